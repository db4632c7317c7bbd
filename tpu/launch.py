"""`python tpu/launch.py VERB`: Cloud TPU VMs from a laptop. `python tpu/launch.py --help` names the verbs."""

import importlib
import sys
from collections.abc import Sequence
from importlib import util
from pathlib import Path


def main(argv: "Sequence[str] | None" = None) -> int:
    """Run a command; its exit code: 0, 1 something failed, 2 bad input, 130 Ctrl-C; `watch` has more.

    Args:
      argv: the words after the program's name; None: those of this process.
    """
    missing = [name for name in ("tomllib", "fcntl") if util.find_spec(name) is None]
    if missing:  # an older Python, such as that of macOS, reads this file, but no other of this folder
        version = ".".join(map(str, sys.version_info[:2]))
        said = "expected Python 3.11 or later, on Linux, macOS or WSL"
        print(f"error: this is Python {version} on {sys.platform}: {said}.", file=sys.stderr)
        return 2
    return int(importlib.import_module("tpu.verbs").main(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    # A script's own folder is where Python looks first, and the names of this one are not meant to be found so.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    sys.exit(main())
