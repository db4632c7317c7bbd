import argparse
from pathlib import Path

import pytest

from tpu import acts, diagnosis, logs
from tpu.acts import Resource
from tpu.gcloud import Cloud
from tpu.meaning import CloudError
from tpu.processes import Done
from tpu.settings import Settings, UserError

END = "launcher: attempt 2 ended with exit code {}, 2026-11-22T10:00:0{}.000Z"


class Told(Cloud):
    """A cloud that answers what it is told to, by a word of the command; and keeps what was said and asked."""

    def __init__(self, answers: dict[str, Done] | None = None) -> None:
        self.said, self.asked, self.answers = [], [], answers or {}
        super().__init__(echo=self.said.append)

    def together(self, commands, *, limit, quiet=False, stream=None):
        self.asked += [" ".join(words) for words in commands]
        found = [self._answer(" ".join(words)) for words in commands]
        for done in found if stream else ():
            for line in done.out.splitlines():
                stream(line)
        return found

    def _answer(self, command: str) -> Done:
        return next((done for word, done in self.answers.items() if word in command), Done(0, "", ""))


@pytest.fixture
def s(tmp_path):
    return Settings(
        "a", project="p", zones=("z",), type="v5litepod-8", bucket=str(tmp_path / "bucket"), state=tmp_path / "state"
    )


@pytest.fixture
def there(monkeypatch):
    """A machine."""
    monkeypatch.setattr(acts, "find", lambda cloud, s: [("z", Resource("ACTIVE", ("a",)))])


@pytest.fixture
def gone(monkeypatch):
    monkeypatch.setattr(acts, "find", lambda cloud, s: [])


def flags(**given):
    return argparse.Namespace(**({"follow": False, "lines": "50"} | given))


def write(folder: Path, texts: dict[int, str]) -> None:
    folder.mkdir(parents=True)
    for number, text in texts.items():
        (folder / f"worker-{number}.log").write_text(text)


SAID = """worker 1: launcher: attempt 2 begins, 2026: python train.py
worker 0: launcher: attempt 2 begins, 2026: python train.py
worker 0: step 1
worker 1: error: no such file 'x'
worker 1: launcher: attempt 2 ended with exit code 1, 2026-11-22T10:00:01.000Z
worker 1: state ended attempt=2 code=1 sha=0123456789ab
worker 0: state running attempt=2 code=- sha=0123456789ab
"""


def test_the_first_error_stands_on_top_of_the_last_lines_of_all(s, there):
    cloud = Told({"worker.sh log": Done(0, SAID, "")})
    assert logs.logs(s, cloud, flags(lines="2")) == 0
    assert cloud.said == [
        "first error, of worker 1:\n  error: no such file 'x'\n",
        "w0 | launcher: attempt 2 begins, 2026: python train.py",
        "w0 | step 1",
        "w1 | error: no such file 'x'",
        "w1 | launcher: attempt 2 ended with exit code 1, 2026-11-22T10:00:01.000Z",
    ]
    copies = s.folder / "logs" / "attempt-2"
    assert (copies / "worker-0.log").read_text().endswith("\nstep 1\n")
    assert logs.newest(cloud, s) == 2


def test_a_worker_that_does_not_answer_keeps_nothing_from_the_others(s, there):
    cloud = Told({"worker.sh log": Done(255, SAID, "ssh: connect to host: Connection refused")})
    assert set(logs.fetch(cloud, s, "z")) == {0, 1}
    assert "Connection refused" in cloud.said[0]


def test_without_a_machine_the_newest_attempt_in_the_bucket_is_shown(s, gone):
    for attempt in (2, 10):
        write(Path(s.workdir, "logs", f"attempt-{attempt}"), {0: f"of {attempt}\n"})
    cloud = Told()
    assert logs.logs(s, cloud, flags()) == 0
    assert cloud.said == ["w0 | of 10"]
    with pytest.raises(CloudError, match="has no machine to follow"):
        logs.logs(s, cloud, flags(follow=True))


def test_a_bucket_is_read_with_gcloud_and_then_the_copies(s, gone, tmp_path):
    s = Settings(**{**vars(s), "bucket": "gs://b"})
    listing = "gs://b/a/logs/attempt-3/\ngs://b/a/logs/attempt-12/\ngs://b/a/logs/host-0000.log\n"
    cloud = Told({"storage ls": Done(0, listing, "")})
    write(s.folder / "logs" / "attempt-12", {1: "copied\n"})
    assert logs.logs(s, cloud, flags()) == 0
    assert cloud.said[-1] == "w1 | copied"
    copies = s.folder / "logs"
    assert cloud.asked[-1] == f"gcloud storage cp --recursive gs://b/a/logs/attempt-12 {copies}"
    empty = Told({"storage ls": Done(1, "", "ERROR: (gcloud.storage.ls) One or more URLs matched no objects.")})
    assert logs.newest(empty, Settings(**{**vars(s), "state": tmp_path / "other"})) == 0
    with pytest.raises(CloudError, match="does not have permission"):
        logs.newest(Told({"storage ls": Done(1, "", "ERROR: HTTPError 403: x does not have permission")}), s)


def test_where_there_is_no_log_all_places_are_named(s, gone):
    with pytest.raises(CloudError, match=r"no log of 'a': not on a machine, in .*bucket/a/logs or in .*state/a/logs"):
        logs.logs(s, Told(), flags())
    with pytest.raises(UserError, match="--lines='-1': expected a number"):
        logs.logs(s, Told(), flags(lines="-1"))


def test_no_lines_are_no_lines():
    assert list(logs.merged({0: "a\nb\n"}, 0)) == [] and list(logs.merged({0: "a\nb\n"}, 1)) == ["w0 | b"]


def test_following_shows_lines_as_they_come_and_tells_the_states(s, there):
    cloud = Told({"worker.sh follow": Done(0, SAID, "")})
    assert logs.logs(s, cloud, flags(follow=True)) == 0
    assert cloud.said[2:4] == ["w0 | step 1", "w1 | error: no such file 'x'"] and len(cloud.said) == 5
    assert logs.follow(cloud, s, "z", 3) == SAID
    assert "worker.sh follow 3" in cloud.asked[-1]


OF_ANOTHER = "error: process 1 (host) failed: out of paper"
OWN = "error: out of paper\nPut paper in."


@pytest.mark.parametrize(
    "texts, expected",
    [
        ({0: "step 1\nstep 2", 1: ""}, None),
        ({0: END.format(0, 1), 1: END.format(143, 1)}, None),
        # Who speaks of another is not the first, whoever ended first.
        ({0: f"{OF_ANOTHER}\n{END.format(1, 1)}", 1: f"{OWN}\n{END.format(1, 2)}"}, f"1 {OWN}"),
        ({0: OF_ANOTHER, 2: OF_ANOTHER}, f"0 {OF_ANOTHER}"),
        # Of those that speak of themselves, who ended first.
        ({0: f"{OWN}\n{END.format(1, 3)}", 1: f"{OWN}\n{END.format(1, 2)}"}, f"1 {OWN}"),
        ({0: f"{OWN}\n{END.format(1, 3)}", 1: OWN}, f"0 {OWN}"),
        ({1: "error: process 1 of 2 could not reach process 0", 0: "error: process 1 did not answer"},
         "1 error: process 1 of 2 could not reach process 0"),
        # The last start is what counts; what it was started again after is history.
        ({0: f"error: old\nsupervisor: restart 1\nerror: new\nsupervisor: gave\n{END.format(1, 1)}"}, "0 error: new"),
        # A traceback is shown to its end, and a worker that was killed without a word by how it ended.
        (
            {3: "step 1\nTraceback (most recent call last):\n  File x\nValueError: no\n" + END.format(1, 1)},
            "3 Traceback (most recent call last):\n  File x\nValueError: no",
        ),
        ({0: OF_ANOTHER, 1: f"step 1\nKilled\n{END.format(137, 1)}"}, "1 Killed"),
        ({0: f"/home/u/flaxmodels/a/worker.sh: 9: exec: trian: not found\n{END.format(127, 1)}"},
         "0 /home/u/flaxmodels/a/worker.sh: 9: exec: trian: not found"),
        ({0: f"step 1\n{END.format(137, 1)}"}, f"0 {END.format(137, 1)}"),
        ({0: "jaxlib.XlaRuntimeError: INTERNAL"}, "0 jaxlib.XlaRuntimeError: INTERNAL"),
        ({0: "W0000: step 3: RESOURCE_EXHAUSTED: 3 GiB"}, "0 W0000: step 3: RESOURCE_EXHAUSTED: 3 GiB"),
    ],
)  # fmt: skip
def test_the_first_error_is_that_of_who_failed(texts, expected):
    found = diagnosis.first_error(texts)
    if expected is None:
        assert found is None
    else:
        number, _, error = expected.partition(" ")
        assert found == "\n".join([f"worker {number}:", *(f"  {line}" for line in error.splitlines())])
