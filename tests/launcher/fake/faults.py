"""What goes wrong, and when, as plan.json says it under "faults": a list of dictionaries.

    {"do": "say", "saying": "capacity", "verb": "queued-resources create", "zone": "a", "times": 2}
    {"do": "say", "saying": "internal", "verb": "queued-resources create", "after": true}  it was done all the same
    {"do": "mute", "worker": 1, "verb": "tpu-vm ssh", "text": "state", "nth": 3}            ssh to this host fails
    {"do": "sleep", "seconds": 2, "verb": "queued-resources describe"}
    {"do": "say", "saying": "bucket", "verb": "storage ls"}             which is of no zone, and no machine's
    {"do": "preempt", "step": 12}                          when a checkpoint of this step or a later one is committed,
    {"do": "kill", "host": 1, "step": 30}                  and the run is under way; hosts of all slices are counted
    {"do": "preempt", "state": "PROVISIONING", "late": 1}  when it is in this state; told a poll later
    {"do": "fail", "saying": "capacity", "state": "WAITING_FOR_RESOURCES"}
    {"do": "preempt", "verb": "tpu-vm ssh", "text": "install"}    as this command comes, or "after" it

A fault of a command happens at the `nth` (1) command that ends with `verb`, in `zone`, with `text` in it, and at those
that follow: `times` (1) in all, 0 for ever. One of a machine happens `times` (1); `notice` sends SIGTERM, and SIGKILL
so many seconds later. Nothing depends on the clock alone.
"""

import json

from fake import hosts, lifecycle, store

OF_COMMANDS = ("say", "mute", "sleep")


def of_command(state, command, words, zone):
    """The faults that happen to this command, which counts as one that they wait for."""
    found = []
    for fault in store.plan().get("faults", []):
        if not _concerns(fault, command, words, zone):
            continue
        seen = state["seen"][_name(fault)] = state["seen"].get(_name(fault), 0) + 1
        first, times = fault.get("nth", 1), fault.get("times", 1)
        if seen >= first and (not times or seen < first + times):
            found.append(fault)
    return found


def _concerns(fault, command, words, zone):
    return (
        ("verb" in fault or fault["do"] in OF_COMMANDS)
        and command.name.endswith(fault.get("verb", ""))
        and fault.get("zone", zone) == zone
        and fault.get("text", "") in " ".join(words)
    )


def waiting(state):
    """Whether a fault waits for a step, which somebody must watch."""
    return any("step" in fault and _due(state, fault) for fault in store.plan().get("faults", []))


def of_machines(state, step):
    """Do to the machines what is due: [(function, arguments) to be called after the state is written]."""
    later = []
    for fault in store.plan().get("faults", []):
        for resource in state["resources"].values() if {"step", "state"} & fault.keys() else ():
            if _due(state, fault) and _happens(fault, resource, step):
                later += do(state, fault, resource)
    return later


def _name(fault):
    return json.dumps(fault, sort_keys=True)


def _due(state, fault):
    times = fault.get("times", 1)
    return not times or state["fired"].get(_name(fault), 0) < times


def _happens(fault, resource, step):
    if fault.get("zone", resource["zone"]) != resource["zone"]:
        return False
    if "state" in fault:
        return resource["state"] == fault["state"]
    return resource["state"] == "ACTIVE" and step >= fault["step"] and hosts.training(resource["uid"])


def do(state, fault, resource):
    """A fault of a machine: the state changes here, and processes die later."""
    state["fired"][_name(fault)] = state["fired"].get(_name(fault), 0) + 1
    if fault["do"] == "preempt":
        lifecycle.taken(resource, fault.get("late", 0))
        return [(hosts.kill, (resource["uid"], "", fault.get("notice", 0)))]
    if fault["do"] == "fail":
        lifecycle.failed(state, resource, fault["saying"])
        return [(hosts.kill, (resource["uid"],))]
    if fault["do"] == "kill":
        each, _ = lifecycle.shape(resource["type"])
        node, worker = divmod(fault["host"], each)
        return [(hosts.kill, (resource["uid"], f"{resource['uid']}/{node}/{worker}"))]
    raise ValueError(f"{fault['do']!r} is nothing that can happen to a machine")
