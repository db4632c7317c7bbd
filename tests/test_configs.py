"""Every config file is a runnable claim: it resolves, says how to run it, and trains when shrunk to two steps."""

import importlib.util
import io
import re

import jax
import pytest
from conftest import ROOT
from shared_data import shared_data

from flaxmodels import loop, sections
from flaxmodels.config import load_config

CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
# Too large for this machine: what they claim is that they compile for a TPU slice, and fit.
COMPILED = {"gpt2_124m": "v5e:4x4", "llama3_8b": "v5p:4x4x4"}
REAL = {
    "mnist_mlp": "mnist",
    "mnist_cnn": "mnist",
    "shakespeare_transformer": "tiny_shakespeare",
    "shakespeare_bpe": "tiny_shakespeare",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_says_how_to_run_it(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert f"python train.py --config=configs/{name}.py" in module.__doc__
    claim = module.__doc__.replace("\n", " ")
    if name in COMPILED:  # topology, time, memory of a device, and of how much
        pattern = rf"Compiled for {COMPILED[name]} .* in \d+ s: .*state.*temporaries.* \d+\.\d GiB of \d+\.\d GiB"
    else:  # hardware, score, time
        pattern = r"Measured on .*CPU.*: .*\d\.\d+.* in \d+ (s|min)\b"
    assert re.search(pattern, claim)


@pytest.mark.parametrize("name", CONFIGS)
def test_resolves_with_an_origin_for_every_value(name):
    rows = sections.resolved(load_config(ROOT / "configs" / f"{name}.py"))
    assert {origin for _, _, origin in rows} <= {"config", "default", "from the data"}
    assert len({key for key, _, _ in rows}) == len(rows)


# Models and data of these are those of others here.
LIKE_OTHERS = ("mnist_cnn", "pydocs_transformer")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.nightly] * (name in LIKE_OTHERS)) for name in CONFIGS]
)
def test_trains_for_two_steps(name, tmp_path):
    config = load_config(ROOT / "configs" / f"{name}.py")
    with config.unlocked(), config.ignore_type():
        config.train.update(duration=2, log_every=1, eval_every=0)
        config.optim.warmup = 0
        if name in COMPILED:  # the same in small, on one device
            sizes = dict(vocab_size=128, layers=2, width=32, heads=2, kv_heads=1, mlp_width=64)
            config.model.update({name: size for name, size in sizes.items() if name in config.model})
            config.data.update(vocab_size=128, length=64, examples=16, test_examples=8, batch_size=8)
            config.mesh.fsdp = 1
        elif config.model.get("layers", 1) > 2:  # two are layers one after another, too
            config.model.update(layers=2, unroll=2)
        if config.data.get("validation"):  # some batches are an evaluation, too
            config.data.validation = 0.01
        if name in REAL:
            config.data.manual_dir = str(shared_data(REAL[name]))
        if name.startswith("sst2"):  # the sentences alone, which are fewer
            config.data.path = config.data.test_path = str(shared_data("sst2") / "test.tsv")
        if name == "sst2_bert":  # what its first stage leaves is tested in test_recipes.py
            config.data.update(tokens="words", vocab_size=500)
            config.start = {}
    outcome = loop.fit(config, tmp_path, devices=jax.devices()[:1], stream=io.StringIO())
    assert outcome.step == 2 and outcome.finished and outcome.metrics["eval/loss"] > 0
