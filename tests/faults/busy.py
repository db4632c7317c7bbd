"""What the soak trains: a data worker reads and augments, one example in 4,096 makes loss and gradients NaN.

The guard leaves such batches out, in a run that is left alone too. `poison` is found through PYTHONPATH.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            model=dict(name="poison:Net", classes=10, kind="forward"),
            data=dict(
                name="poison:marked_images",
                examples=4096,
                bad=(5,),
                batch_size=16,
                workers=1,
                host_augment=(dict(name="flip"),),
            ),
            optim=dict(name="adam", learning_rate=1e-3, average=0.99),
            train=dict(duration=1000, log_every=1, eval_every=100),
            guard=dict(capsules=2),
            checkpoint=dict(every=25, every_seconds=0.0),
        )
    )
