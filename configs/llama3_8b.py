"""A model of Llama 3's shape with 8 billion parameters (https://arxiv.org/abs/2407.21783), for 64 chips of TPU v5p.

    python train.py --config=configs/llama3_8b.py

128 x 8,192 tokens a step. It trains on made-up tokens. For text of your own, prepare it once, `flaxmodels prepare
--config=FILE --to=DIR`, and put `config.data = dict(name="tokens", path=DIR, length=8192, batch_size=128)` in place of
the line below.

It has not run on a TPU; what is known without one:

    flaxmodels shardings --config=configs/llama3_8b.py --topology=v5p:4x4x4 --compile

Compiled for v5p:4x4x4 on 2 cores of an AMD EPYC in 32 s: of the state, 89.7 GiB, each chip holds a sixteenth, 5.6 GiB,
and it is donated; temporaries are 55.2 GiB, and share some of their memory. At most 52.7 GiB of 95.7 GiB are in use: it
fits. With --config.mesh.fsdp=64 a chip holds 1.4 GiB of state, and at most 47.9 GiB are in use.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The config."""
    config = ConfigDict()
    config.model = dict(
        name="transformer",
        vocab_size=128256,
        layers=32,
        width=4096,
        heads=32,
        kv_heads=8,
        mlp_width=14336,
        rope_base=500000.0,
        remat="dots",
    )
    config.loss = dict(name="softmax_cross_entropy", chunks=16)
    config.data = dict(name="synthetic_tokens", vocab_size=128256, length=8192, examples=512, batch_size=128)
    config.optim = dict(
        name="adamw",
        learning_rate=3e-4,
        b2=0.95,
        schedule="cosine",
        warmup="2000 steps",
        weight_decay=0.1,
        clip_norm=1.0,
    )
    # Each chip has a sixteenth of the state, and there are four such groups. Split over all 64, a width of 4096 would
    # be in parts of 64, half of the 128 lanes of a TPU: XLA gathers such with all-reduces, which send twice as much.
    config.mesh = dict(fsdp=16)
    config.train = dict(duration="100000 steps", log_every=10, eval_every="1000 steps")
    return config
