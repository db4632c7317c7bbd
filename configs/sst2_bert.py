"""Sentiment of film reviews (SST-2): a small BERT guesses masked words of the phrases, then learns their classes.

    python train.py --config=configs/sst2_bert.py:masked --workdir=runs/sst2_masked
    python train.py --config=configs/sst2_bert.py

The folder `sst2` has train.tsv, the phrases, and test.tsv, 872 whole sentences (GLUE's dev.tsv), each with the columns
`sentence` and `label`. For another place: --config.data.path=FILE --config.data.test_path=FILE, both times.
Measured on 1 core of an AMD EPYC, CPU only: accuracy on the 872 sentences 0.8028, mean of seeds 0 to 2 (0.8062,
0.7993, 0.8028), in 45 s, after 9 min for the masks, beside other work. Without these 0.8050, seed 0: so few steps on so
few words teach next to nothing. A linear model of n-grams, `sst2_ngrams`, is better.
"""

from ml_collections import ConfigDict

MASKED = "runs/sst2_masked"


def get_config(stage: str = "classes") -> ConfigDict:
    """The config; `stage` is "masked", the first, or "classes"."""
    config = ConfigDict()
    config.model = dict(layers=1, width=64, heads=4, norm_place="pre", dropout=0.3)
    config.loss = dict(name="softmax_cross_entropy")
    config.data = dict(name="tsv", path="sst2/train.tsv", test_path="sst2/test.tsv", text="sentence", batch_size=64)
    config.optim = dict(name="adamw", schedule="cosine", warmup="200 steps", weight_decay=0.05, clip_norm=1.0)
    config.train = dict(duration="3 epochs", eval_every="1 epoch", log_every=100)
    if stage == "masked":
        config.model.update(name="bert", dropout=0.1)
        config.data.update(tokens="words", vocab_size=10000, length=48, windows="packed", objective=dict(name="masked"))
        config.optim.update(learning_rate=3e-3)
    else:
        config.model.update(name="bert_classifier", pool="mean", pooler=None)
        config.data.update(tokens=f"{MASKED}/tokenizer.json", label="label", length=48)
        config.optim.update(learning_rate=2e-3, average=0.998)
        config.start = dict(workdir=MASKED, fresh=("params/head/",))
        config.train.update(duration="1 epoch", metric="eval/accuracy", mode="max")  # it overfits in a second one
    return config
