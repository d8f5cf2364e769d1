"""Flax causal language model of the Qwen2, Qwen3 and Llama families, attention exposed.

The only collection is `params`. Layers are one block scanned over a leading layer axis; what a
layer exposes (keys and values, attention maps, step scores) is an explicit output of that scan.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from attnrl_jax.branching.importance import pool_columns, query_weights
from attnrl_jax.models.attention import KEPT, Route, StepWeights, attention
from attnrl_jax.models.cached_attention import cached_attention
from attnrl_jax.models.config import ModelConfig
from attnrl_jax.models.rotary import rotary_tables, rotate
from attnrl_jax.models.step_maps import step_maps
from attnrl_jax.sharding import BATCH, constrain
from attnrl_jax.types import ArrayLike


@struct.dataclass
class KeyValues:
    """Keys (rotated) and values of every layer, or of a group of layers.

    Keys have time last: the product of one query with all keys then runs along memory.
    """

    keys: Float[Array, "layer batch kv_head head_dim time"]
    values: Float[Array, "layer batch kv_head time head_dim"]


@struct.dataclass
class Output:
    """Result of a forward pass; fields that were not asked for are None.

    Attributes:
      hidden: after the last norm, in the compute dtype.
      key_values: of the given tokens.
      attention: post-softmax maps, float32.
      step_attention: mean attention of the tokens of one range to those of another.
      fci: forward context influence by range (max over layers and heads), no range zeroed.
    """

    hidden: Float[Array, "batch time width"]
    key_values: KeyValues | None = None
    attention: Float[Array, "layer batch head query key"] | None = None
    step_attention: Float[Array, "layer batch head step step"] | None = None
    fci: Float[Array, "batch step"] | None = None


@struct.dataclass
class _Context:
    """What every layer shares."""

    cos: Array
    sin: Array
    visible_until: Array
    cache_lengths: Array | None
    steps: StepWeights | None
    cache_read: int | None = struct.field(pytree_node=False, default=None)
    layout: str = struct.field(pytree_node=False, default="tree")
    step_ranges: int = struct.field(pytree_node=False, default=0)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in float32."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        x32 = x.astype(jnp.float32)
        variance = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        normed = x32 * jax.lax.rsqrt(variance + self.config.norm_eps)
        scale = scale.reshape((1,) * (x.ndim - 1) + scale.shape)
        return (normed * scale).astype(self.config.dtype)


def _dense(config: ModelConfig, features: int, use_bias: bool, name: str) -> nn.Dense:
    return nn.Dense(
        features,
        use_bias=use_bias,
        dtype=config.dtype,
        param_dtype=jnp.float32,
        kernel_init=nn.initializers.normal(0.02),
        dot_general=jax.lax.dot_general,
        name=name,
    )


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    config: ModelConfig
    keep_maps: bool

    @nn.compact
    def __call__(self, x: Array, cache: KeyValues | None, context: _Context):
        config = self.config
        batch, time, _ = x.shape

        def heads(name: str, count: int) -> Array:
            features = count * config.head_dim
            y = _dense(config, features, config.qkv_bias, name)(x)
            return y.reshape(batch, time, count, config.head_dim)

        q = heads("q_proj", config.num_heads)
        k = heads("k_proj", config.num_kv_heads)
        v = heads("v_proj", config.num_kv_heads)
        if config.qk_norm:
            q = RMSNorm(config, name="q_norm")(q)
            k = RMSNorm(config, name="k_norm")(k)
        q = rotate(q, context.cos, context.sin)
        k_BKTD = jnp.swapaxes(rotate(k, context.cos, context.sin), 1, 2)
        v_BKTD = jnp.swapaxes(v, 1, 2)
        columns, maps, by_step = None, None, None
        if cache is None or context.cache_lengths is None:
            route = Route(config.attention, config.block_length, context.layout)
            out, columns, maps = attention(
                q, k_BKTD, v_BKTD, context.visible_until, route, context.steps, self.keep_maps
            )
            if context.steps is not None and context.step_ranges:
                by_step = step_maps(
                    q, k_BKTD, context.visible_until, context.steps, context.step_ranges,
                    config.block_length,
                )  # fmt: skip
        else:
            out = cached_attention(
                q,
                k_BKTD,
                v_BKTD,
                # Cut inside the layer, so that no copy of the whole cache is made.
                cache.keys[..., : context.cache_read],
                cache.values[:, :, : context.cache_read],
                context.cache_lengths,
            )
        out = out.reshape(batch, time, config.num_heads * config.head_dim)
        out = _dense(config, config.width, config.o_bias, "o_proj")(out)
        return out, KeyValues(jnp.swapaxes(k_BKTD, 2, 3), v_BKTD), columns, (maps, by_step)


class MLP(nn.Module):
    """SwiGLU feed-forward (arXiv 2002.05202)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config = self.config
        gate = _dense(config, config.mlp_width, config.mlp_bias, "gate_proj")(x)
        up = _dense(config, config.mlp_width, config.mlp_bias, "up_proj")(x)
        return _dense(config, config.width, config.mlp_bias, "down_proj")(nn.silu(gate) * up)


class Block(nn.Module):
    """One layer; carries the residual stream and the running maximum of step importance."""

    config: ModelConfig
    keep_key_values: bool
    keep_maps: bool

    @nn.compact
    def __call__(self, carry, cache: KeyValues | None, context: _Context):
        x, fci = carry
        config = self.config
        normed = RMSNorm(config, name="input_layernorm")(x)
        attended, key_values, columns, maps = Attention(
            config, self.keep_maps, name="self_attn"
        )(normed, cache, context)  # fmt: skip
        x = x + attended
        normed = RMSNorm(config, name="post_attention_layernorm")(x)
        x = x + MLP(config, name="mlp")(normed)
        x = constrain(x, BATCH, None, None)
        if context.steps is not None:
            by_step = pool_columns(columns, context.steps.step_ids)
            fci = jnp.maximum(fci, by_step.max(axis=1))
        return (x, fci), (key_values if self.keep_key_values else None, maps)


def _remat(remat: str) -> Any:
    """`Block` with the recomputation that `ModelConfig.remat` asks for."""
    if remat == "none":
        return Block
    policies = jax.checkpoint_policies
    policy = None
    if remat != "full":
        policy = policies.save_only_these_names(*KEPT)
    if remat == "dots":
        policy = policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, policy)
    return nn.remat(Block, prevent_cse=False, policy=policy)


def _scanned(block: Any, length: int) -> Any:
    """`block` over a leading layer axis of its parameters."""
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast),
        out_axes=0,
        length=length,
    )


class Transformer(nn.Module):
    """Token ids to hidden states; `unembed` turns those into logits."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "batch time"],
        positions: Int[Array, "batch time"],
        visible_until: Int[Array, "batch time"],
        *,
        step_ids: Int[Array, "batch time"] | None = None,
        delta: int = 4,
        layout: str = "tree",
        keep_key_values: bool = False,
        keep_attention: bool = False,
        step_ranges: int = 0,
    ) -> Output:
        """One forward pass.

        Args:
          tokens: ids.
          positions: rotary position of each token.
          visible_until: query q sees key p exactly if p <= q < visible_until[p], in indices of
            the time axis; 0 for padding.
          step_ids: range of each token, never falling along time (sequences packed behind each
            other go on counting); -1 for padding, all of it behind. Asks for `fci`.
          delta: least distance in ranges for `fci`.
          layout: what `visible_until` is promised to be, for kernels that do not take any: `single`
            (one right-padded row per sequence), `packed` (rows behind each other), `tree` (any).
          keep_key_values, keep_attention: ask for those outputs.
          step_ranges: asks for `step_attention` of so many ranges, all of one sequence; needs
            `step_ids`. Memory grows with layers x heads x step_ranges^2.

        Raises:
          ValueError: `config.attention` names a route that this model can never take.
        """
        config = self.config
        embed = self.param(
            "embed_tokens",
            lambda key: {
                "embedding": nn.initializers.normal(0.02)(
                    key, (config.vocab_size, config.width), jnp.float32
                )
            },
        )
        if not config.tie_embeddings:
            # Used by `unembed`; declared here so that one `init` makes every parameter.
            self.param(
                "lm_head",
                lambda key: {
                    "kernel": nn.initializers.normal(0.02)(
                        key, (config.width, config.vocab_size), jnp.float32
                    )
                },
            )
        x = jnp.take(embed["embedding"].astype(config.dtype), tokens, axis=0)
        x = constrain(x, BATCH, None, None)
        cos, sin = rotary_tables(positions, config.head_dim, config.rope_theta, config.rope_scaling)
        steps = None
        if step_ids is not None:
            steps = StepWeights(step_ids, jnp.asarray(query_weights(step_ids)), delta)
        context = _Context(
            cos, sin, visible_until, None, steps, layout=layout, step_ranges=step_ranges
        )
        layers = _scanned(_remat(config.remat), config.num_layers)(
            config, keep_key_values, keep_attention, name="layers"
        )
        fci = jnp.zeros(tokens.shape, jnp.float32)
        (x, fci), (key_values, (maps, by_step)) = layers((x, fci), None, context)
        x = RMSNorm(config, name="norm")(x)
        return Output(x, key_values, maps, by_step, fci if steps is not None else None)


def group_layers(params: Any, groups: int) -> Any:
    """Parameters with their layers in a tuple of groups of equal size, as `decode` takes them.

    Raises:
      ValueError: the layers cannot be parted so.
    """
    layers = jax.tree.leaves(params["layers"])[0].shape[0]
    if layers % groups:
        raise ValueError(f"{layers} layers are no multiple of {groups} groups")
    if groups == 1:
        return {**params, "layers": (params["layers"],)}
    size = layers // groups
    parts = tuple(
        jax.tree.map(lambda x, g=g: x[g * size : (g + 1) * size], params["layers"])
        for g in range(groups)
    )
    return {**params, "layers": parts}


def decode(
    params: Any,
    config: ModelConfig,
    tokens: Int[Array, "batch time"],
    positions: Int[Array, "batch time"],
    cache: tuple[KeyValues, ...],
    cache_lengths: Int[Array, "batch"],
    cache_read: int | None = None,
) -> tuple[Float[Array, "batch time width"], tuple[KeyValues, ...]]:
    """Forward pass of a few tokens that follow cached ones.

    The layers of a group are scanned, the groups are unrolled. A scan copies each layer's part of
    cache and parameters out of the whole but on a TPU (on a CPU a quarter of the time of a step);
    in as many groups as layers nothing is copied, and more is to be compiled.

    Args:
      params: of `group_layers`.
      config: the model.
      tokens: ids.
      positions: rotary position of each token.
      cache: keys and values of each group of layers, of which the first `cache_lengths` count.
      cache_lengths: cached tokens of each row.
      cache_read: entries of the cache that are read, at least the longest of `cache_lengths`; None
        reads all.

    Returns:
      hidden states after the last norm; keys and values of the given tokens.
    """
    x = jnp.take(params["embed_tokens"]["embedding"].astype(config.dtype), tokens, axis=0)
    x = constrain(x, BATCH, None, None)
    cos, sin = rotary_tables(positions, config.head_dim, config.rope_theta, config.rope_scaling)
    context = _Context(cos, sin, jnp.zeros_like(tokens), cache_lengths, None, cache_read)
    fci = jnp.zeros(tokens.shape, jnp.float32)
    new = []
    for layers, held in zip(params["layers"], cache, strict=True):
        blocks = _scanned(Block, held.keys.shape[0])(config, True, False)
        (x, fci), (key_values, _) = blocks.apply({"params": layers}, (x, fci), held, context)
        new.append(key_values)
    hidden = RMSNorm(config).apply({"params": params["norm"]}, x)
    assert isinstance(hidden, jax.Array)
    return hidden, tuple(new)


def unembed(
    params: Any, config: ModelConfig, hidden: Float[Array, "*batch width"]
) -> Float[Array, "*batch vocab"]:
    """Float32 logits of hidden states."""
    if config.tie_embeddings:
        kernel = params["embed_tokens"]["embedding"].T
    else:
        kernel = params["lm_head"]["kernel"]
    return jnp.matmul(hidden, kernel.astype(config.dtype), preferred_element_type=jnp.float32)


def init_params(config: ModelConfig, key: Array) -> Any:
    """Random float32 parameters."""
    dummy = jnp.zeros((1, 2), jnp.int32)
    # No parameter depends on the route, and two tokens need no kernel of a platform.
    model = Transformer(replace(config, attention="plain"))
    return model.init(key, dummy, dummy, dummy + 1, layout="single")["params"]


def forward(
    params: Any,
    config: ModelConfig,
    tokens: Int[ArrayLike, "batch time"],
    lengths: Int[ArrayLike, "batch"],
    **kwargs: Any,
) -> Output:
    """Forward pass of right-padded sequences, positions and masks from their lengths.

    Args:
      params: parameter pytree.
      config: the model.
      tokens: right-padded ids.
      lengths: tokens of each sequence.
      **kwargs: outputs asked for, as in `Transformer.__call__`.
    """
    index = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    positions = jnp.broadcast_to(index, tokens.shape)
    visible_until = jnp.where(index < lengths[:, None], lengths[:, None], 0)
    output = Transformer(config).apply(
        {"params": params}, tokens, positions, visible_until, layout="single", **kwargs
    )
    assert isinstance(output, Output)
    return output
