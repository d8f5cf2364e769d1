"""AttnRL and the methods it is compared to, at equal cost, over five seeds: 20 runs.

Command:   python -m experiments.sweep --config=experiments/sweeps/methods.py
Hardware:  2 CPU cores
Time:      not measured yet; the default run, which samples about as many tokens, takes 1 min 30 s
Result:    not measured yet

Every run ends with the first step that has sampled 200,000 tokens in all, whatever number of steps
that takes its method; no other setting differs. Tokens of evaluations do not count.
"""

from experiments.search import grid

CONFIG = "experiments/configs/attnrl_graph.py"
COMMON = {"steps": 1000, "max_sampled_tokens": 200_000}


def get_sweep():
    # The method varies faster: a sweep that is stopped has compared all methods on fewer seeds.
    return grid(seed=range(5), method=["attnrl", "treerl", "random", "grpo"])
