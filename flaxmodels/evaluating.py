"""Evaluate what a run has saved, on the whole evaluation split."""

import contextlib
from pathlib import Path

from flaxmodels import basis, optim, registry, resume, storage, together
from flaxmodels.evaluate import evaluate
from flaxmodels.job import Job
from flaxmodels.registry import UserError
from flaxmodels.run import open_checkpoints
from flaxmodels.runtime import peers


def evaluate_checkpoint(
    job: Job, workdir: str | Path, which: str = "best", *, allow_data_change: bool = False
) -> tuple[int, dict[str, float], float]:
    """Evaluate a checkpoint on the whole evaluation split, with the averaged parameters where there are some.

    Args:
      job: of the config that the workdir was trained with.
      workdir: of a run; only read.
      which: "best", "latest", or a step.
      allow_data_change: evaluate on other data than those that the workdir was trained with.

    Returns:
      (step, metrics, the weight that counted).

    Raises:
      UserError: there is no such checkpoint, or it does not fit the config.
    """
    workdir = storage.place(workdir)
    folder = workdir / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"--workdir={str(workdir)!r} has no checkpoints: train first, or name the workdir of a run.")
    with contextlib.closing(open_checkpoints(job, workdir, read_only=True)) as checkpoints:
        steps = checkpoints.steps()
        named = {"best": checkpoints.best() or checkpoints.latest(), "latest": checkpoints.latest()}
        step = named.get(which, int(which) if which.isdecimal() else None)
        if step is None or step not in steps:
            known = [*named, *map(str, steps)]
            raise UserError(f"--step={which!r} is not in {str(folder)!r}. {registry.suggest(which, known)}")
        changes = resume.data_changes(job, checkpoints.meta(step), resume.EVALUATED)
        if changes and not allow_data_change:
            raise UserError(
                f"data {job.source.name!r} is not what the workdir was trained with: {changes}. "
                "Restore the data, or evaluate on these with --allow_data_change."
            )
        peers.compare({"checkpoint": {"--step": step}})
        lowered, names = job.lower_eval()
        together.same_programs(job, {"of the evaluation": lowered})
        state = basis.restored(checkpoints, step, job.abstract, job.origin)
    params = optim.parameters_average(state.opt_state, state.params)
    return step, *evaluate(lowered.compile(), params, state.extra, job.test.evaluation(), names)
