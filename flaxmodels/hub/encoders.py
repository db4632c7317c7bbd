"""Where the arrays of encoders stand: BERT, DistilBERT, ViT; linear maps and norms of all of them have biases."""

import itertools
from collections.abc import Mapping
from typing import Any

from flaxmodels.hub.links import Link

Links = tuple[Link, ...]


def _dense(ours: str, theirs: str, kernel: str, bias: str) -> tuple[Link, Link]:
    """A linear map with a bias."""
    return Link(f"{ours}/kernel", f"{theirs}.weight", kernel), Link(f"{ours}/bias", f"{theirs}.bias", bias)


def _norm(ours: str, theirs: str) -> tuple[Link, Link]:
    """A layer norm."""
    return Link(f"{ours}/scale", f"{theirs}.weight", "d"), Link(f"{ours}/bias", f"{theirs}.bias", "d")


def _block(at: str, names: Mapping[str, str]) -> Links:
    """A block of an encoder: the names of its parts, after `at`."""
    heads, back = "d n h -> (n h) d", "n h d -> d (n h)"
    forms = {
        **{f"attention/{name}": (heads, "n h -> (n h)") for name in ("query", "key", "value")},
        "attention/out": (back, "d"), "mlp/up": ("d f -> f d", "f"), "mlp/down": ("f d -> d f", "d"),
    }  # fmt: skip
    maps = (_dense(f"blocks/{ours}", at + names[ours], *form) for ours, form in forms.items())
    norms = (_norm(f"blocks/{ours}", at + names[ours]) for ours in ("norm_attention", "norm_mlp"))
    return tuple(itertools.chain(*maps, *norms))


_BERT_BLOCK = _block(
    "bert.encoder.layer.{}.",
    {
        **{f"attention/{name}": f"attention.self.{name}" for name in ("query", "key", "value")},
        "attention/out": "attention.output.dense", "norm_attention": "attention.output.LayerNorm",
        "mlp/up": "intermediate.dense", "mlp/down": "output.dense", "norm_mlp": "output.LayerNorm",
    },
)  # fmt: skip
_DISTILBERT_BLOCK = _block(
    "distilbert.transformer.layer.{}.",
    {
        **{f"attention/{name}": f"attention.{name[0]}_lin" for name in ("query", "key", "value")},
        "attention/out": "attention.out_lin", "norm_attention": "sa_layer_norm",
        "mlp/up": "ffn.lin1", "mlp/down": "ffn.lin2", "norm_mlp": "output_layer_norm",
    },
)  # fmt: skip
_VIT_BLOCK = _block(
    "vit.encoder.layer.{}.",
    {
        **{f"attention/{name}": f"attention.attention.{name}" for name in ("query", "key", "value")},
        "attention/out": "attention.output.dense", "norm_attention": "layernorm_before",
        "mlp/up": "intermediate.dense", "mlp/down": "output.dense", "norm_mlp": "layernorm_after",
    },
)  # fmt: skip
_VIT: Links = (
    Link("class_token", "vit.embeddings.cls_token", "d -> 1 1 d"),
    Link("embed_positions/embedding", "vit.embeddings.position_embeddings", "t d -> 1 t d"),
    *_dense("patches", "vit.embeddings.patch_embeddings.projection", "(y x i) d -> d i y x", "d"),
    *_VIT_BLOCK,
    *_norm("norm", "vit.layernorm"),
    *_dense("head", "classifier", "d c -> c d", "c"),
)


def _embeddings(base: str) -> Links:
    """Of BERT and DistilBERT."""
    return (
        Link("embed/embedding", f"{base}.embeddings.word_embeddings.weight", "v d"),
        Link("embed_positions/embedding", f"{base}.embeddings.position_embeddings.weight", "t d"),
        *_norm("embed_norm", f"{base}.embeddings.LayerNorm"),
    )


def _guess(transform: str, norm: str, head: str, bias: str) -> Links:
    """The head that guesses masked tokens; its kernel comes last."""
    return (
        *_dense("transform", transform, "d e -> e d", "e"), *_norm("transform_norm", norm),
        Link("head/bias", bias, "v"), Link("head/kernel", f"{head}.weight", "d v -> v d"),
    )  # fmt: skip


def _classes(pooler: str) -> Links:
    return (*_dense("pooler", pooler, "d e -> e d", "e"), *_dense("head", "classifier", "d c -> c d", "c"))


_BERT: Links = (
    *_embeddings("bert"), Link("embed_types/embedding", "bert.embeddings.token_type_embeddings.weight", "s d"),
    *_BERT_BLOCK,
)  # fmt: skip
_DISTILBERT: Links = (*_embeddings("distilbert"), *_DISTILBERT_BLOCK)
_PREDICT = "cls.predictions"
_BERT_HEAD = _guess(
    f"{_PREDICT}.transform.dense", f"{_PREDICT}.transform.LayerNorm", f"{_PREDICT}.decoder", f"{_PREDICT}.bias"
)
_DISTILBERT_HEAD = _guess("vocab_transform", "vocab_layer_norm", "vocab_projector", "vocab_projector.bias")


def bert(fields: Mapping[str, Any]) -> Links:
    """All arrays of BERT that guesses masked tokens, by complete fields."""
    return (*_BERT, *_BERT_HEAD[: -1 if fields["tied_head"] else None])


def distilbert(fields: Mapping[str, Any]) -> Links:
    """All arrays of DistilBERT that guesses masked tokens, by complete fields."""
    return (*_DISTILBERT, *_DISTILBERT_HEAD[: -1 if fields["tied_head"] else None])


def bert_classifier(_: Mapping[str, Any]) -> Links:
    """All arrays of BERT that classifies texts."""
    return (*_BERT, *_classes("bert.pooler.dense"))


def distilbert_classifier(_: Mapping[str, Any]) -> Links:
    """All arrays of DistilBERT that classifies texts."""
    return (*_DISTILBERT, *_classes("pre_classifier"))


def vit(_: Mapping[str, Any]) -> Links:
    """All arrays of ViT."""
    return _VIT
