"""Several processes: start `jax.distributed` with time limits and clear errors, and leave together.

Read `joined`, which is put around all of a command. `place` says which process this is; `roll_call`, who is missing;
`peers` is how the processes talk once JAX has started.
"""

import argparse
import contextlib
import os
import re
import threading
import time
from collections.abc import Iterator

import jax

from flaxmodels.registry import UserError
from flaxmodels.runtime import exits, peers, roll_call
from flaxmodels.runtime.cluster import Place
from flaxmodels.runtime.exits import FaultError
from flaxmodels.runtime.place import host_and_port, place_of

# Seconds that a process with an error waits for the others to end as well, before it ends them: bad input is found by
# all alike, within a moment.
GRACE = 10.0


def start(place: Place, init_timeout: float = 300.0, heartbeat_timeout: float = 100.0) -> None:
    """Meet the other processes and start `jax.distributed`. Before JAX looks for devices.

    Raises:
      UserError: two processes have one number, or they count differently; the port is taken.
      FaultError: not all came in time; the message says who is missing.
    """
    deadline = time.monotonic() + init_timeout
    roll_call.meet(host_and_port(place.address), place.processes, place.process, init_timeout)
    _threads_for_gloo()
    # It would catch SIGTERM before there is anything to save; `agreement` is how the processes stop together.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        place.address,
        place.processes,
        place.process,
        local_device_ids=place.local_device_ids,
        cluster_detection_method="deactivate",
        initialization_timeout=max(int(deadline - time.monotonic()), 10),
        heartbeat_timeout_seconds=int(heartbeat_timeout),
        shutdown_timeout_seconds=int(init_timeout),
    )


def _threads_for_gloo() -> None:
    """Gloo, the collectives of CPUs, waits for ever where a process has more simulated devices than XLA has threads."""
    flag = re.search(r"xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    devices = int(flag[1] if flag else os.environ.get("JAX_NUM_CPU_DEVICES", 1))
    if devices > 1:
        os.environ.setdefault("NPROC", str(max(4 * devices, os.cpu_count() or 1)))


@contextlib.contextmanager
def joined(flags: argparse.Namespace) -> Iterator[bool]:
    """Around all that a command does: join the other processes of the run, and leave with them.

    At the end all wait for each other; so they do after an error that all find, such as bad input. An error of one
    process alone ends all: each prints it, and leaves with the exit code of such an error. A process that is killed
    can't tell: then JAX ends the others within `--heartbeat_timeout`, by SIGABRT. In a process that is alone nothing
    of this happens.

    Args:
      flags: with those of `place.add_flags`, and `debug`.

    Yields:
      Whether this process is the one to print.

    Raises:
      UserError: the flags, or what the environment says, can't be.
      FaultError: the processes did not find each other in time.
    """
    place = place_of(flags, os.environ)
    if place is None:
        yield True
        return
    start(place, flags.init_timeout, flags.heartbeat_timeout)
    leaving = threading.Event()
    threading.Thread(target=_watch, args=(leaving, flags.debug), name="peers", daemon=True).start()
    try:
        yield place.process == 0
        peers.leave(flags.init_timeout)
    except BaseException as error:
        leaving.set()
        cause = _cause(error)
        if not _leave_with(cause):
            exits.leave(cause, debug=flags.debug)
        jax.distributed.shutdown()
        raise cause from (None if cause is error else error)
    leaving.set()
    jax.distributed.shutdown()


def _cause(error: BaseException) -> BaseException:
    """What JAX raises here because another process has gone, such as a closed connection, is that one's error."""
    if isinstance(error, UserError | FaultError):
        return error
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        return peers.failed() or error
    return error


def _leave_with(error: BaseException) -> bool:
    """Whether all others come to leave as well."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0 has gone, and with it the way to the others
        if peers.failed() is None:
            peers.report(error)
        return peers.leave_with_error(2 * GRACE)
    return False


def _watch(leaving: threading.Event, debug: bool) -> None:
    """End this process some time after another one failed, if it does not come to leave by itself.

    It may be waiting for the other in a collective, where no exception reaches it.
    """
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0 has gone: JAX ends this one
        while not leaving.wait(1.0):
            error = peers.failed()
            if error is not None and not leaving.wait(GRACE):
                peers.cut()
                exits.leave(error, debug=debug)
