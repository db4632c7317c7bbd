"""What a cloud answers when all goes well: for `--dry_run`, which prints the whole good case and does nothing."""

import json
import re
from typing import Any

from tpu import gcloud, machines
from tpu.gcloud import Words
from tpu.processes import Done
from tpu.settings import Settings

_VERB = re.compile(r"(?:FIRST=(\d+) )?sh \S*/worker\.sh (install|check|start|state|stop)\b ?(\S*)")


class GoodCase:
    """A cloud in which a request is granted at once, and a training that was started has ended when next looked at.

    Args:
      s: of the run.
      there: whether its machine is, in the first zone, before the first command.
      trains: whether its training runs there.
    """

    def __init__(self, s: Settings, *, there: bool, trains: bool = False) -> None:
        self._s, self._hosts = s, machines.of(s.type).hosts if s.type else 0
        self._zones = {s.zones[0]} if there and s.zones else set[str]()
        self._sha, self._attempt = ("0" * 12, 1) if trains else ("", 0)
        self._what = "running" if trains else "absent"

    def __call__(self, words: Words) -> Done:
        """The answer to a command."""
        verb = " ".join(words[3:5])
        zone = next((word.partition("=")[2] for word in words if word.startswith("--zone=")), "")
        if verb == "queued-resources create":
            self._zones.add(zone)
        elif verb in ("queued-resources delete", "tpu-vm delete"):
            self._zones.discard(zone)
            self._what, self._sha, self._attempt = "absent", "", 0
        elif verb == "queued-resources describe" and zone not in self._zones:
            return Done(1, "", f"ERROR: (gcloud.{'.'.join(words[1:5])}) NOT_FOUND: {words[5]} was not found")
        elif verb == "queued-resources describe":
            return _answer(self._request(zone))
        elif verb == "queued-resources list":
            return _answer([self._request(zone)] if zone in self._zones else [])
        elif verb == "tpu-vm list":
            return _answer(self._nodes(zone) if zone in self._zones else [])
        elif verb == "tpu-vm ssh":
            return self._ssh(words)
        return Done(0, "", "")

    def _request(self, zone: str) -> dict[str, Any]:
        specs = [{"nodeId": name, "node": {"acceleratorType": self._s.type}} for name in gcloud.node_names(self._s)]
        return {"name": self._path(zone, "queuedResources", self._s.name), "state": {"state": "ACTIVE"}} | {
            "tpu": {"nodeSpec": specs}
        }

    def _nodes(self, zone: str) -> list[dict[str, str]]:
        holder = self._path(zone, "queuedResources", self._s.name)
        names = gcloud.node_names(self._s)
        return [{"name": self._path(zone, "nodes", name), "state": "READY", "queuedResource": holder} for name in names]

    def _path(self, zone: str, kind: str, name: str) -> str:
        return f"projects/{self._s.project}/locations/{zone}/{kind}/{name}"

    def _ssh(self, words: Words) -> Done:
        """What the workers say: what they were told to do is done."""
        command = next((word for word in words if word.startswith("--command=")), "")
        found = _VERB.search(command)
        if found is None:
            return Done(0, "", "")
        first, verb, word = int(found[1] or 0), found[2], found[3]
        if verb == "install":
            self._sha, self._what = word, "installed" if self._what == "absent" else self._what
        elif verb == "start":
            self._what, self._attempt = "running", int(word)
        elif verb == "stop" and self._what == "running":
            self._what = "ended"
        code = "0" if self._what == "ended" else "-"
        state = f"state {self._what} attempt={self._attempt} code={code} sha={self._sha or '-'}"
        if verb == "state" and self._what == "running" and first + self._hosts == self._hosts * self._s.slices:
            self._what = "ended"
        return Done(0, "".join(f"worker {first + host}: {state}\n" for host in range(self._hosts)), "")


def _answer(document: object) -> Done:
    return Done(0, json.dumps(document), "")
