"""A CNN on the digits of `digits_mlp`.

    python train.py --config=configs/digits_cnn.py

Measured on 2 cores of an AMD EPYC, CPU only: test accuracy 0.9909, mean of seeds 0 to 2 (0.9918, 0.9918, 0.9890), in
3 s, and 8 s for the whole process.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The config."""
    config = ConfigDict()
    config.model = dict(name="cnn", features=(32, 64), norm="batch", dropout=0.3, dense=128)
    config.loss = dict(name="softmax_cross_entropy", label_smoothing=0.1)
    config.data = dict(name="digits", batch_size=64)
    config.optim = dict(name="adamw", learning_rate=2e-3, schedule="cosine", weight_decay=0.05, average=0.99)
    config.train = dict(duration="30 epochs", eval_every="5 epochs", log_every=50, metric="eval/accuracy", mode="max")
    return config
