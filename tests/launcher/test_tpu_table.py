"""The table of TPU types: of machines it says what the launcher knows, of what fits what `plan` compiles."""

import re

import pytest

from tpu import machines, table

TEXT = table.README.read_text().partition(table.BEGIN)[2].partition(table.END)[0]
ROWS = {
    cells[0]: cells
    for line in TEXT.splitlines()[2:]
    if line.startswith("| ")
    for cells in [[cell.strip() for cell in line.strip("|").split("|")]]
}


def record(**given):
    """What `plan --json` says, as far as the table reads it."""
    return {
        "fits": True, "refusal": "", "changes": {}, "memory": {"peak": 4 * 2**30, "limit": 16 * 2**30},
        "roofline": {"seconds": 0.05}, "efficiency": 0.5, "hours": 10.0, "remedy": None, **given,
    }  # fmt: skip


def test_readme_has_a_row_for_every_type_and_a_column_for_every_config():
    assert tuple(ROWS) == table.TYPES
    for type, cells in ROWS.items():
        assert tuple(cells[:7]) == table.hardware(machines.of(type))
        assert len(cells) == 7 + len(table.CONFIGS)
        for config, cell in zip(table.CONFIGS, cells[7:], strict=True):
            assert re.match(r"yes\b|no: " if type in table.types(config) else r"-$", cell), (type, config)


def test_what_is_said_of_a_cell():
    machine = machines.of("v5litepod-16")
    price = machines.price(machine, "spot")
    assert table.verdict(record(), machine) == f"yes, 25%, 100 ms, {10 * 16 * price:.0f} USD"
    assert table.verdict(record(changes={"mesh": "auto"}), machine).endswith(" USD*")
    small = record(memory={"peak": 2**20, "limit": 16 * 2**30}, roofline={"seconds": 1e-6})
    assert table.verdict(small, machine) == "yes"
    assert table.verdict(record(fits=False), machine) == "no: 4 GiB"
    assert table.verdict(record(fits=False, refusal="data.batch_size=12 does not"), machine) == "no: batch"


def test_notes_name_the_change_and_gather_types():
    fix = {"changes": {"mesh.data": 1, "mesh.fsdp": 4, "model.remat": "dots"}, "memory": {"peak": 3 * 2**30}}
    bad = record(fits=False, remedy=fix, changes={"mesh": "auto"}, mesh={"data": 1, "fsdp": 4})
    other = record(fits=False, remedy=fix, changes={"mesh": "auto"}, mesh={"data": 4, "fsdp": 1})
    none = record(fits=False)
    refused = record(
        fits=False, refusal="data.batch_size=12 does not divide over the 64 devices of 64 x TPU v5: use 64."
    )
    notes = list(table.notes({"c": {"a": bad, "b": bad, "d": record(), "e": none, "f": refused, "g": other}}))
    assert notes == [
        "- `c` on a, b: it fits with `--config.mesh=auto --config.model.remat=dots`: 3.0 GiB.",
        "- `c` on e: none of the changes that were tried makes it fit.",
        "- `c` on f: data.batch_size=12 does not divide over the 64 devices.",
        "- `c` on g: it fits with `--config.mesh.data=1 --config.mesh.fsdp=4 --config.model.remat=dots`: 3.0 GiB.",
    ]


def test_only_the_table_is_written():
    text = f"a\n{table.BEGIN}old\n{table.END}b\n"
    assert table.inserted(text, "new\n") == f"a\n{table.BEGIN}new\n{table.END}b\n"
    assert table.inserted(table.inserted(text, "new\n"), "old\n") == text


def same(config, types):
    """Compile, and compare all but the figures, which differ from one version of the compiler to the next."""
    pytest.importorskip("libtpu")
    column = 7 + list(table.CONFIGS).index(config)
    for type, found in table.planned(config, types).items():
        said, now = ROWS[type][column], table.verdict(found, machines.of(type))
        assert re.split(r"[ ,:]", said)[0] == re.split(r"[ ,:]", now)[0], (config, type, said, now)
        assert said.endswith("*") == now.endswith("*"), (config, type, said, now)


@pytest.mark.slow
def test_small_cells_are_what_plan_compiles():
    same("digits_mlp", ("v5litepod-16", "v6e-4"))


@pytest.mark.nightly
@pytest.mark.parametrize("config", table.CONFIGS)
def test_all_cells_are_what_plan_compiles(config):
    same(config, table.types(config))
