"""The paper's experiment: AttnRL on DeepSeek-R1-Distill-Qwen-1.5B and 40.3k DeepScaleR problems.

Command:   python -m experiments.run --config=experiments/configs/r1_distill_qwen_1p5b.py \\
               --config.data.benchmarks=DIR/aime24.jsonl,DIR/aime25.jsonl,DIR/amc23.jsonl,... \\
               --workdir=runs/r1_1p5b
           `:treerl` or `:grpo` behind the file's name for the methods it is compared with;
           `--config.model.path=DIR --config.data.train=FILE` where the hub cannot be reached.
Hardware:  8 TPU v5e (v5litepod-8, 16 GB each) or 8 GPUs of 24 GB and more.
Memory:    per device, of 8, in GiB, as the TPU compiler counts for v5e 2x4 (of 15.75;
           experiments/aot_results): parameters and AdamW 2.48, reference 0.83; in the update also
           gradients 0.83 and temporaries 7.58 (rows of 9,216 tokens, one a device): 11.72 in all;
           in sampling a bfloat16 copy 3.31 and the cache of 128 slots 3.94; at most 13.47, when
           slots are halved.
Time:      not measured: no such machine was at hand. Estimated for v5e at 5,000 tokens a response:
           4.8 million sampled tokens a step, 128 in 9.5 ms at the least (memory), 6 minutes;
           scoring and update at 40 % of the peak rate, 4 minutes: 6 days for 800 steps. treerl
           samples 5.8 million tokens a step (7 days), grpo 9.6 (10 days).
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
