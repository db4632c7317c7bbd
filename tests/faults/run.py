"""Run the fault suite and write docs/faults.md: python tests/faults/run.py [--rows=F1,F10] [--quick].

Each row is what the tests named after it (`test_f10_...`, `test_f10_f11_...`) found. With --rows, the others stay as
they stand.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
from harness import ROOT

PAGE = ROOT / "docs/faults.md"
# Row -> (fault, what is required).
ROWS = {
    "F1": (
        "a process is killed at any moment (kill -9)",
        "the same command goes on; the run ends as one left alone, bit for bit",
    ),
    "F2": (
        "killed while a checkpoint is written",
        "the last committed step can be restored; what is half written is never listed, and is removed",
    ),
    "F3": ("killed while an old checkpoint is deleted", "no broken step is ever listed"),
    "F4": (
        "SIGTERM in training, compiling, evaluating, loading; twice",
        "the step is finished and saved, exit code 143; a second signal ends at once",
    ),
    "F5": ("SIGTERM to one of several processes", "all stop at one step, all save, none hangs"),
    "F6": (
        "Ctrl-C; an exception in the user's own code",
        "the last good state stays, the exit code is not 0, the traceback is the last that is said",
    ),
    "F7": (
        "the disk is full during a save",
        "said within one step; nothing half written stays; the run stops or goes on, as the config says",
    ),
    "F8": (
        "the disk is full for the log only",
        "training goes on with one warning; the lines are written when there is room",
    ),
    "F9": ("the workdir can't be written", "an error before the first step, which names the path"),
    "F10": (
        "a file of a checkpoint is cut short",
        "an error that names file and step; an earlier step only where the config says so, and loudly",
    ),
    "F11": ("a flipped bit, a zeroed page in a checkpoint", "always found before anything is restored"),
    "F12": (
        "a file or a whole item of a checkpoint is missing",
        "as a file that is cut short; nothing is filled with zeros",
    ),
    "F13": (
        "the machine stops after the rename, before the data are on disk",
        "the old step or the new one is whole, whatever reached the disk",
    ),
    "F14": (
        "one of several processes is killed",
        "all others end, the supervisor starts them again, and the run ends bit for bit",
    ),
    "F15": ("one of several processes is frozen", "all end within the heartbeat's limit, and say which it was"),
    "F16": ("a process is alive but stuck", "its watchdog says where it stands and in which process, and ends the run"),
    "F17": (
        "the coordinator or a process never comes; a wrong count or port",
        "an error within the limit, which says who is missing",
    ),
    "F18": ("another config or other code in one process", "refused at the start, with what differs"),
    "F19": (
        "a data worker raises, exits, is killed, frozen, or hangs",
        "an error or a new worker within a minute, in every case; the order stays",
    ),
    "F20": ("the main process is killed: its data workers are orphans", "they end, and their shared memory is freed"),
    "F21": (
        "a corrupt record; a truncated or missing shard",
        "an error with file and record, or left out and counted; the order of the others stays",
    ),
    "F22": (
        "other data than those that the run was trained on",
        "refused with what differs, unless it is allowed by a flag",
    ),
    "F23": ("another version of a library", "said; the order of the data does not change unnoticed"),
    "F24": (
        "gradients that are not finite: once, often, for ever",
        "left out and counted; never committed; after so many the run ends and names the batch",
    ),
    "F25": ("the loss spikes", "left out, or rolled back and left out; recorded, and can be replayed"),
    "F26": ("a wrong key, type or range in the config", "an error before anything is compiled, with the nearest name"),
    "F27": (
        "a checkpoint of another model: shape, missing, extra, renamed",
        "one message with all differences and what to do",
    ),
    "F28": ("a checkpoint of another dtype", "refused, unless a cast is asked for by name"),
    "F29": (
        "another mesh, or another number of devices or processes",
        "parameters the same bits, the loss within rounding, the data go on where they were",
    ),
    "F30": ("another tokenizer or vocabulary of the same size", "refused"),
    "F31": (
        "out of memory, on a device or on the host",
        "a message with the bytes of what there is, and advice; after a kill the run goes on bit for bit",
    ),
    "F32": (
        "two runs in one workdir",
        "the second is refused and told who holds it; a dead owner's lock holds nobody up",
    ),
    "F33": ("the clock jumps by a day, or to 1970", "no save too many or too few, nothing deleted, no time limit hit"),
    "F34": ("slow or absent storage", "training goes on beside it; one save in flight; an error by the deadline"),
    "F35": (
        "a save is slower than the time between saves",
        "waited for or left out, as the config says, and said; memory stays bounded",
    ),
    "F36": (
        "killed between a commit and what follows it",
        "made again after the restart: nothing missing, nothing twice",
    ),
    "F37": ("a corrupt or stale cache of compiled programs", "compiled again; the same numbers"),
    "F47": (
        "all of it for twenty minutes: kills, signals, full disks, dead workers, bad batches",
        "the run ends as one left alone, bit for bit",
    ),
}
COUNTS = ("injected", "detected", "exact")
DETECTED = ("rejected", "refused", "explained", "warned")  # are other words for that
SOAK = "F47"
HEAD = """# Faults, and what flaxmodels does about each

Each row is reproduced by its command, with processes of one machine and simulated devices: T1 is one device, T8 eight,
T2x4 two processes of four devices each. "Exact": every batch, every line of the log, each once, and every byte of the
last state are those of a run that was left alone. Where a row needs root (to mount a small file system) or a tool that
is not there, its tests are skipped, and the row says so.

This page is written by `python tests/faults/run.py`; of the user's own config, `flaxmodels verify resume --config=FILE`
shows the first row.

| # | fault | what must be | injected | detected | exact | figures | tests | command |
|---|---|---|---|---|---|---|---|---|
"""


def main(argv: Sequence[str]) -> int:
    """Run what is asked for; 1 where a test failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=lambda text: text.split(","), help="such as F1,F10 (default: all)")
    parser.add_argument("--quick", action="store_true", help="without what takes minutes a row")
    parser.add_argument("--to", type=Path, default=PAGE, help="the page to write (default: docs/faults.md)")
    asked = parser.parse_args(argv)
    if unknown := set(asked.rows or ()) - set(ROWS):
        parser.error(f"there is no row {', '.join(sorted(unknown))}: F1 to F37, and F47")
    rows = asked.rows or [row for row in ROWS if not (asked.quick and row == SOAK)]
    with tempfile.TemporaryDirectory() as folder:
        figures, report = Path(folder, "figures.jsonl"), Path(folder, "report.xml")
        env = {**os.environ, harness.FIGURES: str(figures)}
        if tested := [row for row in rows if row != SOAK]:
            names = " or ".join(f"_{row.lower()}_" for row in tested)
            words = ["-m", "pytest", "tests/faults", "-n", "0", "-k", names, f"--junitxml={report}"]
            subprocess.run([sys.executable, *words, *["--nightly"] * (not asked.quick)], cwd=ROOT, env=env, check=False)
        if SOAK in rows:
            subprocess.run([sys.executable, "tests/faults/soak.py"], cwd=ROOT, env=env, check=False)
        lines = [json.loads(line) for line in figures.read_text().splitlines()] if figures.exists() else []
        outcomes = read(report) if report.exists() else {}
    old = asked.to.read_text().splitlines() if asked.to.exists() else []
    stands = {line.split("|")[1].strip(): line for line in old if re.match(r"\| F\d+ \|", line)}
    for row in rows:
        found = [line for line in lines if line["row"] == row]
        stands[row] = written(row, found, outcomes.get(row, []))
        print(stands[row])
    asked.to.write_text(HEAD + "".join(f"{stands[row]}\n" for row in ROWS if row in stands))
    print(f"written: {asked.to}")
    return int(any(result == "failed" for row in rows for result, _ in outcomes.get(row, [])))


def read(report: Path) -> dict[str, list[tuple[str, str]]]:
    """Row -> (passed, failed or skipped; why) of each of its tests."""
    found: dict[str, list[tuple[str, str]]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        if not (names := re.match(r"test((?:_f\d+)+)_", case.get("name", ""))):
            continue
        result, why = "passed", ""
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                result, why = "skipped" if child.tag == "skipped" else "failed", child.get("message", "")
        for row in names[1].upper().split("_")[1:]:  # a test may be of several
            found.setdefault(row, []).append((result, why))
    return found


def written(row: str, lines: Sequence[Mapping[str, Any]], outcomes: Iterable[tuple[str, str]]) -> str:
    """The row of the page."""
    fault, required = ROWS[row]
    totals, counts = summed(lines), dict[str, int]()
    for result, _ in outcomes:
        counts[result] = counts.get(result, 0) + 1
    tests = ", ".join(f"{count} {result}" for result, count in counts.items()) or "-"
    if reasons := sorted({why for result, why in outcomes if result == "skipped"}):
        tests += f" ({'; '.join(reasons)})"
    others = "; ".join(f"{name.replace('_', ' ')} {value}" for name, value in totals.items() if name not in COUNTS)
    command = "python tests/faults/soak.py" if row == SOAK else f"python tests/faults/run.py --rows={row}"
    cells = [row, fault, required, *(totals.get(name, "-") for name in COUNTS), others or "-", tests, f"`{command}`"]
    return "| " + " | ".join(str(cell).replace("|", "/").replace("\n", " ") for cell in cells) + " |"


def summed(lines: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Figures of a row: whole numbers are added up, of others the least and the most stand, words are listed."""
    values: dict[str, list[Any]] = {}
    for line in lines:
        for name, value in line.items():
            if name not in ("row", "test"):
                values.setdefault("detected" if name in DETECTED else name, []).append(value)
    return {name: _summed(found) for name, found in values.items()}


def _summed(found: Sequence[Any]) -> str:
    if all(isinstance(value, int) for value in found):
        return f"{sum(found):,}"
    if all(isinstance(value, int | float) for value in found):
        least, most = min(found), max(found)
        return f"{least:.3g}" if least == most else f"{least:.3g} to {most:.3g}"
    return ", ".join(dict.fromkeys(map(str, found)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
