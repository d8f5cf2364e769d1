"""Learning rate and warm-up of the default run by random search: 8 points, 2 seeds, 16 runs.

Command:   python -m experiments.sweep --config=experiments/sweeps/learning_rate.py
Hardware:  2 CPU cores
Time:      not measured yet; one run takes 1 min 30 s
Result:    not measured yet

With a larger first argument of `random_search` the points that have run are kept.
"""

from experiments.search import choice, grid, log_uniform, random_search

CONFIG = "experiments/configs/attnrl_graph.py"


def get_sweep():
    points = random_search(
        8,
        seed=0,
        settings={
            "optimizer.learning_rate": log_uniform(3e-5, 3e-3, digits=2),
            "optimizer.warmup_updates": choice([0, 5, 10]),
        },
    )
    return [seed | point for seed in grid(seed=range(2)) for point in points]
