"""Multiple choice by log-likelihood: which of several texts a language model finds the most probable after a question.

Read `choose`. As in Brown et al. 2020 (arXiv:2005.14165, section 2.4): each choice is put behind the question, and only
its own tokens count; raw, or over its length, so that a long choice is not less probable for that alone.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np
from jax.sharding import Mesh

from flaxmodels.data.reading import Paths, inputs
from flaxmodels.data.split import Tokenizer
from flaxmodels.data.text_files import check_encoding, lines
from flaxmodels.data.tokenizer import encode_many
from flaxmodels.data.vocabularies import utf8
from flaxmodels.inference import scoring
from flaxmodels.inference.scoring import Span
from flaxmodels.registry import UserError, quote

QUESTION, CHOICE = "{question}", "{choice}"
TEMPLATE = f"{QUESTION} {CHOICE}"
# What the log-likelihood of a choice is divided by before the largest is taken.
WAYS = ("raw", "per_token", "per_byte")


@dataclasses.dataclass(frozen=True)
class Question:
    """A question with its choices.

    Attributes:
      question: the text before a choice.
      choices: two or more texts.
      answer: the number of the right one; None where nobody says.
      where: "file:line", for messages.
    """

    question: str
    choices: tuple[str, ...]
    answer: int | None = None
    where: str = ""


@dataclasses.dataclass(frozen=True)
class Chosen:
    """What a model makes of a question.

    Attributes:
      likelihoods: the log-likelihood of each choice, in nats.
      picks: way of `WAYS` -> the number of the choice that is the most probable; of equal ones the first.
      cut: tokens that the question lost at its begin, because the model sees no more.
    """

    likelihoods: tuple[float, ...]
    picks: Mapping[str, int]
    cut: int


def read(path: Paths, encoding: str = "utf-8", key: str = "path") -> list[Question]:
    """Questions of a jsonl file: {"question": text, "choices": [text, ...], "answer": number or text} on each line.

    An answer is the number of a choice, from 0, or the choice itself; it may be left out.

    Args:
      path: a file, a glob, or several of them.
      encoding: of the files.
      key: what named them, for messages.

    Raises:
      UserError: the file is missing or empty, or a line is something else; it is named.
    """
    check_encoding(encoding)
    found = []
    for file, _ in inputs(path, key):
        rows = ((number, line) for number, line in enumerate(lines(file, encoding), 1) if line.strip())
        of_file = [_question(line, f"{file}:{number}") for number, line in rows]
        if not of_file:
            raise UserError(f"{file} is empty: expected a question on each line.")
        found += of_file
    return found


def _question(line: str, where: str) -> Question:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is no JSON: {error}. Expected one object on each line.") from error
    if not isinstance(row, dict) or not {"question", "choices"} <= set(row):
        raise UserError(f'{where}: expected {{"question": TEXT, "choices": [TEXT, ...], "answer": NUMBER or TEXT}}.')
    question, choices, answer = row["question"], row["choices"], row.get("answer")
    if not isinstance(question, str):
        raise UserError(f"{where}: question={quote(question)} is of type {type(question).__name__}: expected a text.")
    texts = isinstance(choices, list) and all(isinstance(choice, str) and choice for choice in choices)
    if not texts or len(set(choices)) < max(len(choices), 2):
        raise UserError(f"{where}: choices={quote(choices)}: expected two or more texts that differ, none empty.")
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    number = isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices)
    if answer is not None and not number:
        raise UserError(
            f"{where}: answer={quote(answer)} is none of the {len(choices)} choices: expected one of them, or its "
            f"number, from 0 to {len(choices) - 1}."
        )
    return Question(question, tuple(choices), answer, where)


def choose(
    model: nn.Module,
    params: Any,
    extra: Any,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    *,
    mesh: Mesh,
    template: str = TEMPLATE,
    begin: Sequence[int] = (),
    length: int | None = None,
    batch: int | None = None,
) -> list[Chosen]:
    """Ask a model questions.

    Args:
      model: see `scoring.scores`, as `params`, `extra`, `mesh` and `batch`.
      params: of the model.
      extra: of the model.
      tokenizer: of the model.
      questions: what is asked.
      mesh: where it all lies.
      template: what the model reads, with {question} in it, and {choice} at its end.
      begin: ids that stand before each text: see `scoring.measure`.
      length: the most inputs; a question that is longer loses its begin. None: `model.max_length`.
      batch: choices that are computed together.

    Raises:
      UserError: the template is none; a choice alone is too long; or nothing stands before a choice, and the tokenizer
        has no token to begin with.
    """
    if template.count(CHOICE) != 1 or not template.endswith(CHOICE):
        raise UserError(f"template={template!r}: expected {CHOICE} at its end, and {QUESTION} before that.")
    length, _ = scoring.sizes(model, length)
    spans, cuts = [], []
    for question in questions:
        for span, cut in _spans(tokenizer, question, template.removesuffix(CHOICE), begin, length):
            spans.append(span)
            cuts.append(cut)
    scored = scoring.scores(model, params, extra, spans, mesh=mesh, length=length, stride=length, batch=batch)
    found, at = [], 0
    for question in questions:
        end = at + len(question.choices)
        found.append(_chosen(question, scored[at:end], max(cuts[at:end])))
        at = end
    return found


def _spans(
    tokenizer: Tokenizer, question: Question, before: str, begin: Sequence[int], length: int
) -> list[tuple[Span, int]]:
    """The span of each choice, and how many tokens it lost at its begin.

    A choice is encoded together with what stands before it, as it would be in a text. Its own tokens are those from the
    first on that is another than without it.
    """
    prompt = before.replace(QUESTION, question.question)
    # Where text ends in a space, that is mostly part of the first token of what follows, and would not be alone.
    alone, *whole = encode_many(tokenizer, [prompt.rstrip(), *(prompt + choice for choice in question.choices)])
    rows = []
    for choice, ids in zip(question.choices, whole):
        same = min(len(alone), len(ids) - 1)
        differ = np.flatnonzero(alone[:same] != ids[:same])
        silent = int(differ[0]) if len(differ) else same
        ids, silent = np.concatenate([np.array(begin, np.int64), ids]), silent + len(begin)
        if not silent:
            if tokenizer.end is None:
                raise UserError(
                    f"{question.where}: nothing stands before the choice {choice!r}, and the tokenizer has no token to "
                    "begin a text with. Put a text before {choice} in the template."
                )
            ids, silent = np.concatenate([[tokenizer.end], ids]), 1
        if len(ids) - silent > length:
            raise UserError(
                f"{question.where}: the choice {quote(choice[:40])}... has {len(ids) - silent} tokens, and the model "
                f"sees {length} at once. Use a shorter one."
            )
        cut = max(len(ids) - length - 1, 0)
        rows.append((Span(ids[cut:], silent - cut), cut))
    return rows


def _chosen(question: Question, scored: Sequence[scoring.Score], cut: int) -> Chosen:
    likelihoods = tuple(-score.nll for score in scored)
    sizes = {
        "raw": [1] * len(scored),
        "per_token": [score.tokens for score in scored],
        "per_byte": [len(utf8(choice)) for choice in question.choices],
    }
    picks = {way: int(np.argmax(np.array(likelihoods) / np.array(sizes[way]))) for way in WAYS}
    return Chosen(likelihoods, picks, cut)


def accuracy(questions: Sequence[Question], found: Sequence[Chosen]) -> dict[str, float]:
    """Way of `WAYS` -> share of right picks, and "chance" -> what picks at random would give; of those with an answer.

    NaN where no question has one.
    """
    known = [(question, chosen) for question, chosen in zip(questions, found) if question.answer is not None]
    if not known:
        return dict.fromkeys((*WAYS, "chance"), math.nan)
    right = {way: sum(chosen.picks[way] == question.answer for question, chosen in known) for way in WAYS}
    chance = math.fsum(1 / len(question.choices) for question, _ in known)
    return {name: total / len(known) for name, total in {**right, "chance": chance}.items()}
