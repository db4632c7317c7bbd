"""The verb `gke`: a JobSet manifest for Google Kubernetes Engine, from the settings of a run.

A pod is a host of a slice, a child job is a slice, and the JobSet is the run. JobSet names the pods in a headless
service of its own; `JAX_COORDINATOR_ADDRESS` is the first of them, and `JAX_NUM_PROCESSES` counts them all. Kubernetes
adds `JOB_COMPLETION_INDEX`, which counts within a slice. GKE itself sets what libtpu reads (`TPU_WORKER_ID`,
`TPU_WORKER_HOSTNAMES`, and `MEGASCALE_...` for several slices).
https://docs.cloud.google.com/kubernetes-engine/docs/how-to/tpu-multislice, https://jobset.sigs.k8s.io/docs/
"""

import argparse
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tpu import machines
from tpu.gcloud import Cloud
from tpu.settings import Settings, UserError

PORT = 8476  # where the processes find each other, in the pod of the first
JOBS = "workers"  # the child jobs
# Of a JobSet's name, whose pods are called NAME-workers-SLICE-HOST-SUFFIX: what stays below the 63 of a DNS label.
LONGEST = 40
BAD_INPUT = 2  # the exit code of a run that no restart would mend
RESTARTS = 20
# Seconds from SIGTERM to SIGKILL. A node that is preempted does not wait so long: its pods have about 15.
GRACE = 300
# TPU version -> the label of its nodes, and the name of their machines but for the chips of each.
# https://docs.cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus
NODES: Mapping[str, tuple[str, str]] = {
    "v4": ("tpu-v4-podslice", "ct4p-hightpu"),
    "v5e": ("tpu-v5-lite-podslice", "ct5lp-hightpu"),
    "v5p": ("tpu-v5p-slice", "ct5p-hightpu"),
    "v6e": ("tpu-v6e-slice", "ct6e-standard"),
}
_PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9_./-]*")
_WORDS = ("true", "false", "null", "yes", "no", "on", "off", "y", "n")  # which YAML takes for something else


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that only this verb has."""
    parser.add_argument(
        "--to", type=Path, metavar="FILE", help="the manifest (default: jobset.yaml in the state folder)"
    )
    parser.add_argument("--image", metavar="NAME", help="of the container (default: the project's own registry)")
    parser.add_argument(
        "--account",
        default="default",
        metavar="NAME",
        help="Kubernetes service account that may use the bucket (default)",
    )


def gke(s: Settings, cloud: Cloud, flags: argparse.Namespace) -> int:
    """Write the manifest of a run; with `--dry_run`, print it."""
    text = manifest(s, flags.image or image(s), flags.account)
    if cloud.dry_run:
        cloud.say(text.removesuffix("\n"))
        return 0
    to = flags.to or Path(s.folder, "jobset.yaml")
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(text)
    if s.max_cost is not None:
        cloud.say(f"# max_cost={s.max_cost:g} does not count: nobody watches what a JobSet costs.")
    cloud.say(f"# {to}: {s.slices} x {s.type}. What it needs is said at its top; then: kubectl apply --filename={to}")
    return 0


def image(s: Settings) -> str:
    """The name under which the container lies, where nobody says another: in the registry of the zone's region.

    Raises:
      UserError: no project or no zone is said.
    """
    if not s.project or not s.zones:
        raise UserError("--image is missing: the name of the container. With --project and --zone it has a default.")
    return f"{_region(s)}-docker.pkg.dev/{s.project}/flaxmodels/{s.name}:latest"


def _region(s: Settings) -> str:
    return s.zones[0].rpartition("-")[0] if s.zones else "REGION"


def manifest(s: Settings, image: str, account: str = "default") -> str:
    """The whole text of a JobSet.

    Args:
      s: of the run.
      image: of the container.
      account: a Kubernetes service account that may read and write the bucket.

    Raises:
      UserError: the settings can't be a JobSet.
    """
    machine = machines.of(s.type)
    version, _, topology = machine.topology.partition(":")
    if version not in NODES:
        raise UserError(f"type={s.type!r}: GKE has no nodes with it that JAX can use. It has {', '.join(NODES)}.")
    if len(s.name) > LONGEST:
        raise UserError(f"name={s.name!r} is too long for a JobSet: expected at most {LONGEST} letters.")
    if not s.workdir.startswith("gs://"):
        raise UserError(f"bucket={s.bucket!r} is a folder, which no pod sees: expected gs://BUCKET.")
    if s.slices > 1 and machine.hosts == 1:
        raise UserError(
            f"slices={s.slices} of {s.type!r}: GKE joins slices of several hosts only. Choose a larger type."
        )
    label, kind = NODES[version]
    chips = machine.chips // machine.hosts
    pools = f"""\
# {s.slices} slice(s) of {machine.type}: {s.slices * machine.hosts} pods with {chips} chips each.
# A node pool a slice:
#   gcloud container node-pools create {s.name}-0 --cluster=CLUSTER --project={s.project or "PROJECT"} \\
#     --location={_region(s)} --node-locations={s.zones[0] if s.zones else "ZONE"} \\
#     --machine-type={kind}-{chips}t --tpu-topology={topology} --num-nodes={machine.hosts}{_pool(s)}
# The container, from the root of the repository:
#   gcloud auth configure-docker {image.partition("/")[0]}
#   docker build --platform=linux/amd64 --file=tpu/gke/Dockerfile --tag={image} .
#   docker push {image}
# JobSet itself: https://jobset.sigs.k8s.io/docs/installation/
"""
    return pools + "".join(f"{line}\n" for line in yaml(_jobset(s, image, account, label, topology)))


def _pool(s: Settings) -> str:
    """The flags of a node pool that say how its machines are paid."""
    flags = {"spot": " --spot", "reserved": " \\\n#     --reservation-affinity=specific --reservation=RESERVATION"}
    return flags.get(s.capacity, "")


def _jobset(s: Settings, image: str, account: str, label: str, topology: str) -> dict[str, Any]:
    hosts = machines.of(s.type).hosts
    rules = {
        "maxRestarts": RESTARTS,
        # What is wrong stays wrong; and who sets a limit means it.
        "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy", "DeadlineExceeded"]}],
    }
    job: dict[str, Any] = {
        "completionMode": "Indexed",
        "parallelism": hosts,
        "completions": hosts,
        "backoffLimit": 0,  # no process goes on without the others: all start again together
    }
    if s.max_hours is not None:
        job["activeDeadlineSeconds"] = round(s.max_hours * 3600)
    job["podFailurePolicy"] = {
        "rules": [{"action": "FailJob", "onExitCodes": {"operator": "In", "values": [BAD_INPUT]}}]
    }
    job["template"] = {"spec": _pod(s, image, account, label, topology)}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": s.name,
            # All pods of a child job are on one node pool, which is one slice.
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": s.name},
            "failurePolicy": rules,
            "replicatedJobs": [{"name": JOBS, "replicas": s.slices, "template": {"spec": job}}],
        },
    }


def _pod(s: Settings, image: str, account: str, label: str, topology: str) -> dict[str, Any]:
    machine = machines.of(s.type)
    nodes: dict[str, Any] = {
        "cloud.google.com/gke-tpu-accelerator": label,
        "cloud.google.com/gke-tpu-topology": topology,
    }
    spot: dict[str, Any] = {}
    if s.capacity == "spot":
        nodes["cloud.google.com/gke-spot"] = "true"
        spot = {
            "tolerations": [
                {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
            ]
        }
    container = {
        "name": "training",
        "image": image,
        "command": list(_command(s, machine.hosts)),
        "env": _environment(s, machine.hosts),
        "resources": {"limits": {"google.com/tpu": machine.chips // machine.hosts}},
        "volumeMounts": [{"name": "shared-memory", "mountPath": "/dev/shm"}],
    }
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE,
        "serviceAccountName": account,
        "nodeSelector": nodes,
        **spot,
        "containers": [container],
        # Batches come from worker processes through it, and a container has 64 MB of its own.
        "volumes": [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}],
    }


def _environment(s: Settings, hosts: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {"name": "JAX_COORDINATOR_ADDRESS", "value": f"{s.name}-{JOBS}-0-0.{s.name}:{PORT}"},
        {"name": "JAX_NUM_PROCESSES", "value": str(s.slices * hosts)},
    ]
    if s.slices > 1:
        index = "metadata.labels['jobset.sigs.k8s.io/job-index']"
        found.append({"name": "SLICE", "valueFrom": {"fieldRef": {"fieldPath": index}}})
    return found


def _command(s: Settings, hosts: int) -> Sequence[str]:
    """What a pod runs. Of several slices, a shell adds what Kubernetes can't: the number of a host among all."""
    if s.slices == 1:
        return s.training
    count = f'export JAX_PROCESS_ID=$((SLICE * {hosts} + JOB_COMPLETION_INDEX)); exec "$@"'
    return ("sh", "-c", count, "sh", *s.training)


def yaml(value: Any, indent: str = "") -> Iterator[str]:
    """Lines of YAML of dictionaries, lists, strings, numbers and booleans."""
    if isinstance(value, Mapping):
        for key, below in value.items():
            if isinstance(below, Mapping | list):
                yield f"{indent}{_scalar(key)}:"
                yield from yaml(below, indent + "  ")
            else:
                yield f"{indent}{_scalar(key)}: {_scalar(below)}"
        return
    for below in value:
        first, *rest = (
            list(yaml(below, indent + "  ")) if isinstance(below, Mapping) else [indent + "  " + _scalar(below)]
        )
        yield f"{indent}- {first.strip()}"
        yield from rest


def _scalar(value: str | int | bool) -> str:
    plain = isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _WORDS
    return str(value) if plain else json.dumps(value)
