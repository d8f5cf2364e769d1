"""Training: state, rounds of generation, rows, update, the loop, checkpoints, guards."""
