"""Fixtures of the launcher's tests: a cloud that ends with its test, its `gcloud`, and its buckets."""

import os

import pytest
from cloud import ROOT, Cloud
from faults import harness

# pytest knows one module `conftest`: what other tests import from tests/conftest.py is found here too.
__all__ = ["ROOT", "bucket", "cloud", "fake_cloud", "gcloud", "programs"]


@pytest.fixture
def cloud(tmp_path):
    """A cloud in a folder; at the end nothing of it runs, whatever the test did."""
    made = Cloud.at(tmp_path)
    yield made
    made.close()


@pytest.fixture
def fake_cloud(cloud, monkeypatch):
    """The same, whose state the modules of `fake` read in this process."""
    monkeypatch.setenv("FAKE_CLOUD", str(cloud.folder))
    monkeypatch.setenv("FAKE_PYTHON", os.environ.get("FAKE_PYTHON", cloud.env["FAKE_PYTHON"]))
    return cloud


@pytest.fixture
def gcloud(fake_cloud, capfd):
    """gcloud(words): (exit code, standard output, standard error), in this process."""
    from fake import service

    def run(*words):
        capfd.readouterr()
        code = service.main(list(words))
        return (code, *capfd.readouterr())

    return run


@pytest.fixture
def bucket():
    """A server with a bucket "bucket", of an account that may use its objects and not look at the bucket itself."""
    pytest.importorskip("gcsfs", reason="the extra gcs is not installed")
    from gcs import fake_gcs

    with fake_gcs.serving("bucket") as server:
        server.faults[:] = [fake_gcs.Fault("^GET bucket", 403)]
        yield server


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    """Variables of the hosts that really train: what one has compiled, the next one reads."""
    base = tmp_path_factory.getbasetemp()
    old = os.environ.setdefault(harness.PROGRAMS, str(base / "programs"))
    environment = harness.environment(harness.T2x4)
    shared = {key: environment[key] for key in environment if key.startswith(("JAX_COMPILATION", "JAX_PERSISTENT"))}
    yield {**shared, "FLAXMODELS_COPY_SECONDS": "1"}
    if old == str(base / "programs"):
        del os.environ[harness.PROGRAMS]
