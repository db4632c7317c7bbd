"""Augmentation on the device: part of the jitted step, and random by example, not by batch.

`make` turns `data.augment` of a config into one function of a batch. An augmentation is a function `(batch, keys,
**options) -> batch`, where `keys` (B,) are PRNG keys made from (seed, step, example) and the place in the list. So what
happens to an example is the same after a resume, on any mesh, with any number of hosts or microbatches, and whatever
else is in its batch. Where one image is all it needs to see, `per_image` makes one from a function of an image.

Ours are in `augment_images.py`, `augment_mixing.py` and `randaugment.py`, for images (B, H, W, C) of floats in 0..1:
what interpolates or changes colours clips to that; the rest only moves values.
"""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flaxmodels import registry
from flaxmodels.data.split import Batch, Draw
from flaxmodels.registry import UserError

# (batch, index (B,) int32, step () int32) -> batch.
Augment = Callable[[Batch, Any, Any], Batch]

AUGMENTATIONS: Mapping[str, str] = {
    "brightness": "flaxmodels.data.augment_images:brightness",
    "contrast": "flaxmodels.data.augment_images:contrast",
    "crop": "flaxmodels.data.augment_images:crop",
    "cutmix": "flaxmodels.data.augment_mixing:cutmix",
    "cutout": "flaxmodels.data.augment_images:cutout",
    "flip": "flaxmodels.data.augment_images:flip",
    "mixup": "flaxmodels.data.augment_mixing:mixup",
    "randaugment": "flaxmodels.data.randaugment:randaugment",
    "resized_crop": "flaxmodels.data.augment_images:resized_crop",
    "rotate": "flaxmodels.data.augment_images:rotate",
    "saturation": "flaxmodels.data.augment_images:saturation",
    "shift": "flaxmodels.data.augment_images:shift",
    "zoom": "flaxmodels.data.augment_images:zoom",
}

# Folded into the key of the run before the step. `step.streams` folds the step itself, which is never that large.
PURPOSE = 2**32 - 1
# Folded into the key of an example for what its source draws; the place in `data.augment` is never that large.
DRAW = 2**32 - 1
# Parameters that are no options: of a function of a batch, and of one of an image.
PROVIDED = ("batch", "keys", "image", "key")


def make(
    specs: Sequence[Mapping[str, Any]], *, seed: int, facts: Mapping[str, int], draw: Draw | None = None
) -> Augment:
    """One function that applies what the source draws, then all `specs`, in order.

    Args:
      specs: `data.augment` of a config, each {"name": a key of `AUGMENTATIONS`, or "package.module:function", and its
        options}.
      seed: of the run.
      facts: of the data source; an option of that name which a spec leaves out is filled from it.
      draw: of the data source.

    Returns:
      (batch, index (B,) int32, step () int32) -> batch of the same shapes and dtypes, but for targets that were mixed.
      Traceable. `batch` is the global batch, before it is cut into microbatches.

    Raises:
      UserError: an unknown name or option, or a value of the wrong type or range; when traced, a batch that an
        augmentation is not for.
    """
    functions = bound(specs, AUGMENTATIONS, "data.augment", PROVIDED, facts)

    def augment(batch: Batch, index: Any, step: Any) -> Batch:
        keys = example_keys(seed, index, step)
        batch = draw(batch, fold(keys, DRAW)) if draw else batch
        for place, function in enumerate(functions):
            before = batch
            batch = function(before, fold(keys, place))
            _check_kept(before, batch, f"data.augment[{place}]")
        return batch

    return augment if functions or draw else lambda batch, index, step: batch


def bound(
    specs: Sequence[Mapping[str, Any]],
    table: Mapping[str, str],
    where: str,
    provided: Collection[str],
    facts: Mapping[str, int],
) -> tuple[functools.partial, ...]:
    """The functions that `specs` name in `table`, with their options checked and bound (UserError).

    `where` is the key of the config that holds them, for messages; `provided` are parameters that their caller passes;
    `facts` fill options of the same name.
    """
    expected = 'expected a list of dicts, each with a "name", such as ({"name": "flip"},)'
    if not isinstance(specs, list | tuple):
        raise UserError(f"{where}={registry.plain(specs)!r} has the wrong type: {expected}.")
    functions = []
    for place, spec in enumerate(map(registry.plain, specs)):
        here = f"{where}[{place}]"
        if not isinstance(spec, dict) or "name" not in spec:
            raise UserError(f"{here}={spec!r}: {expected}. {registry.suggest('', table)}")
        function = registry.pick(table, spec["name"], f"{here}.name")
        spec = {key: value for key, value in spec.items() if key != "name"}
        options = registry.bind(function, spec, where=here, provided=provided, optional=tuple(facts))
        for fact in facts.keys() & registry.parameters([function], provided).keys():
            if options.setdefault(fact, facts[fact]) != facts[fact]:
                raise UserError(f"{here}.{fact}={options[fact]}, but the data have {facts[fact]}: leave it out.")
        functions.append(functools.partial(function, **options))
    return tuple(functions)


def example_keys(seed: int, index: Any, step: Any) -> jax.Array:
    """Typed PRNG keys (B,) of examples `index` (B,) at `step`. Threefry: its bits do not depend on sharding."""
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), PURPOSE)
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, step), jnp.asarray(index).astype(jnp.uint32))


def fold(keys: jax.Array, data: int) -> jax.Array:
    """`jax.random.fold_in` of each of `keys` (B,)."""
    return jax.vmap(lambda key: jax.random.fold_in(key, data))(keys)


def _check_kept(before: Batch, after: Any, where: str) -> None:
    def looks(batch: Batch) -> Any:
        kept = {name: part for name, part in batch.items() if name != "targets"}
        return jax.tree.map(lambda x: f"{x.dtype} {x.shape}", kept)

    found = looks(after) if isinstance(after, dict) else type(after).__name__
    if found != looks(before) or "targets" not in after:
        raise UserError(f"{where} returned {found}: expected the targets, and as before {looks(before)}.")


def images_of(batch: Batch, name: str) -> jax.Array:
    """The inputs of a batch, for the augmentation `name`; UserError where they are no images."""
    inputs = batch["inputs"]
    if not hasattr(inputs, "ndim") or inputs.ndim != 4 or not jnp.issubdtype(inputs.dtype, jnp.floating):
        found = jax.tree.map(lambda x: f"{x.dtype} {x.shape}", inputs)
        raise UserError(
            f"data.augment has {name!r}, which is for images: floats of shape (batch, height, width, channels). "
            f"The inputs are {found}: leave it out."
        )
    return inputs


def per_image(function: Callable[..., jax.Array]) -> Callable[..., Batch]:
    """An augmentation, from a function of one image: (image (H, W, C) float32, key, **options) -> the same shape."""

    @functools.wraps(function)
    def augmentation(batch: Batch, keys: jax.Array, **options: Any) -> Batch:
        images = images_of(batch, function.__name__)
        changed = jax.vmap(functools.partial(function, **options))(images.astype(jnp.float32), keys)
        return {**batch, "inputs": changed.astype(images.dtype)}

    return augmentation
