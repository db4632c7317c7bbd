"""A TFDS data set by its name: found where it lies prepared, or prepared now, as ArrayRecord; without TensorFlow.

What lies prepared is read without the code that prepared it. Some builders of TFDS need TensorFlow to prepare; nothing
needs it to read. Read `find` first.
"""

import contextlib
import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flaxmodels.data import builders, prepared
from flaxmodels.registry import UserError, suggest

_EXTRA = "pip install 'flaxmodels-train[tensorflow]'"
_MOST_ARCHIVES = 8  # named in an error


def find(dataset: str, data_dir: str | None, manual_dir: str | None) -> Any:
    """The data set, after preparing it if it is not there.

    Processes that start at once wait for each other: one prepares, the others read.

    Args:
      dataset: "name", "name/config", either with ":1.2.3" behind it. Without a version, the highest that is prepared.
      data_dir: TFDS's data directory; None is TFDS's own default.
      manual_dir: a folder with the original archives; not looked at once prepared.

    Returns:
      The `tfds.core.DatasetBuilder`, which has ArrayRecord files.

    Raises:
      UserError: there is no such set; it is prepared in another format only; or it can't be prepared.
    """
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    root = prepared.data_root(data_dir)
    name = _name(dataset)
    builder = _read(dataset, root)
    if builder is None:
        builder = _from_code(name, dataset, root)
        with prepared.only_process(root / name):
            if not builder.data_path.exists():
                _prepare(builder, root, None if manual_dir is None else Path(manual_dir).expanduser())
        builder = tfds.builder_from_directory(str(builder.data_path))
    return _as_array_record(builder)


def _name(dataset: str) -> str:
    """The name in "name/config:version"."""
    from tensorflow_datasets.core import naming

    try:
        name, options = naming.parse_builder_name_kwargs(dataset)
    except ValueError:
        name, options = None, {}
    if name is None or name.namespace or options.keys() - {"config", "version"}:
        raise UserError(
            f'data.dataset={dataset!r} is no name of a TFDS data set: expected "name" or "name/config", '
            'with ":1.2.3" behind it for a version.'
        )
    return str(name.name)


def _read(dataset: str, root: Path) -> Any:
    """The prepared set, from its files alone; None if it is not there."""
    from tensorflow_datasets.core import read_only_builder, registered

    try:
        return read_only_builder.builder_from_files(dataset, data_dir=str(root))
    except registered.DatasetNotFoundError:
        return None
    except Exception as error:  # whatever TFDS and protobuf say of a damaged dataset_info.json or features.json
        raise UserError(
            f"{dataset} in {root} can't be read: {error}. Remove its folder and prepare it again."
        ) from error


def _as_array_record(builder: Any) -> Any:
    from tensorflow_datasets.core.file_adapters import FileFormat

    info, wanted = builder.info, FileFormat.ARRAY_RECORD
    formats = info.available_file_formats()
    if wanted in formats:
        if info.file_format != wanted:  # converted: its files lie beside those of the first format
            info.set_file_format(wanted, override=True, override_if_initialized=True)
        return builder
    there = ", ".join(sorted(f.value for f in formats))
    raise UserError(
        f"{builder.data_path} is prepared as {there}: only array_record is read here, as all else needs TensorFlow. "
        "Set data.data_dir to another folder, to have it prepared there as array_record; or convert it:\n"
        f"  {_EXTRA}\n"
        f"  tfds convert_format --dataset_version_dir={builder.data_path} --out_file_format=array_record"
    )


def _from_code(name: str, dataset: str, root: Path) -> Any:
    """The builder that TFDS has under this name, which nobody has prepared yet."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import naming, registered

    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints what it misses
            configs = tfds.builder_cls(name).builder_configs
            config = naming.parse_builder_name_kwargs(dataset)[1].get("config")
            if config is not None and config not in configs:
                raise UserError(f"data.dataset={dataset!r}: unknown config {config!r}. {suggest(config, configs)}")
            return tfds.builder(dataset, data_dir=str(root), file_format="array_record")
    except registered.DatasetNotFoundError as error:
        raise UserError(_unknown(name, dataset, root)) from error
    except ImportError as error:
        raise UserError(_needs(name, root, error)) from error
    except (AssertionError, RuntimeError) as error:  # a version that the builder does not have
        why = str(error).rpartition('": ')[2]
        raise UserError(f"data.dataset={dataset!r} is not in {root}, and can't be prepared: {why}") from error


def _unknown(name: str, dataset: str, root: Path) -> str:
    """What to say of a name for which TFDS has no code, nor `root` the files that were asked for."""
    import tensorflow_datasets as tfds

    at_hand = sorted(str(p.parent.relative_to(root / name)) for p in (root / name).glob("**/features.json"))
    if at_hand:
        return f"data.dataset={dataset!r} is not what is in {root / name}: {', '.join(at_hand)}."
    # Builders that import TensorFlow at once are not registered without it: these files still tell of them.
    with_checksums = {path.stem for path in (Path(tfds.__file__).parent / "url_checksums").glob("*.txt")}
    if name in with_checksums:
        return _needs(name, root, ImportError("its code imports it", name="tensorflow"))
    here = {
        path.relative_to(root).parts[0] for path in (*root.glob("*/*/features.json"), *root.glob("*/*/*/features.json"))
    }
    near = suggest(name, with_checksums | here | set(tfds.list_builders(with_community_datasets=False)))
    return f"data.dataset={dataset!r} is unknown to TFDS, and not in {root}. {near}"


def _prepare(builder: Any, root: Path, folder: Path | None) -> None:
    import tensorflow_datasets as tfds

    name = builder.info.full_name
    if folder is not None and not folder.is_dir():
        raise UserError(f"data.manual_dir={str(folder)!r} is not a folder.")
    missing = _missing(builder, root, folder)
    _check_network(builder, root, missing)
    config = tfds.download.DownloadConfig(manual_dir=folder, try_download_gcs=False)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces itself with print
            builder.download_and_prepare(download_config=config)
    except tfds.core.download.download_manager.NonMatchingChecksumError as error:
        raise UserError(builders.wrong_checksum(str(error))) from error
    except Exception as error:
        lacking = next((e for e in _causes(error) if isinstance(e, ImportError | NotImplementedError)), None)
        if lacking is not None:
            raise UserError(_needs(name, root, lacking)) from error
        if isinstance(error, tfds.core.download.util.DownloadError | OSError | AssertionError | ValueError):
            raise UserError(f"{name} could not be prepared in {root}: {error}\n{_remedy(missing)}") from error
        raise  # a fault of the builder's own: its traceback is what helps


def _missing(builder: Any, root: Path, folder: Path | None) -> dict[str, Any]:
    """URL -> TFDS's UrlInfo of the archives that are not at hand, those of other configs among them."""
    recipe = builders.Recipe(builder.name, str(builder.version), type(builder).__module__)
    return {
        url: info
        for url, info in builder.url_infos.items()
        if not (folder is not None and info.filename and (folder / info.filename).is_file())
        and not builders.is_cached(recipe, url, info, root / "downloads")
    }


def _check_network(builder: Any, root: Path, missing: dict[str, Any]) -> None:
    """Fail early: TFDS itself retries a download for minutes before it gives up."""
    if builder.BUILDER_CONFIGS and len(missing) < len(builder.url_infos):
        return  # what is there may be all that this config needs
    url = next((url for url in missing if url.startswith("http")), None)
    if url is not None and (reason := builders.unreachable(url)):
        raise UserError(
            f"{builder.info.full_name} is not in {root}, and can't be downloaded: {reason}.\n{_remedy(missing)}"
        )


def _remedy(missing: dict[str, Any]) -> str:
    more = len(missing) - _MOST_ARCHIVES
    first = dict(itertools.islice(missing.items(), _MOST_ARCHIVES))
    return builders.remedy(first) + (f"\n  and {more} more" if more > 0 else "")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, what caused it, and so on."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _needs(name: str, root: Path, error: BaseException) -> str:
    """What to say where preparing lacks a package."""
    package = (getattr(error, "name", None) or "tensorflow").partition(".")[0]
    what = _EXTRA if package == "tensorflow" else f"pip install {package}"
    plain = name.partition("/")[0]
    ours = isinstance(getattr(builders, plain.upper(), None), builders.Recipe)
    return (
        f"{name} is not in {root}, and its builder in TFDS needs the package {package} to prepare it ({error}). "
        + (f'Use data.name="{plain}", which prepares the same data without; or ' if ours else "")
        + f"{what}, here or on another machine, as reading needs none of it. Elsewhere: "
        f'tfds.builder({name!r}, file_format="array_record").download_and_prepare(), then copy the folder.'
    )
