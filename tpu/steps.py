"""How far a run is, as its bucket tells."""

from pathlib import Path

from tpu import gcloud
from tpu.gcloud import Cloud
from tpu.settings import Settings

_MANIFEST = "MANIFEST.json"  # the last file of a checkpoint: without it there is none


def newest(cloud: Cloud, s: Settings) -> int | None:
    """The newest checkpoint in the bucket; None where nobody here can tell, 0 where there is none."""
    if not s.workdir.startswith("gs://"):
        folder = Path(s.workdir)
        names = [file.parent.name for file in folder.glob(f"checkpoints/*/{_MANIFEST}")]
        return _newest(names) if folder.is_dir() else None
    done = cloud.run(gcloud.storage("ls", f"{s.workdir}/checkpoints/*/{_MANIFEST}"), quiet=True, check=False)
    if done.code:
        return 0 if "matched no objects" in done.err else None
    return _newest([line.split("/")[-2] for line in done.out.split() if line.endswith(f"/{_MANIFEST}")])


def _newest(names: list[str]) -> int:
    return max((int(name) for name in names if name.isdecimal()), default=0)
