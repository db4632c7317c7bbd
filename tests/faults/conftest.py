"""Fixtures of the fault suite: where a row's figures go, and the programs that its processes share."""

import os

import harness
import pytest
from harness import ROOT

# pytest knows one module `conftest`: what other tests import from tests/conftest.py is found here too.
__all__ = ["ROOT", "figures", "programs", "whole"]


@pytest.fixture(scope="session", autouse=True)
def programs(tmp_path_factory):
    """One cache of compiled programs for all processes that the tests of a session start."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "programs"
    old = os.environ.setdefault(harness.PROGRAMS, str(folder))
    yield
    if old == str(folder):
        del os.environ[harness.PROGRAMS]


@pytest.fixture
def figures(request):
    """figures("F10", injected=12, detected=12): add to a row of docs/faults.md, where `run.py` asked for that."""

    def record(row, **values):
        harness.record(row, request.node.nodeid, values)

    return record


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """whole(topology): the workdir of tiny.py's run, left alone; made once a session and topology."""
    made = {}

    def run(topology=harness.T1):
        if topology not in made:
            workdir = tmp_path_factory.mktemp("whole") / topology.name
            with harness.start(workdir, topology) as group:
                assert set(group.wait(300)) == {0}, group
            made[topology] = workdir
        return made[topology]

    return run
