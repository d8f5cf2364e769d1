"""The study's first comparison (docs/study.md): every method at its learning rate, five seeds.

Command:   python -m experiments.study compare
Hardware:  2 CPU cores
Time:      44 minutes for 50 of the 55 runs with the test, two processes at a time (a core each)
Result:    experiments/results/study/report.md
"""

from experiments.study import protocol

CONFIG = protocol.CONFIG
COMMON = protocol.FIRST.common


def get_sweep():
    return protocol.FIRST.comparison()
