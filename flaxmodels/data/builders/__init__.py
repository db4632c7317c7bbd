"""Our TFDS builders, and how one is run: from archives to ArrayRecord files, without TensorFlow.

A `Recipe` says where a prepared set lies, so that a set whose arrays are cached is found without importing TFDS, which
takes longer than reading it. Archives are named, with their URLs and sha256, in `checksums.tsv`: TFDS finds that file
by its place beside the builders, and verifies against it.
"""

import contextlib
import dataclasses
import importlib
import io
import re
import ssl
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from flaxmodels.registry import UserError

_CONNECT_SECONDS = 5.0


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A builder, named but not imported.

    Attributes:
      name: the builder's TFDS name, in lower case: a folder in data_dir.
      version: the builder's TFDS version: a folder within that.
      module: where the class `Builder` is.
      labels: names of the classes; () where examples have none.
    """

    name: str
    version: str
    module: str
    labels: tuple[str, ...] = ()


_TEN = tuple("0123456789")
DIGITS = Recipe("flaxmodels_digits", "1.0.0", "flaxmodels.data.builders.digits", _TEN)
MNIST = Recipe("flaxmodels_mnist", "1.0.0", "flaxmodels.data.builders.mnist", _TEN)
FASHION_MNIST = Recipe(
    "flaxmodels_fashion_mnist",
    "1.0.0",
    "flaxmodels.data.builders.fashion_mnist",
    ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
KMNIST = Recipe(
    "flaxmodels_kmnist",
    "1.0.0",
    "flaxmodels.data.builders.kmnist",
    ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
)
CIFAR10 = Recipe(
    "flaxmodels_cifar10",
    "1.0.0",
    "flaxmodels.data.builders.cifar10",
    ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
)
TINY_SHAKESPEARE = Recipe("flaxmodels_tiny_shakespeare", "1.0.0", "flaxmodels.data.builders.tiny_shakespeare")


def prepare(recipe: Recipe, root: Path, manual_dir: str | None) -> Any:
    """Run a builder, if `root` does not hold its result already.

    Args:
      recipe: which builder.
      root: TFDS's data directory.
      manual_dir: a folder that holds all the archives; None downloads those not in TFDS's cache.

    Returns:
      The `tfds.core.DatasetBuilder`, prepared as ArrayRecord.

    Raises:
      UserError: an archive is missing, damaged or can't be downloaded, or `root` can't be written.
    """
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    builder = importlib.import_module(recipe.module).Builder(data_dir=str(root), file_format="array_record")
    if builder.data_path.exists():
        return builder
    archives = {url: builder.url_infos[url] for url in builder.URLS}
    folder = None if manual_dir is None else Path(manual_dir).expanduser()
    _check_present(recipe, archives, root, folder)
    config = tfds.download.DownloadConfig(manual_dir=folder, try_download_gcs=False)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces itself with print
            builder.download_and_prepare(download_config=config)
    except tfds.core.download.download_manager.NonMatchingChecksumError as error:
        raise UserError(wrong_checksum(str(error))) from error
    except (tfds.core.download.util.DownloadError, OSError) as error:
        raise UserError(f"{recipe.name} could not be prepared in {root}: {error}\n{remedy(archives)}") from error
    return builder


def remedy(archives: dict[str, Any]) -> str:
    """What to do without these archives; URL -> TFDS's UrlInfo (size, checksum, filename)."""
    if not archives:
        return "Is there room on the disk?"
    files = "".join(f"\n  {info.filename}  from {url}" for url, info in archives.items())
    return f"Put into one FOLDER, and set --config.data.manual_dir=FOLDER:{files}"


def _check_present(recipe: Recipe, archives: dict[str, Any], root: Path, folder: Path | None) -> None:
    """Fail early: TFDS itself retries a download for minutes before it gives up."""
    if folder is not None:
        _check_manual(archives, folder)
        return
    missing = {url: info for url, info in archives.items() if not is_cached(recipe, url, info, root / "downloads")}
    if missing and (reason := unreachable(next(iter(missing)))):
        raise UserError(f"{recipe.name} is not in {root}, and can't be downloaded: {reason}.\n{remedy(archives)}")


def _check_manual(archives: dict[str, Any], folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"data.manual_dir={str(folder)!r} is not a folder.\n{remedy(archives)}")
    missing = {url: info for url, info in archives.items() if not (folder / info.filename).is_file()}
    if missing:
        names = ", ".join(info.filename for info in missing.values())
        raise UserError(f"data.manual_dir={str(folder)!r} lacks {names}.\n{remedy(missing)}")


def is_cached(recipe: Recipe, url: str, info: Any, downloads: Path) -> bool:
    """Whether TFDS will find an archive without a download; a cached file that is damaged is refused here.

    TFDS trusts its download cache by name and does not hash what lies there.
    """
    from tensorflow_datasets.core.download import checksums, resource

    if (downloads / "manual" / info.filename).exists():  # hashed by TFDS, as in any manual_dir
        return True
    name = resource.get_dl_fname(url, info.checksum)
    for path in (downloads / recipe.name / name, downloads / name):
        if resource.is_locally_cached(path):
            found = checksums.compute_url_info(path).checksum
            if found != info.checksum:
                raise UserError(_damaged(path, url, info.checksum, found))
            return True
    return False


def wrong_checksum(message: str) -> str:
    """TFDS's message about a wrong checksum, shorter."""
    file = re.search(r"Artifact (\S+), downloaded to (.+), has wrong checksum", message)
    sums = re.findall(r"checksum='(\w+)'", message)
    return _damaged(Path(file[2]), file[1], *sums) if file and len(sums) == 2 else message


def _damaged(path: Path, url: str, expected: str, found: str) -> str:
    return (
        f"{path} is damaged, or another file:\n  expected sha256 {expected}\n  found    sha256 {found}\n"
        f"Remove it, and fetch it again from {url}"
    )


def unreachable(url: str, seconds: float = _CONNECT_SECONDS) -> str | None:
    """Why `url` can't be downloaded, found within about `seconds`; None if nothing speaks against it.

    Asks for the headers alone, through the proxy that the environment names, if any.
    """
    answer: list[str | None] = [f"no answer within {seconds:g} s"]

    def ask() -> None:
        answer[0] = _ask(url, seconds)

    # In a thread, as looking up a host name knows no timeout; a daemon, so that it can't keep the process alive.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds + 1)
    return answer[0]


def _ask(url: str, seconds: float) -> str | None:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds):
            return None
    except urllib.error.HTTPError as error:
        with error:  # the host is there; TFDS retries a 5xx for minutes, and reports anything else at once
            return f"{url} answers {error.code} {error.reason}" if error.code >= 500 else None
    except OSError as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):
            return None  # TFDS has certificates of its own (certifi); let it try
        return f"{url.split('/')[2]}: {reason}"
