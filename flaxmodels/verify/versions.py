"""What is installed, and what the environment says: versions that do not go together, settings that work against it.

Imports no JAX: it may well be what is broken.
"""

import importlib.metadata
import math
import os
import platform
import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from flaxmodels.verify.finding import Finding, ok, problem, warning

OURS = "flaxmodels-train"
SHOWN = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy", "libtpu",
    "jax-cuda12-plugin", "jax-cuda13-plugin", "jax-rocm7-plugin",
)  # fmt: skip
# JAX on accelerators: each says by itself which versions of others it goes with.
OWNERS = (OURS, "jax", "jax-cuda12-plugin", "jax-cuda13-plugin", "jax-rocm7-plugin")
# Two packages with the same files, or with two answers to the same question.
RIVALS = (
    ("libtpu", "libtpu-nightly"), ("jax-cuda12-plugin", "jax-cuda13-plugin"), ("tensorflow", "tensorflow-cpu"),
    ("orbax", "orbax-checkpoint"),
)  # fmt: skip
# Settings for a look at a problem, which cost time in every step.
SLOW = {
    "JAX_DISABLE_JIT": "nothing is compiled",
    "JAX_DEBUG_NANS": "each operation waits for the device",
    "JAX_DEBUG_INFS": "each operation waits for the device",
    "JAX_ENABLE_CHECKS": "JAX checks itself",
    "JAX_ENABLE_X64": "numbers take twice the memory, and TPUs have none of 64 bits",
    "CUDA_LAUNCH_BLOCKING": "each kernel is waited for",
}
NO = ("", "0", "false", "no", "off", "f", "n")


def installed() -> dict[str, str]:
    """Name -> version of every package; the first on the path, as `import` has it."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name:
            found.setdefault(canonicalize_name(name), distribution.version)
    return found


def requirements(found: Mapping[str, str]) -> dict[str, list[str]]:
    """Package -> lines of what it requires, of the `OWNERS` that are there; of ours also where it runs from source."""
    lines = {name: importlib.metadata.requires(name) or [] for name in OWNERS if name in found}
    file = Path(__file__).parents[2] / "pyproject.toml"
    if OURS not in lines and file.is_file():
        project = tomllib.loads(file.read_text())["project"]
        optional = project.get("optional-dependencies", {})
        extras = [f'{line}; extra == "{extra}"' for extra, lines in optional.items() for line in lines]
        lines = {OURS: [*project["dependencies"], *extras], **lines}
    return lines


def packages(found: Mapping[str, str], wanted: Mapping[str, Sequence[str]]) -> list[Finding]:
    """Hold what is installed against what is required.

    Args:
      found: name -> version.
      wanted: name -> lines of what it requires, in the words of PEP 508.
    """
    there = ", ".join(f"{name} {found[name]}" for name in SHOWN if name in found)
    python = ok("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    bad = list(dict.fromkeys(fault for owner, lines in wanted.items() for fault in _unmet(owner, lines, found)))
    both = [
        problem("packages", f"{one} and {other} are both installed.", f"pip uninstall {one}")
        for one, other in RIVALS
        if one in found and other in found
    ]
    unknown = [] if OURS in wanted else [warning("packages", f"{OURS} says nowhere what it needs.", "pip install .")]
    return [python, ok("packages", there), *bad, *both, *unknown]


def _unmet(owner: str, lines: Sequence[str], found: Mapping[str, str]) -> Iterator[Finding]:
    always = {}
    optional = []
    for line in lines:
        requirement = Requirement(line)
        extra = re.search(r"extra == ['\"]([^'\"]+)['\"]", line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            always[canonicalize_name(requirement.name)] = requirement
        elif extra and requirement.marker.evaluate({"extra": extra[1]}):
            optional.append((canonicalize_name(requirement.name), requirement))
    # What an extra asks for counts where it is installed, by whatever way.
    asked = [*always.items(), *((name, one) for name, one in optional if name in found and name not in always)]
    who = f"{owner} {found.get(owner, '')}".strip()
    for name, requirement in asked:
        wish = f"{requirement.name}{requirement.specifier}"
        if name not in found:
            yield problem(
                "packages", f"{requirement.name} is not installed, and {who} needs it.", f'pip install "{wish}"'
            )
            continue
        failing = [one for one in requirement.specifier if not one.contains(found[name], prereleases=True)]
        if failing:
            newer = owner == OURS and all(one.operator in ("<", "<=") for one in failing)
            text = f"{name} {found[name]}: {who} {'is tested with' if newer else 'needs'} {requirement.specifier}."
            yield (warning if newer else problem)("packages", text, f'pip install "{wish}"')


def environment(environ: Mapping[str, str]) -> list[Finding]:
    """Settings that contradict each other, or cost more than one may know."""
    found = [*_flags("XLA_FLAGS", environ), *_flags("LIBTPU_INIT_ARGS", environ), *_settings(environ)]
    names = sorted(name for name in environ if name.startswith(("JAX_", "XLA_", "LIBTPU_", "TPU_")))
    return found or [ok("environment", f"set: {', '.join(names)}" if names else "nothing is set for JAX")]


def _flags(name: str, environ: Mapping[str, str]) -> Iterator[Finding]:
    try:
        words = shlex.split(environ.get(name, ""))
    except ValueError as error:
        yield problem("environment", f"{name} can't be read: {error}.", f"unset {name}, and set it again")
        return
    values: dict[str, list[str]] = {}
    for word in words:
        flag, _, value = word.removeprefix("--").partition("=")
        values.setdefault(flag, []).append(value)
    for flag, given in values.items():
        if len(set(given)) > 1:
            text = f"{name} sets {flag} to {' and to '.join(given)}: the last one counts."
            yield warning("environment", text, f"say it once in {name}")
    tpu = [flag for flag in values if flag.startswith("xla_tpu_")] if name == "XLA_FLAGS" else []
    if tpu:
        text = f"XLA_FLAGS has {', '.join(tpu)}, which only libtpu knows: XLA ends the process over it."
        yield problem("environment", text, "move it to LIBTPU_INIT_ARGS")
    if count := values.get("xla_force_host_platform_device_count"):
        text = f"XLA_FLAGS makes {count[-1]} devices of one CPU: slower than one, for tests."
        yield warning("environment", text, "take xla_force_host_platform_device_count out of XLA_FLAGS")


def _settings(environ: Mapping[str, str]) -> Iterator[Finding]:
    for name, cost in SLOW.items():
        if environ.get(name, "").lower() not in NO:
            yield warning("environment", f"{name}={environ[name]}: {cost}.", f"unset {name}")
    if "JAX_PLATFORM_NAME" in environ and "JAX_PLATFORMS" in environ:
        text = f"JAX_PLATFORM_NAME={environ['JAX_PLATFORM_NAME']} and JAX_PLATFORMS={environ['JAX_PLATFORMS']} are set."
        yield warning("environment", text, "unset JAX_PLATFORM_NAME, the older of the two")
    if "rbg" in (kind := environ.get("JAX_DEFAULT_PRNG_IMPL", "")):
        text = f"JAX_DEFAULT_PRNG_IMPL={kind}: random numbers, as of dropout, are others on another mesh or version."
        yield warning("environment", text, "unset JAX_DEFAULT_PRNG_IMPL for runs that must be the same everywhere")
    for name in ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION"):
        if not _is_share(environ.get(name, "0.75"), most=math.inf if "TF_FORCE_UNIFIED_MEMORY" in environ else 1):
            text = f"{name}={environ[name]}: expected a share of a GPU's memory, from 0 to 1."
            yield problem("environment", text, f"export {name}=0.75")
    cuda = [part for part in environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if "cuda" in part.lower()]
    if cuda:
        text = f"LD_LIBRARY_PATH has {cuda[0]}, whose libraries go before those that pip installed with JAX."
        yield warning("environment", text, "unset LD_LIBRARY_PATH, unless CUDA is meant to come from there")


def _is_share(text: str, most: float) -> bool:
    try:
        return 0 < float(text) <= most
    except ValueError:
        return False
