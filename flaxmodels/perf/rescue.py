"""A run that is out of memory ends with the smallest change of its config that would fit, proved by compiling it.

`offered` goes around `loop.fit`, which knows nothing of it.
"""

import contextlib
import gc
import sys
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from flaxmodels import memory
from flaxmodels.memory import DoesNotFitError, OutOfMemoryError
from flaxmodels.registry import UserError
from flaxmodels.runtime.exits import FaultError

# Seconds after which no compilation is begun.
SECONDS = 180.0


@contextlib.contextmanager
def offered(config: Mapping[str, Any], seconds: float = SECONDS) -> Iterator[None]:
    """Around `loop.fit`: an error of memory says, in place of general advice, which change of the config would fit.

    The arrays of the run are given up first. One process alone looks for a change: those of several pass the error on
    at once, and so does one that Ctrl-C stops looking, or that knows nothing of its devices' memory.

    Args:
      config: of the run.
      seconds: no compilation is begun later than this.

    Raises:
      DoesNotFitError: as `memory.explained` does, with another message.
      OutOfMemoryError: likewise.
    """
    try:
        yield
    except (DoesNotFitError, OutOfMemoryError) as error:
        limit = error.room if isinstance(error, OutOfMemoryError) else None
        alone = jax.process_count() == 1 and (limit is not None or isinstance(error, DoesNotFitError))
        if alone and (said := _remedy(error, config, limit, seconds)):
            error.args = (str(error).replace(memory.ADVICE, said),)
        raise


def _remedy(error: Exception, config: Mapping[str, Any], limit: int | None, seconds: float) -> str:
    """The smallest change that fits, in words; "" where there is none to name."""
    from flaxmodels.perf import cache, cells, remedies  # only a run that fails pays for these

    cache.look_again()
    held: BaseException | None = error  # what it came from has the frames that hold the state and the data
    while held is not None:
        traceback.clear_frames(held.__traceback__)
        held = held.__cause__ or held.__context__
    gc.collect()
    said = f"looking for the smallest change of the config that fits, for up to {seconds:.0f} s; Ctrl-C ends that"
    print(f"{str(error).splitlines()[0]}\n{said}", file=sys.stderr, flush=True)
    try:
        asked = dict(config).get("mesh", {})
        platform = asked.get("platform") if isinstance(asked, Mapping) else None
        (target,) = cells.targets([platform or jax.default_backend()])
        found = remedies.smallest_change(config, target, limit=limit, seconds=seconds)
    except (UserError, FaultError, MemoryError, jax.errors.JaxRuntimeError, KeyboardInterrupt):
        # Of a device that no table knows, say.
        return ""
    return remedies.sentence(found, limit) if found and found[0] else ""
