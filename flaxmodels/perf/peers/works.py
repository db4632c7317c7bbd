"""The works that peers are given, and who takes part: shapes, the config of ours, and what each peer needs.

Imports no library that is measured: a worker reads this before it pins itself to its cores.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

# Steps before anything is measured; the mean of their losses is what peers must agree in.
WARM = 100
# No run of a worker gets this far: it is killed.
ENDLESS = 100_000_000

# Of characters, as in tiny Shakespeare.
VOCABULARY = 65
_IMAGES = dict(name="synthetic_images", examples=60_000, test_examples=256, side=28)
_TOKENS = dict(name="synthetic_tokens", examples=12_288, test_examples=128, vocab_size=VOCABULARY, length=64)
_ADAM = dict(name="adam", learning_rate=1e-3)


@dataclasses.dataclass(frozen=True)
class Work:
    """Something to compute.

    Attributes:
      says: what it is, for people.
      model: the family, for peers: "mlp", "cnn", "gpt", or "gpt2", which generates instead of being trained.
      config: of ours, without what no peer has: evaluations in between. What generates has "data", and a preset as
        "model".
      steps: of a unit that is measured whole, 1 or an epoch.
      seconds: of a chunk, at the least.
      fed: batches come from the library's own loader, as a user would write it.
      ready: else so many lie ready, to be used over and over, at least `WARM`. Keras takes them for an epoch.
      tokens: to make for each prompt, where it generates. A step is all of that, and the loss is that of the prompts.
    """

    says: str
    model: str
    config: Mapping[str, Any]
    steps: int = 1
    seconds: float = 0.4
    fed: bool = False
    ready: int = WARM
    tokens: int = 0

    @property
    def batch_size(self) -> int:
        """Examples of a step."""
        size: int = self.config["data"]["batch_size"]
        return size

    @property
    def data(self) -> dict[str, Any]:
        """Options of the data source alone."""
        return {key: value for key, value in self.config["data"].items() if key != "batch_size"}


_MLP: Mapping[str, Any] = dict(
    model=dict(name="mlp", hidden=(128,)),
    loss=dict(name="softmax_cross_entropy"),
    data=dict(_IMAGES, batch_size=128),
    optim=_ADAM,
    train=dict(duration=ENDLESS, steps_per_dispatch=64),
)


def _generating(batch: int) -> Work:
    data = dict(name="synthetic_tokens", examples=8, test_examples=8, vocab_size=50257, length=32, batch_size=batch)
    says = (
        f"128 tokens after {batch} prompt{'s' * (batch > 1)} of 32, GPT-2 of 124 million random weights, greedy, cached"
    )
    return Work(says, "gpt2", dict(model=dict(name="gpt2"), data=data), tokens=128)


WORKS: Mapping[str, Work] = {
    "mlp": Work("MLP 784-128-10, batch 128, Adam; one step (ours: 64 a dispatch)", "mlp", _MLP, ready=468),
    "cnn": Work(
        "conv32-pool-conv64-pool-dropout-dense128-dropout-10 on 28x28, batch 128, Adam; one step",
        "cnn",
        dict(
            model=dict(name="cnn", features=(32, 64), dense=128, dropout=0.4),
            loss=dict(name="softmax_cross_entropy"),
            data=dict(_IMAGES, batch_size=128),
            optim=_ADAM,
            train=dict(duration=ENDLESS),
        ),
    ),
    "gpt": Work(
        "GPT of 4 layers, 4 heads, width 128, GELU by tanh, context 64, 65 characters, batch 12, AdamW, clipped at 1; "
        "one step",
        "gpt",
        dict(
            model=dict(
                name="transformer", layers=4, width=128, heads=4, max_length=64, norm="layer", positions="learned",
                mlp="gelu", tied_head=True, unroll=4,
            ),
            loss=dict(name="softmax_cross_entropy"),
            data=dict(_TOKENS, batch_size=12),
            optim=dict(name="adamw", learning_rate=1e-3, b2=0.99, weight_decay=0.1, clip_norm=1.0),
            train=dict(duration=ENDLESS),
        ),
    ),
    "epoch": Work(
        "60,000 examples of 28x28 through the MLP, shuffled batches of 128, Adam, each library's own loader; one epoch "
        "(ours: 64 steps a dispatch)",
        "mlp",
        _MLP,
        steps=469,
        seconds=1.0,
        fed=True,
    ),
    "generate": _generating(1),
    "generate_8": _generating(8),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Peer:
    """Somebody who does a work.

    Attributes:
      says: who, for people.
      module: of this package, with a function `start(work, folder, cores, **options)`.
      needs: packages that must be installed.
      works: that it takes part in.
      options: of `start`.
      environment: of its process.
    """

    says: str
    module: str
    needs: tuple[str, ...]
    works: tuple[str, ...]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


_STEPS = ("mlp", "cnn", "gpt")
_ALL = (*_STEPS, "epoch")
_TEXTS = ("generate", "generate_8")
OURS, BARE = "fit", "bare"
# In the order in which they are shown. What is ours is `fit` or `Generator`, as users call them, and the compiled step
# that `fit` calls.
PEERS: Mapping[str, Peer] = {
    "fit": Peer("ours, as users call it", "ours", (), (*_ALL, *_TEXTS)),
    "bare": Peer("ours, compiled step alone", "ours", (), _STEPS, dict(bare=True)),
    "int8": Peer("ours, kernels in 8 bits", "ours", (), _TEXTS, dict(precision="int8")),
    "jax": Peer("JAX by hand", "plain_jax", (), _ALL),
    "torch": Peer("PyTorch, fused optimizer", "in_torch", ("torch",), _ALL),
    "torch_default": Peer(
        "PyTorch, default optimizer", "in_torch", ("torch",), ("mlp", "gpt", "epoch"), dict(fused=False)
    ),
    "torch_channels_last": Peer(
        "PyTorch, fused, channels_last", "in_torch", ("torch",), ("cnn",), dict(channels_last=True)
    ),
    "torch_compiled": Peer("PyTorch, fused, compiled", "in_torch", ("torch",), _STEPS, dict(compiled=True)),
    "keras": Peer("Keras on JAX, Model.fit", "in_keras", ("keras",), _ALL, environment={"KERAS_BACKEND": "jax"}),
    "keras_several": Peer(
        "Keras, several steps an execution",
        "in_keras",
        ("keras",),
        ("mlp", "epoch"),
        dict(most=64),
        {"KERAS_BACKEND": "jax"},
    ),
    "transformers": Peer("transformers", "in_transformers", ("torch", "transformers"), _TEXTS),
    "transformers_bfloat16": Peer(
        "transformers, bfloat16", "in_transformers", ("torch", "transformers"), _TEXTS, dict(dtype="bfloat16")
    ),
}
