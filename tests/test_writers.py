"""What a run leaves behind: metrics.jsonl, TensorBoard events, curves.png, and its lines on the console."""

import io
import json
import math
import os
import pty
import random
import re
import resource
import signal
import struct
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest

from flaxmodels import curves, writers
from flaxmodels.writers import Writers, read_metrics

ROOT = Path(writers.__file__).parents[1]


def make(workdir, start_step=0, total_steps=450, **options):
    stream = options.pop("stream", None) or io.StringIO()
    return Writers(
        workdir, total_steps=total_steps, start_step=start_step, examples_per_step=32, stream=stream, **options
    )


def lines(workdir):
    return (workdir / "metrics.jsonl").read_text().splitlines()


def test_floats_come_back_bit_for_bit(tmp_path):
    seed = 7
    rng = random.Random(seed)
    values = [struct.unpack("<d", rng.randbytes(8))[0] for _ in range(500)]
    values = [v for v in values if math.isfinite(v)] + [0.1, -0.0, 5e-324, 1.7976931348623157e308]
    with make(tmp_path) as w:
        for step, value in enumerate(values):
            w.write(step, {"train/loss": value})
    back = writers.read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["train/loss"].hex()) for row in back] == [(i, v.hex()) for i, v in enumerate(values)]


def test_every_line_is_there_before_the_next(tmp_path):
    with make(tmp_path) as w:
        for step in range(1, 4):
            w.write(step, {"train/loss": 1.0})
            assert len(lines(tmp_path)) == step


def test_nan_and_infinity_are_valid_json_and_come_back(tmp_path):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    values = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.5, "e": 3}
    with make(tmp_path) as w:
        w.write(1, values)
    row = json.loads(lines(tmp_path)[0], parse_constant=refuse)
    assert row == {"step": 1, "a": "NaN", "b": "Infinity", "c": "-Infinity", "d": 1.5, "e": 3}
    assert [repr(v) for v in writers.read_metrics(tmp_path / "metrics.jsonl")[0].values()] == [
        *["1", "nan", "inf", "-inf", "1.5", "3.0"]
    ]


def test_numpy_scalars_are_numbers_too(tmp_path):
    np = pytest.importorskip("numpy")
    with make(tmp_path) as w:
        w.write(1, {"a": np.float32(0.1), "b": np.float64(0.1)})
    assert json.loads(lines(tmp_path)[0]) == {"step": 1, "a": float(np.float32(0.1)), "b": 0.1}


def test_a_restart_drops_what_runs_again_and_a_torn_line(tmp_path):
    with make(tmp_path) as w:
        for step in range(10, 60, 10):
            w.write(step, {"train/loss": 1 / step})
        w.write(40, {"eval/loss": 0.5})
    kept = [line for line in lines(tmp_path) if json.loads(line)["step"] <= 40]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "train/lo')
    with make(tmp_path, start_step=40) as w:
        assert lines(tmp_path) == kept
        w.write(50, {"train/loss": 1 / 50})
    assert [json.loads(line)["step"] for line in lines(tmp_path)] == [10, 20, 30, 40, 40, 50]
    assert {p.name for p in tmp_path.iterdir()} <= {"metrics.jsonl", "tensorboard"}


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": 1.0}\n{"step": 2, "a": 2.0}')
    with make(tmp_path, start_step=2) as w:
        w.write(3, {"a": 3.0})
    assert [row["step"] for row in writers.read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_a_failed_rewind_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text(old := '{"step": 1, "a": 1.0}\n{"step": 9, "a": 2.0}\n')

    def fail(fd):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space"):
            writers.rewind(path, 1)
        assert path.read_text() == old
        assert list(tmp_path.iterdir()) == [path]
        w = make(tmp_path, start_step=1)
        w.write(2, {"a": 5.0})
        assert path.read_text() == old
    w.write(3, {"a": 6.0})
    w.close()
    assert [row["step"] for row in writers.read_metrics(path)] == [1, 2, 3]


def test_disabled_writes_nothing(tmp_path):
    stream = io.StringIO()
    with make(tmp_path / "none", stream=stream, enabled=False) as w:
        w.note("hello")
        w.parameter_table([("a", (1,), "float32", "P()", 1, 4)])
        w.progress(1)
        w.write(1, {"train/loss": 1.0})
        w.final({"eval/loss": 1.0}, 1.0)
    assert stream.getvalue() == ""
    assert list(tmp_path.iterdir()) == []


def test_close_twice_and_calls_after_it_do_nothing(tmp_path):
    w = make(tmp_path)
    w.write(1, {"train/loss": 1.0})
    w.close()
    w.close()
    w.write(2, {"train/loss": 1.0})
    assert len(lines(tmp_path)) == 1


def test_a_full_disk_gives_one_warning_and_loses_nothing(tmp_path):
    stream = io.StringIO()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with make(tmp_path, stream=stream) as w:
        w.write(1, {"train/loss": 0.5})
        # The kernel takes what fits below the limit and then refuses, as a full disk does: a line gets torn.
        resource.setrlimit(resource.RLIMIT_FSIZE, (80, hard))
        try:
            for step in range(2, 30):
                w.write(step, {"train/loss": 0.5})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert (tmp_path / "metrics.jsonl").stat().st_size == 80
        w.write(30, {"train/loss": 0.5})
    assert len(re.findall("warning: .*metrics.jsonl", stream.getvalue())) == 1
    assert [row["step"] for row in writers.read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 31))


def test_lines_that_never_found_room_are_counted(tmp_path, monkeypatch):
    stream = io.StringIO()
    w = make(tmp_path, stream=stream)

    def fail(fd, data):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fail)
        w.write(1, {"train/loss": 0.5})
        w.write(2, {"train/loss": 0.5})
        w.close()
    assert "room for the last 2 lines" in stream.getvalue()


def test_final_prints_best_and_last_of_the_whole_history_and_draws(tmp_path):
    with make(tmp_path, total_steps=20) as w:
        w.write(10, {"train/loss": 2.0, "train/accuracy": 0.5, "optim/learning_rate": 0.1})
        w.write(10, {"eval/loss": 1.0, "eval/accuracy": 0.75})
    stream = io.StringIO()
    with make(tmp_path, total_steps=20, start_step=10, stream=stream) as w:
        w.write(20, {"train/loss": math.nan, "train/accuracy": 0.625, "optim/learning_rate": 0.05})
        w.final({"eval/accuracy": 0.5}, seconds=65)
    out = stream.getvalue()
    assert "10 steps in 1m 05s, ended at step 20" in out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if "/" in line.split()[0]}
    assert rows["eval/accuracy"] == ["0.5000", "0.7500", "10"]
    assert rows["train/loss"] == ["nan", "2.000", "10"]
    assert rows["train/accuracy"] == ["0.6250", "0.6250", "20"]
    assert "optim/learning_rate" not in rows
    image = pytest.importorskip("PIL.Image").open(tmp_path / "curves.png").convert("RGB")
    assert image.size == (1200, 400)
    present = {color for _, color in image.getcolors(1 << 20)}
    wanted = [tuple(bytes.fromhex(c[1:])) for c in (curves.COLORS["train"], curves.COLORS["eval"], curves.GREY)]
    assert set(wanted) <= present


def test_curves_touch_no_global_state_and_draw_an_empty_history(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    before, filters = matplotlib.get_backend(auto_select=False), list(warnings.filters)
    curves.draw([], tmp_path / "empty.png")
    curves.draw([{"step": 1, "train/loss": 1.0}], tmp_path / "one.png")
    assert matplotlib.get_backend(auto_select=False) == before
    assert warnings.filters == filters
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty.png", "one.png"]


def test_a_picture_that_cannot_be_drawn_is_one_warning(tmp_path):
    stream = io.StringIO()
    (tmp_path / "curves.png").mkdir()
    with make(tmp_path, stream=stream) as w:
        w.write(1, {"train/loss": 1.0})
        w.final({}, 1.0)
    assert "warning: curves.png was not drawn" in stream.getvalue()


def test_the_main_metric_is_accuracy_then_perplexity_then_any_other():
    assert curves.main_metric([{"train/perplexity": 1, "eval/accuracy": 1, "train/loss": 1}]) == "accuracy"
    assert curves.main_metric([{"train/perplexity": 1, "train/aaa": 1}]) == "perplexity"
    assert curves.main_metric([{"train/bleu": 1, "train/loss": 1, "perf/x": 1}]) == "bleu"
    assert curves.main_metric([{"train/loss": 1}]) == ""


def test_the_parameter_table_has_every_row_and_the_total(tmp_path):
    stream = io.StringIO()
    rows = [(f"layer_{i}/kernel", (3, 4), "float32", "P('fsdp', None)", 12, 48) for i in range(40)]
    with make(tmp_path, stream=stream) as w:
        w.parameter_table(rows)
    out = stream.getvalue()
    assert all(f"layer_{i}/kernel" in out for i in range(40))
    assert re.search(r"total +480 +1\.9 KiB", out)


@pytest.mark.parametrize(
    "paths, first",
    [
        ([f"block_{i}/mlp/{n}" for i in range(30) for n in "abc"], "block_0/mlp/..."),
        ([f"block_{i}/mlp/{n}" for i in range(96) for n in "abc"], "block_*/mlp/a"),
        ([chr(97 + i) + chr(97 + j) + "/x" for i in range(20) for j in range(20)], "aa/..."),
    ],
)
def test_a_long_parameter_table_is_grouped_and_keeps_its_total(paths, first):
    rows = [(path, (i + 1,), "float32", "P()", i + 1, 4 * (i + 1)) for i, path in enumerate(paths)]
    groups = writers.grouped(rows)
    assert 1 < len(groups) <= 40
    assert groups[0][0] == first
    assert sum(g[4] for g in groups) == sum(r[4] for r in rows)
    assert sum(g[5] for g in groups) == sum(r[5] for r in rows)


def test_grouped_rows_say_how_many_and_what_differs():
    rows = [(f"b/{i}", (2, i), "float32", "P()", 1, 4) for i in range(50)]
    assert writers.grouped(rows) == [("b/...", "50 x various", "float32", "P()", 50, 200)]
    assert writers.grouped([]) == []


def read_events(folder):
    from tensorboardX.proto import event_pb2

    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            yield event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def test_tensorboard_gets_every_scalar_and_the_purge_step(tmp_path):
    pytest.importorskip("tensorboardX", reason="the extra `logging` is not installed")
    with make(tmp_path, start_step=40) as w:
        w.write(50, {"train/loss": 0.25, "train/accuracy": math.nan})
        events = list(read_events(tmp_path / "tensorboard"))  # there already: each row is flushed
    assert [e.step for e in events if e.HasField("session_log")] == [41]
    scalars = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
    assert scalars[0] == (50, "train/loss", 0.25)
    assert scalars[1][1] == "train/accuracy" and math.isnan(scalars[1][2])


def test_tensorboard_on_a_full_disk_gives_one_warning_and_goes_on_later(tmp_path):
    pytest.importorskip("tensorboardX", reason="the extra `logging` is not installed")
    stream = io.StringIO()
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    with make(tmp_path, stream=stream) as w:
        for step in range(1, 51):
            w.write(step, {"train/loss": 1.0})
        (tmp_path / "tensorboard").unlink()
    assert len(re.findall("warning: .*tensorboard", stream.getvalue())) == 1
    assert len(lines(tmp_path)) == 50
    events = read_events(tmp_path / "tensorboard")
    assert [e.step for e in events if e.HasField("summary")] == list(range(1, 51))


def test_without_tensorboard_everything_else_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    stream = io.StringIO()
    with make(tmp_path, stream=stream) as w:
        w.write(1, {"train/loss": 1.0})
    assert "warning" not in stream.getvalue()
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


SCRIPT = """
import sys, time
from pathlib import Path
from flaxmodels.writers import Writers, read_metrics
w = Writers(Path(sys.argv[1]), total_steps=50, start_step=0, examples_per_step=8)
w.note("mesh: data=8")
for step in range(1, 51):
    w.progress(step)
    w.write(step, {"train/loss": 1.0 / step})
    if step == 25:
        print("someone else's print")
        END
w.final({}, 1.0)
"""


def start(workdir, end, stdout, **env):
    script = textwrap.dedent(SCRIPT).replace("END", end)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error", "TERM": "xterm-256color", **env}
    return subprocess.Popen(
        [sys.executable, "-c", script, str(workdir)],
        **{"stdin": stdout, "stdout": stdout, "stderr": subprocess.PIPE, "env": env},
    )


def read_all(fd):
    out = b""
    while True:
        try:
            part = os.read(fd, 65536)
        except OSError:  # Linux says EIO where the other side of a terminal is closed
            part = b""
        if not part:
            return out.decode()
        out += part


def test_a_closed_pipe_does_not_stop_the_run_nor_change_its_exit_code(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    process = start(tmp_path, "pass", writer)
    os.close(writer)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, b"")
    assert len(lines(tmp_path)) == 50
    assert (tmp_path / "curves.png").exists()


@pytest.mark.parametrize(
    "end, code",
    [
        ("pass", 0),
        ("raise RuntimeError('boom')", 1),
        # Where pytest runs in the background of a shell, SIGINT is ignored, and children inherit that.
        (
            "import os, signal; signal.signal(2, signal.default_int_handler); os.kill(os.getpid(), signal.SIGINT)",
            -signal.SIGINT,
        ),
    ],
)
def test_a_terminal_gets_its_cursor_back_however_the_run_ends(tmp_path, end, code):
    outer, inner = pty.openpty()
    process = start(tmp_path, end, inner)
    os.close(inner)
    out = read_all(outer)
    os.close(outer)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert out.count("\x1b[?25l") == 1
    assert out.rindex("\x1b[?25h") > out.rindex("\x1b[?25l")
    assert re.search(r"(^|\n|\r|K)someone else's print\r\n", out)
    assert "mesh: data=8" in out
    assert (b"RuntimeError: boom" in errors) == (code == 1)


def test_a_row_of_the_restored_step_is_not_logged_again(tmp_path):
    """A process that is killed after an evaluation and before the next save makes that evaluation again."""
    options = {"total_steps": 10, "examples_per_step": 1, "stream": io.StringIO()}
    with Writers(tmp_path, start_step=0, **options) as writers:
        writers.write(4, {"train/loss": 1.0})
        writers.write(4, {"eval/loss": 2.0})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with Writers(tmp_path, start_step=4, **options) as writers:
        writers.write(4, {"eval/loss": 2.0})
        assert (tmp_path / "metrics.jsonl").read_bytes() == before
        writers.write(4, {"eval/accuracy": 0.5})
        writers.write(5, {"eval/loss": 3.0})
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [4, 4, 4, 5]
