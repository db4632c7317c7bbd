"""GPT-2 with 124 million parameters (Radford et al., 2019), 128 x 1,024 tokens a step, for a TPU slice of 16 chips.

    python train.py --config=configs/gpt2_124m.py

Parameters, gradients and optimizer state are split over 16 devices: over N, with --config.mesh.fsdp=N. Where there are
several slices, each has a whole state.
It trains on made-up tokens. For text of your own, prepare it once, `flaxmodels prepare --config=FILE --to=DIR`, and put
`config.data = dict(name="tokens", path=DIR, length=1024, batch_size=128)` in place of the line below.

It has not run on a TPU; what is known without one:

    flaxmodels shardings --config=configs/gpt2_124m.py --topology=v5e:4x4 --compile

Compiled for v5e:4x4 on 2 cores of an AMD EPYC in 23 s: of the state, 1.39 GiB, each chip holds a sixteenth, 89.0 MiB,
and it is donated; temporaries are 7.3 GiB, and share some of their memory. At most 7.1 GiB of 15.8 GiB are in use: it
fits. For two such slices (`--num_slices=2`) in 31 s: at most 3.7 GiB.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The config."""
    config = ConfigDict()
    config.model = dict(
        name="transformer",
        vocab_size=50304,  # 50257 tokens, and room up to a multiple of 128, which every mesh divides
        layers=12,
        width=768,
        heads=12,
        norm="layer",
        positions="learned",
        mlp="gelu",
        tied_head=True,
        use_bias=True,
    )
    config.loss = dict(name="softmax_cross_entropy", chunks=8)
    config.data = dict(name="synthetic_tokens", vocab_size=50257, length=1024, examples=4096, batch_size=128)
    config.optim = dict(
        name="adamw",
        learning_rate=6e-4,
        b2=0.95,
        schedule="cosine",
        warmup="700 steps",
        weight_decay=0.1,
        clip_norm=1.0,
    )
    config.mesh = dict(fsdp=16)
    config.train = dict(duration="10e9 tokens", log_every=100, eval_every="1000 steps")
    return config
