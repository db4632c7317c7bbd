"""Train a config: python train.py --config=configs/digits_mlp.py [--workdir=DIR] [--config.KEY=VALUE ...].

On several hosts, the same command on each, with --coordinator_address=HOST:PORT --num_processes=N --process_id=I where
no launcher tells (TPU pods, SLURM and Open MPI do). The same command again resumes. Exit codes: 0 done, 1 a fault,
2 bad input, 75 stuck (a watchdog ended it), 130 and 143 stopped by Ctrl-C or SIGTERM after saving. --max_restarts=N
starts it again after a fault.
"""

import sys

from flaxmodels.runtime import exits, supervisor


def main(argv: list[str]) -> int:
    """Flags -> config -> fit. Returns the exit code."""
    with exits.importing():
        from flaxmodels import config, loop
        from flaxmodels.perf import profile, rescue
        from flaxmodels.runtime import distributed

    flags = config.parse(config.train_parser("train.py"), argv)
    with rescue.offered(flags.config), distributed.joined(flags.arguments, flags.workdir):
        return loop.fit(
            flags.config,
            flags.workdir,
            allow_config_change=flags.arguments.allow_config_change,
            allow_data_change=flags.arguments.allow_data_change,
            profiler=profile.asked(flags.arguments.profile, flags.workdir),
        ).exit_code


if __name__ == "__main__":
    sys.exit(exits.reported(lambda: supervisor.run(main, sys.argv[1:]), debug="--debug" in sys.argv))
