"""Hugging Face's transformers on PyTorch, on the CPU: `generate` with its cache, as its users call it."""

from pathlib import Path

import numpy as np
import torch
import transformers

from flaxmodels.perf.peers.trainer import Trainer, repeating
from flaxmodels.perf.peers.works import Work


def start(work: Work, folder: Path, cores: int, dtype: str = "float32") -> Trainer:
    """Set up.

    Args:
      work: what to generate: its model is a GPT-2, whose default sizes are those of 124 million weights.
      folder: with the prompts.
      cores: threads.
      dtype: of weights and computation.
    """
    torch.manual_seed(0)
    torch.set_num_threads(cores)
    torch.set_grad_enabled(False)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval().to(getattr(torch, dtype))
    model.generation_config.eos_token_id = None  # all texts get as many tokens
    prompts = torch.from_numpy(np.load(folder / "inputs.npy")[: work.batch_size].astype(np.int64))
    options = {"attention_mask": torch.ones_like(prompts), "pad_token_id": 0}

    def call() -> None:
        made = model.generate(prompts, **options, max_new_tokens=work.tokens, do_sample=False, use_cache=True)
        assert made.shape[1] == prompts.shape[1] + work.tokens

    loss = float(model(prompts, labels=prompts).loss)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    return repeating(call, loss, versions, sum(x.numel() for x in model.parameters()))
