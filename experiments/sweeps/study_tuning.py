"""Learning rates of the study (docs/study.md): every method, a grid of rates, seeds of their own.

Command:   python -m experiments.study tune
Hardware:  2 CPU cores
Time:      about 50 minutes, two processes at a time, beside other work
Result:    experiments/results/study/report.md
"""

from experiments.study import protocol

CONFIG = protocol.CONFIG
COMMON = protocol.COMMON


def get_sweep():
    first, second = protocol.TUNING_SEEDS
    points = [(name, rate, first) for rate in protocol.LEARNING_RATES for name in protocol.METHODS]
    points += [(name, rate, first) for name, r in protocol.FURTHER_RATES.items() for rate in r]
    points += [(name, rate, second) for name, r in protocol.CLOSE_RATES.items() for rate in r]
    return [
        protocol.METHODS[name] | {"optimizer.learning_rate": rate, "seed": seed}
        for name, rate, seed in points
    ]
