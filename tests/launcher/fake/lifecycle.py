"""Queued resources and their nodes: how their states follow each other, and how gcloud prints them.

    ACCEPTED -> WAITING_FOR_RESOURCES -> PROVISIONING -> ACTIVE    a poll each, or as many as the plan says
    (any) -> SUSPENDING -> SUSPENDED    its nodes were taken away: PREEMPTED at once, while it may still be ACTIVE
    (any) -> FAILED                     with failedData
    (any) -> DELETING -> gone

A poll is a `describe` or a `list` of its zone, of queued resources or of nodes. States, and what each allows:
https://docs.cloud.google.com/tpu/docs/queued-resources; fields of what is printed:
https://docs.cloud.google.com/tpu/docs/reference/rest/v2/projects.locations.queuedResources and .../nodes
"""

import os
import re
import time

from fake import sayings, store

NEXT = {
    "ACCEPTED": "WAITING_FOR_RESOURCES",
    "WAITING_FOR_RESOURCES": "PROVISIONING",
    "PROVISIONING": "ACTIVE",
    "SUSPENDING": "SUSPENDED",
    "DELETING": "",
}
NODE = {"PROVISIONING": "CREATING", "ACTIVE": "READY", "DELETING": "DELETING"}
UNUSABLE = ("STOPPED", "STOPPING", "DELETING", "HIDDEN")
TERMINAL = ("PREEMPTED", "TERMINATED")
# Deleted without --force: those that have no nodes.
BARE = ("ACCEPTED", "WAITING_FOR_RESOURCES", "FAILED", "SUSPENDED")
NAME = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
PORTS = range(20000, 32000)  # below those that the kernel deals out


def shape(kind):
    """(hosts, chips of each host) of an accelerator type; None where there is no such type.

    https://docs.cloud.google.com/tpu/docs/v5e, v5p, v6e, v4: of the core-counting ones, two cores are a chip.
    """
    family, _, number = kind.rpartition("-")
    if family not in ("v2", "v3", "v4", "v5p", "v5litepod", "v6e") or not number.isdecimal():
        return None
    chips = int(number) // (1 if family in ("v5litepod", "v6e") else 2)
    alone = chips <= (8 if family in ("v5litepod", "v6e") else 4)
    return (1, chips) if alone else (chips // 4, 4)


def create(state, flags, name, project, zone):
    """Put a resource into the queue."""
    count = int(flags.get("--node-count", "0"))
    prefix = flags.get("--node-prefix", name)
    state["machines"] += 1
    state["resources"][f"{zone}/{name}"] = {
        "name": name,
        "project": project,
        "zone": zone,
        "type": flags["--accelerator-type"],
        "runtime": flags["--runtime-version"],
        "tier": next((word for word in ("spot", "reserved", "guaranteed") if f"--{word}" in flags), "on demand"),
        "labels": dict(pair.split("=", 1) for pair in flags.get("--labels", "").split(",") if pair),
        "network": flags.get("--network", "default"),
        "uid": f"{state['machines']}-{os.urandom(8).hex()}",  # no other's, in any cloud of this computer
        "port": _free_port(),
        "state": "ACCEPTED",
        "polls": 0,
        "error": None,
        "nodes": [{"id": f"{prefix}-{i}" if count else flags["--node-id"], "state": None} for i in range(count or 1)],
        "created": _time(),
    }
    state["most"] = max(state["most"], len(state["resources"]))


def _free_port():
    """For the coordinator of the run that the machine's hosts join; one that nothing listens on, and few draw."""
    import socket  # takes a while, and few commands need it

    while True:
        port = PORTS[int.from_bytes(os.urandom(4)) % len(PORTS)]
        with socket.socket() as free:
            if free.connect_ex(("localhost", port)) != 0:
                return port


def _time():
    return time.strftime("%Y-%m-%dT%H:%M:%S.000000Z", time.gmtime())


def polled(state, resource):
    """A poll of a resource: it moves on where it has been in its state for long enough."""
    polls = {**store.POLLS, **store.plan().get("polls", {})}
    while resource["state"] in NEXT and resource["polls"] >= polls[resource["state"]]:
        enter(state, resource, NEXT[resource["state"]])
        if not resource["state"]:
            return
    resource["polls"] += 1


def enter(state, resource, name):
    """Bring a resource into a state; "" removes it, and its nodes."""
    if not name:
        del state["resources"][f"{resource['zone']}/{resource['name']}"]
    resource.update(state=name, polls=0)
    for node in resource["nodes"]:
        if name in NODE and node["state"] not in TERMINAL:
            node["state"] = NODE[name]
        elif name == "FAILED":
            node["state"] = None


def taken(resource, late=0):
    """Its nodes are preempted; the resource stays ACTIVE for `late` polls, as it does for some time in the cloud."""
    for node in resource["nodes"]:
        node["state"] = "PREEMPTED" if node["state"] else None
    resource.update(state="SUSPENDING", polls=-late)


def failed(state, resource, why):
    """It will never be there."""
    enter(state, resource, "FAILED")
    resource["error"] = sayings.FAILED[why]


def shown_state(resource):
    """The state that gcloud prints: preemption is told with a delay."""
    return "ACTIVE" if resource["state"] == "SUSPENDING" and resource["polls"] <= 0 else resource["state"]


def nodes(resource):
    """Those nodes that exist."""
    return [node for node in resource["nodes"] if node["state"]]


def document(resource):
    """What `queued-resources describe --format=json` prints."""
    parent = f"projects/{resource['project']}/locations/{resource['zone']}"
    now, name = shown_state(resource), f"{parent}/queuedResources/{resource['name']}"
    data = {"error": resource["error"]} if resource["error"] else {}
    key = "".join(part.title() if i else part for i, part in enumerate(now.lower().split("_")))
    tier = {"spot": {"spot": {}}, "reserved": {"guaranteed": {"reserved": True}}, "guaranteed": {"guaranteed": {}}}
    node = {
        "acceleratorType": resource["type"],
        "bootDisk": {},
        "labels": resource["labels"],
        "networkConfig": {"enableExternalIps": True, "network": resource["network"]},
        "queuedResource": name,
        "runtimeVersion": resource["runtime"],
    }
    return {
        "createTime": resource["created"],
        "name": name,
        "state": {"state": now, "stateInitiator": "SERVICE", **({f"{key}Data": data} if data else {})},
        "tpu": {"nodeSpec": [{"node": node, "nodeId": one["id"], "parent": parent} for one in resource["nodes"]]},
        **tier.get(resource["tier"], {}),
    }


def node_document(resource, node):
    """What `tpu-vm describe --format=json` prints."""
    parent = f"projects/{resource['project']}/locations/{resource['zone']}"
    hosts, _ = shape(resource["type"])
    return {
        "acceleratorType": resource["type"],
        "createTime": resource["created"],
        "health": "HEALTHY",
        "labels": resource["labels"],
        "name": f"{parent}/nodes/{node['id']}",
        "networkEndpoints": [{"ipAddress": address(i), "port": 8470} for i in range(hosts)],
        "queuedResource": f"{parent}/queuedResources/{resource['name']}",
        "runtimeVersion": resource["runtime"],
        "schedulingConfig": {"spot": True} if resource["tier"] == "spot" else {},
        "state": node["state"],
    }


def address(worker):
    """Of a host, as it would be in a network of Google's."""
    return f"10.128.0.{worker + 2}"
