"""Sizes and switches of published models, as fields of the models here. What they leave out is the default.

A preset's name is a model's name: `model = dict(name="gpt2")` is the model with these fields, and a field that a config
sets beside it counts. The numbers are those of the published configurations; `max_length` is that of their training.
"""

from collections.abc import Mapping
from typing import Any


def _gpt2(layers: int, width: int, heads: int) -> tuple[str, Mapping[str, Any]]:
    """Radford et al., 2019, "Language models are unsupervised multitask learners"."""
    fields = {
        "vocab_size": 50257, "layers": layers, "width": width, "heads": heads, "max_length": 1024, "norm": "layer",
        "norm_eps": 1e-5, "positions": "learned", "mlp": "gelu", "tied_head": True, "use_bias": True,
    }  # fmt: skip
    return "transformer", fields


_LLAMA = {"vocab_size": 32000, "norm_eps": 1e-5}
_LLAMA3 = _LLAMA | {"vocab_size": 128256, "kv_heads": 8, "rope_base": 500000.0, "max_length": 8192}
_LLAMA3_8B = _LLAMA3 | {"layers": 32, "width": 4096, "heads": 32, "mlp_width": 14336}
_QWEN = {"vocab_size": 151936, "rope_base": 1000000.0}
_QWEN2 = _QWEN | {"qkv_bias": True, "max_length": 131072}
_QWEN3 = _QWEN | {"layers": 28, "kv_heads": 8, "head_size": 128, "qk_norm": True, "max_length": 40960}
_GEMMA2 = {
    "vocab_size": 256000, "head_size": 256, "max_length": 8192, "windows": (4096, 0), "mlp": "geglu", "softcap": 50.0,
    "head_softcap": 30.0, "embed_scale": True, "norm_plus_one": True, "post_norms": True, "tied_head": True,
}  # fmt: skip
_BERT = {"vocab_size": 30522, "max_length": 512}

PRESETS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "gpt2": _gpt2(12, 768, 12),
    "gpt2_medium": _gpt2(24, 1024, 16),
    "gpt2_large": _gpt2(36, 1280, 20),
    "gpt2_xl": _gpt2(48, 1600, 25),
    # https://arxiv.org/abs/2307.09288
    "llama2_7b": (
        "transformer",
        _LLAMA | {"layers": 32, "width": 4096, "heads": 32, "mlp_width": 11008, "max_length": 4096},
    ),
    # https://arxiv.org/abs/2407.21783
    "llama3_8b": ("transformer", _LLAMA3_8B),
    "llama3_1_8b": ("transformer", _LLAMA3_8B | {"rope_scaling": (8.0, 1.0, 4.0, 8192.0), "max_length": 131072}),
    "llama3_2_1b": (
        "transformer",
        _LLAMA3
        | {
            "layers": 16, "width": 2048, "heads": 32, "mlp_width": 8192, "tied_head": True,
            "rope_scaling": (32.0, 1.0, 4.0, 8192.0), "max_length": 131072,
        },
    ),
    # https://arxiv.org/abs/2401.02385
    "tinyllama": (
        "transformer",
        _LLAMA | {"layers": 22, "width": 2048, "heads": 32, "kv_heads": 4, "mlp_width": 5632, "max_length": 2048},
    ),
    # https://arxiv.org/abs/2310.06825
    "mistral_7b": (
        "transformer",
        _LLAMA
        | {
            "layers": 32, "width": 4096, "heads": 32, "kv_heads": 8, "mlp_width": 14336, "windows": (4096,),
            "max_length": 32768,
        },
    ),
    # https://arxiv.org/abs/2412.15115
    "qwen2_5_0_5b": (
        "transformer",
        _QWEN2
        | {
            "layers": 24, "width": 896, "heads": 14, "kv_heads": 2, "mlp_width": 4864, "tied_head": True,
            "max_length": 32768,
        },
    ),
    "qwen2_5_1_5b": (
        "transformer",
        _QWEN2 | {"layers": 28, "width": 1536, "heads": 12, "kv_heads": 2, "mlp_width": 8960, "tied_head": True},
    ),
    "qwen2_5_7b": (
        "transformer",
        _QWEN2 | {"vocab_size": 152064, "layers": 28, "width": 3584, "heads": 28, "kv_heads": 4, "mlp_width": 18944},
    ),
    # https://arxiv.org/abs/2505.09388
    "qwen3_0_6b": ("transformer", _QWEN3 | {"width": 1024, "heads": 16, "mlp_width": 3072, "tied_head": True}),
    "qwen3_1_7b": ("transformer", _QWEN3 | {"width": 2048, "heads": 16, "mlp_width": 6144, "tied_head": True}),
    "qwen3_8b": ("transformer", _QWEN3 | {"layers": 36, "width": 4096, "heads": 32, "mlp_width": 12288}),
    # https://arxiv.org/abs/2408.00118
    "gemma2_2b": ("transformer", _GEMMA2 | {"layers": 26, "width": 2304, "heads": 8, "kv_heads": 4, "mlp_width": 9216}),
    "gemma2_9b": (
        "transformer",
        _GEMMA2 | {"layers": 42, "width": 3584, "heads": 16, "kv_heads": 8, "mlp_width": 14336},
    ),
    # https://arxiv.org/abs/1810.04805, https://arxiv.org/abs/1910.01108
    "bert_base": ("bert", _BERT | {"layers": 12, "width": 768, "heads": 12}),
    "bert_large": ("bert", _BERT | {"layers": 24, "width": 1024, "heads": 16}),
    "distilbert": ("bert", _BERT | {"layers": 6, "width": 768, "heads": 12, "types": 0}),
    # https://arxiv.org/abs/2010.11929; the two smaller: https://arxiv.org/abs/2012.12877
    "vit_tiny": ("vit", {"layers": 12, "width": 192, "heads": 3}),
    "vit_small": ("vit", {"layers": 12, "width": 384, "heads": 6}),
    "vit_base": ("vit", {"layers": 12, "width": 768, "heads": 12}),
    "vit_large": ("vit", {"layers": 24, "width": 1024, "heads": 16}),
}  # fmt: skip
