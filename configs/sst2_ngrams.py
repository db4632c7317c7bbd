"""Sentiment of film reviews (SST-2) by a linear model of n-grams of bytes, to compare others with.

    python train.py --config=configs/sst2_ngrams.py

The folder `sst2` has train.tsv, the phrases, and test.tsv, 872 whole sentences (GLUE's dev.tsv), each with the columns
`sentence` and `label`. For another place: --config.data.path=FILE --config.data.test_path=FILE.
Measured on 1 core of an AMD EPYC, CPU only: accuracy on the sentences after the last step 0.8257, mean of seeds 0 to 2
(0.8268, 0.8257, 0.8245), in 30 s beside much other work, 9 s of them of this one's processor time.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The config."""
    config = ConfigDict()
    config.model = dict(name="flaxmodels.models.ngrams:NGrams")
    config.data = dict(
        name="tsv",
        path="sst2/train.tsv",
        test_path="sst2/test.tsv",
        text="sentence",
        label="label",
        tokens="bytes",
        length=256,
        batch_size=64,
    )
    # Adam would give n-grams that are seen twice as much weight as those that are seen a thousand times.
    config.optim = dict(name="sgd", learning_rate=6.0, schedule="cosine", warmup="100 steps", average=0.9995)
    config.train = dict(
        duration="3 epochs",
        eval_every="1 epoch",
        log_every=500,
        steps_per_dispatch=32,
        metric="eval/accuracy",
        mode="max",
    )
    return config
