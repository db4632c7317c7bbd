"""Where the seconds of a run go: they add up, and how long the device had nothing to do is told from few looks."""

import math

import pytest

from flaxmodels.runtime.windows import LOOK, PARTS, Spent, Windows


class Clock:
    """A clock that goes only when it is told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def trained(steps, *, data, device, host=0.001, dispatch=0.0005, evaluate_at=(), fed=lambda: (0.0, 0.0)):
    """The windows of a run whose parts last as said, in seconds a step; and how often it waited just to look.

    As in `run.Run`: a dispatch is read when the next one has been handed over.
    """
    clock = Clock()
    windows = Windows(fed, clock)
    looks, free, unread = 0, clock.now, None  # free: when the device has done all that it was given

    def read():
        if unread is not None:
            ended, began = unread
            waited = ended > clock.now
            clock.now = max(ended, clock.now)
            windows.step(windows.ended(began, 1, seen=waited))

    for step in range(steps):
        clock.now += data
        began = windows.spent("data")
        clock.now += dispatch
        free = max(free, began) + device
        windows.spent("dispatch")
        read()
        if windows.unseen():
            looks += 1
            clock.now = max(free, clock.now)
            windows.look(began)
        unread = free, began
        if step in evaluate_at:
            read()
            unread = None
            with windows.during("evaluation"):
                clock.now += 5.0
        clock.now += host
        windows.spent("host")
    return windows, looks, clock.now - 100.0


def test_the_parts_are_all_of_the_time():
    windows, _, seconds = trained(200, data=0.002, device=0.004, evaluate_at=(50, 120))
    whole = windows.whole()
    assert whole.total == pytest.approx(seconds) and whole.evaluation == pytest.approx(10.0)
    assert whole.training == pytest.approx(seconds - 10.0)
    assert (
        whole.data == pytest.approx(0.4) and whole.dispatch == pytest.approx(0.1) and whole.host == pytest.approx(0.2)
    )
    shares = whole.shares()
    assert shares.keys() == {*PARTS, "idle"} and sum(shares[part] for part in PARTS) == pytest.approx(1, abs=1e-3)
    assert windows.close().total == 0  # and counted once


@pytest.mark.parametrize("data", [0.0, 0.01, 0.05, 0.2])
@pytest.mark.parametrize("device", [0.002, 0.02, 0.1])
def test_idle_is_what_the_device_waits(data, device):
    windows, looks, seconds = trained(300, data=data, device=device)
    each = seconds / 300
    whole = windows.whole()
    assert whole.idle == pytest.approx(1 - device / each, abs=0.03)
    assert whole.busy == pytest.approx(300 * device, rel=0.03)
    assert looks <= 1 + seconds / LOOK


def test_a_run_that_keeps_the_device_busy_is_never_held_up():
    _, looks, _ = trained(5000, data=0.0, device=0.01)
    assert looks <= 1  # before anything was seen


def test_a_wait_for_data_is_divided_as_the_feed_says():
    fed = iter([(1.0, 1.0), (4.0, 2.0), (4.0, 2.0)])
    windows, _, _ = trained(100, data=0.02, device=0.001, fed=lambda: next(fed))
    window = windows.close()
    assert (window.data, window.transfer) == (pytest.approx(1.5), pytest.approx(0.5))


def test_speed_leaves_evaluations_out():
    windows, _, _ = trained(101, data=0.0, device=0.01, host=0.0, dispatch=0.0, evaluate_at=(30, 60))
    assert windows.speed() == pytest.approx(100, rel=0.01)
    assert windows.speed() == 0


def test_what_is_not_counted_is_in_no_part():
    clock = Clock()
    windows = Windows(clock=clock)
    clock.now += 1
    with windows.uncounted():
        clock.now += 10
    with pytest.raises(ZeroDivisionError), windows.during("checkpoint"):
        clock.now += 2
        raise ZeroDivisionError
    assert windows.ended(0.0, 2, seen=False) == pytest.approx(0.5)
    assert windows.whole() == Spent(host=1, checkpoint=2, busy=pytest.approx(math.nan, nan_ok=True))


def test_nothing_is_said_of_a_device_that_nobody_saw():
    windows = Windows(clock=Clock())
    assert math.isnan(windows.close().idle) and "idle" not in windows.whole().shares()
