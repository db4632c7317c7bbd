"""The fake cloud's `gcloud`: reads its words as the real one does, lets happen what the plan says, and answers."""

import json
import sys
import time

from fake import documented, faults, hosts, lifecycle, sayings, store


class RefusedError(Exception):
    """The service says no: what it says, to stderr, with exit code 1."""


def main(words):
    """Run one command; its exit code."""
    with store.opened() as state:
        state["commands"] += 1
        number = state["commands"]
        store.record(number=number, words=["gcloud", *words])
    code = 1
    try:
        code = _run(number, words)
    except documented.UsageError as error:
        print(f"ERROR: {error}", file=sys.stderr)
        code = 2
    except RefusedError as error:
        print(error, file=sys.stderr)
    finally:
        sys.stdout.flush()
        store.record(number=number, code=code)
    return code


def _run(number, words):
    command = documented.parse(words)
    if command.name.startswith("storage "):
        return _storage(command, number, words)
    zone, project = command.flags.get("--zone", ""), command.flags.get("--project", "")
    if not zone or not project:  # gcloud takes them from its configuration; the launcher must not rely on that
        missing = "--zone" if not zone else "--project"
        raise documented.UsageError(f"({command.dotted}) argument {missing}: Must be specified.")
    kind = "nodes" if "tpu-vm" in command.name else "queuedResources"
    name = command.words[-1].partition(":")[0].rpartition("@")[2] if command.words else ""
    fields = {"command": command.dotted, "project": project, "zone": zone, "name": name, "number": number, "kind": kind}
    fields["type"] = command.flags.get("--accelerator-type")
    mine = _met(command, words, fields)
    _befall(fields, [fault for fault in mine if not fault.get("after")])
    silent = {fault["worker"] for fault in mine if fault["do"] == "mute"}
    code, output = VERBS[command.name.removeprefix("compute tpus ")](command, fields, silent)
    _befall(fields, [fault for fault in mine if fault.get("after")])
    _speak(mine, fields, after=True)
    if output is not None:
        _print(command, output)
    return code


def _storage(command, number, words):
    """A command on buckets: it is of no zone, and of all faults only `say` and `sleep` happen to it."""
    from fake import storage  # takes a while to import, and most commands need none

    bucket = command.words[-1].removeprefix(storage.SCHEME).partition("/")[0] if command.words else ""
    fields = dict.fromkeys(("project", "zone", "kind", "type"), "")
    fields |= {"command": command.dotted, "name": bucket, "number": number}
    mine = _met(command, words, fields)
    try:
        code = storage.run(command)
    except storage.StorageError as error:
        raise RefusedError(f"ERROR: ({command.dotted}) {error}") from error
    _speak(mine, fields, after=True)
    return code


def _met(command, words, fields):
    """The faults that happen to a command; it waits, and is refused, where they say so."""
    with store.opened() as state:
        mine = faults.of_command(state, command, words, fields["zone"])
    for fault in mine:
        time.sleep(fault.get("seconds", 0))
    _speak(mine, fields, after=False)
    return mine


def _speak(mine, fields, *, after):
    for fault in mine:
        if fault["do"] == "say" and bool(fault.get("after")) == after:
            raise RefusedError(sayings.said(fault["saying"], **fields))


def _befall(fields, mine):
    """Faults of machines: those that this command brings to its own, and those that are due on any."""
    with store.opened() as state:
        here = [one for one in state["resources"].values() if one["zone"] == fields["zone"]]
        concerned = [one for one in here if fields["name"] in (one["name"], *(node["id"] for node in one["nodes"]))]
        events = [fault for fault in mine if fault["do"] not in faults.OF_COMMANDS]
        later = [act for resource in concerned for fault in events for act in faults.do(state, fault, resource)]
        later += faults.of_machines(state, store.newest_step())
        watched = [one for one in state["resources"].values() if one["state"] == "ACTIVE" and faults.waiting(state)]
    for function, arguments in later:
        function(*arguments)
    for resource in watched:
        hosts.watched(resource)


def _print(command, output):
    form = command.flags.get("--format", "json")
    if form == "json":
        print(json.dumps(output, indent=2))
    elif form.startswith("value(") and form.endswith(")"):
        for one in output if isinstance(output, list) else [output]:
            print("\t".join(str(_field(one, path)) for path in form[6:-1].split(",")))
    else:
        raise documented.UsageError(f"({command.dotted}) the fake cloud does not know the format {form!r}")


def _field(document, path):
    for key in path.split("."):
        document = document.get(key, "") if isinstance(document, dict) else ""
    return document


def _create(command, fields, silent):
    name, zone, project = fields["name"], fields["zone"], fields["project"]
    if not lifecycle.NAME.fullmatch(name):
        raise RefusedError(
            f"ERROR: ({command.dotted}) INVALID_ARGUMENT: {name!r} is no valid name of a queued resource."
        )
    if lifecycle.shape(fields["type"]) is None:
        raise RefusedError(sayings.said("unknown type", **fields))
    with store.opened() as state:
        if f"{zone}/{name}" in state["resources"]:
            raise RefusedError(sayings.said("exists", **fields))
        lifecycle.create(state, command.flags, name, project, zone)
    print(f"Create request issued for: [{name}]", file=sys.stderr)
    if "--async" not in command.flags:
        print(f"Created queued resource [{name}].", file=sys.stderr)
    return 0, None


def _polled(zone):
    """Resources of a zone move on; with one that is gone, go its processes."""
    with store.opened() as state:
        mine = [one for one in state["resources"].values() if one["zone"] == zone]
        for resource in mine:
            lifecycle.polled(state, resource)
        left = [one["uid"] for one in state["resources"].values()]
    for resource in mine:
        if resource["uid"] not in left:
            hosts.kill(resource["uid"])


def _describe(command, fields, silent):
    _polled(fields["zone"])
    with store.opened() as state:
        return 0, lifecycle.document(_resource(state, fields))


def _list(command, fields, silent):
    _polled(fields["zone"])
    with store.opened() as state:
        found = [one for one in state["resources"].values() if one["zone"] == fields["zone"]]
        return 0, [lifecycle.document(one) for one in found if one["project"] == fields["project"]]


def _describe_node(command, fields, silent):
    _polled(fields["zone"])
    with store.opened() as state:
        return 0, lifecycle.node_document(*_node(state, fields)[:2])


def _list_nodes(command, fields, silent):
    _polled(fields["zone"])
    with store.opened() as state:
        return 0, [
            lifecycle.node_document(resource, node)
            for resource in state["resources"].values()
            if (resource["zone"], resource["project"]) == (fields["zone"], fields["project"])
            for node in lifecycle.nodes(resource)
        ]


def _delete(command, fields, silent):
    with store.opened() as state:
        resource = _resource(state, fields)
        if resource["state"] not in lifecycle.BARE and "--force" not in command.flags:
            raise RefusedError(sayings.said("in use", **fields, state=resource["state"]))
        lifecycle.enter(state, resource, "DELETING")
    hosts.kill(resource["uid"])
    if "--async" not in command.flags:
        with store.opened() as state:
            state["resources"].pop(f"{fields['zone']}/{fields['name']}", None)
    print(f"Deleted queued resource [{fields['name']}].", file=sys.stderr)
    return 0, None


def _delete_node(command, fields, silent):
    with store.opened() as state:
        resource, node, _ = _node(state, fields)
        node["state"] = None
    hosts.kill(resource["uid"])
    print(f"Deleted tpu [{fields['name']}].", file=sys.stderr)
    return 0, None


def _ssh(command, fields, silent):
    resource, number, workers = _reached(command, fields)
    text = command.flags.get("--command", "")
    if not text and len(workers) > 1:
        what = "cannot target multiple workers without the `--command` flag."
        raise documented.UsageError(f"({command.dotted}) Invalid value for [--worker]: {what}")
    from fake import sessions  # takes a while to import, and most commands need none

    return sessions.ssh(resource, number, workers, text or "bash", silent), None


def _scp(command, fields, silent):
    *sources, target = command.words
    _, colon, path = target.partition(":")
    if not colon:
        raise documented.UsageError(f"({command.dotted}) the fake cloud copies to hosts only: expected NODE:PATH")
    resource, number, workers = _reached(command, fields)
    from fake import sessions

    return sessions.scp(resource, number, workers, sources, path, silent), None


def _reached(command, fields):
    """(resource, number of the node, workers) that a command goes to, where the node's state allows it."""
    with store.opened() as state:
        resource, node, number = _node(state, fields)
    if node["state"] in lifecycle.TERMINAL:
        raise RefusedError(sayings.said("unusable for ever", **fields, state=node["state"]))
    if node["state"] in lifecycle.UNUSABLE:
        raise RefusedError(sayings.said("unusable", **fields, state=node["state"]))
    if node["state"] != "READY":
        raise RefusedError(sayings.said("unreachable", **fields))
    try:
        workers = _chosen(command.flags.get("--worker", "0"), lifecycle.shape(resource["type"])[0])
    except ValueError as error:
        raise documented.UsageError(f"({command.dotted}) Invalid value for [--worker]: {error}") from error
    return resource, number, workers


def _chosen(text, count):
    """Numbers of the workers that `--worker` names: "all", "1,3", "0-2"."""
    if text == "all":
        return list(range(count))
    found = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    if max(found) >= count:
        raise ValueError(
            f"worker index {max(found)} is larger than the valid worker indexes on this TPU VM. "
            f"Please only use indexes in the range [0, {count - 1}], inclusive."
        )
    return sorted(found)


def _resource(state, fields):
    found = state["resources"].get(f"{fields['zone']}/{fields['name']}")
    if found is None or found["project"] != fields["project"]:
        raise RefusedError(sayings.said("missing", **fields))
    return found


def _node(state, fields):
    for resource in state["resources"].values():
        for number, node in enumerate(resource["nodes"]):
            same = (resource["zone"], resource["project"]) == (fields["zone"], fields["project"])
            if same and node["id"] == fields["name"] and node["state"]:
                return resource, node, number
    raise RefusedError(sayings.said("missing", **{**fields, "kind": "nodes"}))


VERBS = {
    "queued-resources create": _create,
    "queued-resources describe": _describe,
    "queued-resources list": _list,
    "queued-resources delete": _delete,
    "tpu-vm describe": _describe_node,
    "tpu-vm list": _list_nodes,
    "tpu-vm delete": _delete_node,
    "tpu-vm ssh": _ssh,
    "tpu-vm scp": _scp,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
