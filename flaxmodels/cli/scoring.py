"""The verbs that ask how likely a language model finds texts: `score` whole ones, `choose` among several."""

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from flaxmodels.cli import trained, words
from flaxmodels.registry import UserError
from flaxmodels.runtime import exits

# What a file is, by its suffix; all else is text.
KINDS: Mapping[str, str] = {".jsonl": "jsonl", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}


def score(argv: Sequence[str]) -> int:
    """Perplexity, bits per byte and token accuracy of a language model on any text."""
    with exits.importing():
        from flaxmodels.data import reading
        from flaxmodels.inference import scoring
        from flaxmodels.runtime import compile_cache

    parser = _parser("score", "Perplexity, bits per byte and token accuracy of a language model on any text.")
    parser.add_argument("--kind", choices=reading.KINDS, help="of the files (default: by their suffix, else text)")
    parser.add_argument("--column", default="text", help="of csv, tsv, jsonl and parquet, where the texts are (text)")
    parser.add_argument("--stride", type=words.count, help="tokens from one window to the next (default: half of one)")
    asked = trained.parse(parser, argv)
    kinds = {KINDS.get(Path(file).suffix.lower(), "text") for file in asked.data}
    if asked.kind is None and len(kinds) > 1:
        raise UserError(
            f"--data names files of several kinds, {', '.join(sorted(kinds))}: name one --kind, or one file."
        )
    kind = asked.kind or kinds.pop()
    column = None if kind in ("text", "lines") else asked.column
    texts = reading.read(kind, tuple(asked.data), text=column, encoding=asked.encoding, key="--data")
    compile_cache.keep()
    with compile_cache.verified():
        loaded, tokenizer, mesh = trained.load(asked)
        found = scoring.measure(
            loaded.model, loaded.params, loaded.extra, tokenizer, texts,
            mesh=mesh, begin=trained.begin(loaded, tokenizer), length=asked.length, batch=asked.batch,
            stride=asked.stride,
        )  # fmt: skip
    if asked.json:
        print(json.dumps(dataclasses.asdict(found) | found.means))
        return exits.DONE
    print(f"{loaded.where}: {found.tokens:,} tokens, {found.nbytes:,} bytes, texts: {found.documents:,}")
    _table(found.means)
    return exits.DONE


def choose(argv: Sequence[str]) -> int:
    """Answer multiple choice questions by the log-likelihood of the choices."""
    with exits.importing():
        from flaxmodels.inference import choice
        from flaxmodels.runtime import compile_cache

    parser = _parser("choose", "Answer multiple choice questions by the log-likelihood of the choices.")
    parser.add_argument(
        "--template", default=choice.TEMPLATE, help=r"what the model reads (%(default)r); \n is the end of a line"
    )
    asked = trained.parse(parser, argv)
    questions = choice.read(tuple(asked.data), asked.encoding, "--data")
    compile_cache.keep()
    with compile_cache.verified():
        loaded, tokenizer, mesh = trained.load(asked)
        found = choice.choose(
            loaded.model, loaded.params, loaded.extra, tokenizer, questions,
            mesh=mesh, begin=trained.begin(loaded, tokenizer), length=asked.length, batch=asked.batch,
            template=asked.template.replace("\\n", "\n"),
        )  # fmt: skip
    shares = choice.accuracy(questions, found)
    if asked.json:
        for question, chosen in zip(questions, found):
            print(json.dumps({"where": question.where, "answer": question.answer, **dataclasses.asdict(chosen)}))
        return exits.DONE
    answered, cut = sum(q.answer is not None for q in questions), sum(bool(chosen.cut) for chosen in found)
    print(f"{loaded.where}: {len(questions):,} questions, {answered:,} of them with an answer")
    if cut:
        print(f"the model sees too little for {cut:,} of them, which lost their begin")
    if answered:
        _table({f"accuracy, {name}": share for name, share in shares.items() if name != "chance"})
        _table({"by chance": shares["chance"]})
    else:
        for question, chosen in zip(questions, found):
            print(f"{question.where}: {question.choices[chosen.picks['raw']]}")
    return exits.DONE


def _parser(verb: str, description: str) -> argparse.ArgumentParser:
    flags = trained.parser(verb, description, "--data=FILE")
    flags.add_argument("--data", required=True, action="append", metavar="FILE", help="a file, or a glob; or several")
    flags.add_argument("--encoding", default="utf-8", help="of the files (utf-8)")
    flags.add_argument("--length", type=words.count, help="the most tokens that are seen at once (default: all it can)")
    flags.add_argument("--batch", type=words.count, help="windows that are computed together (default: what fits)")
    flags.add_argument("--json", action="store_true", help="print lines of JSON")
    return flags


def _table(values: Mapping[str, float]) -> None:
    for name, value in values.items():
        print(f"  {name:<24} {value:.6g}")
