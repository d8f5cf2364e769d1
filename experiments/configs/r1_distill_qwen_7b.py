"""The paper's larger model: AttnRL on DeepSeek-R1-Distill-Qwen-7B and 40.3k DeepScaleR problems.

Command:   python -m experiments.run --config=experiments/configs/r1_distill_qwen_7b.py \\
               --config.data.benchmarks=DIR/aime24.jsonl,DIR/aime25.jsonl,DIR/amc23.jsonl,... \\
               --workdir=runs/r1_7b
           `:treerl` or `:grpo` behind the file's name for the methods it is compared with;
           `--config.model.path=DIR --config.data.train=FILE` where the hub cannot be reached.
Hardware:  8 TPU v5p (95 GB each) or 8 GPUs of 80 GB. (32 TPU v5e hold it too, with
           `--config.sampler.slots=64 --config.micro_batch_tokens=294912
           --config.score_batch_tokens=294912`, once runs over several hosts are supported.)
Memory:    per device, of 8, in GiB, for v5p 2x2x2; temporaries as the TPU compiler (jax 0.10.2)
           counted them before updates packed rows and decoding wrote its cache in place:
           parameters and AdamW 10.64, reference 3.55; in the update also gradients 3.55 and
           temporaries 13.46 (rows of 9,216 tokens, one a device): 31.2 in all; in sampling also a
           bfloat16 copy 1.77, the cache of 128 slots 7.88 and temporaries 10.86: 34.7 in all. On
           32 v5e with the settings above: 12.0 in the update, 8.0 in sampling.
Time:      not measured: no such machine was at hand. Estimated for v5p at 5,000 tokens a response:
           4.8 million sampled tokens a step, 128 in 29 ms, 18 minutes; scoring and update at 40 %
           of the peak rate, 9 minutes: 15 days for 800 steps. treerl 18 days, grpo 29.
Result:    not run here.
"""

from experiments.configs.paper import paper_config


def get_config(method: str = "attnrl"):
    config = paper_config(method)
    config.model.path = "hf:deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"
    config.sampler.slots = 128
    # One of the longest rows on each of eight devices.
    config.micro_batch_tokens = 8 * 9216
    config.score_batch_tokens = 8 * 9216
    return config
