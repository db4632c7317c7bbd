"""What a process is doing now, and where its seconds went."""

import threading

import pytest

from flaxmodels.runtime import progress


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Seconds that a test may move on; nothing is left of what others did."""
    seconds = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: seconds[0])
    progress.reset()
    yield seconds
    monkeypatch.undo()
    progress.reset()


def test_phases_nest_and_their_seconds_add_up(clock):
    clock[0] += 1
    with progress.phase("training"):
        clock[0] += 2
        with progress.phase("save"):
            assert progress.now().phase == "save"
            clock[0] += 4
        assert progress.now().phase == "training" and progress.now().since == 107
        clock[0] += 8
        assert progress.totals()["training"] == 10
    assert progress.now().phase == ""
    clock[0] += 16
    assert {name: s for name, s in progress.totals().items() if s} == {"start": 17, "training": 10, "save": 4}


def test_the_phase_before_comes_back_after_an_error(clock):
    with pytest.raises(ValueError, match="mine"), progress.phase("training"), progress.phase("data"):
        clock[0] += 1
        raise ValueError("mine")
    assert progress.now().phase == "" and progress.totals()["data"] == 1


def test_beats_and_steps():
    beats = progress.now().beats
    with progress.phase("training"):
        progress.beat()
        progress.beat(7)
        progress.beat()
    assert progress.now().step == 7
    assert progress.now().beats == beats + 5  # beginning and end of a phase move on, too
    assert progress.paces("training") == 3 and progress.paces("evaluation") == 0


def test_a_second_run_starts_anew(clock):
    with progress.phase("training"):
        progress.beat(7)
        clock[0] += 5
        progress.reset()
        clock[0] += 1
        assert progress.now() == progress.Now("training", None, 0, 105)
        assert sum(progress.totals().values()) == progress.totals()["training"] == 1
        assert progress.paces("training") == 0


def test_what_goes_on_in_the_background_is_no_phase():
    def other():
        with progress.phase("save"):
            seen.append(progress.now().phase)

    seen = []
    with progress.phase("training"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    thread = threading.Thread(target=other)  # a fit in a thread of a notebook
    thread.start()
    thread.join()
    assert seen == ["training", "save"] and progress.now().phase == ""


def test_only_known_phases():
    with pytest.raises(ValueError, match="Did you mean 'training'"), progress.phase("trainning"):
        pass
