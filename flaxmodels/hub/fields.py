"""What a config.json says of an architecture <-> the fields of our models, in both directions.

Names and defaults of keys are those of the `transformers` library, of version 4 and 5 alike; what is written, both
read. Keys that change nothing of what a model computes, such as rates of dropout, are not looked at.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from flaxmodels.registry import UserError

Config = Mapping[str, Any]
Fields = dict[str, Any]
Reader = Callable[[Config], Fields]
Writer = Callable[[Mapping[str, Any]], dict[str, Any]]
# (field of ours, key of theirs), which hold the same.
Pairs = tuple[tuple[str, str], ...]

_SIZES: Pairs = (
    ("vocab_size", "vocab_size"), ("layers", "num_hidden_layers"), ("width", "hidden_size"),
    ("heads", "num_attention_heads"), ("mlp_width", "intermediate_size"), ("max_length", "max_position_embeddings"),
)  # fmt: skip
_GPT2: Pairs = (
    ("vocab_size", "vocab_size"), ("layers", "n_layer"), ("width", "n_embd"), ("heads", "n_head"),
    ("max_length", "n_positions"),
)  # fmt: skip
_DISTILBERT: Pairs = (
    ("vocab_size", "vocab_size"), ("layers", "n_layers"), ("width", "dim"), ("heads", "n_heads"),
    ("mlp_width", "hidden_dim"), ("max_length", "max_position_embeddings"),
)  # fmt: skip
_VIT: Pairs = (*_SIZES[1:5], ("patch", "patch_size"), ("image_size", "image_size"), ("channels", "num_channels"))
# Their names of GELU: by the formula of tanh, or exact.
_GELU = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_exact"}
_SLIDING, _FULL = "sliding_attention", "full_attention"


def refuse(key: str, value: Any, expected: str) -> UserError:
    """That a value of a config.json is none that our models can compute."""
    return UserError(f"config.json: {key}={value!r} is not supported: expected {expected}.")


def need(config: Config, key: str) -> Any:
    """What a key holds that must be there (UserError)."""
    if config.get(key) is None:
        raise UserError(f"config.json has no {key!r}: it is damaged, or of another architecture. Copy it again.")
    return config[key]


def _read(config: Config, pairs: Pairs) -> Fields:
    return {ours: need(config, theirs) for ours, theirs in pairs}


def _written(fields: Mapping[str, Any], pairs: Pairs) -> dict[str, Any]:
    return {theirs: fields[ours] for ours, theirs in pairs}


def _check(config: Config, expected: Mapping[str, Sequence[Any]]) -> None:
    """UserError where a key that is there holds none of what is expected, the first of which is its default."""
    for key, values in expected.items():
        if (value := config.get(key, values[0])) not in values:
            raise refuse(key, value, " or ".join(map(repr, values)))


def gpt2(config: Config) -> Fields:
    """GPT-2 (Radford et al., 2019)."""
    _check(config, {"scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,)})
    fields = _read({"n_positions": config.get("n_ctx"), **config}, _GPT2)
    scaled = config.get("scale_attn_weights", True)
    return fields | {
        "mlp_width": config.get("n_inner") or 4 * fields["width"],
        "mlp": _activation(config, "activation_function", "gelu_new"),
        "norm": "layer", "norm_eps": config.get("layer_norm_epsilon", 1e-5), "positions": "learned", "use_bias": True,
        "tied_head": config.get("tie_word_embeddings", True), "query_scale": None if scaled else 1.0,
    }  # fmt: skip


def to_gpt2(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of which `gpt2` makes the fields, if one does."""
    return _written(fields, _GPT2) | {
        "n_ctx": fields["max_length"], "n_inner": fields["mlp_width"], "layer_norm_epsilon": fields["norm_eps"],
        "activation_function": "gelu_new" if fields["mlp"] == "gelu" else "gelu",
        "tie_word_embeddings": fields["tied_head"], "scale_attn_weights": fields["query_scale"] != 1.0,
    }  # fmt: skip


def _activation(config: Config, key: str, default: str) -> str:
    name = config.get(key) or default
    if name not in _GELU:
        raise refuse(key, name, ", ".join(map(repr, _GELU)))
    return _GELU[name]


def _decoder(config: Config, activation: str = "silu", *, tied: bool = False) -> Fields:
    """What LLaMA and those after it share."""
    _check(config, {"hidden_act": (activation,), "hidden_activation": (activation,)})
    fields = _read(config, _SIZES)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return fields | {
        "kv_heads": config.get("num_key_value_heads") or fields["heads"],
        "head_size": config.get("head_dim") or fields["width"] // fields["heads"],
        "norm_eps": config.get("rms_norm_eps", 1e-6), "tied_head": config.get("tie_word_embeddings", tied),
        "rope_base": float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        "rope_scaling": _rope_scaling(rope),
    }  # fmt: skip


def _to_decoder(fields: Mapping[str, Any], activation: str = "silu") -> dict[str, Any]:
    # Both versions of the library read these keys, of which the later one makes "rope_parameters".
    scaling = None
    if fields["rope_scaling"]:
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        scaling = {"rope_type": "llama3", **dict(zip(names, fields["rope_scaling"]))}
        scaling["original_max_position_embeddings"] = int(scaling["original_max_position_embeddings"])
    return _written(fields, _SIZES) | {
        "num_key_value_heads": fields["kv_heads"], "head_dim": fields["head_size"], "hidden_act": activation,
        "rms_norm_eps": fields["norm_eps"], "tie_word_embeddings": fields["tied_head"],
        "rope_theta": fields["rope_base"], "rope_scaling": scaling,
    }  # fmt: skip


def _rope_scaling(rope: Config) -> tuple[float, ...] | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise refuse("rope_type", kind, "'default' or 'llama3'")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return tuple(float(need(rope, name)) for name in names)


def llama(config: Config) -> Fields:
    """Llama (https://arxiv.org/abs/2307.09288, https://arxiv.org/abs/2407.21783), TinyLlama."""
    bias = config.get("attention_bias", False)
    _check({"mlp_bias": False, **config}, {"mlp_bias": (bias,)})
    return _decoder(config) | {"use_bias": bias}


def to_llama(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of which `llama` makes the fields, if one does."""
    return _to_decoder(fields) | {"attention_bias": fields["use_bias"], "mlp_bias": fields["use_bias"]}


def mistral(config: Config) -> Fields:
    """Mistral (https://arxiv.org/abs/2310.06825)."""
    return _decoder(config) | {"windows": (config.get("sliding_window", 4096) or 0,)}


def to_mistral(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of which `mistral` makes the fields, if one does."""
    return _to_decoder(fields) | {"sliding_window": fields["windows"][0] or None}


def qwen2(config: Config) -> Fields:
    """Qwen 2 and 2.5 (https://arxiv.org/abs/2412.15115)."""
    return _decoder(config) | {"qkv_bias": True, "windows": _qwen_windows(config)}


def to_qwen2(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of which `qwen2` makes the fields, if one does."""
    return _to_decoder(fields) | _sliding(fields) | {"use_sliding_window": any(fields["windows"])}


def qwen3(config: Config) -> Fields:
    """Qwen 3 (https://arxiv.org/abs/2505.09388)."""
    _check(config, {"attention_bias": (False,)})
    head = config.get("head_dim", 128)
    return _decoder({**config, "head_dim": head}) | {"qk_norm": True, "windows": _qwen_windows(config)}


def to_qwen3(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of which `qwen3` makes the fields, if one does."""
    return to_qwen2(fields) | {"attention_bias": False}


def _qwen_windows(config: Config) -> tuple[int, ...]:
    if not config.get("use_sliding_window", False):
        return (0,)
    first = config.get("max_window_layers", 28)
    kinds = (_SLIDING if layer >= first else _FULL for layer in range(need(config, "num_hidden_layers")))
    return _windows({"sliding_window": 4096, **config}, kinds)


def gemma2(config: Config) -> Fields:
    """Gemma 2 (https://arxiv.org/abs/2408.00118)."""
    gelu = "gelu_pytorch_tanh"
    # "hidden_act" of its files means nothing where the other key is there.
    config = {**config, "hidden_act": config.get("hidden_activation") or gelu, "hidden_activation": gelu}
    _check(config, {"attention_bias": (False,), "use_bidirectional_attention": (None, False)})
    kinds = ((_SLIDING, _FULL)[layer % 2] for layer in range(need(config, "num_hidden_layers")))
    return _decoder({**config, "head_dim": config.get("head_dim", 256)}, gelu, tied=True) | {
        "mlp": "geglu", "windows": _windows({"sliding_window": 4096, **config}, kinds),
        "softcap": config.get("attn_logit_softcapping", 50.0) or 0.0,
        "head_softcap": config.get("final_logit_softcapping", 30.0) or 0.0,
        "query_scale": config.get("query_pre_attn_scalar", 256) ** -0.5,
        "embed_scale": True, "norm_plus_one": True, "post_norms": True,
    }  # fmt: skip


def to_gemma2(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of which `gemma2` makes the fields, if one does."""
    scalar = fields["query_scale"] ** -2
    return _to_decoder(fields, "gelu_pytorch_tanh") | _sliding(fields) | {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": round(scalar) if round(scalar) ** -0.5 == fields["query_scale"] else scalar,
        "attn_logit_softcapping": fields["softcap"] or None, "final_logit_softcapping": fields["head_softcap"] or None,
    }  # fmt: skip


def _encoder(config: Config, pairs: Pairs, activation: str) -> Fields:
    """What BERT and DistilBERT share."""
    _check(config, {"position_embedding_type": ("absolute",), "is_decoder": (False,), "sinusoidal_pos_embds": (False,)})
    return _read(config, pairs) | {
        "mlp": _activation(config, activation, "gelu"), "tied_head": config.get("tie_word_embeddings", True),
    }  # fmt: skip


def bert(config: Config) -> Fields:
    """BERT (https://arxiv.org/abs/1810.04805)."""
    types = config.get("type_vocab_size") or 2
    return _encoder(config, _SIZES, "hidden_act") | {"types": types, "norm_eps": config.get("layer_norm_eps", 1e-12)}


def to_bert(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of which `bert` makes the fields, if one does."""
    return _written(fields, _SIZES) | {
        "type_vocab_size": fields["types"], "hidden_act": "gelu_new" if fields["mlp"] == "gelu" else "gelu",
        "layer_norm_eps": fields["norm_eps"], "tie_word_embeddings": fields["tied_head"],
    }  # fmt: skip


def distilbert(config: Config) -> Fields:
    """DistilBERT (https://arxiv.org/abs/1910.01108)."""
    return _encoder(config, _DISTILBERT, "activation") | {"types": 0}


def to_distilbert(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of which `distilbert` makes the fields, if one does."""
    return _written(fields, _DISTILBERT) | {
        "activation": "gelu_new" if fields["mlp"] == "gelu" else "gelu", "tie_word_embeddings": fields["tied_head"]
    }  # fmt: skip


def vit(config: Config) -> Fields:
    """ViT (https://arxiv.org/abs/2010.11929)."""
    _check(config, {"qkv_bias": (True,), "hidden_act": ("gelu",)})
    usual = {"patch_size": 16, "image_size": 224, "num_channels": 3}
    return _read(usual | dict(config), _VIT) | {"norm_eps": config.get("layer_norm_eps", 1e-12)} | _classes(config)


def to_vit(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of which `vit` makes the fields, if one does."""
    return _written(fields, _VIT) | {"layer_norm_eps": fields["norm_eps"], "qkv_bias": True} | _to_classes(fields)


def classified(read: Reader, **head: Any) -> Reader:
    """Fields of a classifier of texts, by those of what it stands on, and those of its `head`."""
    return lambda config: read(config) | _classes(config) | head


def to_classified(write: Writer) -> Writer:
    """The config.json of a classifier."""
    return lambda fields: write(fields) | _to_classes(fields)


def _classes(config: Config) -> Fields:
    return {"classes": len(config.get("id2label") or range(config.get("num_labels", 2)))}


def _to_classes(fields: Mapping[str, Any]) -> dict[str, Any]:
    names = {str(i): f"LABEL_{i}" for i in range(fields["classes"])}
    return {"id2label": names, "label2id": {name: int(i) for i, name in names.items()}}


def _windows(config: Config, kinds: Iterable[str]) -> tuple[int, ...]:
    """The window of each layer, as one period of them; `kinds` where the config does not list any."""
    kinds, window = tuple(config.get("layer_types") or kinds), config.get("sliding_window")
    if unknown := set(kinds) - {_SLIDING, _FULL}:
        raise refuse("layer_types", min(unknown), f"{_SLIDING!r} or {_FULL!r}")
    return period([window or 0 if kind == _SLIDING else 0 for kind in kinds])


def period(windows: Sequence[int]) -> tuple[int, ...]:
    """The shortest beginning of which all of them are repetitions, the last one perhaps cut off."""
    sizes = (n for n in range(1, len(windows) + 1) if all(w == windows[i % n] for i, w in enumerate(windows)))
    return tuple(windows[: next(sizes, 0)])


def _sliding(fields: Mapping[str, Any]) -> dict[str, Any]:
    windows, layers = fields["windows"], range(fields["layers"])
    kinds = [_SLIDING if windows[layer % len(windows)] else _FULL for layer in layers]
    return {"sliding_window": max(windows) or None, "layer_types": kinds}
