"""Commands (`python -m experiments.NAME`), configurations and sweeps."""
