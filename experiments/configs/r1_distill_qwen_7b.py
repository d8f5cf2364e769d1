"""The paper's larger model: AttnRL on DeepSeek-R1-Distill-Qwen-7B and 40.3k DeepScaleR problems.

Command:   python -m experiments.run --config=experiments/configs/r1_distill_qwen_7b.py \\
               --config.data.benchmarks=DIR/aime24.jsonl,DIR/aime25.jsonl,DIR/amc23.jsonl,... \\
               --workdir=runs/r1_7b
           `:treerl` or `:grpo` behind the file's name for the methods it is compared with;
           `--config.model.path=DIR --config.data.train=FILE` where the hub cannot be reached.
Hardware:  8 TPU v5p (95 GB each) or 8 GPUs of 80 GB. 32 TPU v5e hold it too (14.91 of 15.75
           GiB), with `--config.mesh.tensor=2 --config.sampler.slots=64
           --config.micro_batch_tokens=147456 --config.score_batch_tokens=147456`.
Memory:    per device, of 8, in GiB, as the TPU compiler counts for v5p 2x2x2 (of 95.74;
           experiments/aot_results): parameters and AdamW 10.64, reference 3.55; in the update also
           gradients 3.55 and temporaries 19.06 (rows of 9,216 tokens, one a device): 36.80 in all;
           in sampling a bfloat16 copy 3.55 and the cache of 256 slots 15.76; at most 44.50, when
           slots are halved.
Time:      not measured: no such machine was at hand. Estimated for v5p at 5,000 tokens a response:
           4.8 million sampled tokens a step, 256 in 7.5 ms at the least (memory), 3 minutes;
           scoring and update at 40 % of the peak rate, 9 minutes: 7 days for 800 steps. treerl 8
           days, grpo 12.
Result:    not run here.
"""

from experiments.configs.paper import paper_config


def get_config(method: str = "attnrl"):
    config = paper_config(method)
    config.model.path = "hf:deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"
    # As many as there are heads of keys and values: the cache is cut with the parameters.
    config.mesh.sampling_tensor = 4
    config.sampler.slots = 256
    # One of the longest rows on each of eight devices.
    config.micro_batch_tokens = 8 * 9216
    config.score_batch_tokens = 8 * 9216
    return config
