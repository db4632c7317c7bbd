"""What a checkpoint of a config costs: how long it holds a run up, how long until it is safe, how long reading takes.

The storage is held against itself: in each round a plain file of the same size is written and read there, too. Read
`bench`.
"""

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from flaxmodels import resume, sections
from flaxmodels.checkpoint import Checkpoints
from flaxmodels.job import Job, assemble
from flaxmodels.perf import timing
from flaxmodels.registry import UserError
from flaxmodels.resume import Memory
from flaxmodels.run import open_checkpoints
from flaxmodels.state import TrainState

# Rows, in the order in which a round has them.
WRITE, READ = "plain file, written", "plain file, read"
HELD_UP, COMMITTED, VERIFY, RESTORE = "save, run held up", "save, until committed", "verify", "restore"
# What each is held against.
AGAINST = {COMMITTED: WRITE, VERIFY: READ, RESTORE: READ}
# Bytes of a plain file, which a smaller one would not measure the storage with, and a larger one no better.
SMALLEST, LARGEST = 2**26, 2**32
_PIECE = 2**24

Took = tuple[float, float]  # seconds: by the clock on the wall, and of all processors


def bench(
    config: Mapping[str, Any], workdir: Path, rounds: int = 5, devices: Sequence[jax.Device] | None = None
) -> list[dict[str, Any]]:
    """Save, verify and restore the state of a config, in a folder of the workdir that goes afterwards.

    Where the system does as it is asked, what is read comes from the storage, not from copies that it keeps in memory.
    The state is a fresh one with noise in the place of its floats: zeros, as Adam begins with, compress to nothing.

    Args:
      config: of a run, with all its sections.
      workdir: where a run of it would write; made, and removed again, if it is not there.
      rounds: of writing and reading.
      devices: that the state lies on; None takes all there are.

    Returns:
      A row for each of the above, ready for JSON: "name", "bytes" (of its files), "seconds" (median of the rounds),
      "slowest", "spread" (`timing.spread`), "cpu_seconds", "gb_per_second" (10^9 bytes), "ratio" (median over rounds of
      its seconds a byte by those of the plain file; None for what is not held against one, and for a state that is
      smaller than `SMALLEST`) and "rounds". A run is held up until `save` has copied the arrays; "until committed"
      contains that. "verify" hashes every file, which "restore" would do as well, if that had not been done.

    Raises:
      UserError: the config is wrong, or the workdir can't be written.
      FaultError: a save failed.
    """
    job = assemble(config, devices)
    details = resume.meta(job, Memory(), {key: value for key, value, _ in sections.resolved(config)})
    found: dict[str, list[Took]] = {}
    sizes: dict[str, int] = {}
    with _folder(workdir) as folder, contextlib.closing(open_checkpoints(job, folder)) as checkpoints:
        state = jax.block_until_ready(_noise(job))
        size = min(max(_nbytes(state), SMALLEST), LARGEST)
        for step in range(1, rounds + 1):
            took = _plain(folder / "plain", size) | _round(job, checkpoints, state, step, details)
            stored = sum(file.stat().st_size for file in _files(checkpoints.directory / str(step)))
            for name, each in took.items():
                found.setdefault(name, []).append(each)
                sizes[name] = size if name in (WRITE, READ) else stored
    return [_row(name, found, sizes) for name in found]


def _round(
    job: Job, checkpoints: Checkpoints, state: TrainState, step: int, details: Mapping[str, Any]
) -> dict[str, Took]:
    """Save, verify, restore."""
    with _timed() as committed:
        with _timed() as held_up:
            checkpoints.save(state, step, details)
        checkpoints.wait()
    _forget(checkpoints.directory)
    with _timed() as verified:
        checkpoints.good()
    _forget(checkpoints.directory)
    with _timed() as restored:
        jax.block_until_ready(checkpoints.restore(step, job.abstract))
    took = {HELD_UP: held_up, COMMITTED: committed, VERIFY: verified, RESTORE: restored}
    return {name: (wall, cpu) for name, (wall, cpu) in took.items()}


def _plain(file: Path, size: int) -> dict[str, Took]:
    """Write and read a file, in pieces."""
    piece = os.urandom(_PIECE)
    with _timed() as written, file.open("wb", buffering=0) as out:
        for start in range(0, size, _PIECE):
            out.write(piece[: size - start])
        os.fsync(out.fileno())
    _forget(file.parent)
    with _timed() as read, file.open("rb", buffering=0) as opened:
        while opened.read(_PIECE):
            pass
    file.unlink()
    return {WRITE: (written[0], written[1]), READ: (read[0], read[1])}


@contextlib.contextmanager
def _timed() -> Iterator[list[float]]:
    """A list that will hold seconds: by the clock on the wall, and of all processors."""
    found: list[float] = []
    wall, cpu = time.perf_counter(), time.process_time()
    yield found
    found += [time.perf_counter() - wall, time.process_time() - cpu]


@contextlib.contextmanager
def _folder(workdir: Path) -> Iterator[Path]:
    """A folder on the storage of a workdir. Nothing of it stays."""
    made = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
    try:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            place = tempfile.TemporaryDirectory(prefix="bench_checkpoint_", dir=workdir)
        except OSError as error:
            raise UserError(f"{workdir} can't be written: {error.strerror}. Choose another --workdir.") from error
        with place as name:
            yield Path(name)
    finally:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _files(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()]


def _forget(folder: Path) -> None:
    """Ask the system to keep no copy of these files in memory; they are on storage."""
    if hasattr(os, "posix_fadvise"):
        for file in _files(folder):
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def _noise(job: Job) -> TrainState:
    """A state of a job with random floats."""

    def noise(x: Any) -> Any:
        floats = jnp.issubdtype(x.dtype, jnp.floating)
        return jax.random.normal(jax.random.key(x.size), x.shape, x.dtype) if floats else x

    places = jax.tree.map(lambda x: x.sharding, job.abstract)
    return jax.jit(lambda state: jax.tree.map(noise, state), out_shardings=places)(job.fresh())


def _nbytes(state: TrainState) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def _row(name: str, found: Mapping[str, Sequence[Took]], sizes: Mapping[str, int]) -> dict[str, Any]:
    seconds, cpu = zip(*found[name])
    ratio = None
    if (other := AGAINST.get(name)) and sizes[name] >= SMALLEST:
        scale = sizes[other] / sizes[name]
        ratio = round(statistics.median(a * scale / b for a, (b, _) in zip(seconds, found[other])), 2)
    median = statistics.median(seconds)
    return {
        "name": name,
        "bytes": sizes[name],
        "seconds": round(median, 6),
        "slowest": round(max(seconds), 6),
        "spread": timing.spread(seconds),
        "cpu_seconds": round(statistics.median(cpu), 6),
        "gb_per_second": float(f"{sizes[name] / median / 1e9:.3g}"),
        "ratio": ratio,
        "rounds": len(seconds),
    }
