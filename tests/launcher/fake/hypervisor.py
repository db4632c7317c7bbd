"""Beside a machine, while faults of the plan wait for a step of the run: they happen at once, not at the next command.

    python -m fake.hypervisor MACHINE

It ends with its machine, with the last of such faults, and with the folder of its cloud.
"""

import sys
import time

from fake import faults, store

PAUSE = 0.02


def main(uid):
    """Watch one machine."""
    while (store.folder() / "lock").exists():
        step, later = store.newest_step(), []
        with store.opened() as state:
            mine = [resource for resource in state["resources"].values() if resource["uid"] == uid]
            if not mine or mine[0]["state"] != "ACTIVE" or not faults.waiting(state):
                return
            later = faults.of_machines(state, step)
        for function, arguments in later:
            function(*arguments)
        time.sleep(PAUSE)


if __name__ == "__main__":
    main(sys.argv[1])
