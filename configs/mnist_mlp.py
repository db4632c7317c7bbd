"""x"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The config."""
    config = ConfigDict()
    config.model = dict(name="mlp", hidden=(128,))
    config.data = dict(name="mnist", batch_size=128)
    config.optim = dict(name="adam", learning_rate=1e-3)
    config.train = dict(
        duration="5 epochs", eval_every="1 epochs", steps_per_dispatch=16, metric="eval/accuracy", mode="max"
    )
    return config
