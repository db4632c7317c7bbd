"""A run that waits where a test wants to find it: python held.py STEP FILE, and the flags of train.py.

After each of its processes has made STEP, it waits until FILE is there. So a test that is late still meets the run in
its middle: it sends its signal, and then makes the file.
"""

import sys
import time
from pathlib import Path

import train
from flaxmodels import loop
from flaxmodels.runtime import exits

LONGEST = 600.0  # seconds; the test has gone then


def hold(step: int, file: Path) -> None:
    """Change the run so that it waits there."""
    after = loop.Run.after

    def held(self, state, made, packed):
        well = after(self, state, made, packed)
        deadline = time.monotonic() + LONGEST
        while made >= step and not file.exists():
            assert time.monotonic() < deadline
            time.sleep(0.005)
        return well

    loop.Run.after = held


if __name__ == "__main__":
    hold(int(sys.argv[1]), Path(sys.argv[2]))
    words = [*sys.argv[3:], "--stuck_after=off"]  # which it is, as long as it is told to
    sys.exit(exits.reported(lambda: train.main(words), debug="--debug" in words))
