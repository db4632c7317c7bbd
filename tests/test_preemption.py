"""Notices of a cloud, from a server that answers as that of Google Cloud does."""

import http.server
import signal
import threading
import time
import urllib.parse
from collections import Counter

import pytest

from flaxmodels.runtime import preemption
from flaxmodels.runtime.signals import NOTICE


class Metadata(http.server.ThreadingHTTPServer):
    """Values by key, and how many questions still fail; one whose tag is that of now waits for a change."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.values, self.changed = {"preempted": "FALSE", "maintenance-event": "NONE"}, threading.Condition()
        self.values["upcoming-maintenance"] = "{ }"
        self.asked, self.flavor, self.failures = [], "Google", Counter()

    def set(self, key, value):
        with self.changed:
            self.values[key] = value
            self.changed.notify_all()


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        url = urllib.parse.urlparse(self.path)
        key, words, server = url.path.rpartition("/")[2], dict(urllib.parse.parse_qsl(url.query)), self.server
        with server.changed:
            server.asked.append((url.path, words, self.headers["Metadata-Flavor"]))
            server.failures[key] -= 1
            if server.failures[key] >= 0 or key not in server.values:
                self.send_error(503 if server.failures[key] >= 0 else 404)
                return
            if words.get("wait_for_change"):
                server.changed.wait_for(
                    lambda: urllib.parse.quote(server.values[key]) != words["last_etag"], float(words["timeout_sec"])
                )
            value = server.values[key]
        self.send_response(200)
        self.send_header("Metadata-Flavor", server.flavor)
        self.send_header("ETag", urllib.parse.quote(value))
        self.end_headers()
        self.wfile.write(f"{value}\n".encode())

    def log_message(self, *words):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(preemption, "WAIT", 1.0)
    monkeypatch.setattr(preemption, "PAUSE", 0.01)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # metadata never go through a proxy
    with Metadata() as server:
        monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def heard(server, key):
    """Wait till the value of now was answered and acted on: till the question after the next one comes."""

    def count():
        return sum(path.endswith(f"/{key}") for path, _, _ in server.asked)

    before = count()
    wait_for(lambda: count() >= before + 2)


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


PENDING = """{
  "can_reschedule": "FALSE",
  "latest_window_start_time": "2026-11-22T19:00:01Z",
  "maintenance_status": "PENDING",
  "type": "UNSCHEDULED"
}"""


def waiting(server):
    """The keys whose change is waited for."""
    return {path.rpartition("/")[2] for path, words, _ in list(server.asked) if "last_etag" in words}


@pytest.mark.parametrize(
    ("key", "before", "value"),
    [
        ("preempted", "FALSE", "TRUE"),
        ("maintenance-event", "MIGRATE_ON_HOST_MAINTENANCE", "TERMINATE_ON_HOST_MAINTENANCE"),
        ("upcoming-maintenance", PENDING, PENDING.replace("PENDING", "ONGOING")),
        ("upcoming-maintenance", PENDING, '{"maintenanceStatus":"ONGOING"}'),
    ],
)
def test_a_notice_is_a_signal_with_its_own_words(server, key, before, value):
    came = []
    with preemption.watched(lambda *words: came.append(words)):
        wait_for(lambda: waiting(server) == set(preemption.KEYS))
        server.set(key, before)
        time.sleep(0.05)
        assert came == []
        server.set(key, value)
        wait_for(lambda: came)
    assert came == [(signal.SIGTERM, NOTICE)]
    assert {path for path, _, _ in server.asked} == {f"/computeMetadata/v1/instance/{key}" for key in preemption.KEYS}
    assert all(flavor == "Google" for _, _, flavor in server.asked)


def test_what_was_there_before_we_asked_counts(server):
    server.set("preempted", "TRUE")
    came = []
    with preemption.watched(lambda *words: came.append(words)):
        wait_for(lambda: came)


def test_a_maintenance_that_stands_there_at_the_start_does_not_count(server, monkeypatch):
    """It would stop each start on a machine that came back from it; also where it is said again, in other words."""
    monkeypatch.setattr(preemption, "WAIT", 0.0)
    server.set("upcoming-maintenance", '{"maintenance_status": "ONGOING"}')
    came = []
    with preemption.watched(lambda *words: came.append(words)):
        heard(server, "upcoming-maintenance")
        server.set("upcoming-maintenance", '{"maintenance_status": "ONGOING", "type": "SCHEDULED"}')
        heard(server, "upcoming-maintenance")
        assert came == []
        server.set("upcoming-maintenance", "{}")
        heard(server, "upcoming-maintenance")
        assert came == []
        server.set("upcoming-maintenance", '{"maintenance_status": "ONGOING"}')
        wait_for(lambda: came)
    words = next(words for path, words, _ in server.asked if path.endswith("/upcoming-maintenance"))
    assert words == {"alt": "json", "recursive": "true"}


@pytest.mark.parametrize(
    ("key", "value"), [("preempted", "TRUE"), ("upcoming-maintenance", '{"maintenance_status": "ONGOING"}')]
)
def test_a_server_that_fails_is_asked_again(server, key, value):
    server.failures.update(dict.fromkeys(preemption.KEYS, 2))
    server.set(key, value)
    came = []
    with preemption.watched(lambda *words: came.append(words)):
        wait_for(lambda: came)
    assert server.failures[key] < 0


def test_a_server_that_is_another_one_says_nothing(server):
    server.flavor = "Other"
    server.set("preempted", "TRUE")
    came = []
    with preemption.watched(lambda *words: came.append(words)):
        wait_for(lambda: len(server.asked) > 3)
    assert came == []


def test_a_key_that_it_does_not_know_is_asked_for_once(server):
    del server.values["maintenance-event"]
    with preemption.watched(lambda *words: None):
        wait_for(lambda: waiting(server) == {"preempted", "upcoming-maintenance"})
        time.sleep(0.05)
    assert len([path for path, _, _ in server.asked if path.endswith("maintenance-event")]) == 1


def test_when_it_is_closed_no_notice_counts(server):
    came = []
    with preemption.watched(lambda *words: came.append(words)):
        wait_for(lambda: waiting(server) == set(preemption.KEYS))
    server.set("preempted", "TRUE")
    wait_for(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("notice")])
    assert came == []


def test_elsewhere_nobody_is_asked(monkeypatch, tmp_path):
    monkeypatch.delenv("GCE_METADATA_HOST", raising=False)
    for text, host in [("Standard PC", ""), ("Google Compute Engine\n", "metadata.google.internal"), (None, "")]:
        file = tmp_path / str(len(text or ""))
        if text:
            file.write_text(text)
        monkeypatch.setattr(preemption, "PRODUCT", file)
        assert preemption.host() == host
    with preemption.watched(lambda *words: None):
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("notice")]
