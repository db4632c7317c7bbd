"""A 4-layer transformer on the characters of tiny Shakespeare; the last tenth of the text is held out.

    python train.py --config=configs/shakespeare_transformer.py
    python train.py --config=configs/shakespeare_transformer.py:long     # four times the context, three times as long

The sizes of the first are those of nanoGPT's recipe for a laptop. The text is downloaded (1 MB), or read from a folder:
--config.data.manual_dir=FOLDER.
Measured on 2 cores of an AMD EPYC, CPU only: loss over the whole validation split 1.550 nats per character, mean of
seeds 0 to 2 (1.551, 1.550, 1.548), in 145 s. The longer one: 1.503, seed 0, in 445 s of processor time.
"""

from ml_collections import ConfigDict


def get_config(recipe: str = "laptop") -> ConfigDict:
    """The config; `recipe` is "laptop" or "long"."""
    config = ConfigDict()
    config.model = dict(
        name="transformer",
        layers=4,
        width=128,
        heads=4,
        unroll=4,  # the loop over layers, unrolled: a fifth faster on CPU; 1 compiles fastest
    )
    config.loss = dict(name="softmax_cross_entropy", metrics=("accuracy", "perplexity", "bits_per_byte"))
    config.data = dict(name="tiny_shakespeare", tokens="characters", length=64, validation=0.1, batch_size=12)
    config.optim = dict(
        name="muon", learning_rate=3e-3, schedule="cosine", warmup="100 steps", weight_decay=0.1, clip_norm=1.0
    )
    config.train = dict(duration="2000 steps", eval_every="500 steps", log_every=100)
    if recipe == "long":  # a step has 2.7 times the tokens, so that Muon's products, which it pays once, weigh less
        config.data.update(length=256, batch_size=8)
        config.train.update(duration="1200 steps", eval_every="600 steps")
    return config
