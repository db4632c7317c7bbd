"""Names to callables, and options checked against signatures."""

import sys
import typing
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import flax.linen as nn
import pytest
from ml_collections import ConfigDict

from flaxmodels import registry
from flaxmodels.registry import Fraction, Positive, Range, Signed, Steps, UserError

TABLE = {"adam": len, "sgd": sorted, "lazy": "json:dumps"}


@pytest.fixture
def my_code(tmp_path, monkeypatch):
    """A folder on the path, in which a test writes modules; they are forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("my_"):
            del sys.modules[name]


# suggest


def test_suggest_names_the_nearest_and_lists_all_in_order():
    assert registry.suggest("adm", ["sgd", "adam"]) == "Did you mean 'adam'? There are: adam, sgd."


@pytest.mark.parametrize("name", ["zzzz", "", 3, None])
def test_suggest_without_a_near_name_only_lists(name):
    assert registry.suggest(name, ["sgd", "adam"]) == "There are: adam, sgd."


def test_suggest_from_nothing():
    assert registry.suggest("x", []) == "There are: none."


# pick


def test_pick_a_name_of_the_table():
    assert registry.pick(TABLE, "adam", "optim.name") is len


def test_pick_imports_what_the_table_only_names():
    import json

    assert registry.pick(TABLE, "lazy", "optim.name") is json.dumps


def test_pick_something_importable():
    import collections

    assert registry.pick(TABLE, "collections:OrderedDict", "x") is collections.OrderedDict


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "adaam",
            r"optim.name='adaam' does not exist. Did you mean 'adam'\? There are: adam, lazy, sgd.*package.module",
        ),
        ("", r"optim.name='' does not exist. There are"),
        ("json.dumps", r"'json.dumps' does not exist"),
        (None, r"optim.name=None must be a name. There are: adam"),
        (3, r"optim.name=3 must be a name"),
        (("adam",), r"must be a name"),
        (["adam"], r"must be a name"),
        ("json:dump_s", r"module 'json' has no 'dump_s'. Did you mean 'dumps'"),
        ("json:", r"module 'json' has no ''"),
        ("no_such_pkg:f", r"there is no module 'no_such_pkg'. Is its folder on PYTHONPATH"),
        ("json.nothing:f", r"there is no module 'json.nothing'"),
        (":f", r"':f' names no module"),
        ("..json:dumps", r"names no module"),
    ],
)
def test_pick_refuses(name, message):
    with pytest.raises(UserError, match=message):
        registry.pick(TABLE, name, "optim.name")


def test_pick_takes_the_users_own(my_code):
    (my_code / "my_pkg").mkdir()
    (my_code / "my_pkg" / "__init__.py").write_text("")
    (my_code / "my_pkg" / "deep.py").write_text("def mine(a=1): return a\n_hidden = 2\n")
    assert registry.pick({}, "my_pkg.deep:mine", "x")(3) == 3
    with pytest.raises(UserError, match=r"has no 'mime'. Did you mean 'mine'\? There are: mine\.$"):
        registry.pick({}, "my_pkg.deep:mime", "x")
    with pytest.raises(UserError, match=r"there is no module 'my_pkg.shallow'"):
        registry.pick({}, "my_pkg.shallow:mine", "x")


def test_what_a_users_module_lacks_surfaces_as_itself(my_code):
    (my_code / "my_needy.py").write_text("import a_package_not_installed\n")
    with pytest.raises(ModuleNotFoundError, match="a_package_not_installed") as caught:
        registry.pick({}, "my_needy:f", "x")
    assert not isinstance(caught.value, UserError)


@pytest.mark.parametrize(("text", "error"), [("1 / 0", ZeroDivisionError), ("def f(:", SyntaxError)])
def test_an_error_of_a_users_module_surfaces_as_itself(my_code, text, error):
    (my_code / "my_broken.py").write_text(text + "\n")
    with pytest.raises(error):
        registry.pick({}, "my_broken:f", "x")


# bind


def function(
    inputs: Any,
    rate: float,
    size: Positive = 3,
    share: Fraction = 0.5,
    shift: Signed = 0.0,
    wait: Steps = 0,
    deep: bool = False,
    kind: Literal["a", "b"] = "a",
    widths: tuple[int, ...] = (),
    pair: tuple[int, float] = (1, 2.0),
    most: Positive | None = None,
    decay: Fraction | None = None,
    table: dict[str, Any] | None = None,
    rules: tuple[tuple[str, dict], ...] = (),
    name: str = "",
    **rest: Any,
):
    return locals()


def bind(**options):
    return registry.bind(function, options, where="optim", provided=("inputs",), convert=lambda text, key: 17)


@pytest.mark.parametrize(
    "options",
    [
        {"rate": 1}, {"rate": 1e-3, "size": 1}, {"rate": 0}, {"rate": 1, "share": 1}, {"rate": 1, "shift": -2.5},
        {"rate": 1, "wait": 5}, {"rate": 1, "deep": True}, {"rate": 1, "kind": "b"}, {"rate": 1, "widths": (4, 5)},
        {"rate": 1, "pair": (4, 5)}, {"rate": 1, "most": None}, {"rate": 1, "most": 2}, {"rate": 1, "table": {"a": -1}},
        {"rate": 1, "rules": (("x", {"freeze": True}),)}, {"rate": 1, "name": "x"}, {"rate": 10**400},
    ],
)  # fmt: skip
def test_bind_returns_what_fits_as_it_is(options):
    assert bind(**options) == options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rat": 1, "rate": 1}, r"optim.rat=1: unknown key. Did you mean 'rate'\? There are: decay, deep, kind"),
        ({"inputs": 1, "rate": 1}, r"optim.inputs=1: unknown key"),
        ({"rest": 1, "rate": 1}, r"optim.rest=1: unknown key"),
        ({}, r"optim.rate is not set. Add it to the config, or --config.optim.rate=VALUE"),
        ({"rate": "fast"}, r"optim.rate='fast' has the wrong type: expected a number"),
        ({"rate": None}, r"optim.rate=None has the wrong type: expected a number"),
        ({"rate": True}, r"optim.rate=True has the wrong type: expected a number"),
        ({"rate": (1.0,)}, r"wrong type"),
        ({"rate": float("nan")}, r"optim.rate=nan is out of range: expected a finite number, at least 0"),
        ({"rate": float("inf")}, r"optim.rate=inf is out of range"),
        ({"rate": -1e-9}, r"out of range"),
        ({"size": 0}, r"optim.size=0 is out of range: expected a finite number, at least 1"),
        ({"size": 1.0}, r"optim.size=1.0 has the wrong type: expected an integer"),
        ({"size": True}, r"optim.size=True has the wrong type"),
        ({"share": 1.1}, r"optim.share=1.1 is out of range: expected a finite number, between 0 and 1"),
        ({"shift": float("-inf")}, r"optim.shift=-inf is out of range: expected a finite number, of either sign"),
        ({"wait": -1}, r"optim.wait=-1 is out of range"),
        ({"wait": 1.5}, r"optim.wait=1.5 has the wrong type: expected steps or a duration such as \"5 epochs\""),
        ({"deep": 1}, r"optim.deep=1 has the wrong type: expected True or False"),
        ({"deep": "True"}, r"expected True or False"),
        ({"kind": "c"}, r"optim.kind='c' has the wrong type: expected one of 'a', 'b'"),
        ({"kind": ["a"]}, r"expected one of 'a', 'b'"),
        ({"widths": 4}, r"optim.widths=4 has the wrong type: expected a list of an integer"),
        ({"widths": (4, 5.0)}, r"wrong type"),
        ({"widths": "45"}, r"wrong type"),
        ({"widths": (4, -5)}, r"optim.widths=\(4, -5\) is out of range"),
        ({"pair": (1,)}, r"wrong type"),
        ({"pair": (1, 2, 3)}, r"wrong type"),
        ({"pair": (1.5, 2)}, r"wrong type"),
        # What is said of a number holds inside of "or None" too.
        ({"most": 0}, r"optim.most=0 is out of range: expected a finite number, at least 1"),
        ({"most": "x"}, r"expected an integer or None"),
        ({"decay": 1.5}, r"optim.decay=1.5 is out of range: expected a finite number, between 0 and 1"),
        ({"decay": float("nan")}, r"out of range"),
        ({"table": [("a", 1)]}, r"expected a dict or None"),
        ({"rules": ("x",)}, r"wrong type"),
        ({"rules": (("x", 1),)}, r"wrong type"),
        ({"name": 3}, r"optim.name=3 has the wrong type: expected a string"),
    ],
)
def test_bind_refuses(options, message):
    with pytest.raises(UserError, match=message):
        bind(**({"rate": 1} if options and "rate" not in options else {}) | options)


def test_bind_turns_lists_and_config_dicts_into_plain_values():
    options = ConfigDict({"rate": 1, "widths": [4, 5], "table": {"deep": {"list": [1, [2]]}}})
    found = bind(**options)
    assert found == {"rate": 1, "widths": (4, 5), "table": {"deep": {"list": (1, (2,))}}}
    assert type(found["table"]["deep"]) is dict


def test_bind_converts_durations_and_only_those():
    assert bind(rate=1, wait="5 epochs", name="5 epochs") == {"rate": 1, "wait": 17, "name": "5 epochs"}


def test_bind_gives_the_converter_the_key_and_checks_what_comes_back():
    asked = []
    with pytest.raises(UserError, match=r"optim.wait=-3 is out of range"):
        registry.bind(
            function, {"rate": 1, "wait": "x"}, where="optim", convert=lambda text, key: asked.append((text, key)) or -3
        )
    assert asked == [("x", "optim.wait")]


def test_a_duration_in_a_union_is_converted():
    def saves(every: Steps | None = None): ...

    assert registry.bind(saves, {"every": "1 epoch"}, where="c", convert=lambda text, key: 9) == {"every": 9}
    assert registry.bind(saves, {"every": None}, where="c", convert=lambda text, key: 9) == {"every": None}


def test_bind_shares_options_between_functions():
    def one(a: int, b: int = 2): ...
    def two(b: str, c: int = 3): ...

    assert registry.bind([one, two], {"a": 1, "c": 4}, where="x") == {"a": 1, "c": 4}  # b has its default from `one`
    with pytest.raises(UserError, match="There are: a, b, c"):
        registry.bind([one, two], {"a": 1, "d": 4}, where="x")
    with pytest.raises(UserError, match=r"x\.b='s' has the wrong type: expected an integer"):
        registry.bind([one, two], {"a": 1, "b": "s"}, where="x")


def test_optional_may_be_left_out_but_is_checked():
    assert registry.bind(function, {}, where="x", provided=("inputs",), optional=("rate",)) == {}
    with pytest.raises(UserError, match="wrong type"):
        registry.bind(function, {"rate": "x"}, where="x", provided=("inputs",), optional=("rate",))


def test_linen_fields_are_the_options_of_a_module():
    class Net(nn.Module):
        width: int
        names: tuple[str, ...] = ()

    assert set(registry.parameters([Net])) == {"width", "names"}
    for key in ("parent", "name"):
        with pytest.raises(UserError, match=rf"model.{key}=None: unknown key"):
            registry.bind(Net, {"width": 1, key: None}, where="model")
    with pytest.raises(UserError, match="expected an integer"):
        registry.bind(Net, {"width": "1"}, where="model")


def test_a_function_may_have_a_parameter_that_is_called_name():
    assert "name" in registry.parameters([function])


@pytest.mark.parametrize("thing", [3.14, "text", None, dict])
def test_what_takes_no_options_is_refused(thing):
    with pytest.raises(UserError, match="takes no options"):
        registry.bind([thing], {}, where="x")


def test_annotations_in_quotes_are_read_and_unknown_ones_check_nothing():
    def quoted(a: "int" = 1): ...
    def unknown(a=1): ...
    def missing(a: "typing.NoSuchType" = 1): ...

    unknown.__annotations__ = {"a": "NoSuchType"}
    with pytest.raises(UserError, match="expected an integer"):
        registry.bind(quoted, {"a": "x"}, where="x")
    assert registry.bind(unknown, {"a": "x"}, where="x") == {"a": "x"}
    assert registry.bind(missing, {"a": "x"}, where="x") == {"a": "x"}


# accepts, spell


@pytest.mark.parametrize(
    ("annotation", "good", "bad", "spelled"),
    [
        (int, [0, -1], [True, 1.0, "1", None], "an integer"),
        (float, [0, 1.5], [False, "1", None], "a number"),
        (bool, [True], [0, 1, "True"], "True or False"),
        (str, [""], [1, None], "a string"),
        (dict, [{}], [(), None], "a dict"),
        (dict[str, int], [{"a": 1}], [()], "a dict"),
        (None, [None], [0], "None"),
        (int | None, [1, None], ["x", 1.0], "an integer or None"),
        (typing.Union.__getitem__((str, None)), ["x", None], [1], "a string or None"),
        (Literal["a", 1], ["a", 1], ["b", 2], "one of 'a', 1"),
        (tuple, [(), (1, "a")], [1, None], str(tuple)),
        (tuple[int, ...], [(), (1,)], [("a",), 1], "a list of an integer"),
        (tuple[str, int], [("a", 1)], [("a",), (1, "a")], "a list of a string"),
        (list[int], [(1,)], [("a",)], "a list of an integer"),
        (Sequence[float], [(1, 2.0)], [("a",)], "a list of a number"),
        (Positive, [1], [1.5], "an integer"),
        (Positive | None, [1, None], ["x"], "an integer or None"),
        (Steps, [1], [1.5], 'steps or a duration such as "5 epochs"'),
        (Annotated[str, "note"], ["x"], [1], "a string"),
    ],
)
def test_accepts_and_spell(annotation, good, bad, spelled):
    assert all(registry.accepts(value, annotation) for value in good)
    assert not any(registry.accepts(value, annotation) for value in bad)
    assert registry.spell(annotation) == spelled


@pytest.mark.parametrize("annotation", [Any, Callable[..., Any], "text", object, nn.Module])
def test_what_can_not_be_judged_accepts_all(annotation):
    assert all(registry.accepts(value, annotation) for value in (1, "x", None, (), {}))


@pytest.mark.parametrize(
    ("bounds", "text"),
    [
        (Range(), "at least 0"),
        (Range(1), "at least 1"),
        (Range(0, 1), "between 0 and 1"),
        (Range(-float("inf")), "of either sign"),
    ],
)
def test_a_range_says_itself(bounds, text):
    assert str(bounds) == text


def test_the_range_of_a_list_holds_for_its_members():
    for annotation in (tuple[Positive, ...], Annotated[tuple[int, ...], Range(1)]):
        assert registry.check([1, 2], annotation, "x") == (1, 2)
        with pytest.raises(UserError, match="at least 1"):
            registry.check([1, 0], annotation, "x")
    with pytest.raises(UserError, match="out of range"):
        registry.check([[1.0, float("nan")]], tuple, "x")
