"""A run of a second or two in which everything happens: dropout, three epochs, evaluations, many saves.

60 steps of 16 of 320 examples; each step is logged, an evaluation follows every 9th, a save every 4th.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            model=dict(name="transformer", layers=1, width=16, heads=2, dropout=0.1),
            data=dict(name="synthetic_tokens", examples=320, test_examples=32, vocab_size=32, length=16, batch_size=16),
            optim=dict(name="adam", learning_rate=3e-3, average=0.9),
            train=dict(duration="3 epochs", log_every=1, eval_every=9),
            checkpoint=dict(every=4, every_seconds=0.0),
        )
    )
