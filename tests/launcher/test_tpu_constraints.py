import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tpu import settings

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def pinned():
    lines = (ROOT / "tpu" / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def asked(extras):
    """Requirements of the project with extras, those of its own extras among them."""
    for text in PROJECT["dependencies"] + [text for e in extras for text in PROJECT["optional-dependencies"][e]]:
        one = Requirement(text)
        if one.name == PROJECT["name"]:
            yield from asked(one.extras)
        else:
            yield one


def test_every_requirement_of_a_worker_is_pinned_to_what_the_project_allows(pinned):
    words = settings.Settings("a").install
    (extras,) = re.fullmatch(r"-e \.\[([\w,]+)\]", " ".join(words)).groups()
    for one in asked(extras.split(",")):
        name = re.sub(r"[-_.]+", "-", one.name).lower()
        assert name in pinned, f"{one.name} is not pinned: make constraints.txt again, by the command it begins with"
        assert one.specifier.contains(pinned[name]), f"{one} does not allow {pinned[name]}"
    assert {"jaxlib", "libtpu", "gcsfs"} <= pinned.keys()


def test_a_constraint_is_a_name_and_a_version(pinned):
    for name, version in pinned.items():
        assert re.fullmatch(r"[a-z0-9][a-z0-9-]*", name) and re.fullmatch(r"\d+(\.\d+)*(\.post\d+)?", version)
