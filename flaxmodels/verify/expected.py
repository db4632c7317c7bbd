"""How many hosts and chips shall be there, and whether this host has its share. Imports no JAX to say that none is."""

import collections
import dataclasses
from collections.abc import Sequence

from flaxmodels.registry import UserError
from flaxmodels.verify.finding import Finding, ok, problem


@dataclasses.dataclass(frozen=True)
class Expected:
    """What shall be there.

    Attributes:
      hosts: processes of the run: on TPUs one a host. None: not said.
      chips: of all of them together. None: not said. Of a CPU, whose devices are simulated, each is one.
    """

    hosts: int | None = None
    chips: int | None = None

    def __post_init__(self) -> None:
        if self.hosts and self.chips and self.chips % self.hosts:
            raise UserError(
                f"--chips={self.chips} does not divide over --hosts={self.hosts}: expected the chips of all hosts "
                "together, of which each has as many."
            )

    def each(self, hosts: int) -> int | None:
        """Chips of one host, of so many where nothing says how many there shall be; None: not known."""
        count = self.hosts or hosts
        return None if self.chips is None or self.chips % count else self.chips // count


def chips(kinds: Sequence[str]) -> int:
    """How many chips so many devices are, by their kinds: JAX lists the halves of some."""
    if not kinds:
        return 0
    from flaxmodels import hardware  # with JAX, which made these kinds

    halves = {kind: hardware.KINDS[kind].devices_per_chip if kind in hardware.KINDS else 1 for kind in kinds}
    return sum(count // halves[kind] for kind, count in collections.Counter(kinds).items())


def here(there: int, expected: Expected, *, alone: bool = True) -> list[Finding]:
    """Whether this host has its share of what is expected.

    Args:
      there: chips of this host.
      expected: of the run.
      alone: nothing told this process of others; else it knows of them, and they did not come.
    """
    found = []
    if alone and (expected.hosts or 1) > 1:
        text = f"this process is alone, and {expected.hosts} are expected: nothing tells it of the others."
        fix = "start it on all hosts at once, with --coordinator_address, --num_processes and --process_id"
        found.append(problem("hosts", text, f"{fix}, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID"))
    each = expected.each(1)
    if each is not None and there != each:
        found.append(too_few_or_many("this host", there, each))
    elif each is not None:
        found.append(ok("chips", f"{there} of {each} of this host are there"))
    return found


def too_few_or_many(who: str, there: int, each: int) -> Finding:
    """What is wrong with a host that has `there` chips and shall have `each`."""
    if there > each:
        return problem(
            "chips", f"{who} has {there} chips, and {each} are expected.", "--chips=N: of all hosts together"
        )
    fix = (
        "sudo lsof /dev/accel* /dev/vfio/* there tells who holds one; else restart that host, or make the machine anew"
    )
    return problem("chips", f"{who} has {there} of {each} chips.", fix)
