"""What is compiled is counted, and named with what differs from the time before."""

import logging
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from small import config

from flaxmodels import loop, run, sharding
from flaxmodels.runtime import compiles
from flaxmodels.testing import assert_compiles


@pytest.fixture
def double():
    """A function that no other test has compiled, compiled once."""
    function = jax.jit(lambda tree, more: {"twice": tree["x"] * 2 + more})
    function({"x": np.ones(3, np.float32)}, np.float32(1))
    return function


def message(number, function):
    with pytest.raises(AssertionError) as caught, assert_compiles(number):
        function()
    return str(caught.value).splitlines()


def test_what_is_compiled_already_is_not_counted(double):
    with assert_compiles(0) as found:
        double({"x": np.zeros(3, np.float32)}, np.float32(2))
    assert found == []


def test_a_new_shape_is_counted_and_named(double):
    with assert_compiles(1) as found:
        double({"x": np.ones(4, np.float32)}, np.float32(1))
    (one,) = found
    assert one.name == "jit(<lambda>)" and one.arguments == ("float32[4]", "float32[]")
    assert "tree['x'], now f32[4] and before f32[3]" in one.why


def test_the_error_shows_shape_dtype_and_sharding_before_and_after(double):
    mesh, x = sharding.make_mesh(), np.ones(16, np.float32)
    split, whole = (jax.device_put(x, jax.sharding.NamedSharding(mesh, spec)) for spec in (P("data"), P()))
    given = (np.ones(5, np.float32), np.ones(5, np.int32), split, whole)
    lines = message(3, lambda: [double({"x": x}, np.float32(1)) for x in given])
    assert lines[0] == "4 programs were compiled, expected 3"
    for words in (
        "tree['x'], now f32[5] and before f32[3]",
        "jit(<lambda>) again: int32[5], float32[]",
        "array 0 was float32[5], is int32[5]",
        "array 0 was int32[5], is float32[16] P('data',)",
        "array 0 was float32[16] P('data',), is float32[16] P()",
    ):
        assert any(words in line for line in lines), (words, lines)


def test_fewer_than_expected_is_an_error_too(double):
    assert message(1, lambda: double({"x": np.ones(3, np.float32)}, np.float32(1))) == [
        "0 programs were compiled, expected 1"
    ]


def test_a_function_that_is_made_anew_each_time_is_told():
    def step():
        for _ in range(2):
            jax.jit(lambda x: x + 3)(np.float32(1))

    lines = message(0, step)
    assert lines[0] == "2 programs were compiled, expected 0"
    assert "is it made anew for each call?" in lines[-1]


def test_other_threads_count():
    thread = threading.Thread(target=jax.jit(lambda x: x - 7), args=(np.float32(1),))
    with assert_compiles(1):
        thread.start()
        thread.join()


def test_what_comes_from_the_folder_of_programs_counts():
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, 0.0)
    try:
        with assert_compiles(2):
            for _ in range(2):  # the second is read
                jax.jit(lambda x: jnp.sin(x) * 17)(np.float32(1))
    finally:
        jax.config.update(name, before)


def test_everything_is_as_before_also_after_an_error(caplog, double):
    logger, names = logging.getLogger("jax"), ("jax_log_compiles", "jax_explain_cache_misses")
    before = [getattr(jax.config, name) for name in names], logger.handlers[:], logger.propagate
    assert before[0] == [False, False]
    with pytest.raises(KeyError), assert_compiles(3):
        logging.getLogger("jax._src.other").warning("of something else")
        double({"x": np.ones(6, np.float32)}, np.float32(1))
        raise KeyError
    assert ([getattr(jax.config, name) for name in names], logger.handlers[:], logger.propagate) == before
    assert [record.getMessage() for record in caplog.records] == ["of something else"]
    with compiles.heard() as found:
        pass
    double({"x": np.ones(7, np.float32)}, np.float32(1))
    assert found == []


@pytest.mark.slow
def test_a_run_compiles_nothing_after_its_first_evaluation(tmp_path, monkeypatch):
    """With more evaluations and saves to come, and dispatches of one step and of two."""
    after, counts = run.Run.after, {}

    def counted(self, state, step, packed):
        well = after(self, state, step, packed)
        counts[step] = len(found)
        return well

    monkeypatch.setattr(run.Run, "after", counted)
    train = dict(duration=15, log_every=2, eval_every=4, steps_per_dispatch=2)
    with compiles.heard() as found:
        loop.fit(config("mlp", train=train), tmp_path)
    assert [one.name for one in found].count("jit(several)") == 1
    assert list(counts) == [2, 4, 6, 8, 10, 12, 14, 15]
    assert counts[2] < counts[4] == counts[15] == len(found)
