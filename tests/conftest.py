"""Tests run stricter than users do: 8 simulated devices, rank promotion raises; pyproject.toml: warnings are errors."""

import os
from importlib import metadata

# Before JAX is imported by anything.
# Most of the time here is XLA compiling: without its backend's optimizations that halves, and halves again by one
# thread a program and, where XLA still has it, its older way to emit fusions. What must hold for the programs that
# users run is tested in processes of their own, with XLA's defaults (the `run` fixture).
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_cpu_parallel_codegen_split_count=1"
)
if metadata.version("jaxlib").startswith("0.10."):  # later ones end the process over a flag they do not know
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

ROOT = Path(__file__).parent.parent
_LOOKED: dict[str, Any] = {}  # of `looked_once`


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--nightly` also runs what takes hours."""
    parser.addoption("--nightly", action="store_true", help="run the tests marked nightly, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the nightly tests out. Not by `-m` in addopts, which a `-m` of the command line would replace."""
    if not config.getoption("--nightly"):
        nightly = [item for item in items if item.get_closest_marker("nightly")]
        config.hook.pytest_deselected(items=nightly)
        items[:] = [item for item in items if item not in nightly]


@pytest.fixture(scope="session", autouse=True)
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Rank promotion raises; compiled programs are shared between tests; and data sets prepared once, off the home."""
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("programs")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    assert jax.device_count() == 8  # starts JAX, before a command that a test runs asks for another number
    folders = {name: str(tmp_path_factory.mktemp("kept")) for name in ("TFDS_DATA_DIR", "XDG_CACHE_HOME")}
    before = {name: os.environ.get(name) for name in folders}
    os.environ.update(folders)
    yield
    for name, old in before.items():
        os.environ.pop(name) if old is None else os.environ.update({name: old})


@pytest.fixture(scope="session")
def run() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command of the repository as a user would, on one device: run("train.py", "--config=...", devices=1)."""

    def command(*arguments: object, devices: int = 1, timeout: float = 300, **environment: str):
        env = {
            **os.environ,
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "PYTHONPATH": str(ROOT),
            **environment,
        }
        return subprocess.run(
            [sys.executable, *map(str, arguments)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout
        )

    return command


@pytest.fixture
def looked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `levers.look` shows of a config is the same each time, and takes a while: it looks once in all tests."""
    from flaxmodels.perf import levers

    look = levers.look

    def once(config: Any, target: Any) -> Any:
        key = f"{config} {len(target.devices)} {target.chip.name}"
        if key not in _LOOKED:
            _LOOKED[key] = look(config, target)
        return _LOOKED[key]

    monkeypatch.setattr(levers, "look", once)
