"""JAX's folder of compiled programs: what is damaged there is removed, whatever JAX itself would make of it."""

import contextlib
import os
import subprocess
import sys
import time
import zlib
from pathlib import Path

import jax
import pytest

from flaxmodels.runtime import compile_cache

ROOT = Path(__file__).parent.parent


def entry(folder, name, text=b"a program" * 50):
    file = folder / f"{name}-cache"
    file.write_bytes(zlib.compress(text))
    return file


@pytest.fixture
def place(tmp_path):
    """A folder with three sealed entries."""
    for name in "abc":
        entry(tmp_path, name, name.encode() * 100)
    compile_cache.seal(tmp_path)
    assert len(list(tmp_path.iterdir())) == 6 and compile_cache.check(tmp_path) == []
    return tmp_path


def _overwrite(file, data):
    """A second later: the clock of a file system goes in steps, and a test may seal and harm a file within one."""
    file.write_bytes(data)
    found = file.stat()
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns + 10**9))


def _flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    _overwrite(file, data)


def _cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def _empty(file):
    file.write_bytes(b"")


def _replace(file):
    _overwrite(file, file.with_name("b-cache").read_bytes())


def _replace_with_its_seal(file):
    for end in ("", compile_cache.SEAL):
        (file.parent / f"a-cache{end}").write_bytes((file.parent / f"b-cache{end}").read_bytes())


HARMS = (_flip, _cut, _empty, _replace, _replace_with_its_seal)


@pytest.mark.parametrize("harm", HARMS)
def test_an_entry_that_differs_from_its_seal_is_removed(place, harm):
    harm(place / "a-cache")
    (line,) = compile_cache.check(place)
    assert line == f"warning: compiled program a-cache in {place} is not what was written: removed, and compiled again"
    assert sorted(file.name for file in place.glob("*")) == ["b-cache", "b-cache.sha256", "c-cache", "c-cache.sha256"]
    assert compile_cache.check(place) == []


@pytest.mark.parametrize("harm", [_cut, _empty])
def test_an_entry_that_was_never_written_to_its_end_is_removed(tmp_path, harm):
    """A process was killed as JAX wrote it; while it is young, another process may still write it."""
    good, bad = entry(tmp_path, "good"), entry(tmp_path, "bad")
    harm(bad)
    assert compile_cache.check(tmp_path) == [] and bad.exists()
    os.utime(bad, (time.time() - 2 * compile_cache.YOUNG,) * 2)
    (line,) = compile_cache.check(tmp_path)
    assert "bad-cache" in line and "can't be unpacked" in line and not bad.exists()
    _flip(good)
    assert "good-cache" in compile_cache.check(tmp_path)[0]  # it was sealed when it was first seen


def test_what_is_being_written_is_not_sealed(tmp_path):
    file = entry(tmp_path, "a")
    whole = file.read_bytes()
    file.write_bytes(whole[:20])
    compile_cache.seal(tmp_path)
    assert list(tmp_path.iterdir()) == [file]
    file.write_bytes(whole)
    compile_cache.seal(tmp_path)
    assert compile_cache.check(tmp_path) == [] and len(list(tmp_path.iterdir())) == 2


def test_seals_of_what_jax_has_removed_go_too(place):
    (place / "a-cache").unlink()
    compile_cache.seal(place)
    assert len(list(place.iterdir())) == 4


def test_a_folder_that_can_not_be_used_is_left_to_jax(tmp_path):
    assert compile_cache.check(tmp_path / "none") == []
    compile_cache.seal(tmp_path / "none")
    compile_cache.seal(None)


@contextlib.contextmanager
def cache_dir(name, enabled=True):
    keys = ("compilation_cache_dir", "enable_compilation_cache", "persistent_cache_min_compile_time_secs")
    before = {f"jax_{key}": getattr(jax.config, f"jax_{key}") for key in keys}
    jax.config.update("jax_compilation_cache_dir", name)
    jax.config.update("jax_enable_compilation_cache", enabled)
    try:
        yield
    finally:
        for key, value in before.items():
            jax.config.update(key, value)


def test_around_what_is_compiled(tmp_path):
    for name in (None, "gs://bucket/programs"):
        with cache_dir(name), compile_cache.verified() as removed:
            assert removed == [] and compile_cache.folder() is None
    with cache_dir(str(tmp_path)):
        with pytest.raises(ZeroDivisionError), compile_cache.verified() as removed:
            assert removed == []
            entry(tmp_path, "a")
            raise ZeroDivisionError
        _flip(tmp_path / "a-cache")
        with compile_cache.verified() as removed:
            assert len(removed) == 1 and "a-cache" in removed[0]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty cache folder of the user."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    return tmp_path / "flaxmodels" / "compiled"


def kept():
    compile_cache.keep()
    return compile_cache.folder()


def test_a_command_keeps_its_programs_in_a_folder_of_the_users_own(home, monkeypatch):
    with cache_dir(None):
        place = kept()
        assert place.parent == home and place.is_dir() and place.stat().st_mode & 0o777 == 0o700
        assert jax.config.jax_persistent_cache_min_compile_time_secs == compile_cache.WORTH
    with cache_dir(None):
        assert kept() == place
    monkeypatch.setattr(compile_cache, "instructions", lambda: "of another CPU")
    with cache_dir(None):
        assert kept() not in (None, place)


def test_what_the_user_says_of_the_folder_stays(home, monkeypatch):
    for name, enabled in (("/of/mine", True), (None, False)):
        with cache_dir(name, enabled):
            before = jax.config.jax_persistent_cache_min_compile_time_secs
            compile_cache.keep()
            assert jax.config.jax_compilation_cache_dir == name and not home.exists()
            assert jax.config.jax_persistent_cache_min_compile_time_secs == before
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "7")
    with cache_dir(None):
        before = jax.config.jax_persistent_cache_min_compile_time_secs
        assert kept() and jax.config.jax_persistent_cache_min_compile_time_secs == before


def test_a_folder_that_others_can_write_in_is_not_used(home):
    with cache_dir(None):
        place = kept()
    place.chmod(0o770)
    with cache_dir(None):
        assert kept() is None


def test_no_folder_is_no_error(home):
    home.parent.write_text("a file in its place")
    with cache_dir(None):
        assert kept() is None


def test_what_was_used_longest_ago_goes_first(home, monkeypatch):
    with cache_dir(None):
        place = kept()
    now = time.time()
    for name in "abcd":
        entry(place, name)
    compile_cache.seal(place)  # reads them all, which is a use
    for age, name in enumerate("abcd"):
        os.utime(place / f"{name}-cache", (now - age * 100,) * 2)
    os.utime(place / "d-cache", (now + 1, now - 300))  # read since
    size = (place / "a-cache").stat().st_size
    monkeypatch.setattr(compile_cache, "MOST", 2 * size)
    with cache_dir(None):
        assert kept() == place
    assert sorted(file.name for file in place.glob("*-cache")) == ["a-cache", "d-cache"]


PROGRAM = """
import sys
import jax
import jax.numpy as jnp
from flaxmodels.runtime import compile_cache
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
with compile_cache.verified() as removed:
    wanted = jax.jit(lambda x: (x @ x + 1.0).sum())(jnp.ones((8, 8)))
    other = jax.jit(lambda x: (x @ x - 5.0).sum())(jnp.ones((8, 8)))
    print(float(wanted), float(other), len(removed))
"""


@pytest.mark.nightly
def test_programs_in_each_others_place_do_not_run(tmp_path):
    """Bare JAX runs them, and says nothing: other numbers."""

    def run(program):
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=120,
            env={"PATH": "", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu",
                 "JAX_COMPILATION_CACHE_DIR": str(tmp_path)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    def swap():
        one, other = sorted(tmp_path.glob("jit__lambda*-cache"))
        first, second = one.read_bytes(), other.read_bytes()
        one.write_bytes(second)
        other.write_bytes(first)

    right = run(PROGRAM)
    assert right == ["576.0", "192.0", "0"]
    swap()
    assert run(PROGRAM) == ["576.0", "192.0", "2"]
    swap()
    bare = PROGRAM.replace("compile_cache.verified()", "__import__('contextlib').nullcontext([])")
    assert run(bare) == ["192.0", "576.0", "0"]
