"""AttnRL with trees of up to 30 rows a problem, the paper's, and one update a step.

Command:   python -m experiments.run --config=experiments/configs/attnrl_graph_trees.py
Hardware:  2 CPU cores
Time:      1 min 50 s to 2 min 53 s, compilation included
Result:    held-out accuracy 0.453 -> 0.881, 0.867, 0.845 (seeds 0, 1, 2; 1,024 problems, one
           response each at temperature 1; the last two on an earlier version)

Responses are short (about 80 tokens in 4 to 14 steps), hence delta 1 and no least distance: at the
paper's 4 and 512 no step would ever be eligible. The learning rate suits 0.3 million parameters.

It samples 400,000 tokens. The study (docs/study.md) and the benchmark of whole steps start from it,
and the default run (attnrl_graph.py) changes some of it: whatever becomes of that, this stays.
"""

from experiments.settings import default_config


def get_config():
    config = default_config()
    config.steps = 12
    config.num_problems = 24
    config.num_responses = 6
    config.prompt_budget = 64
    config.response_budget = 160
    # All rows of a step: one update.
    config.mini_batch_rows = 100000
    config.micro_batch_tokens = 8192
    config.score_batch_tokens = 16384
    config.length_multiple = 64
    # So small a model spends most of its time in attention, and short sequences need the least.
    config.pack_length = 256
    config.eval_every = 3
    config.checkpoint_every = 3
    config.branching.delta = 1
    config.branching.min_distance = 0
    config.branching.num_positions = 2
    config.branching.num_continuations = 2
    config.loss.kl_beta = 0.0
    config.optimizer.learning_rate = 3e-4
    config.optimizer.warmup_updates = 5
    config.optimizer.b2 = 0.99
    config.sampler.slots = 96
    # One cache length, so that training and evaluation share their compiled programs.
    config.sampler.cache_length = 256
    config.prompt.instruction = ""
    return config
