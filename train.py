"""Train a config: python train.py --config=configs/digits_mlp.py [--workdir=DIR] [--config.KEY=VALUE ...].

The same command again resumes. Exit codes: 0 done, 2 bad input, 130 and 143 stopped by Ctrl-C or SIGTERM after saving.
"""

import sys

from flaxmodels.runtime import exits


def main(argv: list[str]) -> int:
    """Flags -> config -> fit. Returns the exit code."""
    with exits.importing():
        from flaxmodels import config, loop

    flags = config.parse(config.train_parser("train.py"), argv)
    return loop.fit(
        flags.config,
        flags.workdir,
        allow_config_change=flags.arguments.allow_config_change,
        allow_data_change=flags.arguments.allow_data_change,
    ).exit_code


if __name__ == "__main__":
    sys.exit(exits.reported(lambda: main(sys.argv[1:]), debug="--debug" in sys.argv))
