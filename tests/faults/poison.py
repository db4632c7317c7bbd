"""Models, a loss and data that go wrong where and when a test says: named as "poison:Name" by configs.

The data mark examples, `marked_images(bad=(3, 17))`: their first pixel is white, and that of no other is. A model or a
loss that sees the mark goes wrong for that example. So nothing in flaxmodels knows that it is tested.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxmodels.data.split import Source
from flaxmodels.data.synthetic import synthetic_images
from flaxmodels.losses import softmax_cross_entropy
from flaxmodels.metrics import Metrics

Kind = Literal["forward", "backward", "overflow"]


def marked_images(examples: int = 256, test_examples: int = 64, bad: tuple[int, ...] = (), side: int = 4) -> Source:
    """`synthetic_images` with a white first pixel in the training examples `bad`."""
    source = synthetic_images(examples, test_examples, side=side)
    arrays = dict(source.train.arrays)
    images = arrays["image"].copy()
    images[:, 0, 0] = images[:, 0, 0].clip(0, 254)
    images[list(bad), 0, 0] = 255
    train = dataclasses.replace(source.train, arrays=arrays | {"image": images})
    return dataclasses.replace(source, name="marked_images", train=train, fingerprint=f"marked {bad}")


class Trap(nn.Module):
    """Goes wrong for marked examples: in its forward pass, its backward pass only, or by a number too large."""

    kind: Kind

    @nn.compact
    def __call__(self, x: jax.Array, marked: jax.Array) -> jax.Array:
        marked = marked.reshape(-1, *(1,) * (x.ndim - 1))
        if self.kind == "forward":
            return x / jnp.where(marked, 0.0, 1.0)
        if self.kind == "overflow":
            return x * jnp.where(marked, 1e38, 1.0) * jnp.where(marked, 1e38, 1.0)
        return x + jnp.sqrt(jnp.where(marked, 0.0 * x, 1.0 + x * x))  # the slope of a root at 0 is infinite


class Net(nn.Module):
    """Dense layers with BatchNorm and a trap between the second and the third."""

    classes: int
    kind: Kind = "forward"
    norm: bool = True
    width: int = 16

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        marked = x[:, 0, 0, 0] == 1.0
        x = nn.relu(nn.Dense(self.width, name="first")(x.reshape(x.shape[0], -1)))
        if self.norm:
            x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        x = nn.relu(nn.Dense(self.width, name="second")(x))
        x = Trap(self.kind, name="trap")(x, marked)
        x = nn.Dropout(0.1, deterministic=not train)(x)
        return nn.Dense(self.classes, name="third")(x)


class Block(nn.Module):
    """A layer, whose `inner` has a trap that is open in one layer only."""

    kind: Kind
    width: int
    bad: int

    @nn.compact
    def __call__(self, carry: tuple[jax.Array, jax.Array], layer: jax.Array) -> tuple[Any, None]:
        x, marked = carry
        y = nn.tanh(nn.Dense(self.width, name="inner")(x))
        return (x + Trap(self.kind, name="trap")(y, marked & (layer == self.bad)), marked), None


class Layers(nn.Module):
    """Blocks in a scan, as a transformer has them, rematerialised or not; the trap is in layer `bad`."""

    classes: int
    kind: Kind = "forward"
    layers: int = 4
    width: int = 16
    bad: int = 2
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        marked = x[:, 0, 0, 0] == 1.0
        x = nn.Dense(self.width, name="embed")(x.reshape(x.shape[0], -1))
        block = nn.remat(Block, prevent_cse=False) if self.remat else Block
        scan = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers)
        (x, _), _ = scan(self.kind, self.width, self.bad, name="blocks")((x, marked), jnp.arange(self.layers))
        return nn.Dense(self.classes, name="head")(x)


def spiky(outputs: jax.Array, batch: Mapping[str, Any], *, factor: float = 1e4) -> Metrics:
    """Cross-entropy; that of a batch with a marked example is multiplied by `factor`."""
    found = softmax_cross_entropy(outputs, batch)
    marked = jnp.any(batch["inputs"][:, 0, 0, 0] == 1.0)
    total, count = found["loss"]
    return found | {"loss": (jnp.where(marked, factor, 1.0) * total, count)}
