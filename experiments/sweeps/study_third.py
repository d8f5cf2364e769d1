"""The study's third comparison (docs/study.md): even mini-batches, of a size of each method's own.

Command:   python -m experiments.study compare --comparison=third
Hardware:  2 CPU cores
Time:      33 minutes with the test, two processes at a time beside other work
Result:    experiments/results/study/third/report.md
"""

from experiments.study import protocol

CONFIG = protocol.CONFIG
COMMON = protocol.THIRD.common


def get_sweep():
    return protocol.THIRD.comparison()
