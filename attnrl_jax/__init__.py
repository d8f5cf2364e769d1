"""AttnRL in JAX: process-supervised reinforcement learning that branches where a model attends."""
