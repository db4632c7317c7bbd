"""What is shipped to the workers: one tar with the code as it is here, and what a worker needs to install it.

The commit goes as a git bundle, and what is not committed as a patch, so that a worker has a clone whose revision and
changes the run records by itself. Nothing of the repository here is changed.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tpu.keys import UserError, suggest

OWN = ("worker.sh", "constraints.txt")  # of this folder, which a worker needs before it has the code
MOST = 100 * 2**20  # bytes of files that are not committed: more than that are data
LONGEST = 2**30  # bytes of the history
LIMIT = 600.0  # seconds of a command of git
# In a hook git sets variables that name another index or folder.
_ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("GIT_") or k.startswith("GIT_CONFIG")}
_PREFIXES = ("--src-prefix=a/", "--dst-prefix=b/")


@dataclass(frozen=True)
class Parcel:
    """What was packed.

    Attributes:
      file: the tar.
      sha: the first 12 hex digits of the SHA-256 of what is in it; the same content has the same.
      revision: the commit.
      patch_sha: the SHA-256 of the patch that brings what is not committed; "" where all is.
      files: the names that the patch changes.
      digest: the SHA-256 of the tar itself, which a worker checks.
    """

    file: Path
    sha: str
    revision: str
    patch_sha: str
    files: tuple[str, ...]
    digest: str


def pack(repository: Path, folder: Path, *, dry_run: bool = False) -> Parcel:
    """Pack a repository as it is in its working tree; what git ignores stays here.

    Args:
      repository: the top folder of a git repository with a commit.
      folder: where the tar goes; one that is there with the same content is taken as it is.
      dry_run: tell of the tar that would be there, and leave none.

    Raises:
      UserError: this is no repository, it has no commit, or what is not committed is too large or can't be shipped.
    """
    revision = _head(repository)
    with _scratch(repository) as (work, environment):
        patch, files = _patch(repository, work, environment)
        content = {name: (Path(__file__).parent / name).read_bytes() for name in OWN} | {"patch": patch}
        sums = {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}
        sha = hashlib.sha256(json.dumps([revision, sums], sort_keys=True).encode()).hexdigest()[:12]
        file, patch_sha = folder / f"parcel-{sha}.tar", sums["patch"] if patch else ""
        written = file
        if not file.is_file():
            facts = {"sha": sha, "revision": revision, "dirty": bool(patch), "patch_sha256": patch_sha, "files": files}
            content["shipped.json"] = json.dumps(facts, indent=1).encode()
            _git(repository, "-c", "pack.threads=1", "bundle", "create", "--quiet", str(work / "bundle"), "HEAD")
            _refuse_long(repository, work / "bundle")
            written = work / file.name if dry_run else file
            _write(written, content, work / "bundle")
        return Parcel(file, sha, revision, patch_sha, files, _digest(written))


def refuse_missing(repository: Path, command: Sequence[str]) -> None:
    """Refuse a training whose config is not in the repository: found out on a machine, that costs.

    Args:
      repository: where its relative paths begin.
      command: of the training.

    Raises:
      UserError: there is no such file.
    """
    for before, word in zip(("", *command), command):
        flag, _, name = word.partition("=") if word.startswith("--config=") else (before, "", word)
        file = Path(name.partition(":")[0])  # FILE:TEXT is a file and an argument of it
        if flag == "--config" and not file.is_absolute() and not (repository / file).is_file():
            others = [str(one.relative_to(repository)) for one in repository.glob("configs/*.py")]
            raise UserError(f"--config={name!r} of the training is not in {repository}. {suggest(str(file), others)}")


def _head(repository: Path) -> str:
    """The commit that is checked out."""
    if not (repository / ".git").exists():
        raise UserError(
            f"{str(repository)!r} is not the top folder of a git repository: what runs on the workers is a commit and "
            "the changes to it. Clone the repository with git; a copy without its .git does not know what it is."
        )
    if _git(repository, "rev-parse", "--is-shallow-repository").strip() == b"true":
        raise UserError(
            f"{str(repository)!r} is a shallow clone, which git can't bundle: `git fetch --unshallow` first."
        )
    try:
        return _git(repository, "rev-parse", "--verify", "--quiet", "HEAD").decode().strip()
    except UserError as error:
        raise UserError(f"{str(repository)!r} has no commit yet: commit once before anything is shipped.") from error


@contextlib.contextmanager
def _scratch(repository: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """A folder, and an environment in which git stages there what it finds, not in the user's own index and objects."""
    with tempfile.TemporaryDirectory(prefix="parcel-") as name:
        work = Path(name)
        git = repository / Path(os.fsdecode(_git(repository, "rev-parse", "--git-path", "index").rstrip(b"\n")))
        objects = repository / Path(os.fsdecode(_git(repository, "rev-parse", "--git-path", "objects").rstrip(b"\n")))
        if git.is_file():  # what is known of each file spares git to read it
            shutil.copy2(git, work / "index")
        (work / "objects").mkdir()
        yield (
            work,
            {
                "GIT_INDEX_FILE": str(work / "index"),
                "GIT_OBJECT_DIRECTORY": str(work / "objects"),
                "GIT_ALTERNATE_OBJECT_DIRECTORIES": str(objects.absolute()),
            },
        )


def _patch(repository: Path, work: Path, environment: Mapping[str, str]) -> tuple[bytes, tuple[str, ...]]:
    """(patch from the commit to the working tree, new files with it; names that it changes)."""
    _refuse_large(repository)
    _git(repository, "-c", "advice.addEmbeddedRepo=false", "add", "--all", environment=environment)
    # Nothing of it hangs on the user's own settings.
    staged = (
        "diff",
        "--cached",
        "--no-renames",
        "--no-ext-diff",
        "--no-textconv",
        "--submodule=short",
        "--no-relative",
    )
    rows = os.fsdecode(_git(repository, *staged, "--raw", "-z", "HEAD", environment=environment)).split("\0")
    changed = {name: row.split()[1] for row, name in zip(rows[::2], rows[1::2])}
    inner = [name for name, mode in changed.items() if mode == "160000"]
    if inner:
        raise UserError(
            f"{inner[0]!r} is a git repository inside this one, which a patch can't bring: add it to .gitignore, or "
            "move it away."
        )
    patch = _git(
        repository, *staged, "--binary", "--full-index", "--no-color", *_PREFIXES, "HEAD", environment=environment
    )
    return patch, tuple(changed)


def _refuse_large(repository: Path) -> None:
    """Refuse changes that are data; before git reads them."""
    names = os.fsdecode(_git(repository, "ls-files", "-z", "--modified", "--others", "--exclude-standard")).split("\0")
    sizes = {name: (repository / name).lstat().st_size for name in names if name and (repository / name).is_file()}
    if sum(sizes.values()) > MOST:
        raise UserError(
            f"what is not committed is {_mib(sum(sizes.values()))}, more than {_mib(MOST)}: {_largest(sizes)}. "
            "Put data into the bucket, and what a run writes into .gitignore."
        )


def _refuse_long(repository: Path, bundle: Path) -> None:
    """Refuse a history that every worker would wait for."""
    if bundle.stat().st_size > LONGEST:
        rows = os.fsdecode(_git(repository, "ls-tree", "-r", "-l", "-z", "HEAD")).split("\0")
        facts = (row.partition("\t")[::2] for row in rows)
        sizes = {name: int(size) for fact, name in facts if (size := fact.rpartition(" ")[2]).isdecimal()}
        raise UserError(
            f"the history of {str(repository)!r} is {_mib(bundle.stat().st_size)}, more than {_mib(LONGEST)}; the "
            f"largest of its files: {_largest(sizes)}. Put data into the bucket, and train from a repository without."
        )


def _largest(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({_mib(sizes[name])})" for name in sorted(sizes, key=lambda name: -sizes[name])[:5])


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def _write(file: Path, content: Mapping[str, bytes], bundle: Path) -> None:
    """Write the tar; it is there when it is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}")
    try:
        with tarfile.open(part, "w") as tar, bundle.open("rb") as history:
            for name, data in content.items():
                tar.addfile(_member(name, len(data)), io.BytesIO(data))
            tar.addfile(_member(bundle.name, bundle.stat().st_size), history)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size = size
    return member


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _git(repository: Path, *words: str, environment: Mapping[str, str] | None = None) -> bytes:
    """What git says.

    Raises:
      UserError: git is not there, refuses, or takes too long.
    """
    command = ["git", "-c", "core.fsmonitor=false", "-c", "core.quotePath=false", *words]
    try:
        done = subprocess.run(
            command, cwd=repository, capture_output=True, check=True, stdin=subprocess.DEVNULL, timeout=LIMIT,
            env={**_ENVIRONMENT, "GIT_OPTIONAL_LOCKS": "0", **(environment or {})},
        )  # fmt: skip
    except FileNotFoundError as error:
        raise UserError("git is not installed here: it packs what the workers run.") from error
    except subprocess.TimeoutExpired as error:
        raise UserError(f"`git {words[0]}` in {str(repository)!r} did not end in {LIMIT:.0f} s.") from error
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode("utf-8", "replace").strip() or f"exit code {error.returncode}"
        raise UserError(f"`git {words[0]}` in {str(repository)!r}: {said}") from error
    return done.stdout
