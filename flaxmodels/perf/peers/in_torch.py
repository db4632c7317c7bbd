"""PyTorch, on the CPU, written as its own tutorials and nanoGPT write it; weights start from the distributions of ours.

Only what is said in `works` differs between the peers of this module: the optimizer's kernel, the layout of images, and
whether the model is compiled.
"""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from flaxmodels.perf.peers.trainer import Trainer, stepping
from flaxmodels.perf.peers.works import VOCABULARY, Work


def start(
    work: Work, folder: Path, cores: int, fused: bool = True, channels_last: bool = False, compiled: bool = False
) -> Trainer:
    """Set up.

    Args:
      work: what to train.
      folder: with the data.
      cores: threads.
      fused: the optimizer's fused kernel; else its default.
      channels_last: memory format of images and convolutions.
      compiled: the model goes through `torch.compile`.
    """
    torch.manual_seed(0)
    torch.set_num_threads(cores)
    net = _MODELS[work.model](work.config["model"])
    memory = torch.channels_last if channels_last else torch.contiguous_format
    if work.model == "cnn":
        net = net.to(memory_format=memory)
    optimizer, clip = _optimizer(net, fused, **work.config["optim"])
    model = torch.compile(net) if compiled else net
    batches = _batches(work, folder, memory)

    def step(i: int) -> torch.Tensor:
        inputs, targets = next(batches)
        logits = model(inputs)
        loss = F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        return loss.detach()

    def mean(losses: Any) -> float:
        return float(torch.stack(losses).mean())

    return stepping(step, mean, {"torch": torch.__version__}, sum(p.numel() for p in net.parameters()))


def _batches(work: Work, folder: Path, memory: torch.memory_format) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    inputs, targets = (torch.from_numpy(np.load(folder / f"{name}.npy")) for name in ("inputs", "targets"))
    targets = targets.long()
    if work.model == "mlp":
        inputs = inputs.flatten(1)
    if work.model == "gpt":
        inputs = inputs.long()
    if work.model == "cnn":
        inputs = inputs.permute(0, 3, 1, 2).contiguous(memory_format=memory)
    if work.fed:
        loader = DataLoader(TensorDataset(inputs, targets), batch_size=work.batch_size, shuffle=True)
        return (tuple(batch) for _ in itertools.count() for batch in loader)
    some = work.ready * work.batch_size
    pairs = zip(inputs[:some].split(work.batch_size), targets[:some].split(work.batch_size))
    return itertools.cycle([(x.contiguous(memory_format=memory) if x.ndim == 4 else x, y) for x, y in pairs])


def _optimizer(
    net: nn.Module,
    fused: bool,
    name: str,
    learning_rate: float,
    b2: float = 0.999,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
) -> tuple[torch.optim.Optimizer, float | None]:
    kernel: dict[str, Any] = {"fused": True} if fused else {}
    common: dict[str, Any] = {"lr": learning_rate, "betas": (0.9, b2), **kernel}
    if name == "adam":
        return torch.optim.Adam(net.parameters(), **common), clip_norm
    groups = [
        {"params": [p for p in net.parameters() if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in net.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, **common), clip_norm


def _lecun(net: nn.Module) -> nn.Module:
    """Weights as Flax begins with: a truncated normal distribution of variance 1 / fan-in; biases of 0."""
    for layer in net.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            std = math.sqrt(1 / layer.weight[0].numel()) / 0.87962566
            nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
            nn.init.zeros_(layer.bias)
    return net


def _mlp(fields: Any) -> nn.Module:
    (hidden,) = fields["hidden"]
    return _lecun(nn.Sequential(nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, 10)))


def _cnn(fields: Any) -> nn.Module:
    (first, second), dense, rate = fields["features"], fields["dense"], fields["dropout"]
    return _lecun(
        nn.Sequential(
            nn.Conv2d(1, first, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(first, second, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Dropout(rate), nn.Linear(second * 7 * 7, dense), nn.ReLU(),
            nn.Dropout(rate), nn.Linear(dense, 10),
        )
    )  # fmt: skip


class Attention(nn.Module):
    """Causal attention, its three projections in one."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, D) -> (B, T, D)."""
        B, T, D = x.shape
        q, k, v = (y.view(B, T, self.heads, D // self.heads).transpose(1, 2) for y in self.qkv(x).split(D, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).contiguous().view(B, T, D))


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.attention = Attention(width, heads)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, D) -> (B, T, D)."""
        x = x + self.attention(self.norm_attention(x))
        return x + self.down(F.gelu(self.up(self.norm_mlp(x)), approximate="tanh"))


class GPT(nn.Module):
    """nanoGPT's model (https://github.com/karpathy/nanoGPT) without biases and dropout."""

    def __init__(self, vocab_size: int, layers: int, width: int, heads: int, length: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocab_size, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width, bias=False), nn.Linear(width, vocab_size, bias=False)
        self.tokens.weight = self.head.weight
        for name, parameter in self.named_parameters():
            if parameter.ndim >= 2:
                last = name.endswith(("attention.out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if last else 0.02)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(B, T) -> (B, T, vocabulary)."""
        x = self.tokens(inputs) + self.places(torch.arange(inputs.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def _gpt(fields: Any) -> nn.Module:
    return GPT(VOCABULARY, fields["layers"], fields["width"], fields["heads"], fields["max_length"])


_MODELS = {"mlp": _mlp, "cnn": _cnn, "gpt": _gpt}
