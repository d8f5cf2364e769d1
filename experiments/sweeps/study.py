"""The study's comparison (docs/study.md): every method at its learning rate, five seeds.

Command:   python -m experiments.study compare
Hardware:  2 CPU cores
Time:      44 minutes for 50 of the 55 runs with the test, two processes at a time (a core each)
Result:    experiments/results/study/report.md
"""

from experiments.study import protocol

CONFIG = protocol.CONFIG
COMMON = protocol.COMMON


def get_sweep():
    # The method varies faster: a sweep that is stopped has compared all methods on fewer seeds.
    return [
        method | {"optimizer.learning_rate": protocol.CHOSEN[name], "seed": seed}
        for seed in protocol.SEEDS
        for name, method in protocol.METHODS.items()
    ]
