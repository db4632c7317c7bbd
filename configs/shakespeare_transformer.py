"""A 4-layer transformer."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The config."""
    config = ConfigDict()
    config.model = dict(name="transformer", layers=4, width=128, heads=4)
    config.data = dict(name="tiny_shakespeare", tokens="characters", length=64, validation=0.1, batch_size=12)
    config.loss = dict(metrics=("accuracy", "perplexity", "bits_per_byte"))
    config.optim = dict(name="adamw", learning_rate=3e-3, schedule="cosine", warmup="100 steps", clip_norm=1.0)
    config.train = dict(duration="2000 steps", eval_every="500 steps")
    return config
