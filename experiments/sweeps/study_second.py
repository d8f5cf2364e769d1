"""The study's second comparison (docs/study.md): small trees, small steps, eight other seeds.

Command:   python -m experiments.study compare --comparison=second
Hardware:  2 CPU cores
Time:      about 30 minutes for 36 of the 48 runs with the test, two at a time beside other work
Result:    experiments/results/study/second/report.md
"""

from experiments.study import protocol

CONFIG = protocol.CONFIG
COMMON = protocol.SECOND.common


def get_sweep():
    return protocol.SECOND.comparison()
