"""Learning rates of the study (docs/study.md): every method, four rates, a seed of its own.

Command:   python -m experiments.study tune
Hardware:  2 CPU cores
"""

from experiments.search import grid
from experiments.study import protocol

CONFIG = protocol.CONFIG
COMMON = protocol.COMMON


def get_sweep():
    points = grid(
        {"seed": protocol.TUNING_SEEDS, "optimizer.learning_rate": protocol.LEARNING_RATES}
    )
    every = [method | point for point in points for method in protocol.METHODS.values()]
    return every + [
        protocol.METHODS[name] | {"seed": seed, "optimizer.learning_rate": rate}
        for name, rates in protocol.FURTHER_RATES.items()
        for rate in rates
        for seed in protocol.TUNING_SEEDS
    ]
