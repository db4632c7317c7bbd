"""Data sources by name: each is a function that returns a `Source`, and its signature is its config section.

Read `split.py` next: it says what a source is. Then `order.py`: which examples a step sees; then `feed.py`: how they
come to the devices. The rest:

    threads, loading                         reading ahead, by threads and by worker processes
    images, arrays, image_folder             sources of images and arrays; builders/ and prepared: official archives
    tfds_source, tfds_sets, tfds_features, records     any set of TFDS, from ArrayRecord files
    text, tables, reading, text_files        sources of text, and the files they read
    tokenizer, vocabularies, byte_pairs      between text and tokens
    documents, packing, token_rows           from documents to windows
    objectives, objective_masked, objective_spans, objective_prefix, words     what is learned from text
    chat, chat_jinja                         conversations, and the templates that make text of them
    preparing, corpus, token_files, token_folder, token_writer     tokens on disk
    mixture, held_out                        several sources as one; what is evaluated on
    augment, augment_images, augment_mixing, randaugment, host_augment     augmentation
"""

from collections.abc import Mapping
from typing import Any

from flaxmodels import registry
from flaxmodels.data.split import Source, Split

__all__ = ["SOURCES", "Source", "Split", "load", "load_as"]

SOURCES = {
    "arrays": "flaxmodels.data.arrays:arrays",
    "cifar10": "flaxmodels.data.images:cifar10",
    "csv": "flaxmodels.data.tables:csv",
    "digits": "flaxmodels.data.images:digits",
    "fashion_mnist": "flaxmodels.data.images:fashion_mnist",
    "image_folder": "flaxmodels.data.image_folder:image_folder",
    "jsonl": "flaxmodels.data.tables:jsonl",
    "kmnist": "flaxmodels.data.images:kmnist",
    "lines": "flaxmodels.data.tables:lines",
    "mixture": "flaxmodels.data.mixture:mixture",
    "mnist": "flaxmodels.data.images:mnist",
    "parquet": "flaxmodels.data.tables:parquet",
    "pydocs": "flaxmodels.data.text:pydocs",
    "synthetic_images": "flaxmodels.data.synthetic:synthetic_images",
    "synthetic_tokens": "flaxmodels.data.synthetic:synthetic_tokens",
    "text": "flaxmodels.data.text:text",
    "tfds": "flaxmodels.data.tfds_source:tfds",
    "tiny_shakespeare": "flaxmodels.data.text:tiny_shakespeare",
    "tokens": "flaxmodels.data.token_files:tokens",
    "tsv": "flaxmodels.data.tables:tsv",
}


def load(name: str, objective: dict | None = None, **options: Any) -> Source:
    """Load a data source: one of `SOURCES`, or your own as `"package.module:function"`.

    Args:
      name: the name of a function that returns a `Source`.
      objective: what is learned from text, {"name": ..., options}: see `objectives.OBJECTIVES`. None: each next token.
      **options: keyword arguments of the function, checked against its signature.

    Raises:
      UserError: an unknown name or option, a value of the wrong type, data that are missing or damaged, or a function
        that returns something else than a `Source`.
    """
    options = {"name": name, **options}
    if objective is None:
        return load_as("data", options)
    from flaxmodels.data import objectives  # with all of JAX, which a source alone need not load

    known = registry.parameters([registry.pick(SOURCES, name, "data.name")])
    length = options.get("length", known["length"].default) if "length" in known else None
    return objectives.apply(objective, lambda **changed: load_as("data", options | changed), length)


def load_as(where: str, options: Mapping[str, Any]) -> Source:
    """`load(**options)`, called `where` in messages: "data", or "data.sources[1]"."""
    name, options = options["name"], {key: value for key, value in options.items() if key != "name"}
    function = registry.pick(SOURCES, name, f"{where}.name")
    source = function(**registry.bind(function, options, where=where))
    if not isinstance(source, Source):
        raise registry.UserError(
            f"{where}.name={name!r} returned {type(source).__name__}: expected a flaxmodels.data.Source. "
            "Return Source(name=..., train=Split(...), test=Split(...), facts={...}, fingerprint=...)."
        )
    return source
