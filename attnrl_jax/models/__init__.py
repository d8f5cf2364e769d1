"""The causal language model with its attention exposed; the only place that knows flax modules."""
