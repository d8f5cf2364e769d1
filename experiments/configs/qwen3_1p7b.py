"""AttnRL on Qwen3-1.7B in its thinking mode, otherwise the paper's setting.

Command:   python -m experiments.run --config=experiments/configs/qwen3_1p7b.py \\
               --config.data.benchmarks=DIR/aime24.jsonl,DIR/aime25.jsonl,DIR/amc23.jsonl,... \\
               --workdir=runs/qwen3_1p7b
           `:treerl` or `:grpo` behind the file's name for the methods it is compared with;
           `--config.model.path=DIR --config.data.train=FILE` where the hub cannot be reached.
Hardware:  8 TPU v5e (v5litepod-8, 16 GB each) or 8 GPUs of 24 GB and more. A token takes four
           times the cache of R1-Distill-Qwen-1.5B (8 key/value heads instead of 2), hence fewer
           slots.
Memory:    per device, of 8, in GiB, as the TPU compiler counts for v5e 2x4 (of 15.75;
           experiments/aot_results): parameters and AdamW 2.40, reference 0.80; in the update also
           gradients 0.80 and temporaries 9.68 (rows of 9,216 tokens, one a device): 13.69 in all;
           in sampling a bfloat16 copy 3.20 and the cache of 32 slots 3.94; at most 14.73, when
           slots are halved.
Time:      not measured: no such machine was at hand. Estimated for v5e at 5,000 tokens a response:
           4.8 million sampled tokens a step, 32 in 9.4 ms at the least (memory), 23 minutes;
           scoring and update 5: 16 days for 800 steps, a month for grpo. More devices, and slots
           with them, shorten it.
Result:    not run here.
"""

from experiments.configs.paper import paper_config


def get_config(method: str = "attnrl"):
    config = paper_config(method)
    config.model.path = "hf:Qwen/Qwen3-1.7B"
    config.sampler.slots = 32
    # One of the longest rows on each of eight devices.
    config.micro_batch_tokens = 8 * 9216
    config.score_batch_tokens = 8 * 9216
    return config
