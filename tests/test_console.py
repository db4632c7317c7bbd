"""What a person sees: number formats, plain lines in a pipe, a live line in a terminal."""

import errno
import io
import math
import re

import pytest

from flaxmodels import console

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Tty(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def tty(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "30")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Tty()


def drawn(display, stream):
    """The text of the live line as rich draws it now."""
    with display._live._lock:  # keeps the refreshing thread out
        start = len(stream.getvalue())
        display._live.refresh()
        return ESCAPE.sub("", stream.getvalue()[start:]).strip("\r\n")


@pytest.mark.parametrize(
    "value, text",
    [
        *[(0, "0"), (7, "7"), (12.345, "12.3"), (999, "999"), (999.6, "1.00k"), (51234, "51.2k")],
        *[(999_999, "1.00M"), (1234567, "1.23M"), (-1234567, "-1.23M"), (5e12, "5.00T"), (7e16, "70000T")],
        *[(math.nan, "nan"), (math.inf, "inf")],
    ],
)
def test_human(value, text):
    assert console.human(value) == text


@pytest.mark.parametrize(
    "value, text", [(0, "0 B"), (512, "512 B"), (1258291, "1.2 MiB"), (1024, "1.0 KiB"), (2**50, "1024.0 TiB")]
)
def test_human_bytes(value, text):
    assert console.human_bytes(value) == text


@pytest.mark.parametrize(
    "value, text",
    [
        *[(0.2, "0s"), (3, "3s"), (59.7, "1m 00s"), (65, "1m 05s"), (3599.9, "1h 00m"), (7380, "2h 03m")],
        *[(273600, "3d 04h"), (math.nan, "-"), (math.inf, "-"), (-1, "0s")],
    ],
)
def test_duration(value, text):
    assert console.duration(value) == text


@pytest.mark.parametrize("value", [0.12345678, 12.5, 9999.7, 123456.0, -3e-7, 1e300, 0.0, math.nan, -math.inf])
def test_a_metric_takes_at_most_ten_characters_and_reads_back_nearly_the_same(value):
    text = console.number(value)
    assert len(text) <= 10
    assert float(text) == pytest.approx(value, rel=5e-3, nan_ok=True)


def test_the_meter_counts_from_its_first_tick_and_only_recent_steps(monkeypatch):
    now = 1000.0  # compilation ended here
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    meter = console.Meter(start_step=40)
    meter.tick(41)
    assert math.isnan(meter.rate())
    for step in range(42, 142):
        now += 10  # a slow start
        meter.tick(step)
    assert meter.rate() == pytest.approx(0.1)
    for step in range(142, 642):
        now += 0.125
        meter.tick(step)
    assert meter.rate() == pytest.approx(8)
    assert meter.seconds_left(642 + 79) == pytest.approx(10)


def test_a_pipe_gets_aligned_plain_lines():
    stream = io.StringIO()
    display = console.open_display(stream, 450, 0, 32)
    display.progress(5, None)
    display.row(5, {"train/loss": 0.12345, "perf/examples_per_second": 51234.0})
    display.row(200, {"train/loss": 12.0, "perf/examples_per_second": 5.0})
    display.row(200, {"eval/accuracy": 0.976})
    assert stream.getvalue().splitlines() == [
        "step   5/450  train/loss 0.1235    perf/examples_per_second 51.2k     eta -",
        "step 200/450  train/loss 12.00     perf/examples_per_second 5         eta -",
        "step 200/450  eval/accuracy 0.9760",
    ]


def test_a_table_in_a_pipe_is_aligned():
    stream = io.StringIO()
    rows = [("a", "1,024"), ("longer", "7")]
    console.open_display(stream, 1, 0, 1).table("title", ("path", "count"), rows, ("total", "1,031"))
    assert stream.getvalue() == "title\n  path    count\n  a       1,024\n  longer      7\n  total   1,031\n"


@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_a_dumb_terminal_is_a_pipe(tty, monkeypatch, term):
    monkeypatch.setenv("TERM", term)
    assert isinstance(console.open_display(tty, 1, 0, 1), console.Pipe)


def test_forced_colors_do_not_reach_a_pipe(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    display = console.open_display(stream, 10, 0, 1)
    display.line("[red]hello[/red]")
    display.table("t", ("a",), [("1",)], ())
    display.row(1, {"eval/loss": 1.0})
    assert "\x1b" not in stream.getvalue()
    assert "[red]hello[/red]" in stream.getvalue()


def test_the_live_line_shows_progress_and_evaluations_stay(tty):
    display = console.open_display(tty, 450, 0, 32)
    try:
        display.progress(1, None)
        display.row(200, {"train/loss": 0.25, "train/accuracy": 0.976})
        display.progress(201, None)
        line = drawn(display, tty)
        assert line.startswith("step 201/450  ━")
        assert "loss 0.2500  accuracy 0.9760" in line
        assert "examples/s  eta" in line
        before = len(tty.getvalue())
        display.row(200, {"train/loss": 0.5})
        assert tty.getvalue()[before:].count("\n") == 0
        display.row(200, {"eval/loss": 0.75})
        assert "step 200/450  eval/loss 0.7500\n" in ESCAPE.sub("", tty.getvalue()[before:])
    finally:
        display.close()
    assert tty.getvalue().rindex("\x1b[?25h") > tty.getvalue().rindex("\x1b[?25l")


def test_the_live_line_fits_any_width(tty):
    display = console.open_display(tty, 450, 0, 32)
    try:
        display.progress(449, {"train/loss": 0.25, "train/accuracy": 0.976})
        display.progress(450, None)
        for width in (200, 100, 79, 60, 40, 25, 12, 5):
            display._console.width = width
            line = drawn(display, tty)
            assert len(line) <= width
            assert "\n" not in line
            assert line.startswith("step 450/450"[: min(width - 1, 12)])
            assert ("loss" in line) == (width >= 40)
    finally:
        display.close()


def test_a_line_that_a_smaller_window_wrapped_is_erased_whole(tty):
    display = console.open_display(tty, 450, 0, 32)
    try:
        display.progress(1, {"train/loss": 0.25})  # drawn 75 characters wide: two rows of 40
        with display._live._lock:  # keeps the refreshing thread out
            display._console.width = 40
            before = len(tty.getvalue())
            display.line("hello")
            assert tty.getvalue()[before:].startswith("\x1b[2K\x1b[1A\r\x1b[2Khello\n")
            before = len(tty.getvalue())
            display.line("again")
            assert tty.getvalue()[before:].startswith("\r\x1b[2Kagain\n")
    finally:
        display.close()


def test_no_color_is_respected(tty, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    display = console.open_display(tty, 450, 0, 32)
    display.progress(10, {"train/loss": 0.25})
    display.table("t", ("a",), [("1",)], ())
    display.close()
    colors = re.findall(r"\x1b\[([0-9;]*)m", tty.getvalue())
    assert not [code for code in colors if re.search(r"(^|;)(3[0-8]|4[0-8]|9\d)", code)]


def test_text_that_looks_like_markup_is_printed_as_it_is(tty):
    display = console.open_display(tty, 450, 0, 32)
    display.line("P[bold](None)  " + "x" * 200)
    assert ESCAPE.sub("", tty.getvalue()) == "P[bold](None)  " + "x" * 200 + "\n"


def test_a_reader_that_left_ends_the_output_not_the_program():
    class Closed(io.StringIO):
        calls = 0

        def write(self, text):
            self.calls += 1
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    stream = Closed()
    display = console.open_display(stream, 10, 0, 1)
    display.line("one")
    display.line("two")
    assert stream.calls == 1


def test_a_full_disk_behind_the_stream_is_waited_out():
    class Full(io.StringIO):
        full = True

        def write(self, text):
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(text)

    stream = Full()
    display = console.open_display(stream, 10, 0, 1)
    display.line("one")
    stream.full = False
    display.line("two")
    assert stream.getvalue() == "two\n"


def test_what_the_stream_cannot_encode_is_escaped():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    console.open_display(stream, 10, 0, 1).line("größer")
    assert raw.getvalue() == b"gr\\xf6\\xdfer\n"
