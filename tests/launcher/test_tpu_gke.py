"""The JobSet: what each pod of it would see puts it in its place, and what it asks of GKE is what the type has."""

import argparse
import json
import subprocess
from pathlib import Path

import pytest

from flaxmodels.runtime import cluster, exits
from tpu import gke, machines, settings
from tpu.gcloud import Cloud

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parent.parent.parent
TYPES = ("v5litepod-1", "v5litepod-4", "v5litepod-8", "v5litepod-16", "v6e-8", "v6e-16", "v5p-8", "v5p-32", "v4-32")
PLACES = [(type, slices) for type in TYPES for slices in (1, 2) if slices == 1 or machines.of(type).hosts > 1]


def made(**given):
    said = {"name": "a", "project": "p", "zones": ("us-west4-a",), "type": "v5litepod-16", "bucket": "gs://b"} | given
    return settings.Settings(**said)


def jobset(s):
    return yaml.safe_load(gke.manifest(s, gke.image(s)))


def pod_spec(found):
    return found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def pods(s, found):
    """Of each pod of a JobSet: (its name in the network, its environment), as JobSet and Kubernetes make them."""
    name, network = found["metadata"]["name"], found["spec"]["network"]
    (jobs,) = found["spec"]["replicatedJobs"]
    (container,) = pod_spec(found)["containers"]
    for job in range(jobs["replicas"]):
        for index in range(jobs["template"]["spec"]["completions"]):
            labels = {"metadata.labels['jobset.sigs.k8s.io/job-index']": str(job)}
            env = {
                each["name"]: each["value"] if "value" in each else labels[each["valueFrom"]["fieldRef"]["fieldPath"]]
                for each in container["env"]
            }
            host = f"{name}-{jobs['name']}-{job}-{index}.{network['subdomain']}"
            yield host, ran(container["command"], env | {"JOB_COMPLETION_INDEX": str(index)})


def ran(command, env):
    """The environment that the training itself has, whose command `env` stands for."""
    if command[0] != "sh":
        return env
    printed = [*command[: command.index("python")], "env"]
    done = subprocess.run(printed, env={"PATH": "/usr/bin:/bin", **env}, capture_output=True, text=True, check=True)
    return dict(line.split("=", 1) for line in done.stdout.splitlines())


@pytest.mark.parametrize(("type", "slices"), PLACES)
def test_every_pod_finds_its_place(type, slices):
    s = made(type=type, slices=slices)
    found = jobset(s)
    machine = machines.of(type)
    told = list(pods(s, found))
    places = [cluster.find(env) for _, env in told]
    if len(told) == 1:
        assert places == [None]  # alone
        return
    assert [place.process for place in places] == list(range(slices * machine.hosts))
    assert {place.processes for place in places} == {slices * machine.hosts}
    assert {place.address for place in places} == {f"{told[0][0]}:{gke.PORT}"}


@pytest.mark.parametrize("type", TYPES)
def test_asks_for_all_chips_of_the_type(type):
    machine = machines.of(type)
    slices = 3 if machine.hosts > 1 else 1
    s = made(type=type, slices=slices)
    found = jobset(s)
    (jobs,) = found["spec"]["replicatedJobs"]
    job = jobs["template"]["spec"]
    (container,) = pod_spec(found)["containers"]
    assert (jobs["replicas"], job["parallelism"], job["completions"]) == (slices, machine.hosts, machine.hosts)
    assert container["resources"]["limits"]["google.com/tpu"] * machine.hosts == machine.chips
    nodes = pod_spec(found)["nodeSelector"]
    assert nodes["cloud.google.com/gke-tpu-topology"] == machine.topology.partition(":")[2]
    assert nodes["cloud.google.com/gke-tpu-accelerator"].startswith("tpu-v" + machine.chip[1])
    assert container["command"][-len(s.training) :] == list(s.training)


def test_names_reach_all_ports_and_only_indexed_jobs():
    found = jobset(made())
    job = found["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert found["spec"]["network"] == {"enableDNSHostnames": True, "subdomain": "a"}
    assert (job["completionMode"], job["backoffLimit"]) == ("Indexed", 0)
    assert pod_spec(found)["restartPolicy"] == "Never"  # what a pod failure policy needs
    assert not pod_spec(found).get("hostNetwork")  # with which a pod is not who its service account says


def test_bad_input_and_a_limit_end_it_and_all_else_restarts():
    found = jobset(made(max_hours=1.5))
    job = found["spec"]["replicatedJobs"][0]["template"]["spec"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule == {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [exits.BAD_INPUT]}}
    (of_all,) = found["spec"]["failurePolicy"]["rules"]
    assert of_all == {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy", "DeadlineExceeded"]}
    assert found["spec"]["failurePolicy"]["maxRestarts"] > 0
    assert job["activeDeadlineSeconds"] == 5400
    assert "activeDeadlineSeconds" not in gke.manifest(made(), "i")


def test_spot_is_asked_for_and_tolerated():
    spot, own = jobset(made()), jobset(made(capacity="reserved"))
    assert pod_spec(spot)["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert pod_spec(spot)["tolerations"][0]["key"] == "cloud.google.com/gke-spot"
    assert "spot" not in json.dumps(own)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"bucket": "/data"}, "gs://BUCKET"),
        ({"name": "a" * 41}, "at most 40"),
        ({"type": "v5litepod-17"}, "v5litepod-16"),
        ({"zones": ()}, "--image is missing"),
        ({"type": "v6e-8", "slices": 2}, "several hosts"),
    ],
)
def test_what_can_not_be_is_refused(given, said):
    with pytest.raises(settings.UserError, match=said):
        jobset(made(**given))


def verb(s, tmp_path, capsys, *words, dry_run=False):
    parser = argparse.ArgumentParser()
    gke.add_flags(parser)
    assert gke.gke(s, Cloud(dry_run), parser.parse_args(words)) == 0
    return capsys.readouterr().out


def test_verb_writes_it_and_a_dry_run_prints_the_same(tmp_path, capsys):
    s = made(state=tmp_path, max_cost=5.0)
    printed = verb(s, tmp_path, capsys, "--account=trainer", dry_run=True)
    assert not list(tmp_path.iterdir())
    said = verb(s, tmp_path, capsys, "--account=trainer")
    assert "kubectl apply" in said
    assert "max_cost=5 does not count" in said
    assert (tmp_path / "a" / "jobset.yaml").read_text() == printed
    assert pod_spec(yaml.safe_load(printed))["serviceAccountName"] == "trainer"
    verb(s, tmp_path, capsys, f"--to={tmp_path / 'b.yaml'}", "--image=other")
    assert pod_spec(yaml.safe_load((tmp_path / "b.yaml").read_text()))["containers"][0]["image"] == "other"


@pytest.mark.parametrize(
    "value", ["true", "No", "1", "1e3", "a: b", "#x", "- a", "'", '"', "é", "", "a\nb", "~", "=", "x"]
)
def test_strings_stay_strings(value):
    assert yaml.safe_load("\n".join(gke.yaml({"k": value, "l": [value, {"m": value}]}))) == {
        "k": value,
        "l": [value, {"m": value}],
    }


def test_container_has_what_the_manifest_runs():
    text = (ROOT / "tpu/gke/Dockerfile").read_text()
    for line in text.splitlines():
        if line.startswith("COPY ") and not line.startswith("COPY . "):
            assert (ROOT / line.split()[1]).exists(), line
    (installed,) = (word.strip('"') for word in text.split() if "[tpu" in word)
    assert installed.partition("=")[2].strip('"') == settings.Settings(name="a").install[-1]
