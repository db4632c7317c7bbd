"""RandAugment: a few operations on each image, drawn from a list, all of one strength (arXiv:1909.13719).

Every image goes through every operation, of which one is kept. To keep that cheap, those that change places share one
sampling of the image; those that change colours are elementwise, but for the histogram of "equalize", which takes most
of the time.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from flaxmodels.data.augment import per_image
from flaxmodels.data.augment_images import affine, blend, grey, mean_grey
from flaxmodels.registry import Positive, Range

# What the strongest operations do, as in AutoAugment (Cubuk et al. 2018, arXiv:1805.09501, table 6).
DEGREES, SHEAR, SHIFT, FACTOR, BITS = 30.0, 0.3, 0.45, 0.9, 4

# (signed strength in -1..1, height, width) -> the arguments of `affine` after the image.
Place = Callable[[Any, int, int], tuple[Any, ...]]
PLACES: Mapping[str, Place] = {
    "rotate": lambda s, height, width: _turned(s * math.radians(DEGREES)),
    "shear_x": lambda s, height, width: (1.0, 0.0, s * SHEAR, 1.0, 0.0, 0.0),
    "shear_y": lambda s, height, width: (1.0, s * SHEAR, 0.0, 1.0, 0.0, 0.0),
    "shift_x": lambda s, height, width: (1.0, 0.0, 0.0, 1.0, 0.0, s * SHIFT * width),
    "shift_y": lambda s, height, width: (1.0, 0.0, 0.0, 1.0, s * SHIFT * height, 0.0),
}

# (image (H, W, C), signed strength) -> image.
COLOURS: Mapping[str, Callable[[jax.Array, Any], jax.Array]] = {
    "identity": lambda image, s: image,
    "autocontrast": lambda image, s: _stretched(image),
    "equalize": lambda image, s: _equalized(image),
    "brightness": lambda image, s: blend(image, 0.0, 1 + s * FACTOR),
    "contrast": lambda image, s: blend(image, mean_grey(image), 1 + s * FACTOR),
    "saturation": lambda image, s: blend(image, grey(image), 1 + s * FACTOR),
    "sharpness": lambda image, s: blend(image, _smoothed(image), 1 + s * FACTOR),
    "posterize": lambda image, s: _posterized(image, jnp.abs(s)),
    "solarize": lambda image, s: jnp.where(image > 1 - jnp.abs(s), 1 - image, image),
}


@per_image
def randaugment(
    image: jax.Array, key: jax.Array, *, count: Positive = 2, magnitude: Annotated[float, Range(0, 10)] = 9.0
) -> jax.Array:
    """Apply `count` operations, each drawn from `PLACES` and `COLOURS` alike (Cubuk et al. 2019, arXiv:1909.13719).

    Those with a direction go either way.

    Args:
      image: (H, W, C).
      key: of the example.
      count: how many, one after the other.
      magnitude: strength of all of them: at 10, a turn by 30 degrees, a shift by 0.45 of the side, a factor of 1.9.
    """
    height, width, _ = image.shape
    moved = [functools.partial(_numbers, place, height, width) for place in PLACES.values()]
    stayed = functools.partial(_numbers, lambda s, height, width: (1.0, 0.0, 0.0, 1.0, 0.0, 0.0), height, width)
    places = [*moved, *[stayed] * len(COLOURS)]
    colours = [*[COLOURS["identity"]] * len(PLACES), *COLOURS.values()]
    for turn in jax.random.split(key, count):
        drawn_key, sign_key = jax.random.split(turn)
        drawn = jax.random.randint(drawn_key, (), 0, len(places))
        strength = jnp.where(jax.random.bernoulli(sign_key), 1.0, -1.0) * (magnitude / 10)
        image = affine(image, *jax.lax.switch(drawn, places, strength))
        image = jax.lax.switch(drawn, colours, image, strength)
    return image


def _numbers(place: Place, height: int, width: int, strength: Any) -> jax.Array:
    return jnp.stack([jnp.asarray(value, jnp.float32) for value in place(strength, height, width)])


def _turned(angle: Any) -> tuple[Any, ...]:
    return (jnp.cos(angle), jnp.sin(angle), -jnp.sin(angle), jnp.cos(angle), 0.0, 0.0)


def _stretched(image: jax.Array) -> jax.Array:
    """Each channel from its darkest pixel at 0 to its brightest at 1; one of a single value stays."""
    low, high = (f(image, axis=(0, 1), keepdims=True) for f in (jnp.min, jnp.max))
    return jnp.where(high > low, (image - low) / jnp.where(high > low, high - low, 1), image)


def _equalized(image: jax.Array) -> jax.Array:
    """Each channel by the share of its pixels that are darker: a flat histogram, of 256 levels."""
    levels = jnp.round(image * 255).astype(jnp.int32)
    channels = jnp.arange(image.shape[-1])[None, None, :]
    counts = jnp.zeros((256, image.shape[-1]), jnp.int32).at[levels, channels].add(1)
    darker = jnp.cumsum(counts, axis=0) - counts
    most = jnp.max(jnp.where(counts > 0, darker, 0), axis=0)  # darker than the brightest
    flat = darker[levels, channels] / jnp.maximum(most, 1)[None, None, :]
    return jnp.where((most > 0)[None, None, :], flat, image)


def _smoothed(image: jax.Array) -> jax.Array:
    """The mean over 3 x 3 pixels, the one in the middle five times; those at the border stay."""
    rows = image[:-2] + image[1:-1] + image[2:]
    middle = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * image[1:-1, 1:-1]
    return image.at[1:-1, 1:-1].set(middle * (1 / 13))


def _posterized(image: jax.Array, strength: Any) -> jax.Array:
    """Of the 8 bits of each value the lower ones are cleared, up to `BITS` of them; none: the image as it was."""
    step = (1 << jnp.round(BITS * strength).astype(jnp.int32)).astype(jnp.float32)
    return jnp.where(step > 1, jnp.floor(jnp.round(image * 255) / step) * step * (1 / 255), image)
