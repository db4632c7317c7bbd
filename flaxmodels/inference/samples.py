"""What a language model writes while it is trained: texts at each evaluation, drawn with the same numbers each time.

Nothing of it changes the run: parameters are only read, and no randomness is shared.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from flaxmodels import lora
from flaxmodels.data import chat
from flaxmodels.data.split import Tokenizer
from flaxmodels.inference import cache, conversation, scoring
from flaxmodels.inference.generate import Generator, prompt_ids
from flaxmodels.inference.sampling import Sampling
from flaxmodels.job import Job
from flaxmodels.registry import Positive, UserError
from flaxmodels.runtime import progress

# The most tokens that one dispatch makes.
STEPS = 32
# (params, extra) -> {"prompt", "text", "ended"} of each prompt, in their order.
Sampler = Callable[[Any, Any], list[dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Samples:
    """What a run writes at each evaluation; with the fields of `Sampling`, the section `samples` of a config.

    Attributes:
      prompts: how texts begin, or what a user says where the data are conversations; () writes none.
      tokens: the most new tokens of each.
    """

    prompts: tuple[str, ...] = ()
    tokens: Positive = 100


def make(job: Job) -> Sampler | None:
    """What writes the samples of a job, all prompts together; None where its config asks for none.

    A text is a function of the parameters, its prompt and its number, and the section's options: a resumed run writes
    what the same run would have written. Programs are compiled at the first call.

    Args:
      job: of a language model.

    Raises:
      UserError: the data are no text, the model can't generate, or a prompt or an option does not fit.
    """
    options = dict(job.config["samples"])
    own = {field.name for field in dataclasses.fields(Samples)}
    asked = Samples(**{key: value for key, value in options.items() if key in own})
    sampling = Sampling(**{key: value for key, value in options.items() if key not in own})
    if not asked.prompts:
        if options:
            raise UserError(f"samples.{next(iter(options))} is set, but samples.prompts is not: say how texts begin.")
        return None
    tokenizer = job.source.tokenizer
    if tokenizer is None:
        raise UserError(f"samples.prompts: data {job.source.name!r} has no tokenizer: leave it out.")
    model, params, extra = lora.merge(job.model, job.abstract.params, job.abstract.extra)
    cache.check(model)
    prompts, ends = _read(asked.prompts, job.config["data"], tokenizer)
    # As many tokens a dispatch as time allows would be another number in each process.
    steps = 1 if jax.process_count() > 1 else STEPS
    generator = Generator(
        model, params, extra, batch=len(prompts) * sampling.beams, mesh=job.mesh, tokenizer=tokenizer, ends=ends,
        steps=steps,
    )  # fmt: skip
    generator.stream(prompts, sampling, asked.tokens)  # checks, and begins nothing

    def sampler(params: Any, extra: Any) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = [{"prompt": prompt, "text": "", "ended": ""} for prompt in asked.prompts]
        _, generator.params, generator.extra = lora.merge(job.model, params, extra)
        try:
            for piece in generator.stream(prompts, sampling, asked.tokens):
                progress.beat()
                rows[piece.request]["text"] += piece.text
                rows[piece.request]["ended"] = piece.ended
        finally:  # merged matrices are copies, and would stay until the next time
            generator.params = generator.extra = None
        return rows

    return sampler


def _read(
    texts: Sequence[str], data: Mapping[str, Any], tokenizer: Tokenizer
) -> tuple[list[list[int]], Sequence[int] | None]:
    """Ids of prompts, as the model is trained to see them; and of the tokens that end an answer, None for a text."""
    if data.get("messages"):
        template = conversation.template_of(Path(), {f"data.{key}": value for key, value in data.items()}, tokenizer)
        asked = [[{"role": "user", "content": text}] for text in texts]
        ids = [chat.encode(template, tokenizer, messages, prompt=True)[0].tolist() for messages in asked]
        return ids, chat.stops(template, tokenizer)
    begin = scoring.beginning(tokenizer) if data.get("begin") else ()
    return [prompt_ids(tokenizer, text, begin) for text in texts], None
