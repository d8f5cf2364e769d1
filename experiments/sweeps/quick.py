"""Two methods over two seeds on a small scale, to see how a sweep is read; it compares nothing.

Command:   python -m experiments.sweep --config=experiments/sweeps/quick.py
Hardware:  2 CPU cores
Time:      about two minutes
Result:    too short and too few to tell the methods apart
"""

from experiments.search import grid

CONFIG = "experiments/configs/attnrl_graph.py"
COMMON = {"steps": 4, "num_problems": 8, "eval_every": 2, "data.held_out_size": 128}


def get_sweep():
    return grid(seed=range(2), method=["attnrl", "grpo"])
