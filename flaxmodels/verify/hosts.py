"""The hosts of a run, from all of its processes: chips, names, and clocks. Called by all alike, after they joined."""

import collections
import json
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

from flaxmodels.runtime import peers
from flaxmodels.verify.expected import Expected, chips, too_few_or_many
from flaxmodels.verify.finding import Finding, ok, problem, warning
from flaxmodels.verify.storage import APART, apart

# How often clocks are compared; the surest comparison counts.
ROUNDS = 8


def look(kinds: Sequence[str]) -> list[dict[str, Any]]:
    """What each process of the run says of itself, in their order.

    Args:
      kinds: of the devices of this one.
    """
    offset, bound = clock()
    mine = {"host": socket.gethostname(), "devices": list(kinds), "offset": offset, "bound": bound}
    return [json.loads(text) for text in peers.gathered(json.dumps(mine))]


def clock(rounds: int = ROUNDS) -> tuple[float, float]:
    """(seconds by which this host's clock is ahead of that of process 0, bound of the error).

    Process 0 reads its clock after this process has come to a meeting, and before this process hears of it: so what it
    read lies between two readings here.
    """
    found = (0.0, float("inf"))
    for _ in range(rounds):
        before = time.time()
        peers.settle("")
        there = peers.told(time.time())
        after = time.time()
        middle, bound = (before + after) / 2, (after - before) / 2
        found = min(found, (middle - there, bound), key=lambda pair: pair[1])
    return (0.0, 0.0) if peers.me() == 0 else found


def present(said: Sequence[Mapping[str, Any]], expected: Expected) -> list[Finding]:
    """Whether all hosts and chips are there, and fit together.

    Args:
      said: as `look` returns it: "host", "devices" (kinds), "offset" and "bound" (seconds) of each process.
      expected: what shall be there.
    """
    counts = [len(one["devices"]) for one in said]
    names = list(dict.fromkeys(one["host"] for one in said))
    listed = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if names[4:] else "")
    text = f"{len(said)} processes on {len(names)} hosts ({listed}), {sum(counts)} devices in all"
    found = []
    if expected.hosts not in (None, len(said)):
        wrong = f"the run has {len(said)} processes, and {expected.hosts} are expected; here are {listed}."
        fix = f"all must be started, with --num_processes={expected.hosts} where no launcher tells"
        found.append(problem("hosts", wrong, fix))
    found += _counted(said, counts) if expected.chips is None else []
    kinds = {kind for one in said for kind in one["devices"]}
    if len(kinds) > 1:
        wrong = f"devices of several kinds: {', '.join(sorted(kinds))}."
        found.append(problem("hosts", wrong, "one kind in all processes: is JAX_PLATFORMS the same everywhere?"))
    return [*(found or [ok("hosts", text)]), *_chips(said, expected), *_clocks(said)]


def _counted(said: Sequence[Mapping[str, Any]], counts: Sequence[int]) -> list[Finding]:
    """Processes that have another number of devices than most."""
    usual = collections.Counter(counts).most_common(1)[0][0]
    return [
        problem(
            "hosts",
            f"process {number} ({one['host']}) has {counts[number]} devices, most have {usual}.",
            "flaxmodels doctor there, alone: --distributed=off",
        )
        for number, one in enumerate(said)
        if counts[number] != usual
    ]


def _chips(said: Sequence[Mapping[str, Any]], expected: Expected) -> list[Finding]:
    """Processes that have more or fewer chips than they shall."""
    if expected.chips is None:
        return []
    each, there = expected.each(len(said)), [chips(one["devices"]) for one in said]
    wrong = [
        too_few_or_many(f"process {number} ({one['host']})", there[number], each)
        for number, one in enumerate(said)
        if each not in (None, there[number])
    ]
    if wrong or sum(there) == expected.chips:
        return wrong or [ok("chips", f"all {sum(there)} are there")]
    return [
        problem("chips", f"{sum(there)} of {expected.chips} chips are there.", "all hosts must come, each with its own")
    ]


def _clocks(said: Sequence[Mapping[str, Any]]) -> list[Finding]:
    wrong = [
        warning(
            "clocks",
            f"process {number} ({one['host']}) is {apart(one['offset'], one['bound'], 'process 0')}.",
            "set it by NTP: chronyc makestep",
        )
        for number, one in enumerate(said)
        if abs(one["offset"]) > APART + one["bound"]
    ]
    worst = max(said, key=lambda one: abs(one["offset"]) + one["bound"])
    most = abs(worst["offset"]) + worst["bound"]
    return wrong or [ok("clocks", f"of all hosts within {1000 * most:.0f} ms of that of process 0")]
