"""Architectures by the names that config.json gives them: `ARCHITECTURES` is all that is known of any."""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from flaxmodels import models, registry
from flaxmodels.fitting import PARAMS, Leaf
from flaxmodels.hub import decoders, encoders
from flaxmodels.hub import fields as of
from flaxmodels.hub.fields import Config, Fields
from flaxmodels.hub.links import Link

# Fields that change how, and not what, a model computes.
_FREE = frozenset(("attention", "dropout", "dtype", "remat", "split_head", "stacked", "unroll"))


@dataclasses.dataclass(frozen=True)
class Architecture:
    """All that is known of an architecture.

    Attributes:
      kind: its "model_type" in config.json.
      model: the name of our model.
      fields: config.json -> fields of it.
      config: the other way; for fields of other architectures it may give anything, which `fields` does not give back.
      links: complete fields -> all arrays.
      base: what the names of tensors begin with, but in files of the model without its head.
      copies: (name, what it is a copy of) of tensors that some files hold twice, where the head is tied.
      unused: regex of tensors that some files have and nothing here computes with.
    """

    kind: str
    model: str
    fields: Callable[[Config], Fields]
    config: Callable[[Mapping[str, Any]], dict[str, Any]]
    links: Callable[[Mapping[str, Any]], tuple[Link, ...]]
    base: str = "model."
    copies: tuple[tuple[str, str], ...] = (("lm_head.weight", "model.embed_tokens.weight"),)
    unused: str = r"rotary_emb\.inv_freq$"


# What heads of classes say of themselves; whether there were one of tokens, and it tied, means nothing to them.
_CLASSES = {"tied_head": True}
_DECODERS = {
    "Llama": ("llama", of.llama, of.to_llama),
    "Mistral": ("mistral", of.mistral, of.to_mistral),
    "Qwen2": ("qwen2", of.qwen2, of.to_qwen2),
    "Qwen3": ("qwen3", of.qwen3, of.to_qwen3),
    "Gemma2": ("gemma2", of.gemma2, of.to_gemma2),
}


def _decoder(kind: str, fields: of.Reader, config: of.Writer) -> Architecture:
    return Architecture(kind, "transformer", fields, config, decoders.decoder)


def _classifier(kind: str, fields: of.Reader, config: of.Writer) -> Architecture:
    """Classes of the last token; the softcap of logits is of those of tokens alone."""
    read = of.classified(fields, tied_head=False, head_softcap=0.0, head_bias=False)
    return Architecture(kind, "classifier", read, of.to_classified(config), decoders.classifier)


_BERT_MASKED = Architecture(
    "bert", "bert", of.bert, of.to_bert, encoders.bert, "bert.",
    (
        ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
        ("cls.predictions.decoder.bias", "cls.predictions.bias"),
    ),
    # The guess whether two sentences follow each other, and what only it needs.
    r"^cls\.seq_relationship\.|^bert\.pooler\.|embeddings\.position_ids$",
)  # fmt: skip
# The first that can say a model's fields is what it is written as.
ARCHITECTURES: Mapping[str, Architecture] = {
    "GPT2LMHeadModel": Architecture(
        "gpt2",
        "transformer",
        of.gpt2,
        of.to_gpt2,
        decoders.gpt2,
        "transformer.",
        (("lm_head.weight", "transformer.wte.weight"),),
        r"\.attn\.(masked_)?bias$",
    ),
    **{f"{name}ForCausalLM": _decoder(*known) for name, known in _DECODERS.items()},
    **{f"{name}ForSequenceClassification": _classifier(*known) for name, known in _DECODERS.items()},
    # What has no types of tokens is a DistilBERT.
    "DistilBertForMaskedLM": Architecture(
        "distilbert",
        "bert",
        of.distilbert,
        of.to_distilbert,
        encoders.distilbert,
        "distilbert.",
        (("vocab_projector.weight", "distilbert.embeddings.word_embeddings.weight"),),
    ),
    "DistilBertForSequenceClassification": Architecture(
        "distilbert",
        "bert_classifier",
        of.classified(of.distilbert, **_CLASSES, pooler="relu"),
        of.to_classified(of.to_distilbert),
        encoders.distilbert_classifier,
        "distilbert.",
        (),
    ),
    "BertForMaskedLM": _BERT_MASKED,
    "BertForPreTraining": _BERT_MASKED,
    "BertForSequenceClassification": Architecture(
        "bert",
        "bert_classifier",
        of.classified(of.bert, **_CLASSES),
        of.to_classified(of.to_bert),
        encoders.bert_classifier,
        "bert.",
        (),
        r"embeddings\.position_ids$",
    ),
    "ViTForImageClassification": Architecture(
        "vit",
        "vit",
        of.vit,
        of.to_vit,
        encoders.vit,
        "vit.",
        (),
        r"^vit\.pooler\.",
    ),
}


@functools.cache
def _parameters(model: str) -> Mapping[str, Any]:
    """The fields of our model, with their defaults."""
    found = registry.parameters([registry.pick(models.MODELS, model, "model.name")])
    return {name: parameter.default for name, parameter in found.items() if name not in _FREE}


def complete(given: Mapping[str, Any], model: str) -> Fields:
    """All that decides what our model computes: with defaults, and without None and repetitions.

    Of a model of images, sizes that its config.json says and ours takes from the data are there, too. A gated MLP shows
    its width by its parameters: see `shown`.
    """
    known = {name: value for name, value in _parameters(model).items() if value is not inspect.Parameter.empty}
    fields = known | {name: value for name, value in given.items() if name not in _FREE}
    head_size = fields.get("head_size") or fields["width"] // fields["heads"]
    meant = {
        "kv_heads": fields["heads"], "head_size": head_size, "mlp_width": 4 * fields["width"],
        "qkv_bias": fields.get("use_bias"), "query_scale": head_size**-0.5,
    }  # fmt: skip
    fields |= {name: value for name, value in meant.items() if name in fields and fields[name] is None}
    if "windows" in fields:
        windows, layers = fields["windows"], fields["layers"]
        fields["windows"] = of.period([windows[layer % len(windows)] for layer in range(layers)])
    return fields


def different(given: Mapping[str, Any], model: str) -> Fields:
    """Fields of our model: sizes, and what else of the given means something else than the defaults do."""
    meant = complete(given, model)
    without = {name: complete({k: v for k, v in given.items() if k != name}, model) for name in given}
    known = {name: value for name, value in given.items() if name in _parameters(model)}
    return {name: value for name, value in known.items() if type(value) is int or without[name] != meant}


def sizes(fields: Mapping[str, Any]) -> dict[str, int]:
    """Letter of a link's axes -> size, of complete fields."""
    names = {
        "v": "vocab_size", "d": "width", "e": "width", "n": "heads", "k": "kv_heads", "h": "head_size",
        "f": "mlp_width", "t": "max_length", "s": "types", "c": "classes", "y": "patch", "x": "patch", "i": "channels",
    }  # fmt: skip
    found = {letter: fields[name] for letter, name in names.items() if fields.get(name) is not None}
    if "image_size" in fields:  # the tokens are patches, and one for the class
        found["t"] = (fields["image_size"] // fields["patch"]) ** 2 + 1
    return {"h": fields["width"] // fields["heads"], **found}


def shown(leaves: Mapping[str, Leaf], fields: Mapping[str, Any]) -> Fields:
    """Sizes that parameters show, and that our fields may leave to the data or to a default."""
    shapes = {path.removeprefix(PARAMS): leaf.shape for path, leaf in leaves.items()}
    found = Fields()
    for name, path, axis in (("vocab_size", "embed/embedding", 0), ("mlp_width", "blocks/mlp/up/kernel", -1)):
        if path in shapes:
            found[name] = shapes[path][axis]
    if "patches/kernel" in shapes:
        tokens, patch = shapes["embed_positions/embedding"][0], fields["patch"]
        found |= {"image_size": math.isqrt(tokens) * patch, "channels": shapes["patches/kernel"][0] // patch**2}
    return found
