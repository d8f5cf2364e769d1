"""The paper's experiment: AttnRL on DeepSeek-R1-Distill-Qwen-1.5B and 40.3k DeepScaleR problems.

Command:   python -m experiments.run --config=experiments/configs/r1_distill_qwen_1p5b.py \\
               --config.data.benchmarks=DIR/aime24.jsonl,DIR/aime25.jsonl,DIR/amc23.jsonl,... \\
               --workdir=runs/r1_1p5b
           `:treerl` or `:grpo` behind the file's name for the methods it is compared with;
           `--config.model.path=DIR --config.data.train=FILE` where the hub cannot be reached.
Hardware:  8 TPU v5e (v5litepod-8, 16 GB each) or 8 GPUs of 24 GB and more.
Memory:    per device, of 8, in GiB, for v5e 2x4; temporaries as the TPU compiler (jax 0.10.2)
           counted them before updates packed rows and decoding wrote its cache in place:
           parameters and AdamW 2.48, reference 0.83; in the update also gradients 0.83 and
           temporaries 4.24 (rows of 9,216 tokens, one a device): 8.4 in all; in sampling also a
           bfloat16 copy 0.41, the cache of 128 slots 3.94 and temporaries 4.88: 12.5 in all.
Time:      not measured: no such machine was at hand. Estimated for v5e at 5,000 tokens a response:
           4.8 million sampled tokens a step, 128 in 20 ms (cut parameters are gathered for every
           token), 12 minutes; scoring and update at 40 % of the peak rate, 4 minutes: 9 days for
           800 steps. treerl samples 5.8 million tokens a step (11 days), grpo 9.6 (17 days).
Result:    not run here. The paper reports +7.5 points on average over six benchmarks.
"""

from experiments.configs.paper import paper_config


def get_config(method: str = "attnrl"):
    config = paper_config(method)
    config.model.path = "hf:deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
    config.sampler.slots = 128
    # One of the longest rows on each of eight devices.
    config.micro_batch_tokens = 8 * 9216
    config.score_batch_tokens = 8 * 9216
    return config
