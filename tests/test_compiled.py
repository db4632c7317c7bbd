"""What is read from the text of a compiled program, and reported of a compiled step."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from flaxmodels import job
from flaxmodels.perf import compiled, hlo
from flaxmodels.perf.collectives import TRANSFER, collectives
from flaxmodels.sharding import make_mesh

PROGRAM = """HloModule jit_step, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}
BODIES
ENTRY %main (x: f32[16,4]) -> f32[16,4] {
  %x = f32[16,4]{1,0:T(8,128)S(1)} parameter(0), metadata={op_name="jit(f)/(x)"}
LINES
  ROOT %end = f32[16,4] copy(%x)
}
"""


def read(*lines, bodies=""):
    text = PROGRAM.replace("LINES", "\n".join(f"  {line}" for line in lines)).replace("BODIES", bodies)
    found, notes = collectives(text)
    return [(one.kind, one.count, one.bytes, one.groups) for one in found], notes


EIGHT = (tuple(range(8)),)
HALVES, PAIRS = ((0, 1, 2, 3), (4, 5, 6, 7)), ((0, 4), (1, 5), (2, 6), (3, 7))


@pytest.mark.parametrize(
    ("spelling", "groups"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", HALVES),
        ("replica_groups={}", EIGHT),
        ("replica_groups=[2,4]<=[8]", HALVES),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", PAIRS),
        ("replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}", EIGHT),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", HALVES),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", PAIRS),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}", EIGHT),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(2)4}", HALVES),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(1)2}", PAIRS),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_1'}", PAIRS),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=(0,4,1,5,2,6,3,7) {'axis_1'}", PAIRS),
        ("replica_groups=of_a_kind_to_come", ()),
    ],
)
def test_groups_in_every_spelling(spelling, groups):
    (found,), _ = read(f"%r = f32[16,4] all-reduce(%x), channel_id=1, {spelling}, to_apply=%add")
    assert found == ("all-reduce", 1, 256, groups)


def test_bytes_are_those_of_the_whole_buffer():
    rows, notes = read(
        "%g = f32[64,4] all-gather(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}",
        "%s = f32[4,4] reduce-scatter(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, to_apply=%add",
        "%h = bf16[3]{0:T(1024)(128)(2,1)} convert(%x)",
        "%t = (f32[16,4]{1,0}, bf16[3]{0:T(1024)(128)(2,1)}) all-reduce(%x, %h), replica_groups={}, to_apply=%add",
        "%a = f32[16,4] all-to-all(%x), replica_groups={}, dimensions={0}",
    )
    assert not notes and [(kind, size) for kind, _, size, _ in rows] == [
        ("all-gather", 4 * 256), ("reduce-scatter", 256), ("all-reduce", 256 + 6), ("all-to-all", 256),
    ]  # fmt: skip


def test_an_operation_in_two_parts_counts_once():
    rows, _ = read(
        "%b = (f32[16,4]{1,0}, f32[128,4]{1,0}) all-gather-start(%x), replica_groups={}, dimensions={0}",
        "%c = f32[128,4] all-gather-done(%b)",
        "%p = (f32[16,4], f32[16,4], u32[]) collective-permute-start(%x), source_target_pairs={{0,1},{1,0},{5,6}}",
        "%q = f32[16,4] collective-permute-done(%p)",
        "%s = ((f32[16,4]), f32[2,4], u32[]) async-start(%x), calls=%wrapped",
        "%u = ((f32[16,4]), f32[2,4], u32[]) async-update(%s), calls=%wrapped",
        "%d = f32[2,4] async-done(%u), calls=%wrapped",
        bodies="""
%wrapped (y: f32[16,4]) -> f32[2,4] {
  %y = f32[16,4] parameter(0)
  ROOT %r = f32[2,4] reduce-scatter(%y), replica_groups={}, dimensions={0}, to_apply=%add
}
""",
    )
    assert rows == [
        ("all-gather", 1, 8 * 256, EIGHT),
        ("collective-permute", 1, 256, ((0, 1), (5, 6))),
        ("reduce-scatter", 1, 256, EIGHT),
    ]


def test_a_collective_in_pieces_between_other_work_counts_once():
    """As libtpu writes them: each piece is a fusion that has the whole operation inside, with one channel."""
    bodies = "".join(
        f"""
%piece.{i} (y: f32[16,4]) -> f32[128,4] {{
  %y = f32[16,4] parameter(0)
  ROOT %g = f32[128,4] all-gather(%y), channel_id={channel}, replica_groups={{}}, dimensions={{0}}
}}
"""
        for i, channel in enumerate((7, 7, 7, 9))
    )
    lines = [f"%f.{i} = f32[128,4] fusion(%x), kind=kCustom, calls=%piece.{i}" for i in range(4)]
    assert read(*lines, bodies=bodies)[0] == [("all-gather", 1, 2048, EIGHT)] * 2


def test_transfers_between_slices():
    rows, _ = read(
        "%k = token[] after-all()",
        "%s = (f32[16,4], u32[], token[]) send(%x, %k), channel_id=3, is_host_transfer=true",
        "%d = token[] send-done(%s), channel_id=3, is_host_transfer=true",
    )
    assert rows == [(TRANSFER, 1, 256, ())]


LOOP = """
%inner (p: (s32[], f32[16,4])) -> (s32[], f32[16,4]) {
  %p = (s32[], f32[16,4]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %y = f32[16,4] get-tuple-element(%p), index=1
  %one = s32[]{:T(128)} constant(STEP)
  %copied = s32[] copy(%i)
  %next = s32[] add(%copied, %one)
  %r = f32[16,4] all-reduce(%y), replica_groups={}, to_apply=%add
  ROOT %out = (s32[], f32[16,4]) tuple(%next, %r)
}

%until (p: (s32[], f32[16,4])) -> pred[] {
  %p = (s32[], f32[16,4]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %last = s32[] constant(12), metadata={op_name="a (b)"}
  ROOT %lt = pred[] compare(%i, %last), direction=DIRECTION
}
"""
START = "%zero = s32[] constant(START)"
INTO = "%t = (s32[], /*index=1*/f32[16,4]) tuple(%zero, %x)"
WHILE = "%w = (s32[], f32[16,4]) while(%t), condition=%until, body=%inner"


@pytest.mark.parametrize(
    ("start", "step", "direction", "turns"),
    [("0", "1", "LT", 12), ("0", "2", "LT", 6), ("1", "2", "LT", 6), ("4", "1", "LE", 9), ("12", "1", "LT", 0)],
)
def test_what_is_in_a_loop_counts_as_often_as_it_turns(start, step, direction, turns):
    bodies = LOOP.replace("STEP", step).replace("DIRECTION", direction)
    assert read(START.replace("START", start), INTO, WHILE, bodies=bodies) == ([("all-reduce", turns, 256, EIGHT)], [])


def test_a_loop_in_a_loop():
    inner = LOOP.replace("STEP", "2").replace("DIRECTION", "LT")
    outer = inner.replace("%inner", "%outer").replace("%until", "%end").replace("constant(2)", "constant(4)")
    outer = outer.replace(
        "%r = f32[16,4] all-reduce(%y), replica_groups={}, to_apply=%add",
        f"{START.replace('START', '0')}\n  {INTO.replace('%x', '%y')}\n  {WHILE}\n"
        "  %r = f32[16,4] get-tuple-element(%w), index=1",
    )
    around = WHILE.replace("%inner", "%outer").replace("%until", "%end")
    rows, _ = read(START.replace("START", "0"), INTO, around, bodies=inner + outer)
    assert rows == [("all-reduce", 6 * 3, 256, EIGHT)]


def test_a_loop_whose_length_xla_notes():
    noted = WHILE + ', backend_config={"known_trip_count":{"n":"5"},"known_init_step":{"init":"0","step":"1"}}'
    assert read(INTO.replace("%zero", "%x"), noted, bodies=LOOP)[0] == [("all-reduce", 5, 256, EIGHT)]


def test_a_loop_of_unknown_length_is_one_turn_and_says_so():
    bodies = LOOP.replace("STEP", "1").replace("DIRECTION", "LT").replace("constant(12)", "parameter(1)")
    rows, notes = read(START.replace("START", "0"), INTO, WHILE, bodies=bodies)
    assert rows == [("all-reduce", 1, 256, EIGHT)] and "counts as one turn" in notes[0]
    silent = bodies.replace("all-reduce(%y)", "negate(%y)")
    assert read(START.replace("START", "0"), INTO, WHILE, bodies=silent) == ([], [])


def test_of_a_conditional_all_branches_count():
    bodies = "".join(
        f"""
%branch.{i} (y: f32[16,4]) -> f32[16,4] {{
  %y = f32[16,4] parameter(0)
  ROOT %r = f32[16,4] all-reduce(%y), replica_groups={{}}, to_apply=%add
}}
"""
        for i in range(2)
    )
    rows, notes = read(
        "%c = f32[16,4] conditional(%n, %x, %x), branch_computations={%branch.0, %branch.1}", bodies=bodies
    )
    assert len(rows) == 2 and notes == ["of a conditional all branches are counted"]


def test_what_is_no_program():
    with pytest.raises(ValueError, match="no ENTRY"):
        collectives("")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("f32[]", 4),
        ("pred[3]", 3),
        ("(bf16[2,3]{1,0}, s8[5], token[])", 17),
        ("s4[8]{0:T(8)E(4)}", 4),
        ("f8e4m3fn[6]", 6),
    ],
)
def test_sizes(text, size):
    assert hlo.size_of(text) == size


# Programs that were compiled here


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(data=2, fsdp=2, tensor=2)


def program(function, mesh, *specs, shape=(16, 8)):
    places = [NamedSharding(mesh, spec) for spec in specs]
    mapped = jax.shard_map(function, mesh=mesh, in_specs=specs[0], out_specs=specs[1], check_vma=False)
    return jax.jit(mapped).lower(jax.ShapeDtypeStruct(shape, jnp.float32, sharding=places[0])).compile()


@pytest.mark.parametrize("axes", [("data",), ("fsdp",), ("tensor",), ("data", "fsdp"), ("data", "tensor")])
def test_the_axes_of_a_collective(mesh, axes):
    found = program(lambda x: jax.lax.psum(x, axes), mesh, P(axes), P())
    rows, notes = compiled._collectives(found, mesh)
    (row,) = rows
    assert (row.kind, row.axes, row.whole, row.count) == ("all-reduce", axes, True, 1) and not notes
    assert row.bytes == 16 * 8 * 4 // 2 ** len(axes)


def test_loops_and_permutes_of_a_program(mesh):
    def turn(x):
        shift = [(0, 1), (1, 0)]
        return jax.lax.fori_loop(0, 5, lambda _, y: jax.lax.ppermute(y, "fsdp", shift), x)

    (row,), _ = compiled._collectives(program(turn, mesh, P("fsdp"), P("fsdp")), mesh)
    assert (row.kind, row.axes, row.count, row.bytes) == ("collective-permute", ("fsdp",), 5, 5 * 8 * 8 * 4)


def test_groups_of_a_part_of_an_axis():
    line = make_mesh(data=8)
    assert compiled.along(HALVES, line) == (("data",), False)
    assert compiled.along(EIGHT, line) == (("data",), True)
    assert compiled.along(((0,), (1,)), line) == ((), True)


def test_a_text_that_can_not_be_read(mesh):
    class Silent:
        def as_text(self):
            raise NotImplementedError("no text")

    rows, (note,) = compiled._collectives(Silent(), mesh)
    assert rows == () and "can't be told" in note and "no text" in note


@pytest.fixture(scope="module")
def reported():
    """An MLP on 2 x 4 devices, its parameters sharded."""
    made = job.assemble(small.config("mlp", mesh=dict(fsdp=4)) | {"model": dict(name="mlp", hidden=(128,))})
    found, seconds = compiled.compile_program(made.lower_train()[0], made.mesh)
    assert seconds > 0
    return made, compiled.report(found, made)


def test_memory_by_class(reported):
    made, report = reported
    memory = report.memory
    state = made.fresh()

    def held(tree):
        return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))

    assert memory.parameters == held(state.params) > 0
    assert memory.optimizer == held(state.opt_state) > 0
    assert memory.other == 4
    assert memory.data == held(made.train.every) > 0
    assert memory.batch == held(next(made.train.dispatches(0, [(0, 1)], 1))["each"]) + 8
    assert memory.state_is_donated and memory.donated >= memory.state
    assert memory.limit is None and memory.peak >= memory.state + memory.data
    whole = sum(x.nbytes for x in jax.tree.leaves(state.params))
    assert whole / 4 <= memory.parameters < 0.3 * whole


def test_fsdp_gathers_parameters(reported):
    _, report = reported
    kinds = {(row.kind, row.axes) for row in report.collectives}
    assert ("all-gather", ("fsdp",)) in kinds and any(kind == "all-reduce" for kind, _ in kinds)


def test_the_report_in_lines(reported):
    _, report = reported
    text = "\n".join(report.lines())
    assert text.startswith("8 x cpu: data=2, fsdp=4; bytes of one device\n")
    for words in ("parameters ", "optimizer state ", "temporaries ", "is donated: one copy", r"all-gather .* x  along"):
        assert re.search(words, text), words
    assert max(map(len, report.lines())) <= 100


def test_a_state_that_is_not_donated_is_seen(reported):
    made, _ = reported
    undonated = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state)).lower(made.abstract).compile()
    report = compiled.report(undonated, made)
    assert not report.memory.state_is_donated and "NOT donated" in "\n".join(report.lines())


@pytest.mark.parametrize(
    ("said", "needed", "limit"),
    [
        ("total memory required (120.13G) exceeds available HBM (15.75G).", 120.13, 15.75),
        ("Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded ...", 20.5, 15.75),
        ("out of memory, somehow", None, None),
    ],
)
def test_a_program_that_does_not_fit(mesh, said, needed, limit):
    class Large:
        def compile(self):
            raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {said}")

    with pytest.raises(compiled.DoesNotFitError, match=r"8 x cpu.*\n.*mesh.fsdp") as caught:
        compiled.compile_program(Large(), mesh)
    gib = 2**30
    assert caught.value.needed == (needed and int(needed * gib)) and caught.value.limit == (limit and int(limit * gib))
    assert (f"{needed:.1f} GiB" if needed else "somehow") in str(caught.value)


def test_other_errors_of_the_compiler_pass(mesh):
    class Broken:
        def compile(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        compiled.compile_program(Broken(), mesh)


def test_positions_are_those_of_the_mesh():
    """Groups are positions in the mesh, not ids of devices: a mesh may be in any order."""
    devices = np.roll(jax.devices(), 3).tolist()
    turned = make_mesh(data=4, fsdp=2, devices=devices)
    (row,), _ = compiled._collectives(program(lambda x: jax.lax.psum(x, "fsdp"), turned, P("fsdp"), P()), turned)
    assert row.axes == ("fsdp",)
