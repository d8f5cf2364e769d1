"""AttnRL from any Hugging Face model folder, on any JSONL file of problems and answers.

Command:   python -m experiments.run --config=experiments/configs/attnrl_hf.py \\
               --config.model.path=DIR --config.data.train=FILE.jsonl
Hardware:  any; the budgets below suit models of up to about a billion parameters on one
           accelerator, and tiny ones on a CPU. Raise them, and min_distance with them, for models
           that think longer.
Time:      not measured at scale yet.
Result:    depends on the model; answers are judged by math-verify.
"""

from ml_collections import config_dict

from experiments.settings import default_config


def get_config():
    config = default_config()
    # To be given on the command line.
    config.model.path = config_dict.placeholder(str)
    config.data.train = config_dict.placeholder(str)
    config.steps = 100
    config.num_problems = 8
    config.num_responses = 6
    config.prompt_budget = 512
    config.response_budget = 512
    config.mini_batch_rows = 192
    config.micro_batch_tokens = 8192
    config.score_batch_tokens = 16384
    config.length_multiple = 256
    config.eval_every = 20
    config.data.held_out_size = 64
    config.branching.delta = 4
    config.branching.min_distance = 16
    config.optimizer.learning_rate = 1e-6
    config.sampler.slots = 48
    config.sampler.length_bucket = 256
    return config
