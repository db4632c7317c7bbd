"""What a run has cost: the hours that its machines were held, and the price of their chips."""

import dataclasses
import time
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Life:
    """One machine, from the request for it to its deletion.

    Attributes:
      zone: where.
      begun: seconds since 1970 when it was given to us, and began to cost; None while the request waits, which is free.
      ended: when it was taken back or deleted; None: it still runs.
      chips: of all slices.
      usd_per_hour: of all its chips; None where no price is known.
      why: it ended, such as "preempted", or "" while it runs.
    """

    zone: str
    begun: float | None
    ended: float | None
    chips: int
    usd_per_hour: float | None
    why: str = ""


def spent(lives: Iterable[Life], now: float) -> tuple[float, float]:
    """Hours that machines were held, and USD; a machine without a known price counts 0 USD.

    Args:
      lives: of one run.
      now: seconds since 1970, for what still runs.
    """
    hours = usd = 0.0
    for life in lives:
        if life.begun is None:
            continue
        held = max(0.0, (now if life.ended is None else life.ended) - life.begun) / 3600
        hours, usd = hours + held, usd + held * (life.usd_per_hour or 0.0)
    return hours, usd


def table(lives: Iterable[Life], now: float) -> list[str]:
    """A line a machine, and the sum."""
    lives = list(lives)
    rows = [f"{'zone':<20}{'from (UTC)':<18}{'hours':>8}{'chips':>7}{'USD/h':>9}{'USD':>9}  "]
    for life in lives:
        hours, usd = spent([life], now)
        begun = "waits" if life.begun is None else time.strftime("%Y-%m-%d %H:%M", time.gmtime(life.begun))
        price = ("?", "?") if life.usd_per_hour is None else (f"{life.usd_per_hour:.2f}", f"{usd:.2f}")
        state = life.why if life.ended is not None else "in the queue" if life.begun is None else "still there"
        rows.append(f"{life.zone:<20}{begun:<18}{hours:>8.2f}{life.chips:>7}{price[0]:>9}{price[1]:>9}  {state}")
    hours, usd = spent(lives, now)
    rows.append(f"{'all':<38}{hours:>8.2f}{usd:>25.2f}")
    if any(life.usd_per_hour is None for life in lives):
        rows.append("No price is known where it says ?: give one with --prices=FILE.")
    return [row.rstrip() for row in rows]
