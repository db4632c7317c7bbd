"""`flaxmodels chat`: talk to a trained model at the terminal."""

import json
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from flaxmodels import storage
from flaxmodels.cli import trained, words
from flaxmodels.cli.generate import SAMPLING
from flaxmodels.registry import UserError
from flaxmodels.runtime import exits

if TYPE_CHECKING:
    from flaxmodels.inference.generate import Generator
    from flaxmodels.inference.sampling import Sampling

# Tokens of a conversation that are kept, where nobody says; some models could see more than there is memory for.
LENGTH = 4096


def chat(argv: Sequence[str]) -> int:
    """Talk to a trained model: each line is a message, and the answer is shown as it is made."""
    with exits.importing():
        from flaxmodels.data import chat as chats
        from flaxmodels.inference import cache, conversation, weights
        from flaxmodels.inference.generate import Generator
        from flaxmodels.inference.sampling import Sampling
        from flaxmodels.runtime import compile_cache

    parser = trained.parser("chat", chat.__doc__, "[--system=TEXT]")
    parser.add_argument("--system", metavar="TEXT", help="what the model is told first")
    parser.add_argument(
        "--template", metavar="NAME", help="how conversations are written (default: as the model knows)"
    )
    parser.add_argument("--tokens", type=words.count, default=256, help="the most in an answer (256)")
    parser.add_argument("--length", type=words.count, help=f"tokens that are seen at once (up to {LENGTH})")
    for name, (kind, said) in SAMPLING.items():
        parser.add_argument(f"--{name}", type=kind, help=said)
    parser.add_argument(
        "--precision", choices=("given", "int8"), default="given", help="of the weights; int8 is faster (given)"
    )
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each answer")
    asked = trained.parse(parser, argv)
    sampling = Sampling(**{name: value for name in SAMPLING if (value := getattr(asked, name)) is not None})
    compile_cache.keep()
    with compile_cache.verified():
        loaded, tokenizer, mesh = trained.load(asked)
        if asked.template:
            template = chats.pick(asked.template, "")
        else:
            template = conversation.template_of(
                storage.place(asked.workdir or asked.source).expanduser(), loaded.config, tokenizer
            )
        cache.check(loaded.model)
        model, params = weights.prepare(loaded.model, loaded.params, asked.precision)
        generator = Generator(
            model, params, loaded.extra, batch=sampling.beams,
            length=asked.length or min(model.max_length, LENGTH), mesh=mesh, tokenizer=tokenizer,
            ends=tuple(dict.fromkeys((*chats.stops(template, tokenizer), *loaded.ends))),
        )  # fmt: skip
        room = generator.length - min(asked.tokens, generator.length // 2)
        messages = [{"role": "system", "content": asked.system}] if asked.system else []
        for question in _questions():
            messages.append({"role": "user", "content": question})
            try:
                ids, left_out = conversation.ids_of(template, tokenizer, messages, room)
            except UserError as error:
                if not sys.stdin.isatty():
                    raise
                print(f"error: {error}", file=sys.stderr)
                messages.pop()
                continue
            if left_out:
                print(f"(the first {left_out} messages are no longer seen)", file=sys.stderr)
            # A search does not go on beyond what is seen at once.
            most = min(asked.tokens, generator.length - len(ids)) if sampling.beams > 1 else asked.tokens
            answer = _answered(generator, ids, sampling, most, show=not asked.json)
            messages.append({"role": "assistant", "content": answer})
            if asked.json:
                print(json.dumps({"question": question, "answer": answer}), flush=True)
    return exits.DONE


def _questions() -> Iterator[str]:
    """What is typed, or what comes through a pipe, line by line; blank ones are left out."""
    talking = sys.stdin.isatty()
    while True:
        try:
            line = input("> " if talking else "").strip()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise UserError(f"standard input is no text: {error}.") from error
        if line:
            yield line


def _answered(generator: "Generator", ids: Sequence[int], sampling: "Sampling", most: int, *, show: bool) -> str:
    """The answer, without white space around it; shown as it is made."""
    answer = ""
    for piece in generator.stream([ids], sampling, most):
        # A template may put a space before an answer; none is shown.
        new = piece.text if answer else piece.text.lstrip()
        answer += new
        if show:
            print(new, end="", flush=True)
    if show:
        print(flush=True)
    return answer.strip()
