"""The state of a fake cloud: a file, a lock, and a record of every command.

plan.json       what is to happen: "faults" (see faults.py), "polls" (state -> polls that it lasts), "host"
                (variables of each host), "workdir" (where checkpoints are seen: a folder, or gs://...)
state.json      what is
commands.jsonl  a line for each command as it begins, and one as it ends
hosts/          the homes of the hosts
"""

import contextlib
import fcntl
import json
import os
import time
from pathlib import Path

VARIABLE = "FAKE_CLOUD"  # names the folder
EMPTY = {"commands": 0, "machines": 0, "most": 0, "seen": {}, "fired": {}, "resources": {}}
# How many polls a state lasts where the plan says nothing.
POLLS = {
    "ACCEPTED": 1,
    "WAITING_FOR_RESOURCES": 1,
    "PROVISIONING": 1,
    "SUSPENDING": 1,
    "DELETING": 1,
}


def folder():
    """Of the cloud that this process belongs to."""
    return Path(os.environ[VARIABLE])


@contextlib.contextmanager
def opened():
    """The state, nobody else's meanwhile; written when all went well."""
    with (folder() / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        file = folder() / "state.json"
        before = file.read_text() if file.exists() else json.dumps(EMPTY)
        state = json.loads(before)
        yield state
        after = json.dumps(state)
        if after != before:
            (folder() / "state.json.new").write_text(after)
            (folder() / "state.json.new").replace(file)


def plan():
    """What is to happen."""
    file = folder() / "plan.json"
    return json.loads(file.read_text()) if file.exists() else {}


def record(**line):
    """Add a line to commands.jsonl; one write, so that two commands do not mix."""
    with (folder() / "commands.jsonl").open("a") as file:
        file.write(json.dumps({**line, "time": time.time()}) + "\n")


def newest_step():
    """The newest committed checkpoint of the run; 0 where there is none."""
    workdir = plan().get("workdir", "")
    if workdir.startswith("gs://"):
        from fake import storage  # takes a while to import, and few need it

        return max(storage.steps(workdir), default=0)
    found = Path(workdir).glob("checkpoints/*/MANIFEST.json") if workdir else ()
    return max((int(file.parent.name) for file in found if file.parent.name.isdecimal()), default=0)
