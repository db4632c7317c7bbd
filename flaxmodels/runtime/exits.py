"""Exit codes, and errors as a user should see them."""

import sys
from collections.abc import Callable

from flaxmodels.registry import UserError

DONE = 0
BAD_INPUT = 2
# As a shell reports a process that a signal ended: 128 + its number. The run was saved; the same command goes on.
INTERRUPTED = 128 + 2
TERMINATED = 128 + 15


def reported(main: Callable[[], int], *, debug: bool) -> int:
    """Run `main`; bad input becomes a message and exit code 2, Ctrl-C exit code 130. Other errors pass through.

    Args:
      main: returns an exit code.
      debug: let the traceback of a `UserError` through.
    """
    try:
        return main()
    except UserError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        if debug:
            raise
        print("interrupted before there was anything to save", file=sys.stderr)
        return INTERRUPTED
