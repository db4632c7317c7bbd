"""What was measured of peers, as rows: medians, spreads, and ratios where these can be told."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from flaxmodels.perf import timing
from flaxmodels.perf.peers.works import BARE, OURS, PEERS, WORKS

Row = dict[str, Any]
# Rounds that a judgement needs at least.
FEWEST = 5
# A turn is quiet where others had at most this share of the cores; only such turns count for the clock on the wall.
QUIET = 0.1
# The losses of peers may be this far from their median: weights and order of examples are drawn anew by each.
AGREE = 0.2


@dataclasses.dataclass(frozen=True)
class Chunk:
    """One turn of a peer.

    Attributes:
      steps: that ended in it.
      wall: seconds.
      cpu: seconds of all threads.
      others: the share of its cores' time that others used, about; None where nobody tells.
      compiles: programs compiled in it; None where nobody counts.
    """

    steps: int
    wall: float
    cpu: float
    others: float | None = None
    compiles: int | None = None

    @property
    def quiet(self) -> bool:
        """Whether its wall time is to be believed."""
        return self.others is None or self.others <= QUIET


def rows(
    work: str,
    cores: int,
    ready: Mapping[str, Mapping[str, Any]],
    found: Mapping[str, Sequence[Chunk]],
    absent: Mapping[str, str],
) -> list[Row]:
    """A row for each peer, ready for JSON.

    Args:
      work: a key of `WORKS`.
      cores: that each had.
      ready: peer -> what `worker` says of its warm-up.
      found: peer -> its turns, one in each round; the first of them is ours.
      absent: peer -> why it was left out.

    Returns:
      In the order of `PEERS`, of each "work", "peer", "says", "cores", "batch_size"; then, where it did not take part,
      "left_out", why; else
        "rounds"; "cpu_ms", "wall_ms" of a step, medians, with their "cpu_spread", "wall_spread" (`timing.spread`);
        "unit_seconds", on the wall, where a work is an epoch; "others" (`Chunk`, median), "quiet", how many turns;
        "compiles" in all of them; "loss", "agrees", "parameters", "warm_seconds", "versions" of the warm-up;
        "by" ("cpu" or "wall"), "ratio", our median by theirs, "ratio_spread" of the rounds' ratios, and "refused", why
        that ratio is not to be believed, or "".
      Ours has, beside its compiled step, "over_bare_us" of a step, quartiles of the rounds' differences, and
      "over_bare", the middle one as a share of that step.
    """
    middle = statistics.median(one["loss"] for one in ready.values())
    sizes = {one["parameters"] for one in ready.values()} - {None}
    result = []
    for peer in (name for name in PEERS if name in found or name in absent):
        row: Row = {"work": work, "peer": peer, "says": PEERS[peer].says, "cores": cores}
        row["batch_size"] = WORKS[work].batch_size
        if peer in absent:
            result.append(row | {"left_out": absent[peer]})
            continue
        warm = ready[peer]
        row |= _figures(work, found[peer])
        row |= {"loss": warm["loss"], "agrees": len(sizes) < 2 and abs(warm["loss"] - middle) <= AGREE * middle}
        row |= {"parameters": warm["parameters"], "warm_seconds": warm["seconds"], "versions": dict(warm["versions"])}
        result.append(row)
    agreeing = {row["peer"]: row["agrees"] for row in result if "agrees" in row}
    for row in result:
        if row["peer"] in found:
            row |= _against(work, cores, found[OURS], found[row["peer"]])
            if not (agreeing[row["peer"]] and agreeing[OURS]):
                row["refused"] = "other work"
            if row["peer"] == OURS and BARE in found:
                row |= _over_bare(found[OURS], found[BARE])
    return result


def agree(found: Sequence[Row]) -> bool:
    """Whether all peers learned alike."""
    return all(row.get("agrees", True) for row in found)


def _figures(work: str, chunks: Sequence[Chunk]) -> Row:
    cpu, wall = ([1e3 * getattr(one, kind) / one.steps for one in chunks] for kind in ("cpu", "wall"))
    shares = [one.others for one in chunks if one.others is not None]
    counted = [one.compiles for one in chunks if one.compiles is not None]
    unit = WORKS[work].steps
    row: Row = {"rounds": len(chunks), "quiet": sum(one.quiet for one in chunks)}
    for kind, values in (("cpu", cpu), ("wall", wall)):
        row |= {f"{kind}_ms": round(statistics.median(values), 4), f"{kind}_spread": timing.spread(values)}
    if unit > 1:
        row["unit_seconds"] = round(unit * statistics.median(wall) / 1e3, 4)
    row["others"] = round(statistics.median(shares), 3) if shares else None
    row["compiles"] = sum(counted) if counted else None
    return row


def _against(work: str, cores: int, ours: Sequence[Chunk], theirs: Sequence[Chunk]) -> Row:
    """Our time by theirs. The first clock that can tell does: see `bench`."""
    wall = cores > 1 or WORKS[work].fed
    tried = [_ratio("wall", ours, theirs)] if wall else []
    if cores == 1:  # on more, threads that wait for each other use processor time, too
        tried.append(_ratio("cpu", ours, theirs))
    return next((one for one in tried if not one["refused"]), tried[0])


def _ratio(by: str, ours: Sequence[Chunk], theirs: Sequence[Chunk]) -> Row:
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if by == "cpu" or (a.quiet and b.quiet)]
    if len(pairs) < FEWEST:
        said = f"{len(pairs)} of {len(ours)} rounds quiet"
        return {"by": by, "ratio": None, "ratio_spread": None, "refused": said}
    times = [(getattr(a, by) / a.steps, getattr(b, by) / b.steps) for a, b in pairs]
    apart = timing.spread([a / b for a, b in times])
    ratio = statistics.median(a for a, _ in times) / statistics.median(b for _, b in times)
    said = f"spread {apart:.0%}" if apart > timing.SPREAD else ""
    return {"by": by, "ratio": round(ratio, 4), "ratio_spread": apart, "refused": said}


def _over_bare(ours: Sequence[Chunk], bare: Sequence[Chunk]) -> Row:
    """What `fit` does beside calling the compiled step, by processor time, round by round."""
    extra = [1e6 * (a.cpu / a.steps - b.cpu / b.steps) for a, b in zip(ours, bare, strict=True)]
    step = statistics.median(1e6 * b.cpu / b.steps for b in bare)
    quartiles = statistics.quantiles(extra, n=4, method="inclusive")
    return {"over_bare_us": [round(x, 1) for x in quartiles], "over_bare": round(quartiles[1] / step, 4)}
