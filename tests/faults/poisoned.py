"""A config whose data hold examples that go wrong: `--config.data.bad=(3, 17)`; see `poison`."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            model=dict(name="poison:Net"),
            data=dict(name="poison:marked_images", examples=256, bad=(0,), batch_size=16),
            optim=dict(name="adam", learning_rate=3e-3),
            train=dict(duration=16, log_every=1),
            checkpoint=dict(every=4, every_seconds=0.0),
        )
    )
