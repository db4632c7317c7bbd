"""A linear classifier of texts, over bags of hashed n-grams of their tokens."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

# Odd numbers with bits all over, for hashes by multiplication: 2^32 over the golden ratio, and one of MurmurHash3.
_STEP, _MIX = 0x9E3779B1, 0x85EBCA6B


class NGrams(nn.Module):
    """The bag of n-grams of fastText (https://arxiv.org/abs/1607.01759) without its hidden layer.

    Each n-gram has a weight for each class, found by a hash (https://arxiv.org/abs/0902.2206), and those of a text are
    added up and divided by the root of their number, as if its bag were a vector of length 1. Of bytes, n-grams of 4 to
    6 know words by their stems, where too few texts show all the words. A segment of 0 is padding.

    Attributes:
      classes: how many there are.
      smallest: tokens in the shortest n-grams.
      largest: tokens in the longest.
      buckets: rows of the table of weights; n-grams of the same hash share one.
    """

    classes: int
    smallest: int = 4
    largest: int = 6
    buckets: int = 2**18

    def __post_init__(self) -> None:
        """Check the fields; a ValueError names the one that is wrong."""
        if not 1 <= self.smallest <= self.largest:
            raise ValueError(f"smallest={self.smallest} must be at least 1, and at most largest={self.largest}.")
        for name in ("classes", "buckets"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        super().__post_init__()

    @nn.compact
    def __call__(self, inputs: Mapping[str, jax.Array], train: bool = False) -> jax.Array:
        """Logits (B, classes) float32 of {"tokens", "segments"}, each (B, T) of an integer dtype."""
        tokens_BxT, segments_BxT = inputs["tokens"].astype(jnp.uint32) + 1, inputs["segments"]
        B, T = tokens_BxT.shape
        table = nn.Embed(self.buckets, self.classes, embedding_init=nn.initializers.zeros, name="ngrams")
        hash_BxT = jnp.zeros_like(tokens_BxT)
        sums_BxC: Any = jnp.zeros((B, self.classes))
        count_B: Any = jnp.zeros((B,), jnp.int32)
        factor = 1
        for n in range(1, self.largest + 1):  # the n-gram that ends at each place, from the one before that is shorter
            first_BxT, there_BxT = (jnp.pad(x, ((0, 0), (n - 1, 0)))[:, :T] for x in (tokens_BxT, segments_BxT))
            hash_BxT += first_BxT * jnp.uint32(factor)
            factor = factor * _STEP % 2**32
            if n < self.smallest:
                continue
            mixed_BxT = (hash_BxT ^ (hash_BxT >> 15)) * jnp.uint32(_MIX)
            rows_BxT = ((mixed_BxT ^ (mixed_BxT >> 13)) % self.buckets).astype(jnp.int32)
            real_BxT = (segments_BxT > 0) & (there_BxT == segments_BxT)
            sums_BxC += jnp.sum(table(rows_BxT) * real_BxT[..., None], axis=1)
            count_B += real_BxT.sum(1)
        bias_C = self.param("bias", nn.initializers.zeros, (self.classes,))
        logits_BxC: jax.Array = sums_BxC / jnp.sqrt(jnp.maximum(count_B, 1))[:, None] + bias_C[None]
        return logits_BxC
