"""Which processes belong to this one's run, as the environment tells: TPU, SLURM, Open MPI, Kubernetes, or variables.

Nothing here contacts anyone, but for the metadata server of a TPU VM, which is part of the machine. What looks like one
process alone (a laptop, a SLURM allocation of one task, a pod of a cluster with no job around it) is one process alone.
"""

import dataclasses
import hashlib
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping

from flaxmodels.registry import UserError
from flaxmodels.runtime.exits import FaultError

PORT = 8476  # of process 0, where only its host is known
METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
_REMEDY = (
    "Say who belongs to the run with --coordinator_address, --num_processes and --process_id, "
    "or train on this host alone with --distributed=off."
)


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of this process among those of one run.

    Attributes:
      address: "HOST:PORT" of process 0, where the processes find each other; "" where nothing told.
      processes: how many there are; 0 where nothing told.
      process: which of them this one is, from 0; -1 where nothing told.
      local_device_ids: the GPUs of its host that are this process's; None for all.
      source: what told, for messages.
    """

    address: str = ""
    processes: int = 0
    process: int = -1
    local_device_ids: tuple[int, ...] | None = None
    source: str = "the command line"


def find(environment: Mapping[str, str], metadata: Callable[[str], str] | None = None) -> Place | None:
    """What the environment says, or None where this process is alone.

    Args:
      environment: `os.environ`, after JAX is imported: that marks a TPU VM in it.
      metadata: name -> text of an attribute of a TPU VM; None asks its metadata server.

    Raises:
      UserError: the environment says half of it.
      FaultError: the metadata server of a TPU VM does not answer.
    """
    found = (
        _variables(environment)
        or _open_mpi(environment)
        or _slurm(environment)
        or _tpu_hosts(environment)
        or _tpu_metadata(environment, metadata or _ask)
        or _address(environment)
    )
    return found if found is not None and found.processes != 1 else None


def _variables(env: Mapping[str, str]) -> Place | None:
    """JAX's variable for the address, and its words for the other two; an indexed job of Kubernetes sets the last."""
    if "JAX_NUM_PROCESSES" not in env:  # an address alone goes with what a launcher tells
        return None
    name = "JAX_PROCESS_ID" if "JAX_PROCESS_ID" in env else "JOB_COMPLETION_INDEX"
    process = _number(name, env[name]) if name in env else -1
    address, processes = env.get("JAX_COORDINATOR_ADDRESS", ""), _number("JAX_NUM_PROCESSES", env["JAX_NUM_PROCESSES"])
    return Place(address, processes, process, source="JAX_NUM_PROCESSES")


def _address(env: Mapping[str, str]) -> Place | None:
    """An address that no launcher goes with: somebody meant several processes, and did not say how many."""
    address = env.get("JAX_COORDINATOR_ADDRESS")
    return Place(address, source="JAX_COORDINATOR_ADDRESS") if address else None


def _slurm(env: Mapping[str, str]) -> Place | None:
    """What `srun` sets for each task of a step; a batch script, or a shell in an allocation, is no step."""
    if not {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID"} <= env.keys():
        return None
    tasks = _number("SLURM_STEP_NUM_TASKS", env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1")))
    # "node[007-009,12],other" begins with node007, "rack[1-2]n[3,5]-ib" with rack1n3-ib.
    host = re.sub(r"\[(\w*)[^]]*\]|,.*", r"\1", env["SLURM_STEP_NODELIST"])
    address = (
        env.get("JAX_COORDINATOR_ADDRESS") or f"{host}:{_port(env['SLURM_JOB_ID'] + env.get('SLURM_STEP_ID', ''))}"
    )
    alone = env.get("SLURM_STEP_TASKS_PER_NODE", "1").partition("(")[0] == "1"  # "4(x2)": 4 on each of 2 nodes
    ids = None if alone else _share(env, env.get("SLURM_LOCALID"))
    return Place(address, tasks, _number("SLURM_PROCID", env["SLURM_PROCID"]), ids, "SLURM")


def _open_mpi(env: Mapping[str, str]) -> Place | None:
    """What `mpirun` of Open MPI sets for each rank. Only version 4 says where it was started."""
    if not {"OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"} <= env.keys():
        return None
    size, local = env["OMPI_COMM_WORLD_SIZE"], env.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1")
    # "123.0;tcp://10.0.0.1,10.1.0.1:34911", or, from version 5 on, "prterun-node1.cluster-123@1"
    job = env.get("OMPI_MCA_orte_hnp_uri", env.get("PMIX_NAMESPACE", ""))
    launcher = re.search(r"tcp://([^,:]+)|tcp6://\[([^,\]]+)", job)
    host = "localhost" if size == local else launcher and (launcher[1] or f"[{launcher[2]}]")
    address = env.get("JAX_COORDINATOR_ADDRESS") or (f"{host}:{_port(job.partition(';')[0])}" if host else "")
    ids = None if local == "1" else _share(env, env.get("OMPI_COMM_WORLD_LOCAL_RANK"))
    rank = _number("OMPI_COMM_WORLD_RANK", env["OMPI_COMM_WORLD_RANK"])
    return Place(address, _number("OMPI_COMM_WORLD_SIZE", size), rank, ids, "Open MPI")


def _share(env: Mapping[str, str], local: str | None) -> tuple[int, ...] | None:
    """GPUs of one of several tasks on a host: the one of its number; all it sees where the launcher dealt them out."""
    dealt = "CUDA_VISIBLE_DEVICES" in env and "," not in env["CUDA_VISIBLE_DEVICES"]
    return None if local is None or dealt else (int(local),)


def _on_tpu(env: Mapping[str, str]) -> bool:
    """Whether JAX found the chips of a TPU VM, and may use them."""
    platforms = env.get("JAX_PLATFORMS", "")
    return "TPU_ML_PLATFORM" in env and (not platforms or "tpu" in platforms.split(","))


def _tpu_hosts(env: Mapping[str, str]) -> Place | None:
    """What Kubernetes on TPUs sets for each worker; several slices are told of by MEGASCALE_ variables."""
    hosts = env.get("TPU_PROCESS_ADDRESSES", env.get("TPU_WORKER_HOSTNAMES"))
    if not _on_tpu(env) or not hosts or "TPU_WORKER_ID" not in env:
        return None
    return _slices(hosts.split(","), _number("TPU_WORKER_ID", env["TPU_WORKER_ID"]), env.get, "TPU_WORKER_HOSTNAMES")


def _tpu_metadata(env: Mapping[str, str], ask: Callable[[str], str]) -> Place | None:
    """What the metadata of a Cloud TPU VM say of its slice."""
    if not _on_tpu(env) or "TPU_SKIP_MDS_QUERY" in env:
        return None
    lines = (line.partition(":") for line in ask("tpu-env").splitlines())
    facts = {key.strip(): value.strip().strip("'") for key, _, value in lines}
    # Either plain host names, or name:id:address.
    hosts = [entry.rpartition(":")[2] for entry in ask("worker-network-endpoints").split(",")]
    worker = _number("agent-worker-number", ask("agent-worker-number") or "0")
    return _slices(hosts, worker, lambda name: env.get(name) or facts.get(name), "the metadata of the TPU VM")


def _slices(hosts: list[str], worker: int, tell: Callable[[str], str | None], source: str) -> Place:
    """A worker of one of several slices, all of one shape."""
    slices, mine = (
        int(tell(name) or least) for name, least in (("MEGASCALE_NUM_SLICES", 1), ("MEGASCALE_SLICE_ID", 0))
    )
    first = (tell("MEGASCALE_COORDINATOR_ADDRESS") or hosts[0]).partition(":")[0]
    address = tell("JAX_COORDINATOR_ADDRESS") or f"{first}:{PORT}"
    return Place(address, len(hosts) * slices, len(hosts) * mine + worker, source=source)


def _ask(name: str) -> str:
    request = urllib.request.Request(METADATA + name, headers={"Metadata-Flavor": "Google"})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the server is a part of the machine
    try:
        with direct.open(request, timeout=10) as answer:
            return answer.read().decode().strip()
    except urllib.error.HTTPError as error:
        if error.code == 404:  # a TPU that is no slice of several hosts may not have it
            return ""
        raise FaultError(f"the metadata server of this TPU VM refuses {name!r}: {error}. {_REMEDY}") from error
    except OSError as error:
        raise FaultError(f"the metadata server of this TPU VM does not answer: {error}. {_REMEDY}") from error


def _port(job: str) -> int:
    """A port that all processes of a job compute alike, and two jobs on one host rarely share; none is reserved."""
    return 61440 + int.from_bytes(hashlib.sha256(job.encode()).digest()[:2]) % 4096


def _number(name: str, text: str) -> int:
    if not text.isdecimal():
        raise UserError(f"{name}={text!r} in the environment is not a number: expected an integer, at least 0.")
    return int(text)
