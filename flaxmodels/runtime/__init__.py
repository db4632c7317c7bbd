"""Processes: several of one run, signals, the lock on a workdir, exit codes."""
