"""The verb `cost`: what a run has cost, and what still does."""

import argparse
import dataclasses
import time

from tpu import acts, cost, state
from tpu.gcloud import Cloud
from tpu.settings import Settings


def everywhere(s: Settings) -> Settings:
    """With the zones, too, where the run has had a machine: settings may have changed since."""
    lives = state.load(s.folder).lives
    return dataclasses.replace(s, zones=tuple(dict.fromkeys((*s.zones, *(life.zone for life in lives)))))


def bill(s: Settings, cloud: Cloud, flags: argparse.Namespace) -> int:
    """What the run has cost by its state file and, where project and zones are known, what is there now."""
    lives = state.load(s.folder).lives
    for line in cost.table(lives, time.time()) if lives else [f"# {s.folder} knows of no machine of {s.name!r}."]:
        cloud.say(line)
    if lives and s.capacity == "reserved":
        cloud.say("# A reservation is paid for by contract: this is the price on demand, unless --prices has another.")
    s = everywhere(s)
    if s.project and s.zones:
        for line in acts.left(cloud, s) or [f"# Nothing of {s.name} is there now in {', '.join(s.zones)}."]:
            cloud.say(line)
    return 0
