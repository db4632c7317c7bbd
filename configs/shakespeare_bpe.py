"""A 4-layer transformer on tiny Shakespeare in 1,024 byte pair tokens, learned from the training split.

    python train.py --config=configs/shakespeare_bpe.py

Needs the extra `text`. The last tenth of the text is held out; bits per byte compare with other tokenizers, losses do
not: a token has 2.3 characters here, each a byte. The text is downloaded (1 MB), or read from a folder:
--config.data.manual_dir=FOLDER.
Measured on 1 core of an AMD EPYC, CPU only: 2.236 bits per byte of the whole validation split, seed 0, in 293 s of wall
time beside other work, 233 s of processor time. Characters, with half the context, need 2.236, too.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The config."""
    config = ConfigDict()
    config.model = dict(name="transformer", layers=4, width=128, heads=4, tied_head=True, dropout=0.1, unroll=4)
    config.loss = dict(name="softmax_cross_entropy", metrics=("accuracy", "perplexity", "bits_per_byte"))
    config.data = dict(name="tiny_shakespeare", tokens="bpe", vocab_size=1024, length=128, validation=0.1, batch_size=8)
    config.optim = dict(
        name="muon", learning_rate=3e-3, schedule="cosine", warmup="100 steps", weight_decay=0.1, clip_norm=1.0
    )
    config.train = dict(duration="1200 steps", eval_every="300 steps", log_every=100, metric="eval/bits_per_byte")
    return config
