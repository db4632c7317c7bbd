"""The factors of a run (`lora`) as the PEFT library reads them: adapter_config.json, adapter_model.safetensors."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from flaxmodels import fitting, lora, shelf, stored
from flaxmodels.fitting import PARAMS, Leaf
from flaxmodels.hub import tensor_files, writing
from flaxmodels.hub.families import ARCHITECTURES
from flaxmodels.hub.links import Link
from flaxmodels.registry import UserError
from flaxmodels.shelf import Entry
from flaxmodels.state import BASE

# Beginnings of paths.
_BASE, _AVERAGE = f"extra/{BASE}/", "/parameters_average/"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MERGE = "Write the whole model instead: `flaxmodels merge`, then `flaxmodels export --format=hf`."


def release(entry: Entry, to: Path) -> list[Path]:
    """Write the factors of a checkpoint, averaged ones where the run kept some; the base is not needed.

    Args:
      entry: of a run with `lora.rank`; its files are verified.
      to: new, or empty.

    Returns:
      The files.

    Raises:
      UserError: the run trained no factors, or what it trained can't be said there.
    """
    shelf.check(entry)
    config, meta = entry.meta.get("config", {}), entry.meta
    if not config.get("lora.rank") or "model" not in meta:
        raise UserError(f"{entry} has no factors: its config has no lora.rank.")
    saved, memory = stored.tree(entry.folder), meta.get("memory", {})
    names = {path: path for path in saved if path.startswith(PARAMS)}
    names |= {PARAMS + path.partition(_AVERAGE)[2]: path for path in saved if _AVERAGE in path}
    arrays = stored.arrays(entry.folder, list(names.values()))
    factors = {path.removeprefix(PARAMS): arrays[name] for path, name in names.items()}
    kinds = memory.get("base", {}).get("leaves", {}).items()
    leaves = {PARAMS + path: Leaf(tuple(shape), kind) for path, (shape, kind) in kinds}
    leaves |= {path.replace(_BASE, PARAMS, 1): leaf for path, leaf in saved.items() if path.startswith(_BASE)}
    architecture, fields, _ = writing.translated(meta["model"], leaves)
    tensors, modules, turned = translated(factors, ARCHITECTURES[architecture].links(fields))
    said = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM" if architecture.endswith("CausalLM") else None,
        "base_model_name_or_path": memory.get("origin") or None,
        "r": config["lora.rank"], "lora_alpha": config["lora.alpha"], "lora_dropout": config["lora.dropout"],
        "target_modules": sorted(modules), "fan_in_fan_out": turned, "bias": "none", "inference_mode": True,
    }  # fmt: skip
    folder = writing.new(to)
    tensor_files.write(folder / WEIGHTS, fitting.leaves(tensors), tensors.items())
    (folder / CONFIG).write_text(json.dumps(said, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return [folder / WEIGHTS, folder / CONFIG]


def translated(
    factors: Mapping[str, np.ndarray], links: tuple[Link, ...]
) -> tuple[dict[str, np.ndarray], set[str], bool]:
    """What trained, as tensors of PEFT.

    Args:
      factors: path -> array of all that trained.
      links: of the architecture.

    Returns:
      (name -> tensor: of each adapted map A (rank, inputs) and B (outputs, rank); ends of the names of these maps;
      whether their matrices are (inputs, outputs), as GPT-2's are).

    Raises:
      UserError: there are other things than factors beside linear maps, or a map is a part of a larger one there.
    """
    known, ends = {link.ours: link for link in links}, lora.BESIDE
    tensors: dict[str, np.ndarray] = {}
    modules, turned = set[str](), set[bool]()
    for path, a in factors.items():
        if path.endswith(ends[1]):
            continue
        ours = path.removesuffix(ends[0])
        if ours == path or ours not in known:
            raise UserError(f"{path} trained, which an adapter of PEFT can't hold. {_MERGE}")
        link, b, rank = known[ours], factors[ours + ends[1]], a.shape[-1]
        inputs = a.ndim - 1 - link.of_blocks
        mine, _, other = link.form.partition(" -> ")
        theirs = [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\w", other or mine)]
        groups = [mine.split()[:inputs], mine.split()[inputs:]]
        if link.part != (0, 1) or theirs not in (groups, groups[::-1]):
            raise UserError(f"{ours} is a part of {link.theirs} there, whose factors it can't share. {_MERGE}")
        turned.add(theirs == groups)
        module = link.theirs.removesuffix(".weight")
        modules.add(module.rpartition("{}.")[2])
        for i, name in enumerate(Link(ours, module, link.form).names(len(a) if link.of_blocks else 1)):
            pair = (a[i], b[i]) if link.of_blocks else (a, b)
            tensors[f"base_model.model.{name}.lora_A.weight"] = pair[0].reshape(-1, rank).T
            tensors[f"base_model.model.{name}.lora_B.weight"] = pair[1].reshape(rank, -1).T
    if len(turned) > 1:
        raise UserError(f"these matrices are not all turned alike there. {_MERGE}")
    return tensors, modules, turned == {True}
