"""Data sources by name: each is a function that returns a `Source`, and its signature is its config section.

Read `split.py` next: it says what a source is. Then `order.py`: which examples a step sees.
"""

from typing import Any

from flaxmodels import registry
from flaxmodels.data.split import Source, Split

__all__ = ["SOURCES", "Source", "Split", "load"]

SOURCES = {
    "digits": "flaxmodels.data.images:digits",
    "mnist": "flaxmodels.data.images:mnist",
    "pydocs": "flaxmodels.data.text:pydocs",
    "synthetic_images": "flaxmodels.data.synthetic:synthetic_images",
    "synthetic_tokens": "flaxmodels.data.synthetic:synthetic_tokens",
    "text": "flaxmodels.data.text:text",
    "tiny_shakespeare": "flaxmodels.data.text:tiny_shakespeare",
}


def load(name: str, **options: Any) -> Source:
    """Load a data source: one of `SOURCES`, or your own as `"package.module:function"`.

    Args:
      name: the name of a function that returns a `Source`.
      **options: its keyword arguments, checked against its signature.

    Raises:
      UserError: an unknown name or option, a value of the wrong type, data that are missing or damaged, or a function
        that returns something else than a `Source`.
    """
    function = registry.pick(SOURCES, name, "data.name")
    source = function(**registry.bind(function, options, where="data"))
    if not isinstance(source, Source):
        raise registry.UserError(
            f"data.name={name!r} returned {type(source).__name__}: expected a flaxmodels.data.Source. "
            "Return Source(name=..., train=Split(...), test=Split(...), facts={...}, fingerprint=...)."
        )
    return source
