"""Augmentations of one image: moved, interpolated, of other colours. See `augment.py`.

Costs: `crop` and `shift` copy a window; `resized_crop`, `zoom` and `rotate` gather four neighbours of each pixel, which
a TPU is slow at; the rest is elementwise, `contrast` after a sum.

The bits must not depend on how many examples a device has, but compilers fuse a product and a sum into one rounding
where that suits a loop, and split sums as they like. So here sums of many are of integers, sums of products are of
numbers that make them exact (`grid`), and all else has one product in a sum (`mix`).
"""

import math
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp

from flaxmodels.data.augment import per_image
from flaxmodels.registry import Fraction, Positive, Range, UserError

Mode = Literal["zeros", "reflect"]
# Ends of a range, in any order, that a number is drawn from.
Factors = tuple[Annotated[float, Range(0, 100)], Annotated[float, Range(0, 100)]]
Ratios = tuple[Annotated[float, Range(0.1, 10)], Annotated[float, Range(0.1, 10)]]
Shares = tuple[Annotated[float, Range(0.001, 1)], Annotated[float, Range(0.001, 1)]]

# Red, green and blue in the brightness of a pixel: ITU-R BT.601, in 65,536ths.
LUMA = (19595, 38470, 7471)
# Boxes that `resized_crop` draws until one fits into the image.
TRIES = 10

# What moves pixels


@per_image
def crop(image: jax.Array, key: jax.Array, *, padding: int = 4, mode: Mode = "zeros") -> jax.Array:
    """Pad by `padding` pixels on each side and cut the old size out, anywhere.

    Args:
      image: (H, W, C).
      key: of the example.
      padding: pixels.
      mode: what stands in the padding.
    """
    return _window(image, key, (padding, padding), mode, "crop")


@per_image
def shift(image: jax.Array, key: jax.Array, *, fraction: Fraction = 0.1, mode: Mode = "zeros") -> jax.Array:
    """Move up or down by up to `fraction` of the height, left or right by up to that of the width; whole pixels."""
    return _window(image, key, (round(fraction * image.shape[0]), round(fraction * image.shape[1])), mode, "shift")


def _window(image: jax.Array, key: jax.Array, padding: tuple[int, int], mode: Mode, name: str) -> jax.Array:
    if mode == "reflect" and any(p >= side for p, side in zip(padding, image.shape)):
        raise UserError(
            f"data.augment has {name!r} with mode='reflect' and {max(padding)} pixels of padding: "
            f"it must be less than the sides of the images, {image.shape[0]} x {image.shape[1]}."
        )
    wide = jnp.pad(image, [(p, p) for p in (*padding, 0)], mode="reflect" if mode == "reflect" else "constant")
    row, column = jax.random.randint(key, (2,), 0, 2 * jnp.asarray(padding) + 1)
    return jax.lax.dynamic_slice(wide, (row, column, 0), image.shape)


@per_image
def flip(image: jax.Array, key: jax.Array, *, horizontal: Fraction = 0.5, vertical: Fraction = 0.0) -> jax.Array:
    """Mirror left to right with probability `horizontal`, and upside down with probability `vertical`."""
    across, down = jax.random.uniform(key, (2,)) < jnp.asarray((horizontal, vertical))
    image = jnp.where(across, image[:, ::-1], image)
    return jnp.where(down, image[::-1], image)


@per_image
def cutout(image: jax.Array, key: jax.Array, *, size: Positive = 8, fill: Fraction = 0.0) -> jax.Array:
    """Fill a square of `size` pixels, its centre anywhere in the image (DeVries & Taylor 2017, arXiv:1708.04552)."""
    height, width, _ = image.shape
    if size > min(height, width):
        raise UserError(
            f"data.augment has 'cutout' with size={size}, and images of {height} x {width}, of which little or nothing "
            f"would be left: set a size of at most {min(height, width)}."
        )
    return jnp.where(box(image.shape, key, (size, size)), fill, image)


def box(shape: tuple[int, ...], key: jax.Array, sides: Any) -> jax.Array:
    """(H, W, 1) bool: a box of `sides` pixels, its centre uniform over all pixels; what is outside is lost."""
    inside = []
    for axis, centre in enumerate(jax.random.randint(key, (2,), 0, jnp.asarray(shape[:2]))):
        start = centre - sides[axis] // 2
        place = jnp.arange(shape[axis])
        inside.append((place >= start) & (place < start + sides[axis]))
    return inside[0][:, None, None] & inside[1][None, :, None]


# What interpolates


@per_image
def resized_crop(
    image: jax.Array,
    key: jax.Array,
    *,
    area: Shares = (0.08, 1.0),
    aspect: Ratios = (3 / 4, 4 / 3),
) -> jax.Array:
    """Cut a box out and stretch it to the size of the image (Szegedy et al. 2015, arXiv:1409.4842, sec. 6).

    Args:
      image: (H, W, C).
      key: of the example.
      area: range of the box's share of the image; uniform.
      aspect: range of its width over its height; uniform in the logarithm. Of ten boxes the first that fits counts;
        where none does, the first, cut to the image.
    """
    height, width, _ = image.shape
    shape_key, place_key = jax.random.split(key)
    share, stretch = jax.random.uniform(shape_key, (2, TRIES))
    covered = area[0] + share * (area[1] - area[0])
    # The box's height and width, as shares of those of the image, and the ratio of the two.
    ratio = jnp.exp(math.log(aspect[0]) + stretch * (math.log(aspect[1]) - math.log(aspect[0]))) * (height / width)
    tall, wide = jnp.sqrt(covered / ratio), jnp.sqrt(covered * ratio)
    first = jnp.argmax((tall <= 1) & (wide <= 1))
    axes = []
    for side, sizes, place in zip((height, width), (tall, wide), jax.random.uniform(place_key, (2,))):
        size = grid(jnp.minimum(sizes[first], 1))
        at = grid(place * (1 - size) * side) + (jnp.arange(side) + 0.5) * size - 0.5
        axes.append(jnp.clip(at, 0, side - 1))
    return _bilinear(image, axes[0][:, None], axes[1][None, :])


@per_image
def zoom(image: jax.Array, key: jax.Array, *, factor: Ratios = (0.8, 1.2)) -> jax.Array:
    """Magnify about the centre by a factor from a range; below 1 there are zeros around the image."""
    shrink = 1 / jax.random.uniform(key, (), minval=factor[0], maxval=factor[1])
    return affine(image, shrink, 0.0, 0.0, shrink)


@per_image
def rotate(image: jax.Array, key: jax.Array, *, degrees: Annotated[float, Range(0, 180)] = 15.0) -> jax.Array:
    """Turn about the centre by up to `degrees` either way; zeros come in at the corners."""
    angle = jax.random.uniform(key, (), minval=-1.0) * math.radians(degrees)
    return affine(image, jnp.cos(angle), jnp.sin(angle), -jnp.sin(angle), jnp.cos(angle))


def affine(image: jax.Array, yy: Any, yx: Any, xy: Any, xx: Any, down: Any = 0.0, right: Any = 0.0) -> jax.Array:
    """The result at (y, x) is the image at (yy y + yx x - down, xy y + xx x - right), bilinear; zeros outside.

    Args:
      image: (H, W, C) float32, sides up to 1024.
      yy: y in the image for one pixel further down in the result. All numbers are taken to the nearest 4096th.
      yx: y in the image for one pixel further to the right.
      xy: x in the image for one pixel further down.
      xx: x in the image for one pixel further to the right.
      down: pixels that the image moves down.
      right: pixels that the image moves to the right.
    """
    yy, yx, xy, xx, down, right = map(grid, (yy, yx, xy, xx, down, right))
    middle, centre = ((side - 1) / 2 for side in image.shape[:2])
    y, x = (jnp.arange(image.shape[0]) - middle)[:, None], (jnp.arange(image.shape[1]) - centre)[None, :]
    return _bilinear(image, yy * y + yx * x - down + middle, xy * y + xx * x - right + centre)


def _bilinear(image: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """The image at `rows` and `columns`, (H, W) or what broadcasts to it; zeros outside."""
    height, width, channels = image.shape
    rows, columns = jnp.clip(rows, -1, height), jnp.clip(columns, -1, width)
    top, left = jnp.floor(rows), jnp.floor(columns)
    # In a frame of zeros all four neighbours of all these places exist.
    framed = jnp.pad(image, ((1, 2), (1, 2), (0, 0))).reshape(-1, channels)
    corner = ((top + 1) * (width + 3) + left + 1).astype(jnp.int32)
    upper_left, upper_right, lower_left, lower_right = (
        framed.at[corner + offset].get(mode="promise_in_bounds") for offset in (0, 1, width + 3, width + 4)
    )
    across, down = (columns - left)[..., None], (rows - top)[..., None]
    return mix(mix(upper_left, upper_right, across), mix(lower_left, lower_right, across), down)


def grid(number: Any) -> Any:
    """The nearest multiple of 1/4096: times the place of a pixel it is exact in float32, and so are sums of these."""
    return jnp.round(number * 4096.0) * (1 / 4096)


def mix(one: Any, other: Any, share: Any) -> Any:
    """`one` with a `share` of it replaced by `other`: exactly `one` at 0, and of numbers in 0..1 never outside that."""
    return one + share * (other - one)


# What changes colours


@per_image
def brightness(image: jax.Array, key: jax.Array, *, factor: Factors = (0.8, 1.2)) -> jax.Array:
    """Multiply by a factor from a range."""
    return blend(image, 0.0, jax.random.uniform(key, (), minval=factor[0], maxval=factor[1]))


@per_image
def contrast(image: jax.Array, key: jax.Array, *, factor: Factors = (0.8, 1.2)) -> jax.Array:
    """Multiply the distance of each pixel from the mean brightness of its image by a factor from a range."""
    return blend(image, mean_grey(image), jax.random.uniform(key, (), minval=factor[0], maxval=factor[1]))


@per_image
def saturation(image: jax.Array, key: jax.Array, *, factor: Factors = (0.8, 1.2)) -> jax.Array:
    """Multiply the distance of each colour from the grey of its brightness by a factor from a range."""
    return blend(image, grey(image), jax.random.uniform(key, (), minval=factor[0], maxval=factor[1]))


def grey(image: jax.Array) -> jax.Array:
    """(H, W, C) -> (H, W, 1): the brightness of colours; the mean over channels where they are not three."""
    shares = LUMA if image.shape[-1] == len(LUMA) else (1,) * image.shape[-1]
    total = jnp.sum(_levels(image) * jnp.asarray(shares)[None, None, :], axis=-1, keepdims=True)
    return total * (1 / (255 * sum(shares)))


def mean_grey(image: jax.Array) -> jax.Array:
    """(H, W, C) -> (1, 1, 1): the mean brightness."""
    mean = jnp.sum(_levels(image), axis=(0, 1), keepdims=True) * (1 / (255 * image.shape[0] * image.shape[1]))
    return grey(mean)


def _levels(image: jax.Array) -> jax.Array:
    """In 8 bits, 0 to 255, int32."""
    return jnp.round(image * 255).astype(jnp.int32)


def blend(image: jax.Array, base: Any, factor: Any) -> jax.Array:
    """`base` at factor 0, the image, exactly, at 1, and beyond it above; clipped to 0..1."""
    return jnp.clip(mix(image, base, 1 - factor), 0, 1)
