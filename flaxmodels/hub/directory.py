"""What a directory of Hugging Face holds, by its JSON files and the headers of its weights.

Nothing is fetched, and nothing is run: of weights only safetensors are read. Read `describe` first.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flaxmodels import fitting, models, registry, storage
from flaxmodels.data import tokenizer
from flaxmodels.fitting import PARAMS, Leaf
from flaxmodels.hub import families, tensor_files
from flaxmodels.hub.families import ARCHITECTURES, Architecture
from flaxmodels.hub.links import Link
from flaxmodels.hub.tensor_files import Tensor
from flaxmodels.registry import UserError

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER, TOKENIZER_CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
# What a directory says beside its model: of its tokenizer, of conversations, of how it generates, of its images.
SETTINGS = (TOKENIZER_CONFIG, "special_tokens_map.json", TEMPLATE, "generation_config.json", "preprocessor_config.json")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where an array of ours stands.

    Attributes:
      link: of its architecture.
      tensors: of each block, or one.
      leaf: shape, stacked over blocks where it is `stacked`, and stored dtype.
      stacked: whether its first axis is that of blocks.
      sizes: letter of the link's axes -> size.
    """

    link: Link
    tensors: tuple[Tensor, ...]
    leaf: Leaf
    stacked: bool
    sizes: Mapping[str, int] = dataclasses.field(repr=False)

    def apart(self) -> "list[Place]":
        """The array of each block."""
        leaf = Leaf(self.leaf.shape[1:], self.leaf.dtype)
        return [Place(self.link, (tensor,), leaf, False, self.sizes) for tensor in self.tensors]


@dataclasses.dataclass(frozen=True)
class Described:
    """What a directory holds, before any array is read.

    Attributes:
      folder: the directory.
      architecture: its name in config.json.
      model: "name" and fields of our model; what is not there has the model's own default.
      files: of the weights.
      leaves: path of ours, such as "params/blocks/mlp/up/kernel", stacked over blocks -> shape and stored dtype.
      tokenizer: path of its tokenizer.json, or None.
      chat_template: of conversations, for Jinja, or None.
      unused: names of tensors that are there and that nothing here computes with.
      places: path of ours -> where it stands.
    """

    folder: Path
    architecture: str
    model: dict[str, Any]
    files: tuple[Path, ...]
    leaves: Mapping[str, Leaf]
    tokenizer: Path | None
    chat_template: str | None
    unused: tuple[str, ...]
    places: Mapping[str, Place] = dataclasses.field(repr=False)

    @property
    def nbytes(self) -> int:
        """Of all arrays."""
        return sum(leaf.nbytes for leaf in self.leaves.values())

    @property
    def meta(self) -> dict[str, Any]:
        """What a checkpoint would say of its data: the tokenizer alone is known."""
        return {"data": {"tokenizer": tokenizer.load(self.tokenizer).fingerprint}} if self.tokenizer else {}

    def __str__(self) -> str:
        return f"{self.architecture} of {str(self.folder)!r}"


def is_directory(path: str | Path) -> bool:
    """Whether a folder holds a model of Hugging Face, and is no workdir of ours."""
    file = storage.place(path).expanduser() / CONFIG
    if not file.is_file():
        return False
    try:
        described = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(described, dict) and bool({"model_type", "architectures"} & set(described))


def describe(path: str | Path) -> Described:
    """What a directory holds; JSON and headers alone are read.

    Args:
      path: a folder with config.json, model.safetensors or the shards that model.safetensors.index.json lists, and
        perhaps tokenizer.json.

    Raises:
      UserError: files are missing or damaged, the architecture or one of its options is not supported, or tensors are
        missing, left over, or of another shape than config.json says; the message names all of them.
    """
    folder = storage.place(path).expanduser()
    if storage.is_object(folder):
        raise UserError(
            f"{str(folder)!r}: a directory of Hugging Face is read from a folder only. Copy it to this machine first: "
            f"gcloud storage cp --recursive {folder} FOLDER"
        )
    config = _json(folder / CONFIG)
    name, architecture = _architecture(config, folder)
    try:
        model = architecture.fields(config)
        complete = families.complete(model, architecture.model)
        links, sizes = architecture.links(complete), families.sizes(complete)
        ours = families.different(model, architecture.model)
    except UserError:
        raise
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{folder / CONFIG} is damaged, or of another version: {error}. Copy it again.") from error
    try:
        models.build(architecture.model, **ours)  # does it take such values?
    except UserError as error:
        raise UserError(f"{folder / CONFIG} describes no model: {error}") from error
    files, found = _tensors(folder)
    found = _renamed(found, architecture.base, links)
    unused = tuple(tensor for tensor in found if re.search(architecture.unused, tensor))
    found = {tensor: x for tensor, x in found.items() if tensor not in unused}
    places, lines = _places(architecture, links, found, complete, sizes)
    if lines:
        what = f"{name} of {str(folder)!r} does not hold what its {CONFIG} says"
        raise UserError(fitting.refusal(what, lines, "Copy the whole directory again, or correct its config.json."))
    return Described(
        folder, name, {"name": architecture.model, **ours}, files,
        {path: place.leaf for path, place in places.items()},
        file if (file := folder / TOKENIZER).is_file() else None,
        chat_template(folder), unused, places,
    )  # fmt: skip


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{file} is not there: expected a directory of Hugging Face, with a {file.name}.") from error
    except OSError as error:
        raise UserError(f"{file} can't be read: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"{file} is damaged: {error}. Copy it again.") from error
    if not isinstance(found, dict):
        raise UserError(f"{file} is damaged: expected a JSON object. Copy it again.")
    return found


def _architecture(config: Mapping[str, Any], folder: Path) -> tuple[str, Architecture]:
    """The first of its names that is known; of a file that names none, by its kind."""
    if config.get("quantization_config"):
        raise UserError(f"{str(folder)!r} has quantised weights, which are not read: copy the model as it was trained.")
    names = config.get("architectures") or [n for n, a in ARCHITECTURES.items() if a.kind == config.get("model_type")]
    name = next((name for name in names if name in ARCHITECTURES), None)
    if not names and "model_type" not in config:
        raise UserError(f"{folder / CONFIG} describes no model of Hugging Face: it has no 'architectures'.")
    if name is None:
        said = names[0] if names else config.get("model_type")
        raise UserError(f"{folder / CONFIG}: the architecture {said!r} is not known. {_known(said)}")
    return name, ARCHITECTURES[name]


def _known(name: object) -> str:
    return registry.suggest(name, ARCHITECTURES)


def chat_template(folder: Path) -> str | None:
    """The template of conversations that a directory, or a workdir that was made of one, has; for Jinja."""
    file = folder / TEMPLATE
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"{file} can't be read as text: {error}. Copy it again.") from error
    config = folder / TOKENIZER_CONFIG
    template = _json(config).get("chat_template") if config.is_file() else None
    if isinstance(template, list):  # several, by name
        named = [one for one in template if isinstance(one, dict)]
        template = next((one.get("template") for one in named if one.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def _tensors(folder: Path) -> tuple[tuple[Path, ...], dict[str, Tensor]]:
    """The files with weights, and all tensors in them, by name."""
    if (folder / INDEX).is_file():
        names = _json(folder / INDEX).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise UserError(f'{folder / INDEX} is damaged: expected {{"weight_map": {{TENSOR: FILE}}}}. Copy it again.')
        files = tuple(folder / Path(name).name for name in sorted(set(names.values())))
        if missing := [file.name for file in files if not file.is_file()]:
            raise UserError(f"{folder / INDEX} names files that are not there: {', '.join(missing)}. Copy them, too.")
    elif (folder / WEIGHTS).is_file():
        files = (folder / WEIGHTS,)
    else:
        others = sorted(file.name for end in ("bin", "pt", "h5", "msgpack", "pth") for file in folder.glob(f"*.{end}"))
        said = f"{', '.join(others[:3])} can run code, or be of another kind, and is not read: " if others else ""
        raise UserError(
            f"{str(folder)!r} has no {WEIGHTS}: {said}save it with safe_serialization=True, or copy a revision with "
            "safetensors."
        )
    found: dict[str, Tensor] = {}
    for file in files:
        found |= tensor_files.tensors(file)
    return files, found


def _renamed(found: Mapping[str, Tensor], base: str, links: Iterable[Link]) -> dict[str, Tensor]:
    """Tensors by the names of the model with its head; files of early versions had others."""
    new = {re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name): x for name, x in found.items()}
    new = {re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name): x for name, x in new.items()}
    if any(name.startswith(base) for name in new):
        return new
    heads = {link.theirs for link in links if not link.theirs.startswith(base)}
    return {name if name in heads else base + name: x for name, x in new.items()}


def _places(
    architecture: Architecture,
    links: Iterable[Link],
    found: Mapping[str, Tensor],
    fields: Mapping[str, Any],
    sizes: Mapping[str, int],
) -> tuple[dict[str, Place], list[str]]:
    """Where each of our arrays stands; and a line on each tensor that does not fit."""
    usual = next((tensor.leaf.dtype for tensor in found.values()), "float32")
    wanted, places, lines = dict[str, Leaf](), dict[str, Place](), list[str]()
    for link in links:
        names, shape = link.names(fields["layers"]), link.their_shape(sizes)
        wanted |= {name: Leaf(shape, found[name].leaf.dtype if name in found else usual) for name in names}
        if all(name in found and found[name].leaf.shape == shape for name in names):
            tensors = tuple(found[name] for name in names)
            if len({tensor.leaf.dtype for tensor in tensors}) > 1:
                lines.append(f"{link.theirs} is not of one dtype in all blocks")
            lead = (len(tensors),) if link.of_blocks else ()
            leaf = Leaf((*lead, *link.our_shape(sizes)), tensors[0].leaf.dtype)
            places[PARAMS + link.ours] = Place(link, tensors, leaf, link.of_blocks, sizes)
    saved = {name: tensor.leaf for name, tensor in found.items()}
    for copy, original in architecture.copies if fields.get("tied_head") else ():
        if copy in saved and original in saved:  # the one is used, the other must say the same
            if not _same(found[copy], found[original]):
                lines.append(f"{copy} differs from {original}, to which {CONFIG} ties it")
            del saved[copy]
    return places, fitting.differences(saved, wanted) + lines


def _same(one: Tensor, other: Tensor) -> bool:
    return one.leaf == other.leaf and all(np.array_equal(a, b) for a, b in zip(one.view(), other.view()))
