"""flaxmodels: train Flax models on accelerators, with one config and one compiled step over any mesh.

The names a library user starts from; each is imported when it is first used, so `import flaxmodels` is cheap and
`flaxmodels.models.transformer` brings in no data or checkpoint library.
"""

import importlib
from typing import Any

from flaxmodels.version import __version__

# name -> module that holds it; None: the module itself.
_PUBLIC = {
    "fit": "flaxmodels.loop",
    "load_config": "flaxmodels.config",
    "UserError": "flaxmodels.registry",
    "checkpoint": None, "data": None, "evaluate": None, "losses": None, "metrics": None, "models": None,
    "optim": None, "sharding": None, "state": None, "step": None, "testing": None,
}  # fmt: skip

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'flaxmodels' has no attribute {name!r}")
    home = _PUBLIC[name]
    return getattr(importlib.import_module(home), name) if home else importlib.import_module(f"flaxmodels.{name}")


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
