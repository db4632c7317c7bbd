"""An MLP on scikit-learn's 1,797 handwritten digits.

python train.py --config=configs/digits_mlp.py
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The config."""
    config = ConfigDict()
    config.model = dict(name="mlp", hidden=(128,))
    config.data = dict(name="digits", batch_size=64)
    config.optim = dict(name="adam", learning_rate=3e-3, schedule="cosine")
    config.train = dict(
        duration="30 epochs", eval_every="5 epochs", steps_per_dispatch=16, metric="eval/accuracy", mode="max"
    )
    return config
