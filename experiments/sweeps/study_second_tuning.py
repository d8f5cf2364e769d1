"""Learning rates of the study's second comparison (docs/study.md), on seeds of their own.

Command:   python -m experiments.study tune --comparison=second
Hardware:  2 CPU cores
Time:      9 minutes, two processes at a time (a core each)
Result:    experiments/results/study/second/report.md
"""

from experiments.study import protocol

CONFIG = protocol.CONFIG
COMMON = protocol.SECOND.common


def get_sweep():
    return protocol.SECOND.tuning()
