"""`flaxmodels generate`: text from a trained model, as it is made."""

import argparse
import collections
import dataclasses
import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flaxmodels import storage
from flaxmodels.cli import trained, words
from flaxmodels.registry import UserError
from flaxmodels.runtime import exits

if TYPE_CHECKING:
    from flaxmodels.data.split import Tokenizer
    from flaxmodels.inference.generate import Piece
    from flaxmodels.inference.loading import Loaded

# How many prompts are computed at the same time, where nobody says.
BATCH = 8
# Contexts are as long as the next multiple of this, so that few programs serve all prompts.
ROUND = 128
# What the flags of sampling do; their defaults are those of `Sampling`.
SAMPLING: Mapping[str, tuple[Any, str]] = {
    "temperature": (float, "divides the logits; 0 takes the likeliest token"),
    "top_k": (words.number, "only so many of the likeliest tokens"),
    "top_p": (float, "only the likeliest tokens that together have this probability"),
    "min_p": (float, "only tokens with this share of the probability of the likeliest"),
    "repetition_penalty": (float, "over 1, tokens that the text has already become less likely"),
    "seed": (words.number, "of what is drawn"),
    "beams": (words.count, "search for the likeliest text with so many hypotheses; nothing is drawn"),
    "length_penalty": (float, "of the search: over 0 longer texts are better"),
}


def generate(argv: Sequence[str]) -> int:
    """Continue prompts with a trained model; the text is shown as it is made."""
    with exits.importing():
        from flaxmodels.inference import cache, weights
        from flaxmodels.inference.generate import Generator
        from flaxmodels.inference.sampling import Sampling
        from flaxmodels.runtime import compile_cache

    asked = _parse(argv)
    if asked.template and not asked.chat:
        raise UserError(f"--template={asked.template!r} is of --chat: add that, or leave it out.")
    sampling = Sampling(**{name: value for name in SAMPLING if (value := getattr(asked, name)) is not None})
    texts = [*asked.prompt, *_lines(asked.file)]
    if not texts:
        raise UserError('no prompt: give one with --prompt="...", or several in a --file, one in each line.')
    compile_cache.keep()
    with compile_cache.verified():
        loaded, tokenizer, mesh = trained.load(asked)
        cache.check(loaded.model)
        prompts, ends = _prompts(loaded, tokenizer, texts, asked)
        model, params = weights.prepare(loaded.model, loaded.params, asked.precision)
        generator = Generator(
            model, params, loaded.extra,
            batch=(asked.batch or min(len(prompts), BATCH)) * sampling.beams,
            length=asked.length or _length(model.max_length, prompts, asked.tokens),
            mesh=mesh, tokenizer=tokenizer, ends=ends,
        )  # fmt: skip
        begun, count, shown = time.monotonic(), 0, -1
        for piece in _in_order(generator.stream(prompts, sampling, asked.tokens, asked.stop), asked.json):
            count += len(piece.tokens)
            if asked.json:
                print(json.dumps({"prompt": texts[piece.request], **dataclasses.asdict(piece)}), flush=True)
            else:
                # An answer stands by itself, what continues a prompt behind it.
                begins = piece.request > shown and not asked.chat
                _show(piece, texts[piece.request], begins)
            shown = piece.request
    seconds = time.monotonic() - begun - generator.compiling
    print(
        f"{loaded.where}: {count} tokens in {seconds:.2f} s, {count / seconds:.1f} tokens/s"
        f" (compiled in {generator.compiling:.1f} s)",
        file=sys.stderr,
    )
    return exits.DONE


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = trained.parser("generate", generate.__doc__, '--prompt="..."')
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="to continue; or several")
    parser.add_argument("--file", metavar="FILE", help="with a prompt in each line; - is standard input")
    parser.add_argument("--chat", action="store_true", help="prompts are messages, and the model answers them")
    parser.add_argument("--template", metavar="NAME", help="of --chat (default: as the model knows)")
    parser.add_argument("--tokens", type=words.count, default=128, help="to make for each prompt (128)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends a text; or several")
    for name, (kind, said) in SAMPLING.items():
        parser.add_argument(f"--{name}", type=kind, help=said)
    parser.add_argument(
        "--precision", choices=("given", "int8"), default="given", help="of the weights; int8 is faster (given)"
    )
    parser.add_argument("--batch", type=words.count, help=f"prompts at the same time (all, up to {BATCH})")
    parser.add_argument("--length", type=words.count, help="tokens that the model sees at once (what is needed)")
    parser.add_argument("--json", action="store_true", help="print lines of JSON")
    return trained.parse(parser, argv)


def _lines(file: str | None) -> list[str]:
    """The lines of a file that are not empty."""
    if file is None:
        return []
    try:
        text = sys.stdin.read() if file == "-" else Path(file).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--file={file!r} can't be read: {error}.") from error
    return [line for line in text.split("\n") if line.strip()]  # a prompt may hold what other lines end with


def _prompts(
    loaded: "Loaded", tokenizer: "Tokenizer", texts: Sequence[str], asked: argparse.Namespace
) -> tuple[list[list[int]], tuple[int, ...]]:
    """The ids of each prompt, and those that end a text."""
    from flaxmodels.data import chat
    from flaxmodels.inference import conversation
    from flaxmodels.inference.generate import prompt_ids

    if not asked.chat:
        begin = trained.begin(loaded, tokenizer)
        return [prompt_ids(tokenizer, text, begin) for text in texts], loaded.ends
    if asked.template:
        template = chat.pick(asked.template, "")
    else:
        where = storage.place(asked.workdir or asked.source).expanduser()
        template = conversation.template_of(where, loaded.config, tokenizer)
    messages = [[{"role": "user", "content": text}] for text in texts]
    found = [chat.encode(template, tokenizer, message, prompt=True)[0].tolist() for message in messages]
    return found, tuple(dict.fromkeys((*chat.stops(template, tokenizer), *loaded.ends)))


def _length(most: int, prompts: Sequence[Sequence[int]], tokens: int) -> int:
    """Of the context: what the longest text needs, if the model sees as much."""
    needed = max(map(len, prompts)) + tokens
    return min(most, -(-needed // ROUND) * ROUND)


def _in_order(pieces: Iterable["Piece"], whole: bool) -> Iterator["Piece"]:
    """Pieces as they come, but those of a later request when the ones before it have ended; or `whole` texts only."""
    held: dict[int, list[Piece]] = collections.defaultdict(list)
    turn = 0
    for piece in pieces:
        held[piece.request].append(piece)
        while held[turn] and (not whole or held[turn][-1].ended):
            new = held.pop(turn)
            text, tokens = "".join(piece.text for piece in new), tuple(i for piece in new for i in piece.tokens)
            yield dataclasses.replace(new[-1], text=text, tokens=tokens)
            turn += bool(new[-1].ended)


def _show(piece: "Piece", prompt: str, begins: bool) -> None:
    print(prompt * begins + piece.text, end="\n" * bool(piece.ended), flush=True)
