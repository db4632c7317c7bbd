"""A Flax NNX module as a Linen one: what trains, shards and saves a Linen module does so with this.

An NNX module holds its arrays; a Linen one is given them, and hands back what changed. So wherever this is traced the
module is made anew, each of its variables gets the value that came in, it is called, and what its variables then hold
goes out. Arrays that its constructor draws are read by nobody, and the compiler leaves them out.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
from flax import nnx

# (collection, path, variable)
Held = tuple[str, tuple[str, ...], nnx.Variable]


def maker(cls: type[nnx.Module]) -> Callable[..., nn.Module]:
    """A function with the signature of an NNX class, without `rngs`, that makes its modules as Linen ones.

    Args:
      cls: its `__init__` takes what is there to configure, and `rngs: nnx.Rngs` if it draws anything. Its `__call__`
        takes the inputs, and `train: bool` if it wants to be told; dropout and BatchNorm are told by `train()` and
        `eval()` in any case.
    """
    signature = inspect.signature(cls.__init__)  # that of the class is its metaclass's, which takes anything

    @functools.wraps(cls.__init__)
    def make(**fields: Any) -> nn.Module:
        create, seeded = functools.partial(cls, **fields), "rngs" in signature.parameters
        module = Typed(create, seeded, fields["dtype"]) if "dtype" in fields else FromNNX(create, seeded)
        jax.eval_shape(lambda: module.fresh(_key()) and None)  # a constructor that refuses the fields does so here
        return module

    shown = [parameter for name, parameter in signature.parameters.items() if name not in ("self", "rngs")]
    vars(make)["__signature__"] = signature.replace(parameters=shown)
    return make


class FromNNX(nn.Module):
    """An NNX module as a Linen one.

    Its variables are plain arrays in nested dicts, so that sharding rules, optimizer masks and checkpoints see paths
    such as "layers/0/kernel": `nnx.Param` in "params", `nnx.BatchStat` in "batch_stats", a type of your own in a
    collection of its name. Only an `nnx.Param` is trained. What a module sows is dropped, and the sharding that its
    variables are annotated with means nothing: rules outside of the module say it.

    Each random stream in the module starts each step from a key of its own; none is stored. In an evaluation, where
    nothing is random, and for arrays that the constructor draws and holds outside of variables, the keys are constants.

    Attributes:
      create: the class, with all its arguments but `rngs`.
      seeded: whether it takes `rngs`.
    """

    create: functools.partial[nnx.Module]
    seeded: bool

    @nn.compact
    def __call__(self, inputs: Any, train: bool = False) -> Any:
        """What the NNX module gives for `inputs`, a pytree of arrays (B, ...).

        With `train` and random streams, `apply` needs `rngs={"dropout": key}`.
        """
        starts = self.is_initializing()
        module = self.fresh(self.make_rng("params") if starts else _key())
        held = list(_variables(module))
        if starts:
            self._keep(held)
        else:
            for collection, path, variable in held:
                variable.set_value(functools.reduce(lambda tree, name: tree[name], path, self.variables[collection]))
        for stream in _streams(module) if train else ():
            stream.set_value(jax.random.split(self.make_rng("dropout"), stream.get_value().shape))
        told = {"train": train} if "train" in inspect.signature(type(module).__call__).parameters else {}
        module.train() if train else module.eval()
        with nnx.use_eager_sharding(False):
            outputs = module(inputs, **told)
        if not starts:
            self._keep(held)
        return outputs

    def fresh(self, key: jax.Array) -> nnx.Module:
        """The NNX module, its parameters drawn from `key`."""
        with nnx.use_eager_sharding(False):  # it would ask for a mesh with the axes of the annotations
            return self.create(rngs=nnx.Rngs(key)) if self.seeded else self.create()

    def _keep(self, held: list[Held]) -> None:
        """Hand out what the variables hold now, of the collections that may change."""
        trees: dict[str, Any] = {}
        for collection, path, variable in held:
            tree = trees.setdefault(collection, {})
            for name in path[:-1]:
                tree = tree.setdefault(name, {})
            tree[path[-1]] = variable.get_value()
        for collection in filter(self.is_mutable_collection, trees):
            for name, tree in trees[collection].items():
                self.put_variable(collection, name, tree)


class Typed(FromNNX):
    """One that is told the dtype of its computation. A field says so, as it does of any Linen module.

    Attributes:
      dtype: what it is told.
    """

    dtype: Any


def _key() -> jax.Array:
    """For what is replaced, or is the same for every seed."""
    return jax.random.key(0, impl="threefry2x32")


def _variables(module: nnx.Module) -> Iterator[Held]:
    """(collection, path, variable) of all that is to be stored; one that is shared comes once."""
    names = {nnx.Param: "params", nnx.BatchStat: "batch_stats"}
    for path, variable in nnx.iter_graph(module):
        if isinstance(variable, nnx.Variable) and not isinstance(variable, nnx.RngState):
            collection = next((name for kind, name in names.items() if isinstance(variable, kind)), None)
            yield collection or type(variable).__name__, tuple(map(str, path)), variable


def _streams(module: nnx.Module) -> Iterator[nnx.Variable]:
    return (variable for _, variable in nnx.iter_graph(module) if isinstance(variable, nnx.RngKey))
