"""Processes: signals, the lock on a workdir, exit codes."""
