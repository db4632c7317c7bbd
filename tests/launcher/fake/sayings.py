"""What gcloud says where something goes wrong, word for word as users have reported it, with where they did.

Each goes to stderr and ends with exit code 1; the fields in braces are filled in.
"""

SAYINGS = {
    # https://github.com/hashicorp/terraform-provider-google/issues/21243 (the text and code 8); its form in gcloud's
    # output, as data, is in a test of PerfKit Benchmarker, cloud_tpu_test.py (testStockout).
    "capacity": """\
Create request issued for: [{name}]
Waiting for operation [projects/{project}/locations/{zone}/operations/operation-{number}] to complete...failed.
ERROR: ({command}) {{
  "code": 8,
  "message": "There is no more capacity in the zone \\"{zone}\\"; you can try in another zone where Cloud TPU Nodes \
are offered (see https://cloud.google.com/tpu/docs/regions) [EID: 0xba393c906974e61]"
}}""",
    # https://github.com/skypilot-org/skypilot/issues/4579
    "reserved": """\
ERROR: ({command}) {{
  "code": 8,
  "message": "Insufficient reserved capacity. Contact customer support to increase your reservation. \
[EID: 0x7adf6d58c08b0aa4]"
}}""",
    # https://github.com/marin-community/marin/issues/3200
    "quota": """\
ERROR: ({command}) HttpError accessing <https://tpu.googleapis.com/v2/projects/{project}/locations/{zone}/\
queuedResources?alt=json&queuedResourceId={name}>: response: <{{'content-type': 'application/json; charset=UTF-8', \
'server': 'ESF', 'status': 429}}>, content <{{
  "error": {{
    "code": 429,
    "message": "Quota limit 'TPUV5sPreemptibleLitepodPerProjectPerZoneForTPUAPI' has been exceeded. Limit: 0 in zone \
{zone}.",
    "status": "RESOURCE_EXHAUSTED"
  }}
}}>""",
    # https://github.com/marin-community/marin/pull/1612
    "quota of the region": """\
ERROR: ({command}) RESOURCE_EXHAUSTED: Quota limit 'TPUV6EPreemptiblePerProjectPerRegionForTPUAPI' has been exceeded. \
Limit: 0 in region {zone}.""",
    # Seen in users' notes of `tpu-vm create`, 2025.
    "permission": """\
ERROR: ({command}) PERMISSION_DENIED: Permission denied on 'locations/{zone}' (or it may not exist). This command is \
authenticated as somebody@example.com which is the active account specified by the [core/account] property.""",
    # https://github.com/substratusai/runbooks/issues/31, for another verb; `name` is the bucket's
    "bucket": """\
ERROR: ({command}) [somebody@example.com] does not have permission to access b instance [{name}] (or it may not \
exist): somebody@example.com does not have storage.objects.list access to the Google Cloud Storage bucket. Permission \
'storage.objects.list' denied on resource (or it may not exist).""",
    # https://cloud.google.com/apis/docs/troubleshooting
    "disabled": """\
ERROR: ({command}) PERMISSION_DENIED: Cloud TPU API has not been used in project {project} before or it is disabled. \
Enable it by visiting https://console.developers.google.com/apis/api/tpu.googleapis.com/overview?project={project} \
then retry.""",
    # https://github.com/skypilot-org/skypilot/issues/129, for a node
    "exists": """\
ERROR: ({command}) ALREADY_EXISTS: Resource 'projects/{project}/locations/{zone}/{kind}/{name}' already exists
- '@type': type.googleapis.com/google.rpc.ResourceInfo
  resourceName: projects/{project}/locations/{zone}/{kind}/{name}""",
    "missing": """\
ERROR: ({command}) NOT_FOUND: Resource 'projects/{project}/locations/{zone}/{kind}/{name}' was not found
- '@type': type.googleapis.com/google.rpc.ResourceInfo
  resourceName: projects/{project}/locations/{zone}/{kind}/{name}""",
    # Reported by users who tried v6e-4 in asia-east1-a, 2026.
    "unknown type": """\
ERROR: ({command}) INVALID_ARGUMENT: Cloud TPU received a bad request. The requested accelerator configuration for \
accelerator type, "{type}", could not be found in the zonal accelerator configurations for "{zone}".; the accelerator \
{type} was not found in zone {zone} [EID: 0xadaada1e50943af6]""",
    # https://docs.cloud.google.com/tpu/docs/reference/rest/v2/projects.locations.queuedResources/delete (`force`)
    "in use": """\
ERROR: ({command}) FAILED_PRECONDITION: Queued resource 'projects/{project}/locations/{zone}/queuedResources/{name}' \
still has nodes, and cannot be deleted in the {state} state.""",
    # https://cloud.google.com/apis/design/errors: 503 and 500
    "transient": "ERROR: ({command}) UNAVAILABLE: The service is currently unavailable.",
    "internal": "ERROR: ({command}) INTERNAL: an internal error has occurred",
    # googlecloudsdk/command_lib/compute/tpus/tpu_vm/exceptions.py of the Google Cloud SDK
    "unusable for ever": 'ERROR: ({command}) This TPU has terminal state "{state}", so it cannot be used anymore.',
    "unusable": 'ERROR: ({command}) This TPU has state "{state}", so it cannot be currently connected to.',
    # googlecloudsdk/command_lib/compute/tpus/tpu_vm/ssh.py: nobody can reach a machine that is not there yet
    "unreachable": "ERROR: ({command}) [/usr/bin/ssh] exited with return code [255].",
}

# What `state.failedData.error` of a queued resource says.
FAILED = {
    "capacity": {"code": 8, "message": "There is no more capacity in the zone"},
    # A user's notes of a v6e-64, 2026: PROVISIONING, SUSPENDING, FAILED within five minutes.
    "internal": {"code": 13, "message": "an internal error has occurred"},
    "quota": {"code": 8, "message": "Quota 'TPUV4sPreemptiblePodPerProjectPerRegionForTPUAPI' exhausted."},
}

# googlecloudsdk/command_lib/compute/tpus/tpu_vm/ssh.py, in the order in which a user sees them.
ATTEMPT = "{verb}: Attempting to connect to worker {worker}..."
SILENT = """\
ssh: connect to host {address} port 22: Connection timed out
Failed to execute command on multiple workers. This may have happened if you have not added your SSH key to your \
ssh-agent using "ssh-add ~/.ssh/google_compute_engine".
Retrying: {verb} command error: [/usr/bin/ssh] exited with return code [255]."""
WORKER_FAILED = "##### Command execution on worker {worker} failed with exit status {code}. Continuing."


def said(kind: str, /, **fields: object) -> str:
    """The text of a saying."""
    return SAYINGS[kind].format(**fields)
