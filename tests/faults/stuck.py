"""A run in which one process gets stuck while it lives: python stuck.py PROCESS WHERE, and the flags of train.py.

WHERE: "data" sleeps for ever in the thread that prepares batches, "step" in the loop between two steps, "lock" waits
there in compiled code, "evaluation" sleeps where it reads its first batch.
"""

import sys
import threading
import time

from flaxmodels import config, loop
from flaxmodels.data.feed import Feed
from flaxmodels.runtime import distributed, exits, peers

STEP = 10


def stop(where: str) -> None:
    """Get stuck."""
    print(f"stuck: {time.time()}", flush=True)
    if where == "lock":
        lock = threading.Lock()
        lock.acquire()
        lock.acquire()
    while True:
        time.sleep(3600)


def break_in(where: str) -> None:
    """Change the run so that it gets stuck after step 10."""
    pieces, batches, after = Feed._pieces, Feed.evaluation, loop.Run.after

    def slow_pieces(self, *arguments):
        for number, piece in enumerate(pieces(self, *arguments)):
            if number == STEP:
                stop(where)
            yield piece

    def slow_batches(self):
        stop(where)
        yield from batches(self)

    def slow_after(self, state, step, packed):
        if step > STEP:
            stop(where)
        return after(self, state, step, packed)

    if where == "data":
        Feed._pieces = slow_pieces
    elif where == "evaluation":
        Feed.evaluation = slow_batches
    else:
        loop.Run.after = slow_after


def main(process: str, where: str, *words: str) -> int:
    """Train."""
    flags = config.parse(config.train_parser("stuck"), words)
    with distributed.joined(flags.arguments, flags.workdir):
        if peers.me() == int(process):
            break_in(where)
        return loop.fit(flags.config, flags.workdir).exit_code


if __name__ == "__main__":
    sys.exit(exits.reported(lambda: main(*sys.argv[1:]), debug="--debug" in sys.argv))
