"""Several processes: start `jax.distributed` with time limits and clear errors, and leave together.

Read `joined`, which is put around all of a command. `place` says which process this is; `roll_call`, who is missing;
`peers` is how the processes talk once JAX has started; `pulse` knows who died, froze or is stuck.
"""

import argparse
import contextlib
import functools
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from flaxmodels import mirror, storage
from flaxmodels.runtime import compile_cache, exits, host_log, peers, progress, pulse, roll_call
from flaxmodels.runtime.cluster import Place
from flaxmodels.runtime.exits import SignalledError
from flaxmodels.runtime.lease import answered
from flaxmodels.runtime.place import host_and_port, place_of

# Seconds that a process with an error waits for the others to end as well, before it ends them: bad input is found by
# all alike, within a moment.
GRACE = 10.0
PAUSE = 0.2


def start(place: Place, init_timeout: float = 300.0, heartbeat_timeout: float = 60.0) -> None:
    """Start `jax.distributed`, once the processes have met. Before JAX looks for devices.

    Args:
      place: of this process.
      init_timeout: seconds for all to come, and at the end for all to leave.
      heartbeat_timeout: of `pulse`. JAX's own, which aborts a process without a word, is longer.
    """
    _threads_for_gloo()
    # It would catch SIGTERM before there is anything to save; `agreement` is how the processes stop together.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        place.address,
        place.processes,
        place.process,
        local_device_ids=place.local_device_ids,
        cluster_detection_method="deactivate",
        initialization_timeout=int(init_timeout),
        heartbeat_timeout_seconds=int(2 * heartbeat_timeout + 30),
        shutdown_timeout_seconds=int(init_timeout),
    )


def _threads_for_gloo() -> None:
    """Gloo, the collectives of CPUs, waits for ever where a process has more simulated devices than XLA has threads."""
    flag = re.search(r"xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    devices = int(flag[1] if flag else os.environ.get("JAX_NUM_CPU_DEVICES", 1))
    if devices > 1:
        os.environ.setdefault("NPROC", str(max(4 * devices, os.cpu_count() or 1)))


@contextlib.contextmanager
def joined(flags: argparse.Namespace, workdir: Path | None = None) -> Iterator[bool]:
    """Around all that a command does: join the other processes of the run, watch that all get on, leave with them.

    At the end all wait for each other; so they do after an error that all find, such as bad input. An error of one
    process alone ends all: each prints it, and leaves with the exit code of such an error. One that dies, freezes or is
    stuck ends all as well, each with a message that names it: see `pulse`. A process that is alone is watched, too.

    Args:
      flags: with those of `place.add_flags`, and `debug`.
      workdir: where a process that is stuck writes where its threads stand, and where each of several keeps a
        `host_log`; None writes that to stderr alone.

    Yields:
      Whether this process is the one to print.

    Raises:
      UserError: the flags, or what the environment says, can't be.
      FaultError: the processes did not find each other in time.
    """
    place = place_of(flags, os.environ)
    if place is None:
        compile_cache.keep()  # of several processes JAX has only one write there
        if workdir is not None and storage.is_object(workdir):  # stacks, and the last lines of the log
            exits.before_end(functools.partial(mirror.flush, workdir), host_log.LAST)
        with pulse.opened({}, 0, flags.heartbeat_timeout, flags.stuck_after, workdir and mirror.local(workdir)):
            yield True
        return
    if workdir is not None:
        with answered(workdir):
            host_log.keep(workdir, place.process, place.processes)
    deadline = time.monotonic() + flags.init_timeout
    ties = roll_call.meet(host_and_port(place.address), place.processes, place.process, flags.init_timeout)
    folder = workdir and mirror.local(workdir, place.process)
    with pulse.opened(ties, place.process, flags.heartbeat_timeout, flags.stuck_after, folder) as beat:
        start(place, max(deadline - time.monotonic(), 10.0), flags.heartbeat_timeout)
        leaving = threading.Event()
        threading.Thread(target=_watch, args=(leaving, beat, flags.debug), name="peers", daemon=True).start()
        try:
            yield place.process == 0
            with progress.phase("end"):
                peers.leave(flags.init_timeout)
        except BaseException as error:
            leaving.set()
            cause = peers.cause(error)
            if not _leave_with(cause):
                exits.leave(cause, debug=flags.debug)
            jax.distributed.shutdown()
            raise cause from (None if cause is error else error)
        leaving.set()
        jax.distributed.shutdown()


def _leave_with(error: BaseException) -> bool:
    """Whether all others come to leave as well."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0 has gone, and with it the way to the others
        if peers.failed() is None:
            peers.report(error)
        return peers.leave_with_error(2 * GRACE)
    return False


def _watch(leaving: threading.Event, beat: pulse.Pulse, debug: bool) -> None:
    """End this process some time after one failed, if it does not come to leave by itself.

    It may be waiting for the other in a collective, where no exception reaches it; or, where the error is its own, for
    others that have gone. A signal that ends the run at once leaves nothing to wait for.
    """
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0 has gone
        while not leaving.wait(PAUSE):
            error = peers.failed() or (peers.reported() if beat.deserted() else None)
            if error is not None and (isinstance(error, SignalledError) or not leaving.wait(GRACE)):
                peers.cut()
                exits.leave(error, debug=debug)
