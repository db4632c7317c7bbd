"""Real data for tests, which lie beside the repository and are not part of it."""

from pathlib import Path

import pytest

_FOLDER = Path(__file__).resolve().parents[2] / "shared" / "data"


def shared_data(name: str) -> Path:
    """The folder of one real data set, such as "mnist"; the calling test is skipped where it is absent."""
    folder = _FOLDER / name
    if not folder.is_dir():
        pytest.skip(f"needs real data that is not here: {folder}")
    return folder
