"""`--profile`: which operations took the time, each counted once, with its place in the model."""

import io
import re
from pathlib import Path

import jax
import pytest
import small
from jax.profiler import ProfileData

from flaxmodels import loop
from flaxmodels.perf import profile
from flaxmodels.registry import UserError

PROGRAM = """HloModule jit_step, entry_computation_layout={()->f32[]}

ENTRY %main {
  %p = f32[8]{0} parameter(0), metadata={op_name="state.params[\\'head\\']"}
  %dot.1 = f32[8]{0} dot(%p, %p), metadata={op_name="jit(step)/jvp(Net)/head/dot_general" stack_frame_id=1}
  %while.2 = f32[8]{0} while(%p), metadata={op_name="jit(step)/transpose(jvp(Net))/blocks/while"}
  ROOT %fusion = f32[8]{0} fusion(%dot.1, %while.2), kind=kLoop
}
"""


def event(kind, start, length, module=1):
    """An event of `length` microseconds."""
    return f"events {{ metadata_id: {kind} offset_ps: {start * 10**6} duration_ps: {length * 10**6} " + (
        f"stats {{ metadata_id: 1 ref_value: {10 + kind} }} stats {{ metadata_id: 2 ref_value: {module} }} }}"
    )


@pytest.fixture
def trace(tmp_path):
    """Two threads: a loop of 100 us that holds a product of 30 us twice; and what is no part of the program."""
    names = {1: "dot.1", 2: "while.2", 3: "fusion", 4: "end: dot.1"}
    kinds = "".join(f'event_metadata {{ key: {k} value {{ id: {k} name: "{n}" }} }}' for k, n in names.items())
    facts = {
        1: "hlo_op",
        2: "hlo_module",
        11: "dot.1",
        12: "while.2",
        13: "fusion",
        14: "dot.1",
        20: "jit_step",
        21: "jit_eval",
    }
    stats = "".join(f'stat_metadata {{ key: {k} value {{ id: {k} name: "{n}" }} }}' for k, n in facts.items())
    one = [event(2, 0, 100, 20), event(1, 10, 30, 20), event(1, 50, 30, 20), event(4, 80, 1, 20), event(3, 100, 5, 20)]
    two = [event(3, 40, 15, 20), event(3, 60, 900, 21), "events { metadata_id: 3 offset_ps: 0 duration_ps: 700 }"]
    lines = "".join(f'lines {{ id: {i} name: "t{i}" {" ".join(events)} }}' for i, events in enumerate((one, two)))
    text = f'planes {{ name: "/host:CPU" {lines} {kinds} {stats} }}'
    file = tmp_path / "vm.xplane.pb"
    file.write_bytes(ProfileData.text_proto_to_serialized_xspace(text))
    return file


def test_each_nanosecond_counts_once(trace):
    found = {o.name: o for o in profile.read(trace, PROGRAM)}
    assert [*found] == ["dot.1", "while.2", "fusion"]
    assert [round(1e6 * o.seconds) for o in found.values()] == [60, 40, 20] and found["dot.1"].runs == 2
    assert (found["dot.1"].module, found["dot.1"].way, found["dot.1"].primitive) == (
        "Net/head",
        "forward",
        "dot_general",
    )
    assert (found["while.2"].module, found["while.2"].way) == ("Net/blocks", "backward")
    assert (found["fusion"].module, found["fusion"].way, found["fusion"].primitive) == ("", "", "")
    assert profile.modules(found.values())[0] == ("Net/head", "forward", pytest.approx(60e-6))


def test_a_compiler_that_tells_nothing_still_gives_a_table(trace):
    found = profile.read(trace, "")
    assert found[0].name == "fusion" and round(1e6 * found[0].seconds) == 920  # whatever ran
    assert {o.module for o in found} == {""}


def test_tables_are_of_one_step(trace):
    said, header, first, *_ = profile.lines(profile.read(trace, PROGRAM), 2)
    assert said.startswith("its operations took 0.060 ms of a step")
    assert header.split() == ["ms/step", "share", "runs/step", "operation", "what", "it", "is"]
    assert first.split() == ["0.030", "50.0%", "1", "dot.1", "forward", "Net/head", "dot_general"]
    many = [profile.Operation(f"fusion.{i}" * 20, "m" * 99, "add", "forward", 1.0, 1) for i in range(40)]
    lines = profile.lines(many, 1)
    assert "  and 28 more" in lines and max(map(len, lines)) < 170
    assert profile.lines([], 1) == ["the trace names no operation of the compiled program"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("jit(several)/while/body/closed_call/jvp(Transformer)/blocks/attention/query/dot_general",
         ("Transformer/blocks/attention/query", "dot_general", "forward")),
        ("jit(step)/transpose(jvp(Net))/checkpoint/rematted_computation/mlp/mul", ("Net/mlp", "mul", "again")),
        ("jit(step)/jvp(Net)/jit(relu)/max", ("Net", "max", "forward")),
        ("jit(step)/add", ("", "add", "")),
        ("state.params['head']['kernel']", ("", "", "")),
        ("", ("", "", "")),
    ],
)  # fmt: skip
def test_the_place_in_the_model_is_read_from_the_name(name, expected):
    assert profile._origin(name) == expected


@pytest.mark.parametrize("span", ["10", "10:", ":5", "a:b", "10:0", "-1:5", "1:2:3", "1:99999999999999999999"])
def test_a_span_is_a_step_and_a_number(span):
    with pytest.raises(UserError, match="expected START:STEPS"):
        profile.asked(span, Path("x"))


def test_a_run_that_ends_before_is_refused(tmp_path):
    assert profile.asked(None, tmp_path) is None
    asked = profile.asked("30:5", tmp_path)
    asked.check(31)
    with pytest.raises(UserError, match="--profile=30:5: the run ends at step 30"):
        asked.check(30)
    assert asked.close() == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("span", "said"), [("5:3", "4 to 8"), pytest.param("18:50", "16 to 20", marks=pytest.mark.nightly)]
)
def test_a_run_says_what_its_steps_did(tmp_path, span, said):
    """Two devices, dispatches of four steps: the same numbers as without, and products of both layers in the table."""
    config = small.config("mlp", train=dict(duration=20, steps_per_dispatch=4))
    devices, stream = jax.devices()[:2], io.StringIO()
    traced = loop.fit(
        config, tmp_path / "a", devices=devices, stream=stream, profiler=profile.asked(span, tmp_path / "a")
    )
    plain = loop.fit(config, tmp_path / "b", devices=devices, stream=io.StringIO())
    assert small.bits(traced.state) == small.bits(plain.state)
    text = stream.getvalue()
    assert f"profile of steps {said}: " in text and len(list((tmp_path / "a/profile").rglob("*.xplane.pb"))) == 1
    for layer in ("hidden_0", "head"):
        assert re.search(rf"(forward|backward) +MLP/{layer}", text), text
