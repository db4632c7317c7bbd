"""One cloud for the tests of this folder, which all have a workdir of their own in its bucket."""

import gc
import os
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]  # pytest knows one module `conftest`: other tests import it from there


@pytest.fixture(scope="module")
def _serving(tmp_path_factory):
    pytest.importorskip("gcsfs", reason="the extra gcs is not installed")
    import fake_gcs

    with fake_gcs.serving("bucket") as cloud:
        given = {**cloud.environment(), "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache"))}
        before = {name: os.environ.get(name) for name in given}
        os.environ.update(given)
        yield cloud
        _forget()
        for name, old in before.items():
            os.environ.pop(name) if old is None else os.environ.update({name: old})


def _forget():
    """Let go of all connections: what the clients leave to the garbage collector would warn in other tests."""
    import fsspec
    from etils.epath import backend

    from flaxmodels import buckets

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        buckets._client().close()
        buckets._client.cache_clear()
        backend.fsspec_backend._get_filesystem.cache_clear()
        fsspec.get_filesystem_class("gcs").clear_instance_cache()
        gc.collect()


@pytest.fixture
def cloud(_serving):
    """A bucket "bucket" that forgets between tests what was planted and asked."""
    import fake_gcs

    # An account that may use all objects, roles/storage.objectUser, may not look at the bucket itself.
    _serving.faults[:] = [fake_gcs.Fault("^GET bucket", 403)]
    _serving.requests.clear()
    yield _serving
    _serving.faults.clear()


@pytest.fixture
def workdir(cloud, request):
    """A place of this test's own."""
    from flaxmodels import storage

    return storage.place(f"gs://bucket/{request.node.name.replace('[', '_').replace(']', '')}")


@pytest.fixture
def hasty(monkeypatch):
    """Requests are made again at once."""
    from flaxmodels import buckets

    monkeypatch.setattr(buckets, "FIRST", 0.001)
    buckets._retry.cache_clear()
    yield
    buckets._retry.cache_clear()


@pytest.fixture
def impatient(hasty, monkeypatch):
    """Requests are made again at once, and for a moment only: for tests in which no answer comes."""
    from flaxmodels import buckets

    monkeypatch.setattr(buckets, "PATIENCE", 0.2)
    buckets._retry.cache_clear()
    yield
    buckets._retry.cache_clear()
