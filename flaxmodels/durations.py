"""Durations: steps, epochs, examples, tokens, or a share of the run, all turned into steps here and nowhere else."""

import dataclasses
import math
import re

from flaxmodels.registry import UserError

# A step is a 32-bit counter in the train state; a run of more steps than this can't be meant.
LONGEST = 2**31 - 1
UNITS = ("steps", "epochs", "examples", "tokens", "%")


@dataclasses.dataclass(frozen=True)
class Clock:
    """What a duration is measured against.

    Attributes:
      batch_size: examples of one step, over all hosts.
      epoch_size: examples of the training split.
      tokens_per_example: 1 where examples are not sequences.
      total_steps: steps of the whole run, for shares such as "10%"; None while that is what is being asked.
    """

    batch_size: int
    epoch_size: int
    tokens_per_example: int = 1
    total_steps: int | None = None

    def steps(self, text: str, where: str) -> int:
        """Turn "2000 steps", "5 epochs", "6e5 examples", "1e9 tokens" or "10%" into steps, rounded up.

        Args:
          text: the duration.
          where: its config key, for the message.

        Raises:
          UserError: not a duration, negative, or longer than makes sense.
        """
        amount, unit = parse(text, where)
        return limit(math.ceil(amount * self._per(unit, text, where) - 1e-9), f"{where}={text!r}")

    def _per(self, unit: str, text: str, where: str) -> float:
        if unit == "%":
            if self.total_steps is None:
                raise UserError(f"{where}={text!r}: a share needs a run to be a share of; use steps or epochs here.")
            return self.total_steps / 100
        per_step = {"steps": 1.0, "epochs": self.batch_size / self.epoch_size, "examples": self.batch_size,
                    "tokens": self.batch_size * self.tokens_per_example}  # fmt: skip
        return 1 / per_step[unit]


def limit(steps: int, what: str) -> int:
    """`steps`, unless that is more than a run can have (UserError)."""
    if steps > LONGEST:
        raise UserError(f"{what} is {steps} steps, over the limit of {LONGEST}: is the unit right?")
    return steps


def parse(text: str, where: str) -> tuple[float, str]:
    """Split "5 epochs" into (5.0, "epochs"), without asking how long that is.

    Raises:
      UserError: not a duration, or negative.
    """
    found = re.fullmatch(r"\s*([-+0-9.e_]+)\s*([a-z]+|%)\s*", text.lower())
    unit = found.group(2) if found else ""
    unit = unit if unit in UNITS else unit + "s"
    try:
        amount = float(found.group(1)) if found else math.nan
    except ValueError:
        amount = math.nan
    if unit not in UNITS or not math.isfinite(amount) or amount < 0:
        raise UserError(
            f'{where}={text!r} is not a duration: expected steps, or a number and a unit, such as "2000 steps", '
            '"5 epochs", "60000 examples", "1e6 tokens" or "10%".'
        )
    return amount, unit
