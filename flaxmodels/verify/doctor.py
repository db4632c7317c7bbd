"""`flaxmodels doctor`: what keeps a run from starting, going on, being fast or being safe; each finding with its fix.

Read `examine`. Every check is a function from facts to findings, in the modules beside this one; what gathers the
facts imports no JAX where that may be what is broken.
"""

import contextlib
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flaxmodels.registry import UserError
from flaxmodels.runtime.exits import FaultError
from flaxmodels.storage import is_object
from flaxmodels.verify import bucket, devices, machine, storage, versions
from flaxmodels.verify.devices import Started
from flaxmodels.verify.expected import Expected
from flaxmodels.verify.finding import Finding, ok, problem, warning

LIMIT = 120.0  # seconds for JAX to find its devices, in a run of several processes


def examine(workdir: Path, config: Mapping[str, Any] | None = None, started: Started | None = None) -> list[Finding]:
    """Look at software, machine, storage and workdir.

    Args:
      workdir: of a run that is, was, or will be; a small folder is written beside what is there, and removed.
      config: of that run; with it, room for its checkpoints and processors for its data are judged.
      started: what JAX found when it started; None where it could not be asked.
    """
    installed = versions.installed()
    found = [*versions.packages(installed, versions.requirements(installed)), *versions.environment(os.environ)]
    there = devices.present()
    gpus = len(there["NVIDIA GPU"])
    found += devices.accelerators(there, started, os.environ, installed) if started is not None else []
    found += [ok("driver", line) for line in devices.nvidia_smi()]
    found += devices.held(devices.holders())
    found += devices.huge_pages(bool(there["TPU"]))
    needed, judged, loading = _wanted(config, started)
    found += [*machine.memory(), *machine.shared_memory(gpus), *machine.processors(*loading), *machine.open_files()]
    in_bucket = is_object(workdir)
    found += bucket.bucket(workdir) if in_bucket else storage.storage(workdir, needed)
    usable = not (in_bucket and found[-1].level == "problem")
    found += storage.contents(workdir) if usable else []
    return [*found, *storage.compiled_programs(os.environ), *data_sets(os.environ), *judged]


def data_sets(environ: Mapping[str, str]) -> list[Finding]:
    """Where official data sets are prepared, and read from at every start."""
    folder = environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    if "://" in folder:
        text = f"TFDS_DATA_DIR={folder} is no folder of this machine: data sets are read from one at every start."
        return [warning("data sets", text, "unset TFDS_DATA_DIR, or name a folder on a disk")]
    return [ok("data sets", str(Path(folder).expanduser()))]


def started(seconds: float = LIMIT) -> Started:
    """As `devices.look`, of this process, which is one of several: JAX on a TPU looks for the hosts of its slice.

    Where that fails, or takes longer than `seconds`, the others wait for it in vain, so that the run ends.
    """
    import jax

    with _limited(seconds):
        try:
            kinds = tuple(device.device_kind for device in jax.local_devices())
        except RuntimeError as error:
            return Started(said=" ".join(str(error).split())[-300:])
    return Started(jax.default_backend(), kinds, str(jax.random.key_impl(jax.random.key(0))))


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    from flaxmodels import together

    text = (
        f"JAX has not found its devices within {seconds:.0f} s: another process holds those of one of the hosts, or a "
        "host of the slice does not answer. `flaxmodels doctor --distributed=off` on each host tells which."
    )
    timer = threading.Timer(seconds, lambda: together.end(FaultError(text)))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _wanted(config: Mapping[str, Any] | None, started: Started | None) -> tuple[int, list[Finding], tuple[int, int]]:
    """Of a config: (bytes of the checkpoints that it keeps, what is wrong with it, (data.workers, data.threads))."""
    if config is None or started is None or not started.backend:
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


def together(found: Sequence[Finding], kinds: Sequence[str], expected: Expected) -> list[Finding]:
    """Add what several processes find only together, and what another one than process 0 has found by itself.

    Args:
      found: of this process, by `examine`.
      kinds: of its devices.
      expected: of all.
    """
    from flaxmodels.runtime import peers
    from flaxmodels.verify import hosts

    said = hosts.look(kinds)
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
    return [*hosts.present(said, expected), *found, *bad]
