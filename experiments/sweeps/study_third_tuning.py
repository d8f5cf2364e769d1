"""Learning rates of the study's third comparison (docs/study.md), each on two seeds.

Command:   python -m experiments.study tune --comparison=third
Hardware:  2 CPU cores
Time:      18 minutes, two processes at a time beside other work
Result:    experiments/results/study/third/report.md
"""

from experiments.study import protocol

CONFIG = protocol.CONFIG
COMMON = protocol.THIRD.common


def get_sweep():
    return protocol.THIRD.tuning()
