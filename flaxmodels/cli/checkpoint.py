"""`flaxmodels checkpoint`: look at the checkpoints of any workdir, compare, average, prune them; without a config."""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flaxmodels import console, storage
from flaxmodels.cli import contents, words
from flaxmodels.registry import UserError
from flaxmodels.runtime import exits
from flaxmodels.runtime.lock import workdir_lock

if TYPE_CHECKING:
    from flaxmodels.shelf import Entry

# Differing tensors that `diff` shows, unless all are asked for.
SHOWN = 20


def checkpoint(argv: Sequence[str]) -> int:
    """List, inspect, verify, diff, average or prune the checkpoints of any workdir."""
    if argv and (not argv[0].startswith("-") or argv[0] in ("-h", "--help")):
        return words.one_of("checkpoint", checkpoint, "action", ACTIONS, argv)
    there = ", ".join(ACTIONS)
    raise UserError(f"checkpoint: say first what to do, as in `flaxmodels checkpoint list --workdir=DIR`: {there}.")


def _parser(action: str, description: str, steps: str = "", number: str = "*") -> argparse.ArgumentParser:
    """The flags of all actions; `steps` says what the words without a flag are."""
    parser = argparse.ArgumentParser(
        prog=f"flaxmodels checkpoint {action}", description=description, allow_abbrev=False
    )
    parser.add_argument("--workdir", metavar="DIR", help="of a run, or gs://BUCKET/NAME; it is read anew each time")
    parser.add_argument("--json", action="store_true", help="print lines of JSON")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    if steps:
        parser.add_argument("steps", nargs=number, metavar="STEP", help=steps)
    return parser


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    flags = words.parse(parser, argv)
    _keep_off()
    return flags


def _keep_off() -> None:
    """Let no accelerator be touched: a run may be using it, and here nothing is computed on it."""
    with exits.importing():
        import jax

    jax.config.update("jax_platforms", "cpu")


def _workdir(flags: argparse.Namespace) -> Path:
    if flags.workdir is None:
        raise UserError("--workdir is not set: name the workdir of a run, as in --workdir=runs/digits_mlp.")
    return storage.place(flags.workdir)


def _found(flags: argparse.Namespace, text: str) -> "Entry":
    """The checkpoint that a word names: a step of --workdir, or WORKDIR:STEP."""
    from flaxmodels import shelf

    folder, colon, step = text.rpartition(":")
    if colon:
        return shelf.find(storage.place(folder), step, "workdir")
    return shelf.find(_workdir(flags), text)


def _say(records: Sequence[Mapping[str, Any]]) -> None:
    for record in records:
        print(json.dumps(record))


def _display() -> console.Display:
    return console.open_display(sys.stdout, 1, 0, 1)


def _git(entry: "Entry") -> str:
    found = entry.facts.get("git") or {}
    return str(found.get("revision", "-"))[:9] + "+" * bool(found.get("dirty"))


def _state(entry: "Entry", found: list[str] | None) -> str:
    if not entry.committed:
        return "not committed"
    return "committed" if found is None else "damaged" if found else "whole"


def _list(argv: Sequence[str]) -> int:
    with exits.importing():
        from flaxmodels import shelf

    parser = _parser("list", "List the checkpoints of a workdir.")
    parser.add_argument("--verify", action="store_true", help="read all files, and say whether they are whole")
    flags = _parse(parser, argv)
    entries = shelf.entries(_workdir(flags))
    best = shelf.best(entries)
    problems = {e.step: shelf.problems(e) if flags.verify and e.committed else None for e in entries}
    records = [
        {
            "step": entry.step, "saved": entry.saved, "bytes": entry.nbytes, "metric": entry.metric,
            "best": entry == best, "state": _state(entry, problems[entry.step]),
            "parent": entry.facts.get("parent"), "git": entry.facts.get("git"),
        }
        for entry in entries
    ]  # fmt: skip
    if flags.json:
        _say(records)
        return exits.DONE
    display = _display()
    metric = next((name for e in entries if (name := e.meta.get("config", {}).get("train.metric"))), "metric")
    rows = [
        (
            str(entry.step), contents.when(entry.saved), console.human_bytes(entry.nbytes),
            "-" if entry.metric is None else console.number(entry.metric), "best" if entry == best else "",
            _state(entry, problems[entry.step]), str(entry.facts.get("parent") or "-"), _git(entry),
        )
        for entry in entries
    ]  # fmt: skip
    if rows:
        total = ("", "", console.human_bytes(sum(entry.nbytes for entry in entries)), "", "", "", "", "")
        headers = ("step", "saved", "size", metric, "", "state", "parent", "git")
        display.table(f"checkpoints of {flags.workdir}", headers, rows, total)
    else:
        display.line(f"{flags.workdir} has no checkpoints yet")
    for name, size in shelf.aside(_workdir(flags)):
        display.line(f"aside: {name}, {console.human_bytes(size)}")
    display.close()
    return exits.DONE


def _inspect(argv: Sequence[str]) -> int:
    with exits.importing():
        from flaxmodels import shelf, tensors

    parser = _parser("inspect", "Show what one checkpoint holds.", 'a number, "best" or "latest" (latest)', "?")
    flags = _parse(parser, argv)
    entry = _found(flags, flags.steps or "latest")
    problems, rows = shelf.problems(entry), list(tensors.statistics(entry))
    if flags.json:
        facts = {**entry.facts, "bytes": entry.nbytes, "saved": entry.saved, "problems": problems}
        _say([{"kind": "facts", **facts}, *({"kind": "tensor", **row.record()} for row in rows)])
        return exits.DONE
    display = _display()
    contents.show(display, entry, problems, rows)
    display.close()
    return exits.DONE


def _verify(argv: Sequence[str]) -> int:
    with exits.importing():
        from flaxmodels import shelf

    parser = _parser("verify", "Read every file of a checkpoint, or of all.", "a number, best or latest (all)")
    flags = _parse(parser, argv)
    entries = [_found(flags, text) for text in flags.steps] or shelf.entries(_workdir(flags))
    damaged = 0
    for entry in entries:
        begun = time.monotonic()
        found = shelf.problems(entry) if entry.committed else []
        seconds = time.monotonic() - begun
        damaged += bool(found)
        state = _state(entry, found)
        if flags.json:
            record = {"step": entry.step, "state": state, "problems": found, "bytes": entry.nbytes, "seconds": seconds}
            _say([record])
            continue
        rate = entry.nbytes / max(seconds, 1e-9)
        speed = f"{console.human_bytes(entry.nbytes)} in {seconds:.2f} s, {console.human(rate)}B/s"
        words.say(f"step {entry.step}: {state}" + (f", {speed}" if entry.committed else ""))
        for problem in found:
            words.say(f"  {problem}")
    if not entries and not flags.json:
        words.say(f"{flags.workdir} has no checkpoints yet")
    if damaged and not flags.json:
        words.say(
            f"{damaged} of {len(entries)} checkpoints are damaged: put copies in their place, or throw them away with "
            "`flaxmodels checkpoint prune --damaged`."
        )
    return exits.FAULT if damaged else exits.DONE


def _diff(argv: Sequence[str]) -> int:
    with exits.importing():
        from flaxmodels import tensors

    parser = _parser("diff", "Show how two checkpoints differ.", "two of: a number, best, latest, or WORKDIR:STEP")
    parser.add_argument("--all", action="store_true", help=f"show all tensors that differ, not the first {SHOWN}")
    flags = _parse(parser, argv)
    if len(flags.steps) != 2:
        raise UserError(f"diff compares two checkpoints, and {len(flags.steps)} are named: STEP STEP, or WORKDIR:STEP.")
    a, b = (_found(flags, text) for text in flags.steps)
    facts = list(contents.facts_that_differ(a, b))
    lines, compared = tensors.differences(a, b)
    rows = list(compared)
    if flags.json:
        _say([{"kind": kind, "name": name, "a": x, "b": y} for kind, name, x, y in facts])
        _say([{"kind": "unlike", "line": line} for line in lines])
        _say([{"kind": "tensor", **row.record()} for row in contents.ranked(rows)])
        return exits.DONE
    display = _display()
    contents.show_difference(display, (a, b), facts, lines, rows, None if flags.all else SHOWN)
    display.close()
    return exits.DONE


def _average(argv: Sequence[str]) -> int:
    with exits.importing():
        from flaxmodels import averaging, stored

    parser = _parser(
        "average", "Average the parameters of several checkpoints.", "a number, best, latest, WORKDIR:STEP"
    )
    parser.add_argument("--to", required=True, metavar="DIR", help="a new workdir, for the average")
    flags = _parse(parser, argv)
    to = storage.local(flags.to, "--to")
    entries = [_found(flags, text) for text in flags.steps]
    with contextlib.ExitStack() as locks:
        for workdir in sorted({entry.workdir for entry in entries}):
            locks.enter_context(workdir_lock(workdir))  # else a run might delete them meanwhile
        made = averaging.average(entries, to)
    text = f"average of {', '.join(str(entry.step) for entry in entries)}: {made}"
    if flags.json:
        _say([{"step": made.step, "workdir": str(flags.to), "average of": made.facts["average of"]}])
    else:
        words.say(f"{text}. Evaluate it with `flaxmodels eval --config=FILE --workdir={flags.to}`.")
        if any(path.startswith("extra/") for path in stored.tree(made.folder)):
            words.say(
                "what is not a parameter, such as statistics of BatchNorm, was averaged too, and not measured anew"
            )
    return exits.DONE


def _prune(argv: Sequence[str]) -> int:
    with exits.importing():
        from flaxmodels import shelf

    parser = _parser("prune", "Say which checkpoints would be deleted, and delete them with --yes.")
    parser.add_argument("--keep", type=words.count, metavar="N", help="keep the newest N")
    parser.add_argument("--keep_best", type=words.count, metavar="N", help="keep the N with the best metric")
    parser.add_argument("--keep_every", type=words.count, metavar="N", help="keep one every N steps")
    parser.add_argument("--damaged", action="store_true", help="delete what is damaged or was never committed")
    parser.add_argument("--yes", action="store_true", help="do it")
    flags = _parse(parser, argv)
    workdir, asked = _workdir(flags), (flags.keep, flags.keep_best, flags.keep_every)
    if not any(asked) and not flags.damaged:
        raise UserError(
            "prune: say what stays, with --keep=N, --keep_best=N or --keep_every=N; or what goes: --damaged."
        )
    shelf.entries(workdir)  # is it one? the lock would make it
    with workdir_lock(workdir) if flags.yes else contextlib.nullcontext():
        entries = shelf.entries(workdir)
        verdicts = shelf.plan_prune(
            entries,
            keep=flags.keep or (1 if any(asked) else len(entries)),
            keep_best=flags.keep_best or 0,
            keep_every=flags.keep_every or 0,
            damaged=flags.damaged,
        )
        gone = [verdict.entry for verdict in verdicts if not verdict.keep]
        aside = shelf.aside(workdir) if flags.damaged else []
        size = sum(entry.nbytes for entry in gone) + sum(nbytes for _, nbytes in aside)
        rows = [
            (str(v.entry.step), "keep" if v.keep else "delete", v.why, console.human_bytes(v.entry.nbytes))
            for v in verdicts
        ]
        rows += [(name, "delete", "moved aside by a run", console.human_bytes(nbytes)) for name, nbytes in aside]
        if flags.json:
            _say([dict(zip(("step", "what", "why"), row)) for row in rows])
        elif rows:
            display = _display()
            display.table(f"checkpoints of {workdir}", ("step", "", "", "size"), rows, ())
            display.close()
        if flags.yes:
            shelf.throw_away(workdir, gone, aside)
    count = f"{len(gone) + len(aside)} of {len(rows)} folders, {console.human_bytes(size)}"
    if not gone and not aside:
        count = "nothing: all of them stay"
    if not flags.json:
        words.say(f"deleted {count}" if flags.yes or not gone + aside else f"would delete {count}: add --yes to do it")
    return exits.DONE


ACTIONS: Mapping[str, words.Verb] = {
    "list": _list,
    "inspect": _inspect,
    "verify": _verify,
    "diff": _diff,
    "average": _average,
    "prune": _prune,
}
