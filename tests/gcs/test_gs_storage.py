"""Paths in a bucket, what is moved and deleted there, and what is said where that can't be."""

import hashlib

import pytest
from fake_gcs import Fault

from flaxmodels import buckets, disk, manifest, storage
from flaxmodels.registry import UserError

# Google's client leaves a connection that failed to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.mark.parametrize(
    "text",
    [
        "gs://",
        "gs://bucket",
        "gs://bucket/",
        "gs:///run",
        "gs://bucket/a/../b",
        "s3://b/run",
        "gs://b/run[1]",
        "gs://b/a*/c",
    ],
)
def test_what_names_no_place_is_refused(text):
    with pytest.raises(UserError, match=r"gs://BUCKET/NAME"):
        storage.place(text)


def test_a_folder_stays_what_it_is(tmp_path):
    assert type(storage.place(str(tmp_path))) is type(tmp_path) and not storage.is_object(tmp_path)
    assert storage.place(tmp_path) is not None and storage.local("~", "--to").is_absolute()


def test_what_is_only_written_to_folders_refuses_a_bucket():
    with pytest.raises(UserError, match=r"--to='gs://bucket/x': .*folder of this machine"):
        storage.local("gs://bucket/x", "--to")


def test_a_path_in_a_bucket_is_a_path(workdir):
    assert storage.is_object(workdir) and storage.place(str(workdir)) == workdir and hash(workdir)
    inside = workdir / "a" / "b.txt"
    assert str(inside) == f"{workdir}/a/b.txt" and inside.parent == workdir / "a" and inside.suffix == ".txt"
    assert inside.relative_to(workdir).as_posix() == "a/b.txt" and inside.absolute() == inside.expanduser() == inside
    assert (inside.bucket, inside.key) == ("bucket", f"{workdir.name}/a/b.txt")


def test_reading_and_writing(workdir, cloud):
    assert not workdir.exists() and list(workdir.iterdir()) == []
    (workdir / "a" / "b.txt").write_text("hällo")
    storage.write(workdir / "c", b"12")
    assert (workdir / "a" / "b.txt").read_text() == "hällo" and (workdir / "c").stat().st_size == 2
    assert workdir.is_dir() and not workdir.is_file() and (workdir / "c").is_file() and not (workdir / "c").is_dir()
    assert [path.name for path in workdir.iterdir()] == ["a", "c"]
    assert storage.sizes(workdir) == {"a/b.txt": 6, "c": 2}
    assert (workdir / "c").sha256() == {"size": 2, "sha256": hashlib.sha256(b"12").hexdigest()}
    assert not (workdir / "ab").exists()  # "a" is no folder's name because another begins with it
    (workdir / "c").unlink()
    (workdir / "c").unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        (workdir / "c").unlink()
    with pytest.raises(FileNotFoundError):
        (workdir / "c").read_bytes()
    assert cloud.objects("bucket", workdir.name) == {f"{workdir.name}/a/b.txt": "hällo".encode()}


def test_a_listing_of_several_pages(workdir, cloud):
    for i in range(cloud.page + 7):
        cloud.put("bucket", f"{workdir.name}/many/{i:03}/x", b"1")
        cloud.put("bucket", f"{workdir.name}/many/{i:03}/y", b"22")
    assert len(list((workdir / "many").iterdir())) == cloud.page + 7
    assert len(storage.sizes(workdir)) == 2 * cloud.page + 14
    assert [path.parent.name for path in (workdir / "many").glob("00*/x")] == [f"{i:03}" for i in range(10)]


def test_a_write_can_be_bound_to_what_is_there(workdir):
    file = workdir / "one"
    first = file.write_bytes(b"1", generation=0)
    for other in (0, first - 1):
        with pytest.raises(FileExistsError):
            file.write_bytes(b"2", generation=other)
    second = file.write_bytes(b"3", generation=first)
    with pytest.raises(FileExistsError):
        file.unlink(generation=first)
    assert file.read() == (b"3", second)
    file.unlink(generation=second)
    assert not file.exists()


@pytest.mark.parametrize("what", [503, 429, "cut"])
def test_a_storage_that_is_busy_is_asked_again(workdir, cloud, what, hasty):
    cloud.faults.append(Fault(f"write {workdir.name}", what, times=2))
    (workdir / "one").write_bytes(b"1")
    cloud.faults.append(Fault(f"(read|list|delete) {workdir.name}", 503, times=2))
    assert (workdir / "one").read_bytes() == b"1" and storage.sizes(workdir) == {"one": 1}
    (workdir / "one").unlink()
    assert not cloud.objects("bucket", workdir.name)


def test_a_read_that_is_cut_off_goes_on(workdir, cloud, hasty):
    data = bytes(range(256)) * 5000
    (workdir / "one").write_bytes(data)
    described = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    for read, right in (("read_bytes", data), ("sha256", described)):
        cloud.faults.append(Fault("read .*/one", "half", times=2))
        assert getattr(workdir / "one", read)() == right and cloud.faults[-1].times == 0


def test_what_is_said_where_it_does_not_answer(workdir, cloud, impatient):
    cloud.faults.append(Fault(workdir.name, 503))
    with pytest.raises(OSError, match="does not answer as it should") as caught:
        (workdir / "one").write_bytes(b"1")
    assert caught.value.strerror.startswith("gs://bucket does not answer") and not isinstance(caught.value, UserError)


@pytest.mark.parametrize("do", ["exists", "read_bytes", "write_bytes"])
def test_a_bucket_that_is_not_there_and_one_that_is_not_ours(workdir, cloud, do):
    arguments = [b"1"] if do == "write_bytes" else []
    with pytest.raises(UserError, match=r"gs://missing does not exist.*gcloud storage buckets create gs://missing"):
        getattr(storage.place("gs://missing/run"), do)(*arguments)
    cloud.faults.append(Fault(workdir.name, 403))
    with pytest.raises(UserError, match=r"may not do that in gs://bucket .*add-iam-policy-binding") as caught:
        getattr(workdir, do)(*arguments)
    assert isinstance(caught.value, OSError) and caught.value.strerror == str(caught.value)


def test_without_the_extra_it_says_what_to_install(workdir, monkeypatch):
    monkeypatch.setattr(buckets, "NEEDED", ("gcsfs", "no_such_module.inside"))
    monkeypatch.setattr(buckets, "_client", buckets._client.__wrapped__)
    with pytest.raises(UserError, match=r"needs no_such_module.inside, .*pip install -e '\.\[gcs\]'"):
        workdir.exists()


def test_without_credentials_it_says_how_to_get_some(workdir, monkeypatch):
    from google.auth import exceptions

    def default(scopes):
        raise exceptions.DefaultCredentialsError("none")

    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    monkeypatch.setattr("google.auth.default", default)
    monkeypatch.setattr(buckets, "_client", buckets._client.__wrapped__)
    with pytest.raises(UserError, match="gcloud auth application-default login"):
        workdir.exists()


def steps(workdir, *numbers):
    """Committed steps of a few objects each; one stands before the manifest in every listing."""
    for number in numbers:
        for name in ("0", "a", "b/c", "d"):
            (workdir / str(number) / name).write_bytes(f"{number} {name}".encode())
        manifest.write(workdir / str(number), {"step": number})


def test_a_manifest_describes_what_is_in_the_bucket(workdir, cloud):
    steps(workdir, 4)
    writes = [request for request in cloud.requests if " write " in request]
    assert writes[-1].endswith("/4/MANIFEST.json") and sum("MANIFEST" in write for write in writes) == 1
    assert manifest.read(workdir / "4") == {"step": 4} and manifest.verify(workdir / "4") == []
    name = f"{workdir.name}/4/b/c"
    cloud.put("bucket", name, b"5 b/c")
    assert manifest.verify(workdir / "4") == ["b/c is damaged: its SHA-256 is another one"]
    cloud.put("bucket", name, b"4 b")
    assert manifest.verify(workdir / "4") == ["b/c has 3 bytes, 5 were written"]
    cloud.delete("bucket", name)
    cloud.put("bucket", f"{name}2", b"")
    assert manifest.verify(workdir / "4") == ["b/c is missing", "b/c2 was not there when it was written"]
    manifest.amend(workdir / "4", {"step": 5})
    assert manifest.read(workdir / "4") == {"step": 5}


def test_shares_of_a_verification_are_all_of_it(workdir, cloud):
    steps(workdir, 4)
    for name in ("a", "b/c", "d"):
        cloud.put("bucket", f"{workdir.name}/4/{name}", b"?")
    found = [manifest.verify(workdir / "4", part, 2) for part in range(2)]
    assert sorted([*found[0], *found[1]]) == sorted(manifest.verify(workdir / "4")) and all(found)


def test_a_bucket_that_does_not_answer_says_nothing_of_a_step(workdir, cloud):
    steps(workdir, 4)
    cloud.faults.append(Fault(f"read {workdir.name}/4/a", 403))
    with pytest.raises(OSError, match="may not do that"):
        manifest.verify(workdir / "4")


def cut_at_each_request(cloud, act, found):
    """`act` again and again, all requests that change something failing from the first, the second, ... on."""
    for moment in range(100):
        prepared = found()
        cloud.faults.append(cut := Fault(r"^(POST|DELETE) ", 403, times=0))
        cloud.requests.clear()
        count = 0

        def struck(request, struck=cloud.struck, moment=moment, cut=cut):
            nonlocal count
            if request.startswith(("POST ", "DELETE ")) and "/batch" not in request:
                count += 1
                cut.times = 10**9 if count > moment else 0
            return struck(request)

        cloud.struck = struck
        try:
            act(prepared)
        except OSError:
            pass
        finally:
            del cloud.struck
            cloud.faults.remove(cut)
        yield prepared
        if count <= moment:
            return
    raise AssertionError("it never came to its end")


@pytest.mark.slow
def test_deleting_cut_off_anywhere_leaves_whole_steps_only(workdir, cloud):
    number = iter(range(1000))

    def prepared():
        folder = workdir / str(next(number))
        steps(folder, 4, 8, 12)
        return folder

    left = []
    for folder in cut_at_each_request(cloud, lambda folder: disk.delete(folder, [4, 8]), prepared):
        listed = disk.committed(folder)
        assert [manifest.verify(folder / str(step)) for step in listed] == [[] for _ in listed] and 12 in listed
        disk.tidy(folder)
        assert disk.committed(folder) == listed and not (folder / disk.TRASH).exists()
        assert not (folder / disk.UNCOMMITTED).exists(), "what was being deleted is no save that was cut off"
        left.append(listed)
    assert left[0] == [4, 8, 12] and left[-1] == [12] and [4, 12] in left


@pytest.mark.slow
def test_moving_cut_off_anywhere_leaves_it_whole_at_one_place(workdir, cloud):
    number = iter(range(1000))

    def prepared():
        folder = workdir / str(next(number))
        steps(folder, 4, 8)
        return folder

    for folder in cut_at_each_request(cloud, lambda folder: disk.move(folder / "8", folder / disk.DAMAGED), prepared):
        places = [place for place in (folder / "8", folder / disk.DAMAGED / "8") if manifest.committed(place)]
        assert places and all(manifest.verify(place) == [] for place in places[-1:])
        if disk.committed(folder) == [4, 8]:
            assert manifest.verify(folder / "8") == []
    assert disk.committed(folder) == [4] and not (folder / "8").exists()
    steps(folder, 8)
    assert disk.move(folder / "8", folder / disk.DAMAGED).name == "8.1"


def test_what_was_never_committed_is_set_aside_and_goes_with_the_next_commit(workdir):
    steps(workdir, 4)
    (workdir / "8" / "a").write_bytes(b"half")
    assert disk.committed(workdir) == [4]
    assert disk.tidy(workdir) == ["checkpoint 8 was cut off before it was committed: moved to uncommitted/8"]
    assert disk.tidy(workdir) == [] and (workdir / disk.UNCOMMITTED / "8" / "a").is_file()
    steps(workdir, 8, 12)
    disk.retire(workdir, disk.Retention(2, 0, "min", 0, 0.0))
    assert [path.name for path in workdir.iterdir()] == ["12", "8"]
