"""The table of TPU types in tpu/README.md: what each type is, and which of our configs fits, by `flaxmodels plan`.

    python -m tpu.table             compiles what is not kept yet, and writes the table between its two marks
    python -m tpu.table --check     exit code 1 where the README says something else

It needs what `plan` needs: this project, installed with its `tpu` extra. The first time takes more than an hour on two
cores: what does not fit is searched for a change that does, at most ten minutes for each type. The launcher does not
need this module.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tpu import machines
from tpu.machines import Machine

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "tpu" / "README.md"
BEGIN, END = "<!-- python -m tpu.table: begin -->\n", "<!-- python -m tpu.table: end -->\n"
TYPES = (
    "v5litepod-1", "v5litepod-4", "v5litepod-8", "v5litepod-16", "v5litepod-64", "v6e-1", "v6e-4", "v6e-8", "v6e-16",
    "v6e-64", "v5p-8", "v5p-32", "v5p-128", "v4-8", "v4-32",
)  # fmt: skip
# Config -> the fewest chips that it is compiled for.
CONFIGS: Mapping[str, int] = {"digits_mlp": 1, "shakespeare_transformer": 1, "gpt2_124m": 1, "llama3_8b": 16}
NOT_COMPILED = "-"
AUTO: Mapping[str, Any] = {"mesh": "auto"}  # what `plan` compiles where a config's own mesh is for other machines
GIB = 2**30
# Steps that are shorter say nothing: calling them is what takes the time.
SHORTEST = 1e-3
Record = Mapping[str, Any]  # what `plan --json` says of one machine
Records = Mapping[str, Mapping[str, Record]]  # by config, by type


def main(argv: Sequence[str] | None = None) -> int:
    """Write the table, or compare it."""
    parser = argparse.ArgumentParser(prog="python -m tpu.table", description="The table of TPU types in tpu/README.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where it differs")
    check = parser.parse_args(argv).check
    old = README.read_text()
    new = inserted(
        old, "".join(f"{line}\n" for line in lines({config: planned(config, types(config)) for config in CONFIGS}))
    )
    if check:
        print("the same" if new == old else f"{README}: differs; python -m tpu.table writes it")
        return int(new != old)
    README.write_text(new)
    return 0


def types(config: str) -> tuple[str, ...]:
    """Those that a config is compiled for."""
    return tuple(type for type in TYPES if machines.of(type).chips >= CONFIGS[config])


def planned(config: str, types: Sequence[str]) -> dict[str, Record]:
    """What `flaxmodels plan` says of a config on machines of some types."""
    topologies = ",".join(machines.of(type).topology for type in types)
    words = ["plan", f"--config=configs/{config}.py", f"--topologies={topologies}", "--json"]
    done = subprocess.run([sys.executable, "-m", "flaxmodels", *words], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    return dict(zip(types, map(json.loads, done.stdout.splitlines()), strict=True))


def inserted(text: str, table: str) -> str:
    """A text with the table in place of what is between the two marks."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}{table}{END}{rest.partition(END)[2]}"


def lines(records: Records) -> Iterator[str]:
    """All of the table, and below it what would make fit what does not."""
    titles = ("type", "chips", "hosts", "HBM", "peak", "spot", "on demand", *(f"`{config}`" for config in records))
    yield f"| {' | '.join(titles)} |"
    yield f"|---|{'---:|' * 6}{'---|' * len(records)}"
    for type in TYPES:
        machine = machines.of(type)
        cells = [verdict(found[type], machine) if type in found else NOT_COMPILED for found in records.values()]
        yield f"| {' | '.join((*hardware(machine), *cells))} |"
    yield ""
    yield from notes(records)


def hardware(machine: Machine) -> tuple[str, ...]:
    """The columns that say what a type is: memory and peak of a chip, and what an hour of all chips costs."""
    prices = (machines.price(machine, "spot"), machines.price(machine, "on demand"))
    return (
        machine.type,
        f"{machine.chips}",
        f"{machine.hosts}",
        f"{machine.hbm // GIB} GiB",
        f"{machine.peak / 1e12:.0f} TFLOP/s",
        *("-" if price is None else f"{price * machine.chips:,.2f}" for price in prices),
    )


def verdict(record: Record, machine: Machine) -> str:
    """Whether a config fits: "yes", the part of a chip's memory that it takes, ms of a step, USD of the run on spot."""
    memory = record["memory"]
    if record["refusal"]:
        return "no: batch" if "batch_size" in record["refusal"] else "no: mesh"
    if not record["fits"]:
        return f"no: {memory['peak'] / GIB:.0f} GiB"
    step, price = record["roofline"]["seconds"] / record["efficiency"], machines.price(machine, "spot")
    found = ["yes", *([f"{memory['peak'] / memory['limit']:.0%}"] if memory["peak"] > 0.01 * memory["limit"] else [])]
    if step >= SHORTEST:
        found.append(f"{1e3 * step:,.0f} ms")
        found += [f"{record['hours'] * machine.chips * price:,.0f} USD"] if price is not None else []
    return ", ".join(found) + "*" * bool(record["changes"])


def notes(records: Records) -> Iterator[str]:
    """A line for each reason and each change that makes a config fit, with the types that it is for."""
    for config, by_type in records.items():
        said: dict[str, list[str]] = {}
        for type, record in by_type.items():
            if note := _note(record):
                said.setdefault(note, []).append(type)
        for note, named in said.items():
            yield f"- `{config}` on {', '.join(named)}: {note}"
        if len(by_type) < len(TYPES) and CONFIGS.get(config, 1) > 1:
            yield f"- `{config}` was not compiled for fewer than {CONFIGS[config]} chips (`{NOT_COMPILED}`)."


def _note(record: Record) -> str:
    if record["refusal"]:
        return f"{record['refusal'].partition(' of ')[0]}."  # without the name of the devices
    if record["fits"]:
        own = f"* with `{_flags(record, record['changes'])}`: its own mesh is for another number of chips."
        return own if record["changes"] else ""
    fix = record["remedy"]
    if not fix:
        return "none of the changes that were tried makes it fit."
    return f"it fits with `{_flags(record, fix['changes'])}`: {fix['memory']['peak'] / GIB:.1f} GiB."


def _flags(record: Record, changes: Mapping[str, Any]) -> str:
    """Changes of a record as flags of a command; all axes of the mesh that `auto` chooses are `auto`."""
    axes = {key: value for key, value in changes.items() if key.startswith("mesh.")}
    if record["changes"] == AUTO and axes == {f"mesh.{axis}": size for axis, size in record["mesh"].items()}:
        changes = {**AUTO} | {key: value for key, value in changes.items() if key not in axes}
    return " ".join(f"--config.{key}={value}" for key, value in changes.items())


if __name__ == "__main__":
    sys.exit(main())
