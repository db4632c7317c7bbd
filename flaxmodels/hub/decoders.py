"""Where the arrays of decoders stand: GPT-2; LLaMA and those after it."""

from collections.abc import Mapping
from typing import Any

from flaxmodels.hub.links import Link

Links = tuple[Link, ...]

_LLAMA: Links = (
    Link("embed/embedding", "model.embed_tokens.weight", "v d"),
    Link("blocks/norm_attention/scale", "model.layers.{}.input_layernorm.weight", "d"),
    Link("blocks/attention/query/kernel", "model.layers.{}.self_attn.q_proj.weight", "d n h -> (n h) d"),
    Link("blocks/attention/key/kernel", "model.layers.{}.self_attn.k_proj.weight", "d k h -> (k h) d"),
    Link("blocks/attention/value/kernel", "model.layers.{}.self_attn.v_proj.weight", "d k h -> (k h) d"),
    Link("blocks/attention/out/kernel", "model.layers.{}.self_attn.o_proj.weight", "n h d -> d (n h)"),
    Link("blocks/norm_mlp/scale", "model.layers.{}.post_attention_layernorm.weight", "d"),
    Link("blocks/mlp/gate/kernel", "model.layers.{}.mlp.gate_proj.weight", "d f -> f d"),
    Link("blocks/mlp/up/kernel", "model.layers.{}.mlp.up_proj.weight", "d f -> f d"),
    Link("blocks/mlp/down/kernel", "model.layers.{}.mlp.down_proj.weight", "f d -> d f"),
    Link("norm/scale", "model.norm.weight", "d"),
)
_HEAD: Links = (Link("head/kernel", "lm_head.weight", "d v -> v d"),)
_QKV_BIASES: Links = (
    Link("blocks/attention/query/bias", "model.layers.{}.self_attn.q_proj.bias", "n h -> (n h)"),
    Link("blocks/attention/key/bias", "model.layers.{}.self_attn.k_proj.bias", "k h -> (k h)"),
    Link("blocks/attention/value/bias", "model.layers.{}.self_attn.v_proj.bias", "k h -> (k h)"),
)
_OTHER_BIASES: Links = (
    Link("blocks/attention/out/bias", "model.layers.{}.self_attn.o_proj.bias", "d"),
    Link("blocks/mlp/gate/bias", "model.layers.{}.mlp.gate_proj.bias", "f"),
    Link("blocks/mlp/up/bias", "model.layers.{}.mlp.up_proj.bias", "f"),
    Link("blocks/mlp/down/bias", "model.layers.{}.mlp.down_proj.bias", "d"),
)
_QK_NORMS: Links = (
    Link("blocks/attention/query_norm/scale", "model.layers.{}.self_attn.q_norm.weight", "h"),
    Link("blocks/attention/key_norm/scale", "model.layers.{}.self_attn.k_norm.weight", "h"),
)
_GPT2: Links = (
    Link("embed/embedding", "transformer.wte.weight", "v d"),
    Link("embed_positions/embedding", "transformer.wpe.weight", "t d"),
    Link("blocks/norm_attention/scale", "transformer.h.{}.ln_1.weight", "d"),
    Link("blocks/norm_attention/bias", "transformer.h.{}.ln_1.bias", "d"),
    *(
        Link(f"blocks/attention/{name}/{ours}", f"transformer.h.{{}}.attn.c_attn.{theirs}", form, (k, 3))
        for ours, theirs, form in (("kernel", "weight", "d n h -> d (n h)"), ("bias", "bias", "n h -> (n h)"))
        for k, name in enumerate(("query", "key", "value"))
    ),
    Link("blocks/attention/out/kernel", "transformer.h.{}.attn.c_proj.weight", "n h d -> (n h) d"),
    Link("blocks/attention/out/bias", "transformer.h.{}.attn.c_proj.bias", "d"),
    Link("blocks/norm_mlp/scale", "transformer.h.{}.ln_2.weight", "d"),
    Link("blocks/norm_mlp/bias", "transformer.h.{}.ln_2.bias", "d"),
    Link("blocks/mlp/up/kernel", "transformer.h.{}.mlp.c_fc.weight", "d f"),
    Link("blocks/mlp/up/bias", "transformer.h.{}.mlp.c_fc.bias", "f"),
    Link("blocks/mlp/down/kernel", "transformer.h.{}.mlp.c_proj.weight", "f d"),
    Link("blocks/mlp/down/bias", "transformer.h.{}.mlp.c_proj.bias", "d"),
    Link("norm/scale", "transformer.ln_f.weight", "d"),
    Link("norm/bias", "transformer.ln_f.bias", "d"),
)
# Its names of norms say where they stand, and not what comes after.
_GEMMA2 = {
    "blocks/norm_mlp/scale": Link("blocks/norm_mlp/scale", "model.layers.{}.pre_feedforward_layernorm.weight", "d")
}
_POST_NORMS: Links = (
    Link("blocks/norm_attention_out/scale", "model.layers.{}.post_attention_layernorm.weight", "d"),
    Link("blocks/norm_mlp_out/scale", "model.layers.{}.post_feedforward_layernorm.weight", "d"),
)


def decoder(fields: Mapping[str, Any]) -> Links:
    """All arrays of LLaMA and those after it, by complete fields."""
    links = _LLAMA
    if fields["qkv_bias"]:
        links += _QKV_BIASES
    if fields["use_bias"]:
        links += _OTHER_BIASES
    if fields["qk_norm"]:
        links += _QK_NORMS
    if fields["post_norms"]:
        links = (*(_GEMMA2.get(link.ours, link) for link in links), *_POST_NORMS)
    return links if fields["tied_head"] else (*links, *_HEAD)


def classifier(fields: Mapping[str, Any]) -> Links:
    """All arrays of a classifier of texts on one of these."""
    score = Link("head/kernel", "score.weight", "d c -> c d")
    return (*decoder({**fields, "tied_head": True}), score)


def gpt2(fields: Mapping[str, Any]) -> Links:
    """All arrays of GPT-2, by complete fields."""
    return _GPT2 if fields["tied_head"] else (*_GPT2, *_HEAD)
