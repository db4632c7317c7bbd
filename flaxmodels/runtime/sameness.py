"""What must be the same in every process of a run beside its config: code, versions, programs."""

import hashlib
import platform
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

PACKAGE = Path(__file__).parent.parent


def code(config: Mapping[str, Any]) -> dict[str, str]:
    """File -> SHA-256 of its bytes: of this package, and of the packages of modules that the config names.

    Args:
      config: values of any depth, in which "package.module:attribute" names something of the user's own.
    """
    files = {f"{PACKAGE.name}/{file.relative_to(PACKAGE)}": file for file in PACKAGE.rglob("*.py")}
    own = {name.partition(".")[0] for name in _modules(config)} - {PACKAGE.name}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name.partition(".")[0] in own and file and file.endswith(".py"):
            files[name] = Path(file)
    return {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in sorted(files.items())}


def _modules(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", value):
            yield value.partition(":")[0]
    elif isinstance(value, Mapping | tuple | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _modules(item)


def program(lowered: jax.stages.Lowered) -> str:
    """SHA-256 of a lowered program, without where in the source its operations stand."""
    return hashlib.sha256(lowered.as_text(debug_info=False).encode()).hexdigest()


def python() -> dict[str, str]:
    """The version of Python, as `versions` of packages has it."""
    return {"python": platform.python_version()}
