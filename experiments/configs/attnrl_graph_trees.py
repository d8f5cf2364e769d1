"""AttnRL with trees of up to 30 rows a problem, the paper's, and one update a step.

Command:   python -m experiments.run --config=experiments/configs/attnrl_graph_trees.py
Hardware:  2 CPU cores
Time:      1 min 50 s to 2 min 53 s, compilation included
Result:    held-out accuracy 0.453 -> 0.881, 0.867, 0.845 (seeds 0, 1, 2; 1,024 problems, one
           response each at temperature 1; the last two on an earlier version)

It samples 400,000 tokens. The study (docs/study.md) and the benchmark of whole steps start from it.
"""

from experiments.configs import attnrl_graph


def get_config():
    config = attnrl_graph.get_config()
    config.steps = 12
    config.num_problems = 24
    config.num_responses = 6
    config.branching.num_positions = 2
    config.branching.num_continuations = 2
    # All rows of a step: one update, at a learning rate that suits so few of them.
    config.mini_batch_rows = 100000
    config.optimizer.learning_rate = 3e-4
    config.eval_every = 3
    config.checkpoint_every = 3
    return config
