"""Memory that is freed stays with the process, also what a thread frees; each case is a process of its own."""

import json
import subprocess
import sys

import pytest

from flaxmodels.runtime import heap

# What a step does: allocate, touch and free the same again and again; by itself, or in a thread of XLA's. Up to 32 MiB
# the library keeps by itself what it has seen freed once.
CODE = """
import json, resource, sys, threading
from flaxmodels.runtime import heap
kept, found = "keep" in sys.argv and heap.keep("cpu"), []

def touch():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * (48 * 2**20)
    found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

def steps():
    for _ in range(3):
        touch()

thread = threading.Thread(target=steps)
if "thread" in sys.argv:
    thread.start()
    thread.join()
else:
    steps()
print(json.dumps([kept, found]))
"""


def faults(*words):
    """(whether the library took it, page faults of the first, second and third time)."""
    done = subprocess.run([sys.executable, "-c", CODE, *words], capture_output=True, text=True, timeout=60, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("where", ["main", "thread"])
def test_freed_memory_is_not_faulted_in_again(where):
    kept, (first, *others) = faults("keep", where)
    if not kept:
        pytest.skip("this C library has no mallopt")
    assert first > 10 and max(others) < 5


def test_without_it_all_of_it_is():
    kept, found = faults("main")
    assert not kept and min(found) > 10


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: object())
    assert not heap.keep("cpu")


def test_a_step_of_an_accelerator_takes_no_memory_here():
    assert not heap.keep("tpu")
