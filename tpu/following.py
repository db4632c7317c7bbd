"""look -> decide -> write down -> act, and again, till nothing is left of a run. What it touches is handed in."""

import dataclasses
import time
from collections.abc import Callable

from tpu import cost, noting, state
from tpu.deciding import decide
from tpu.meaning import CloudError
from tpu.noting import Action, Seen
from tpu.settings import Settings
from tpu.state import Kept

EVERY = 30.0  # seconds between looks
LONGEST = 600.0  # between looks while the cloud does not answer or an act fails
COSTLY = 60.0  # likewise, where a machine may be there
SAY = 600.0  # between lines while nothing changes


@dataclasses.dataclass(frozen=True)
class World:
    """All that `follow` touches.

    Attributes:
      look: at the cloud: (what is remembered, whether this is the first look) -> what is there.
      act: does what was decided, and says what it found.
      write: keeps what is remembered, durably.
      say: prints a line.
      clock: seconds since 1970.
      sleep: waits so many seconds.
    """

    look: Callable[[Kept, bool], Seen]
    act: Callable[[Action], str]
    write: Callable[[Kept], None]
    say: Callable[[str], None]
    clock: Callable[[], float]
    sleep: Callable[[float], None]


def follow(kept: Kept, s: Settings, world: World, every: float = EVERY) -> Kept:
    """Look, decide, write, act, until the run has ended and nothing is left; what is remembered then.

    Raises:
      CloudError: nothing can be done from this machine, such as without `gcloud`.
      UserError: a machine of this name is another than the one that is asked for.
    """
    first, fails, before, line = True, 0, "", _Line(world)
    while kept.phase not in state.ENDED:
        try:
            seen = world.look(kept, first)
        except CloudError as error:
            if error.kind == "gone" or (first and error.kind not in ("transient", "unknown")):
                raise
            fails += 1
            world.say(f"# can't look: {error}")
            world.sleep(_pause(kept, every, fails))
            continue
        action = decide(seen, kept, world.clock(), s)
        kept, first, fails = action.kept, False, 0
        world.write(kept)
        line.say(kept)
        if action.do in ("wait", before):
            world.sleep(every)
        before = action.do
        if action.do == "wait":
            continue
        try:
            said = world.act(action)
        except CloudError as error:
            if error.kind == "gone":
                raise
            kept = noting.failed(action, kept, error, world.clock(), s)
            world.write(kept)
            world.say(f"# {error}")
            world.sleep(_pause(kept, every, kept.tries))
            continue
        kept = noting.did(action, kept, world.clock(), said)
        world.write(kept)
    return kept


@dataclasses.dataclass
class _Line:
    """Says where the run is: when that changes, and now and then."""

    world: World
    last: tuple[str, str] = ("", "")
    at: float = 0.0

    def say(self, kept: Kept) -> None:
        if (kept.phase, kept.why) == self.last and 0 <= kept.looked - self.at < SAY:
            return
        self.last, self.at = (kept.phase, kept.why), kept.looked
        hours, usd = cost.spent(kept.lives, kept.looked)
        paid = f", {usd:.2f} USD" * all(life.usd_per_hour is not None for life in kept.lives)
        clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(kept.looked))
        self.world.say(f"# {clock} {kept.phase}: {kept.why} (step {kept.step}; {hours:.2f} hours{paid})")


def _pause(kept: Kept, every: float, fails: int) -> float:
    longest = LONGEST if kept.held is None else COSTLY
    return min(every * 2.0 ** min(fails - 1, 10), max(longest, every))
