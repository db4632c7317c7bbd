"""Buckets of the fake cloud: its `gcloud storage` does and says what Google's does, which the launcher understands."""

import pytest
from fake import hosts, store
from faults import harness

from tpu import gcloud as commands
from tpu import logs, meaning, steps
from tpu.processes import Done
from tpu.settings import Settings

LOGS = "gs://bucket/a/logs"
OBJECTS = {
    "a/checkpoints/12/params/0": b"not committed",
    "a/checkpoints/4/MANIFEST.json": b"{}",
    "a/checkpoints/8/MANIFEST.json": b"{}",
    "a/checkpoints/8/params/0": b"8",
    "a/logs/attempt-12/worker-0.log": b"of 12\n",
    "a/logs/attempt-12/worker-1.log": b"of 12, too\n",
    "a/logs/attempt-3/worker-0.log": b"of 3\n",
    "a/logs/host-0000.log": b"of the training\n",
    "ab.txt": b"ab",
}


@pytest.fixture
def there(bucket, fake_cloud, monkeypatch):
    """The server, with objects; commands of this process and of the laptop find it."""
    for name, data in OBJECTS.items():
        bucket.put("bucket", name, data)
    for name, value in {**bucket.environment(), "PATH": fake_cloud.env["PATH"]}.items():
        monkeypatch.setenv(name, value)
    fake_cloud.env.update(bucket.environment())
    return bucket


@pytest.fixture
def ls(gcloud, there):
    """ls(word): (exit code, lines, standard error)."""

    def run(*words):
        code, out, err = gcloud("storage", "ls", *words)
        return code, out.splitlines(), err

    return run


@pytest.fixture
def cp(gcloud, there):
    """cp(words): (exit code, standard error)."""

    def run(*words):
        code, out, err = gcloud("storage", "cp", *map(str, words))
        assert out == ""
        return code, err

    return run


@pytest.mark.parametrize("page", [100, 1])
@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("gs://bucket", ["ab.txt", "a/"]),
        ("gs://bucket/", ["ab.txt", "a/"]),
        (f"{LOGS}/", ["a/logs/host-0000.log", "a/logs/attempt-12/", "a/logs/attempt-3/"]),
        (LOGS, ["a/logs/host-0000.log", "a/logs/attempt-12/", "a/logs/attempt-3/"]),
        (f"{LOGS}/host-0000.log", ["a/logs/host-0000.log"]),
        (f"{LOGS}/*-0000.???", ["a/logs/host-0000.log"]),
        (f"{LOGS}/attempt-[0-9]", ["a/logs/attempt-3/worker-0.log"]),  # the one folder's content
        ("gs://bucket/*/*/*-3/*", ["a/logs/attempt-3/worker-0.log"]),
        ("gs://bucket/a/checkpoints/*/MANIFEST.json", [name for name in OBJECTS if name.endswith("/MANIFEST.json")]),
    ],
)  # fmt: skip
def test_a_listing_has_objects_and_folders(ls, there, pattern, found, page):
    there.page = page
    code, lines, err = ls(pattern)
    assert (code, err) == (0, "")
    if page == 1:  # objects come before folders on each page
        lines, found = sorted(lines), sorted(found)
    assert lines == [f"gs://bucket/{name}" for name in found]


def test_several_folders_are_listed_one_by_one(ls):
    rows = ["gs://bucket/ab.txt", "", "gs://bucket/a/:", "gs://bucket/a/checkpoints/", "gs://bucket/a/logs/"]
    assert ls("gs://bucket/a*") == (0, rows, "")
    _, lines, _ = ls(f"{LOGS}/attempt-*")
    assert lines[:2] == [f"{LOGS}/attempt-12/:", f"{LOGS}/attempt-12/worker-0.log"] and lines[-1].endswith(
        "-3/worker-0.log"
    )


def test_an_object_is_not_taken_for_the_folder_of_its_name(ls, there):
    there.put("bucket", "a/logs/attempt-3", b"")
    assert ls(f"{LOGS}/attempt-3") == (0, [f"{LOGS}/attempt-3"], "")
    assert ls(f"{LOGS}/attempt-3/") == (0, [f"{LOGS}/attempt-3/worker-0.log"], "")


@pytest.mark.parametrize(
    ("word", "said"),
    [
        (f"{LOGS}/attempt-4/", "One or more URLs matched no objects."),
        ("gs://bucket/a/*.log", "One or more URLs matched no objects."),  # "*" does not cross "/"
        ("gs://bucket/ab.txt/", "One or more URLs matched no objects."),
        ("gs://bucket/b/checkpoints/*/MANIFEST.json", "One or more URLs matched no objects."),
        ("gs://nobodys/a/", "gs://nobodys not found: 404."),
        ("folder", "Ls only works for cloud URLs. Error for: folder"),
    ],
)
def test_a_listing_that_finds_nothing_says_so(ls, word, said):
    assert ls(word) == (1, [], f"ERROR: (gcloud.storage.ls) {said}\n")


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("gs://bucket/b/new.log", "b/new.log"),
        ("gs://bucket/b/", "b/file"),
        ("gs://bucket", "file"),
        (LOGS, "a/logs/file"),  # a folder that is there
        ("gs://bucket/a/logs/host-0000.log", "a/logs/host-0000.log"),
    ],
)
def test_a_file_goes_to_an_object(cp, there, tmp_path, target, name):
    (tmp_path / "file").write_bytes(b"data")
    assert cp(tmp_path / "file", target) == (0, f"Copying file://{tmp_path}/file to gs://bucket/{name}\n")
    assert there.objects("bucket") == {**OBJECTS, name: b"data"}


def test_objects_go_to_files(cp, tmp_path):
    assert cp("--no-user-output-enabled", "gs://bucket/ab.txt", tmp_path / "new") == (0, "")
    assert (tmp_path / "new").read_bytes() == b"ab"
    assert cp("gs://bucket/*.txt", f"{LOGS}/host-0000.log", tmp_path)[0] == 0
    assert (tmp_path / "ab.txt").read_bytes() == b"ab" and (tmp_path / "host-0000.log").is_file()


@pytest.mark.parametrize("word", [f"{LOGS}/attempt-12", f"{LOGS}/attempt-12/"])
def test_a_folder_goes_into_one_that_is_there(cp, there, tmp_path, word):
    there.page = 1
    code, err = cp("--recursive", word, tmp_path / "no")
    assert code == 1 and err.endswith(f"Destination URL must name an existing directory. Provided: {tmp_path}/no.\n")
    assert cp("--recursive", word, tmp_path)[0] == 0
    assert {file.name: file.read_text() for file in (tmp_path / "attempt-12").iterdir()} == {
        "worker-0.log": "of 12\n",
        "worker-1.log": "of 12, too\n",
    }


def test_what_is_not_there_is_not_copied(cp, there, tmp_path):
    said = "ERROR: (gcloud.storage.cp) The following URLs matched no objects or files:\n"
    for words in ((f"{LOGS}/attempt-4", tmp_path), ("--recursive", f"{LOGS}/attempt-4", tmp_path), ("no", LOGS)):
        assert cp(*words) == (1, f"{said}{words[-2]}\n")
    code, err = cp(f"{LOGS}/attempt-3", tmp_path)
    assert code == 1 and f"Omitting {LOGS}/attempt-3/ because it is a container" in err and said in err
    code, err = cp("gs://bucket/ab.txt", f"{tmp_path}/no/")
    assert code == 1 and f"if it ends with a delimiter. Provided: {tmp_path}/no/." in err
    (tmp_path / "file").touch()
    assert cp(tmp_path / "file", "gs://nobodys/file") == (
        1,
        "ERROR: (gcloud.storage.cp) gs://nobodys not found: 404.\n",
    )
    assert there.objects("bucket") == OBJECTS and [file.name for file in tmp_path.iterdir() if file.name == "no"] == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("ls",), "a list of all buckets"),
        (("ls", "--recursive", LOGS), "--recursive"),
        (("ls", "gs://bucket/**"), "'**' of 'gs://bucket/**'"),
        (("cat", "gs://bucket/ab.txt"), "`storage cat`"),
        (("cp", "--no-clobber", "file", LOGS), "--no-clobber"),
        (("cp", "file", "other"), "any copy but one between a file and a bucket"),
        (("cp", "gs://bucket/ab.txt", LOGS), "any copy but one between a file and a bucket"),
        (("cp", "--recursive", "folder", LOGS), "an upload of a folder"),
        (("cp", "--recursive", "gs://bucket", "folder"), "a copy of a whole bucket"),
    ],
)
def test_what_the_fake_does_not_do_it_refuses(gcloud, there, words, said):
    code, out, err = gcloud("storage", *words)
    assert (code, out) == (2, "") and f"the fake cloud does not know {said}" in err
    assert there.objects("bucket") == OBJECTS


def test_without_a_server_there_are_no_buckets(gcloud, monkeypatch):
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    code, _, err = gcloud("storage", "ls", "gs://bucket")
    assert code == 2 and "say a folder for --bucket" in err


def test_a_command_on_buckets_is_refused_as_often_as_it_is_told_to(cp, ls, fake_cloud, there, tmp_path):
    fake_cloud.plan(
        {"do": "say", "saying": "bucket", "verb": "storage ls", "nth": 2},
        {"do": "say", "saying": "transient", "verb": "storage cp", "after": True},
    )
    assert [ls(LOGS)[0] for _ in range(3)] == [0, 1, 0]
    (tmp_path / "file").write_text("done all the same")
    assert cp(tmp_path / "file", LOGS)[0] == 1
    assert there.objects("bucket")["a/logs/file"] == b"done all the same"
    assert fake_cloud.ended("storage ls") == [0, 1, 0]


@pytest.mark.parametrize(
    ("what", "said", "kind"),
    [(403, "does not have permission", "permission"), (503, "503", "transient"), ("cut", "Error", "transient")],
)
def test_what_a_server_refuses_means_what_it_does(ls, there, what, said, kind):
    from gcs import fake_gcs

    there.faults.append(fake_gcs.Fault("^GET list", what))
    code, lines, err = ls(LOGS)
    assert (code, lines) == (1, []) and said in err
    assert meaning.error_of(commands.storage("ls", LOGS), Done(code, "", err)).kind == kind


def settings(tmp_path, **others):
    given = {"bucket": "gs://bucket", "state": tmp_path / "state", **others}
    return Settings(name="a", project="p", zones=("us-west4-a",), type="v5litepod-16", **given)


def test_the_launcher_finds_the_newest_step(there, fake_cloud, tmp_path):
    cloud, s = commands.Cloud(echo=lambda line: None), settings(tmp_path)
    assert steps.newest(cloud, s) == 8
    assert steps.newest(cloud, settings(tmp_path, bucket="gs://bucket/none")) == 0
    assert steps.newest(cloud, settings(tmp_path, bucket="gs://nobodys")) is None
    fake_cloud.plan(workdir=s.workdir)
    assert store.newest_step() == 8


def test_the_launcher_finds_the_newest_logs(there, tmp_path):
    cloud, s = commands.Cloud(echo=lambda line: None), settings(tmp_path)
    assert logs.newest(cloud, s) == 12
    assert logs.stored(cloud, s) == {0: "of 12\n", 1: "of 12, too\n"}
    assert sorted(file.name for file in (s.folder / "logs").glob("*/*")) == ["worker-0.log", "worker-1.log"]
    assert logs.stored(cloud, settings(tmp_path / "other", bucket="gs://bucket/none")) == {}
    with pytest.raises(meaning.CloudError, match="buckets create"):
        logs.newest(cloud, settings(tmp_path, bucket="gs://nobodys"))


def test_logs_and_status_of_a_run_that_another_laptop_made(there, fake_cloud, tmp_path):
    flags = ("--name=a", "--project=p", "--zone=us-west4-a", "--type=v5litepod-16", "--bucket=gs://bucket")
    done = fake_cloud.launch("logs", *flags, f"--state={tmp_path}/state")
    assert done.returncode == 0 and done.stdout.splitlines()[-2:] == ["w0 | of 12", "w1 | of 12, too"], done
    done = fake_cloud.launch("status", *flags, f"--state={tmp_path}/state")
    assert "step      8, the newest checkpoint in gs://bucket/a" in done.stdout.splitlines(), done


PLACE = ("--project=p", "--zone=z")
CREATE = ("--accelerator-type=v5litepod-1", "--runtime-version=r", "--node-id=a", "--spot")


@pytest.fixture
def machine(gcloud, there, fake_cloud):
    """Of one host: ssh(command), which finds the same buckets."""
    fake_cloud.plan(host=there.environment())
    queued = ("compute", "tpus", "queued-resources")
    assert gcloud(*queued, "create", "a", *PLACE, *CREATE)[0] == 0
    described = (gcloud(*queued, "describe", "a", *PLACE, "--format=json")[1] for _ in range(20))
    assert any('"state": "ACTIVE"' in one for one in described)
    return lambda command: gcloud("compute", "tpus", "tpu-vm", "ssh", "a", *PLACE, "--worker=0", f"--command={command}")


def test_a_host_has_the_same_gcloud_and_the_same_buckets(machine, there):
    assert machine("echo text >file; gcloud storage cp --quiet file gs://bucket/b/")[0] == 0
    assert there.objects("bucket", "b/") == {"b/file": b"text\n"}
    assert machine("gcloud storage ls gs://bucket/b")[:2] == (0, "gs://bucket/b/file\n")


def test_a_step_in_a_bucket_is_seen_at_once(machine, there, fake_cloud):
    fake_cloud.plan({"do": "preempt", "step": 9}, host=there.environment(), workdir="gs://bucket/a")
    sleeper = "exec -a --workdir=x sleep 1000 >/dev/null 2>&1 & disown"
    assert machine(f"({sleeper})")[0] == 0
    (uid,) = [one["uid"] for one in fake_cloud.state()["resources"].values()]
    assert harness.wait_for(lambda: hosts.training(uid), 60) and fake_cloud.fired() == 0
    there.put("bucket", "a/checkpoints/12/MANIFEST.json", b"{}")
    assert harness.wait_for(lambda: fake_cloud.fired() and not fake_cloud.processes(), 60), fake_cloud.processes()
