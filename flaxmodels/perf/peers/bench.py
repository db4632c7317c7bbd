"""Peers take turns at the same work; `flaxmodels bench peers`.

Each has a process and an environment of its own, and is set up alone. Then, in rounds of another order each, one goes
on for half a second while all others are stopped. Read `bench` first, then `judging`, which makes rows of what was
measured.
"""

import contextlib
import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flaxmodels import data, registry
from flaxmodels.perf.peers import judging, machine, process
from flaxmodels.perf.peers.process import Process
from flaxmodels.perf.peers.works import OURS, PEERS, WORKS, Work
from flaxmodels.registry import UserError
from flaxmodels.runtime.exits import FaultError

Row = dict[str, Any]


def bench(
    works: Sequence[str] = tuple(WORKS),
    peers: Sequence[str] = tuple(PEERS),
    *,
    cores: int = 1,
    rounds: int = 9,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> list[Row]:
    """Let peers do works.

    Args:
      works: keys of `WORKS`.
      peers: keys of `PEERS`; ours takes part in any case.
      cores: that each runs on. On one the processor time of a step is compared, which other processes on the machine
        hardly change; on more the time on the wall.
      rounds: in which each peer has a turn.
      seed: of the order within them.
      say: is told what goes on, a line at a time.

    Returns:
      The rows of `judging.rows` for each work, in order.

    Raises:
      UserError: there is no such work or peer, or there are not so many cores.
      FaultError: ours failed, or another one in its turn.
    """
    for flag, names, there in (("--work", works, WORKS), ("--peers", peers, PEERS)):
        for name in names:
            if name not in there:
                raise UserError(f"{flag}={name!r} does not exist. {registry.suggest(name, there)}")
    if rounds < judging.FEWEST:
        raise UserError(f"--rounds={rounds}: expected at least {judging.FEWEST}, else quartiles mean nothing.")
    numbers = machine.cores(cores)
    return [row for name in works for row in _work(name, peers, numbers, cores, rounds, random.Random(seed), say)]


def _work(
    name: str,
    peers: Sequence[str],
    numbers: Sequence[int],
    cores: int,
    rounds: int,
    order: random.Random,
    say: Callable[[str], None],
) -> list[Row]:
    work = WORKS[name]
    asked = [peer for peer, one in PEERS.items() if (peer in peers or peer == OURS) and name in one.works]
    with tempfile.TemporaryDirectory(prefix="flaxmodels_peers_") as folder, contextlib.ExitStack() as stack:
        write(work, Path(folder))
        there: dict[str, Process] = {}
        ready: dict[str, Row] = {}
        absent: dict[str, str] = {}
        for number, peer in enumerate(asked, 1):
            if lacking := process.missing(peer):
                absent[peer] = f"{' and '.join(lacking)} not installed: left out"
                continue
            say(f"{name}: {PEERS[peer].says} loads, compiles and warms up ({number} of {len(asked)})")
            try:
                started = stack.enter_context(_started(name, peer, Path(folder), numbers))
                ready[peer], there[peer] = started.ready(), started
            except FaultError as error:
                if peer == OURS:
                    raise
                absent[peer] = str(error)
        say(f"{name}: {rounds} rounds of {len(there)} on {cores} core{'s' * (cores > 1)}")
        found: dict[str, list[judging.Chunk]] = {peer: [] for peer in there}
        for _ in range(rounds):
            for peer in order.sample(list(there), len(there)):
                found[peer].append(_chunk(there[peer], work.seconds, numbers))
    return judging.rows(name, cores, ready, found, absent)


def _started(work: str, peer: str, folder: Path, numbers: Sequence[int]) -> Process:
    own = folder / peer
    own.mkdir()
    for file in folder.glob("*.npy"):
        (own / file.name).symlink_to(file)
    return Process(peer, process.command(work, peer, own, numbers), own, process.environment(peer, own, numbers))


def _chunk(peer: Process, seconds: float, numbers: Sequence[int]) -> judging.Chunk:
    share = machine.others(numbers)
    answer = peer.ask(seconds)
    own = answer.pop("own")
    return judging.Chunk(**answer, others=share(own))


def write(work: Work, folder: Path) -> None:
    """The examples of a work, in a random order: "inputs.npy" and "targets.npy"."""
    split = data.load(**work.data).train
    index = np.random.default_rng(0).permutation(split.size).astype(np.int32)
    batch = split.prepare(split.gather(split.arrays, index), index)
    for name in ("inputs", "targets"):
        np.save(folder / f"{name}.npy", np.asarray(batch[name]))
