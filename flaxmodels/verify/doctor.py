"""`flaxmodels doctor`: what keeps a run from starting, going on, being fast or being safe; each finding with its fix.

Read `examine`. Every check is a function from facts to findings, in the modules beside this one; what gathers the
facts imports no JAX where that may be what is broken.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flaxmodels.registry import UserError
from flaxmodels.verify import devices, machine, storage, versions
from flaxmodels.verify.finding import Finding, ok, problem


def examine(workdir: Path, config: Mapping[str, Any] | None = None, *, alone: bool = True) -> list[Finding]:
    """Look at software, machine, storage and workdir.

    Args:
      workdir: of a run that is, was, or will be; a small folder is written beside what is there, and removed.
      config: of that run; with it, room for its checkpoints and processors for its data are judged.
      alone: this process is the whole run; else JAX has started in it already.
    """
    installed = versions.installed()
    found = [*versions.packages(installed, versions.requirements(installed)), *versions.environment(os.environ)]
    there = devices.present()
    started = devices.look() if alone else _started()
    gpus = len(there["NVIDIA GPU"])
    found += devices.accelerators(there, started, os.environ, installed)
    found += [ok("driver", line) for line in devices.nvidia_smi()]
    found += devices.held(devices.holders())
    found += devices.huge_pages(bool(there["TPU"]))
    needed, judged, loading = _wanted(config, started) if config is not None else (0, [], (0, 1))
    found += [*machine.memory(), *machine.shared_memory(gpus), *machine.processors(*loading), *machine.open_files()]
    found += [*storage.storage(workdir, needed), *storage.contents(workdir), *storage.compiled_programs(os.environ)]
    return [*found, *judged]


def _started() -> devices.Started:
    """As `devices.look`, of this process."""
    import jax

    kinds = tuple(device.device_kind for device in jax.local_devices())
    return devices.Started(jax.default_backend(), kinds, str(jax.random.key_impl(jax.random.key(0))))


def _wanted(config: Mapping[str, Any], started: devices.Started) -> tuple[int, list[Finding], tuple[int, int]]:
    """Of a config: (bytes of the checkpoints that it keeps, what is wrong with it, (data.workers, data.threads))."""
    if not started.backend:
        return 0, [], (0, 1)
    import jax

    from flaxmodels.console import human_bytes
    from flaxmodels.job import assemble

    try:
        job = assemble(config)
    except UserError as error:
        said = " ".join(str(error).split())
        return 0, [problem("config", said, "flaxmodels config --config=FILE shows every key")], (0, 1)
    state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(job.abstract))
    kept = 1 + _kept(job.checkpoint)
    text = f"its state takes {human_bytes(state)}; with checkpoint.keep, {kept} of it are on disk while one is saved"
    return state * kept, [ok("config", text)], (job.train.loading.workers, job.train.loading.threads)


def _kept(options: Mapping[str, Any]) -> int:
    """Steps that stay on disk, as far as their number is bounded."""
    from flaxmodels import registry
    from flaxmodels.checkpoint import Checkpoints

    known = registry.parameters([Checkpoints])
    return sum(int(options.get(name, known[name].default)) for name in ("keep", "keep_best"))


def together(found: Sequence[Finding]) -> list[Finding]:
    """Add what several processes find only together, and what another one than process 0 has found by itself.

    Args:
      found: of this process, by `examine`.
    """
    from flaxmodels.runtime import peers
    from flaxmodels.verify import hosts

    said = hosts.look()
    mine = json.dumps([[one.what, one.level, one.text, one.fix] for one in found if one.level != "ok"])
    others = [json.loads(text) for text in peers.gathered(mine)]
    seen = {(one.what, one.text) for one in found}
    bad = [
        Finding(what, level, f"process {number} ({said[number]['host']}): {text}", fix)
        for number, lines in enumerate(others)
        if number
        for what, level, text, fix in lines
        if (what, text) not in seen
    ]
    return [*hosts.present(said), *found, *bad]
