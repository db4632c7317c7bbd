"""Stands for the command `flaxmodels`, which says that all is well."""

import sys


def main():
    """What `doctor` says."""
    print(f"{sys.argv[1]}: all is well")
    return 0
