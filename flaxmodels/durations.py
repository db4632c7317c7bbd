"""Durations: steps, epochs, examples, tokens, or a share of the run, all turned into steps here and nowhere else."""

import dataclasses
import math
import re

from flaxmodels.registry import LONGEST, UserError

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
        steps = self._steps(amount, unit, text, where)
        if steps > LONGEST:
            raise UserError(f"{where}={text!r} is {steps:.4g} steps, over the limit of {LONGEST}: is the unit right?")
        return math.ceil(steps - 1e-9)

    def _steps(self, amount: float, unit: str, text: str, where: str) -> float:
        if unit == "%":
            if self.total_steps is None:
                raise UserError(f"{where}={text!r}: a share needs a run to be a share of; use steps or epochs here.")
            return amount * self.total_steps / 100
        # One division, at the end, so that a whole number of steps comes out whole.
        times, over = {
            "steps": (1, 1),
            "epochs": (self.epoch_size, self.batch_size),
            "examples": (1, self.batch_size),
            "tokens": (1, self.batch_size * self.tokens_per_example),
        }[unit]
        return amount * times / over


def parse(text: str, where: str) -> tuple[float, str]:
    """Split "5 epochs" into (5.0, "epochs"), without asking how long that is.

    Raises:
      UserError: not a duration, or negative.
    """
    found = re.fullmatch(r"\s*([-+]?[0-9._]+(?:e[-+]?[0-9]+)?)\s*([a-z]+|%)\s*", text.lower())
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
