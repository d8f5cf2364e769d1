"""Learning rates of the study's first comparison (docs/study.md), on seeds of their own.

Command:   python -m experiments.study tune
Hardware:  2 CPU cores
Time:      about 50 minutes, two processes at a time, beside other work
Result:    experiments/results/study/report.md
"""

from experiments.study import protocol

CONFIG = protocol.CONFIG
COMMON = protocol.FIRST.common


def get_sweep():
    return protocol.FIRST.tuning()
