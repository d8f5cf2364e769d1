"""Sweeps: a file each, with one `get_sweep()`."""
