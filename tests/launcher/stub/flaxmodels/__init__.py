"""Stands for the library, where a worker only asks whether it is there."""
