"""The paper's setting (arXiv 2509.26628), to which a config file adds a model and its memory.

40.3k DeepScaleR problems, 64 of them a step, n = 6 responses of at most 8,192 tokens, N = 2 branch
positions at least D = 512 tokens apart, C = 2 continuations of each; AdamW at 1e-6, about ten
updates a step, a KL penalty of 0.001. Those are the defaults; what stands here is what a default
leaves open. The paper does not give the number of steps and the rhythm of evaluation: they follow
the training script that its authors published (801 steps, an evaluation every 20).

The methods it is compared with have the same numbers, without what is AttnRL's own:
  treerl  branches at tokens of high entropy, two rounds of generation, a fixed batch
  grpo    no tree: 30 responses a problem, so that as much is sampled; a fixed batch
"""

from experiments.settings import METHODS, SettingError, default_config

METHODS_COMPARED = ("attnrl", "treerl", "grpo")
# The repository holds one file, an array of problems.
DEEPSCALER = "hf:agentica-org/DeepScaleR-Preview-Dataset:deepscaler.json"


def paper_config(method: str):
    """The setting for one of the methods that the paper compares.

    Args:
      method: `attnrl`, `treerl` or `grpo`; what follows the colon of `--config=FILE:METHOD`.

    Raises:
      SettingError: another method.
    """
    if method not in METHODS_COMPARED:
        raise SettingError(
            f"the paper compares {', '.join(METHODS_COMPARED)}; got {method!r} "
            f"(all methods: {', '.join(METHODS)})"
        )
    config = default_config()
    config.method = method
    if method != "attnrl":
        config.schedule = "on_policy"
        config.batch_size.adaptive = False
    config.steps = 800
    config.eval_every = 20
    config.eval_temperature = 0.6
    config.checkpoint_every = 10
    config.data.train = DEEPSCALER
    config.data.held_out_size = 256
    config.model.dtype = "bfloat16"
    # Parameters, optimizer and gradients are cut over all devices.
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.sampler.length_bucket = 1024
    # One cache length, whatever the longest request of a round is.
    config.sampler.cache_length = config.prompt_budget + config.response_budget
    config.length_multiple = 1024
    return config
