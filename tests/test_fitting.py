"""What a stored tree and a wanted one differ in: each difference is named, and nothing is cast that nobody named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxmodels import fitting
from flaxmodels.fitting import Leaf
from flaxmodels.registry import UserError

F32, BF16, I32, I8 = "float32", "bfloat16", "int32", "int8"
TREE = {
    "params/head/kernel": Leaf((4, 8), F32),
    "params/head/bias": Leaf((8,), F32),
    "opt_state/0/count": Leaf((), I32),
    "step": Leaf((), I32),
}


def changed(**leaves):
    """TREE with some leaves replaced, or left out where None; "__" stands for "/"."""
    found = TREE | {path.replace("__", "/"): leaf for path, leaf in leaves.items()}
    return {path: leaf for path, leaf in found.items() if leaf is not None}


def test_the_same_tree_fits():
    assert fitting.differences(TREE, dict(TREE)) == []


def test_leaves_are_read_off_arrays_and_shapes():
    tree = {"a": np.zeros((2, 3), np.float32), "b": [jax.ShapeDtypeStruct((), jnp.bfloat16), jnp.zeros(4, jnp.int32)]}
    found = fitting.leaves(tree)
    assert found == {"a": Leaf((2, 3), F32), "b/0": Leaf((), BF16), "b/1": Leaf((4,), I32)}
    assert [leaf.nbytes for leaf in found.values()] == [24, 2, 16]


def test_every_kind_is_named_at_once():
    saved = changed(params__head__kernel=Leaf((4, 9), F32), params__old=Leaf((3,), F32), opt_state__0__count=None)
    wanted = changed(params__new__name=Leaf((5,), F32), step=Leaf((), I8))
    assert sorted(fitting.differences(saved, wanted)) == [
        "opt_state/0/count is missing: wanted () int32",
        "params/head/kernel was (4, 9) float32, is (4, 8) float32",
        "params/new/name is missing: wanted (5,) float32",
        "params/old is not wanted: saved (3,) float32",
        "step was () int32, is () int8; checkpoint.cast casts floats only",
    ]


def test_a_renamed_array_is_paired_with_the_nearest_name_of_its_shape():
    layers = {f"params/block_{i}/kernel": Leaf((4, 4), F32) for i in range(12)}
    wanted = {path.replace("block", "layer"): leaf for path, leaf in layers.items()}
    found = fitting.differences(layers, wanted)
    assert sorted(found) == sorted(
        f"params/block_{i}/kernel was probably renamed to params/layer_{i}/kernel, both (4, 4) float32"
        for i in range(12)
    )
    # Not where the shape is another, the dtype is, the name has nothing in common, or it is of another kind.
    for other in ({"params/block_0/kernel": Leaf((4, 5), F32)}, {"params/block_0/kernel": Leaf((4, 4), BF16)},
                  {"params/zzz": Leaf((4, 4), F32)}, {"opt_state/layer_0/kernel": Leaf((4, 4), F32)}):  # fmt: skip
        assert fitting.renames({"params/layer_0/kernel": Leaf((4, 4), F32)}, other) == {}


def test_moments_are_renamed_as_their_parameters_are():
    def tree(name):
        paths = [f"params/{name}", f"opt_state/0/mu/{name}", f"opt_state/0/nu/{name}"]
        return dict.fromkeys(paths, Leaf((8,), F32))

    found = fitting.renames(tree("heads/bias"), tree("head/bias"))
    assert found == {new: new.replace("heads", "head") for new in tree("heads/bias")}
    # Their paths are alike for the most part, whatever the parameters are called.
    assert fitting.renames(tree("xyz/w"), tree("head/bias")) == {}


def test_names_are_guessed_up_to_a_limit(monkeypatch):
    monkeypatch.setattr(fitting, "PAIRS", 1000)
    old, new = ({f"params/{name}_{i}": Leaf((1,), F32) for i in range(100)} for name in ("old", "new"))
    lines = fitting.differences(old, new)
    renamed = [line for line in lines if "renamed" in line]
    assert 5 < len(renamed) < 15
    assert len(lines) == 200 - len(renamed)  # and none is left out


@pytest.mark.parametrize(
    ("old", "new", "allowed"),
    [
        (F32, BF16, True), (BF16, F32, True), (F32, "float16", True), ("float8_e4m3fn", BF16, True),
        (I32, F32, False), (F32, I32, False), (I32, I8, False), (I32, "uint32", False), ("bool", F32, False),
    ],
)  # fmt: skip
def test_only_floats_are_cast_and_only_by_name(old, new, allowed):
    saved, wanted = {"params/a": Leaf((2,), old)}, {"params/a": Leaf((2,), new)}
    (line,) = fitting.differences(saved, wanted)
    assert line.startswith(f"params/a was (2,) {old}, is (2,) {new}; checkpoint.cast ")
    assert fitting.differences(saved, wanted, ("^params/",)) == ([] if allowed else [line])
    assert ("does not name it" in line) == allowed


def test_a_cast_names_paths_that_are_there():
    wanted = {"params/a": Leaf((2,), F32), "params/b": Leaf((2,), F32)}
    saved = {path: Leaf((2,), BF16) for path in wanted}
    assert fitting.differences(saved, wanted, ("a$",)) == [
        "params/b was (2,) bfloat16, is (2,) float32; checkpoint.cast does not name it"
    ]
    with pytest.raises(UserError, match=r"checkpoint.cast: 'parms/a' matches no path. Did you mean 'params/a'\?"):
        fitting.differences(saved, wanted, ("parms/a",))
    with pytest.raises(UserError, match=r"start.cast: '\(' is no regular expression: "):
        fitting.differences(saved, wanted, ("(",), where="start.cast")
    other = {"params/a": Leaf((3,), BF16), "params/b": Leaf((2,), F32)}  # a cast is no excuse for another shape
    assert fitting.differences(other, wanted, ("a",)) == ["params/a was (3,) bfloat16, is (2,) float32"]


@pytest.mark.parametrize(("count", "more"), [(1, 0), (fitting.LISTED, 0), (fitting.LISTED + 3, 3)])
def test_one_message_lists_the_first_and_counts_the_others(count, more):
    lines = fitting.differences({}, {f"params/p{i:02}": Leaf((i,), F32) for i in range(count)})
    text = fitting.refusal("it can't be restored", lines, "Do this.").splitlines()
    assert text[0] == "it can't be restored: " + ("one difference" if count == 1 else f"{count} differences")
    assert text[-1] == "Do this." and len(text) == 2 + min(count, fitting.LISTED) + bool(more)
    assert not more or text[-2] == f"  and {more} more"


def test_the_fix_says_what_helps():
    renamed = fitting.differences({"params/a": Leaf((), F32)}, {"params/ab": Leaf((), F32)})
    cast = fitting.differences({"params/a": Leaf((), F32)}, {"params/a": Leaf((), BF16)})
    ints = fitting.differences({"params/a": Leaf((), I32)}, {"params/a": Leaf((), BF16)})
    assert "start.rename" in fitting.fix(renamed) and "checkpoint.cast" not in fitting.fix(renamed)
    assert "checkpoint.cast=(REGEX, ...)" in fitting.fix(cast) and "start." not in fitting.fix(cast)
    assert fitting.fix(ints) == "Go back to the config that it was trained with, or choose another --workdir."
