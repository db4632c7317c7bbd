"""Which dtype parameters, computation and outputs have.

Parameters in float32, computation in bfloat16 on accelerators: the usual mixed precision. What adds up much stays in
float32 whatever the policy says: the loss, softmax, norms, statistics, sums of gradients, second moments.

There is no float16. Its smallest normal number is 6e-5, so gradients need a loss scale that is found while training
(Micikevicius et al. 2018, arXiv:1710.03740); bfloat16 has the range of float32, needs none, and is native to every
accelerator that JAX of today supports.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from flaxmodels import registry

Float = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class Policy:
    """Names of dtypes.

    Attributes:
      param: of the parameters as they are stored. An update smaller than 1/256 of a parameter in bfloat16 is lost.
      compute: of the model's computation.
      output: of what the model returns.
    """

    param: Float
    compute: Float
    output: Float

    def __str__(self) -> str:
        return f"parameters {self.param}, computation {self.compute}, outputs {self.output}"


def policy(
    param: Float = "float32",
    compute: Literal["auto", "float32", "bfloat16"] = "auto",
    output: Float = "float32",
    *,
    platform: str,
) -> Policy:
    """The policy of a config.

    Args:
      param: dtype of the parameters as they are stored. bfloat16 halves their memory, and loses updates smaller than
        1/256 of a parameter: for fine-tuning with large steps, or a model that does not fit otherwise.
      compute: dtype of the computation; "auto" is bfloat16 on "gpu" and "tpu", and float32 on "cpu".
      output: dtype of what the model returns. The losses compute in float32 from either.
      platform: "cpu", "gpu" or "tpu", of the devices of the mesh.

    Raises:
      UserError: there is no such dtype here.
    """
    given = {"param": param, "compute": compute, "output": output}
    registry.bind(policy, given, where="precision", provided=("platform",))
    if compute == "auto":
        compute = "float32" if platform == "cpu" else "bfloat16"
    return Policy(param, compute, output)


def cast(tree: Any, dtype: Any) -> Any:
    """A pytree with its real floating leaves in `dtype`; integers, booleans, complex numbers and PRNG keys as they are.

    So is all of it where `dtype` is None. A leaf that is in `dtype` already is returned itself.
    """
    if dtype is None:
        return tree
    return jax.tree.map(lambda x: x.astype(dtype) if _floating(x) and x.dtype != dtype else x, tree)


def cast_like(tree: Any, like: Any) -> Any:
    """A pytree with each floating leaf in the dtype of the leaf of `like` in its place."""
    return jax.tree.map(lambda x, y: cast(x, y.dtype) if _floating(y) else x, tree, like)


def _floating(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)
