"""Training objectives on text: which tokens a model sees, and which it predicts. Without one, each next token.

`data.objective` of a config is {"name": a key of `OBJECTIVES`, and its options}. It works on any source of text, also
on prepared tokens and on mixtures. What is random is drawn by example from (seed, step, example), in the jitted step,
as augmentations are: the same after a resume, on any mesh, whatever else is in the batch. An evaluation draws with a
seed of its own, the same each time, so that its figures compare across steps and runs.

Read `apply` first. An objective has two parts: `lay` gives a batch the form that it needs, and `draw` fills it in. Ours
are in `objective_masked.py`, `objective_spans.py` and `objective_prefix.py`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np

from flaxmodels import registry
from flaxmodels.data import tokenizer
from flaxmodels.data.augment import example_keys
from flaxmodels.data.split import Batch, Draw, Source, Split, Tokenizer
from flaxmodels.data.token_rows import LOUD, places_of
from flaxmodels.registry import LONGEST, Range, UserError

# The share of tokens that are predicted: none is nothing to learn, all is nothing to see.
Rate = Annotated[float, Range(1e-6, 1 - 1e-6)]
OBJECTIVES: Mapping[str, str] = {
    "denoise": "flaxmodels.data.objective_spans:denoise",
    "masked": "flaxmodels.data.objective_masked:masked",
    "prefix": "flaxmodels.data.objective_prefix:prefix",
}


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is learned from a source of text.

    Attributes:
      source: the text, in windows, with a tokenizer that has the special tokens.
      lay: what `Split.prepare` gives -> a batch of the form that is trained on.
      draw: (batch, keys (B,)) -> the same form, filled in.
      facts: what a model must know.
      compressed: whether targets are the text, each token from those before it, so that bits per byte mean something.
    """

    source: Source
    lay: Callable[[Batch], Batch]
    draw: Draw
    facts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    compressed: bool = False


@dataclasses.dataclass(frozen=True)
class Text:
    """A source of text that is not loaded yet.

    Attributes:
      name: of the objective, for messages.
      function: returns the `Source`, with some options changed.
      size: `data.length`; None where the source has no such option.
    """

    name: str
    function: Callable[..., Source]
    size: int | None

    @property
    def length(self) -> int:
        """`data.length`. UserError where the source has none."""
        if self.size is None:
            raise UserError(
                f"data.objective.name={self.name!r} makes windows of its own, and needs a source with the option "
                "data.length: this one has none."
            )
        return self.size

    def load(self, *, prompts: bool = True, **changed: Any) -> Source:
        """The source, with some options changed.

        Raises:
          UserError: it has no text, or labels; or without `prompts`, prompts.
        """
        source = self.function(**changed)
        has = "labels" if source.labels else "no text" if source.tokenizer is None else ""
        if not prompts and not has and prompted(source):
            has = "prompts, for which 'prefix' is the objective"
        if has:
            raise UserError(f"data.objective.name={self.name!r} is learned from text alone: these data have {has}.")
        return source


def apply(spec: Mapping[str, Any], function: Callable[..., Source], length: int | None) -> Source:
    """Load a source of text, and learn from it what an objective says.

    Args:
      spec: `data.objective` of a config; the name may also be "package.module:function", (`Text`, options) ->
        `Objective`.
      function: returns the source, with some of its options changed.
      length: `data.length`; None where the source has no such option.

    Returns:
      The source, with the special tokens, the facts and the splits of the objective: `Source.draw` makes it anew for
      each batch of training, and the test split is the same at each evaluation.

    Raises:
      UserError: an unknown objective or option; or the source has no text, labels, or windows that do not fit.
    """
    if "name" not in spec:
        raise UserError(f"data.objective={registry.plain(spec)!r} has no name. {registry.suggest('', OBJECTIVES)}")
    make = registry.pick(OBJECTIVES, spec["name"], "data.objective.name")
    given = {key: value for key, value in spec.items() if key != "name"}
    given = registry.bind(make, given, where="data.objective", provided=("text",))
    found: Objective = make(Text(spec["name"], function, length), **given)
    source, lay, draw = found.source, found.lay, found.draw
    return dataclasses.replace(
        source,
        train=_prepared(source.train, lambda batch, index: lay(batch)),
        test=_prepared(source.test, lambda batch, index: draw(lay(batch), example_keys(0, index, LONGEST))),
        facts={**source.facts, **found.facts},
        token_bytes=source.token_bytes if found.compressed else None,
        transforms={**source.transforms, "objective": registry.plain(spec)},
        draw=draw,
    )


def _prepared(split: Split, then: Callable[[Batch, Any], Batch]) -> Split:
    return dataclasses.replace(split, prepare=lambda rows, index: then(split.prepare(rows, index), index))


def prompted(source: Source) -> bool:
    """Whether parts of the documents are no targets of the loss."""
    return LOUD in source.train.gather(source.train.arrays, np.zeros(1, np.int32))


def with_marks(source: Source, names: Sequence[str]) -> tuple[Source, Tokenizer]:
    """The source, of text, with a tokenizer that has special tokens of these names; and the tokenizer.

    Those that it lacks come after all others, so that the ids of these stay.
    """
    assert source.tokenizer is not None
    made = tokenizer.extended(source.tokenizer, names)
    return dataclasses.replace(source, tokenizer=made, facts={**source.facts, "vocab_size": made.size}), made


def ends(known: Tokenizer | None) -> tuple[int, ...]:
    """The token that ends a document; () where there is none."""
    return () if known is None or known.end is None else (known.end,)


def layout(batch: Batch) -> dict[str, Any]:
    """{"tokens", "segments", "positions"}, each (B, T) int32, of any batch of windows; an example without weight is 0.

    A model that sees both sides must not see what stands after the end of a text.
    """
    inputs, some = batch["inputs"], batch["weights"] > 0
    if not isinstance(inputs, Mapping):
        segments = jnp.concatenate([some[:, :1], some[:, :-1]], axis=1).astype(jnp.int32)
        return {"tokens": inputs * segments, "segments": segments, "positions": places_of(inputs)}
    return {**inputs, "segments": inputs["segments"] * some.any(axis=1, keepdims=True)}
