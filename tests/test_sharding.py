"""The mesh, the table of parameter layouts, and eight devices against one."""

from __future__ import annotations

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from attnrl_jax.models.config import ModelConfig
from attnrl_jax.models.transformer import forward, init_params, unembed
from attnrl_jax.models.weights import load_params
from attnrl_jax.scoring import score_packed
from attnrl_jax.sharding import (
    MeshConfig,
    batch_devices,
    batch_sharding,
    cast_function,
    cast_to_mesh,
    constrain,
    make_mesh,
    make_meshes,
    parameter_shardings,
)
from attnrl_jax.types import PackedTokens

WHOLE = PartitionSpec()
COLUMN = PartitionSpec(None, "fsdp", "tensor")
ROW = PartitionSpec(None, "tensor", "fsdp")
BIAS = PartitionSpec(None, "tensor")
COMMON = {
    "embed_tokens/embedding": PartitionSpec("tensor", "fsdp"),
    "norm/scale": WHOLE,
    "layers/input_layernorm/scale": WHOLE,
    "layers/post_attention_layernorm/scale": WHOLE,
    "layers/self_attn/q_proj/kernel": COLUMN,
    "layers/self_attn/k_proj/kernel": COLUMN,
    "layers/self_attn/v_proj/kernel": COLUMN,
    "layers/self_attn/o_proj/kernel": ROW,
    "layers/mlp/gate_proj/kernel": COLUMN,
    "layers/mlp/up_proj/kernel": COLUMN,
    "layers/mlp/down_proj/kernel": ROW,
}
BIASES = {f"layers/self_attn/{name}_proj/bias": BIAS for name in "qkv"}
NORMS = {f"layers/self_attn/{name}_norm/scale": WHOLE for name in "qk"}
HEAD = {"lm_head/kernel": PartitionSpec("fsdp", "tensor")}
EXPECTED = {
    "qwen2_tied": COMMON | BIASES,
    "qwen2_untied": COMMON | BIASES | HEAD,
    "qwen3": COMMON | NORMS,
    "llama": COMMON | HEAD,
}


@pytest.fixture(scope="module")
def mesh():
    if len(jax.devices()) != 8:
        pytest.fail("these tests need 8 (simulated) devices; see tests/conftest.py")
    return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


def by_path(tree) -> dict:
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(key.key for key in path): leaf for path, leaf in flat}


def test_every_parameter_has_its_intended_layout(mesh, model):
    shardings = by_path(parameter_shardings(model.params, mesh))
    assert {path: sharding.spec for path, sharding in shardings.items()} == EXPECTED[model.name]


def test_axes_that_do_not_divide_are_not_cut(mesh):
    tree = {"embed_tokens": {"embedding": jax.ShapeDtypeStruct((257, 64), jnp.float32)}}
    assert by_path(parameter_shardings(tree, mesh)) == {
        "embed_tokens/embedding": jax.NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    }
    # The optimizer's scalars carry the path of no parameter, or of one with fewer axes.
    tree = {"embed_tokens": {"embedding": jax.ShapeDtypeStruct((), jnp.float32)}}
    assert by_path(parameter_shardings(tree, mesh))["embed_tokens/embedding"].spec == WHOLE


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (8, 1, 1)),
        (MeshConfig(data=1, fsdp=-1, tensor=2), (1, 4, 2)),
        (MeshConfig(data=2, fsdp=2, tensor=2), (2, 2, 2)),
    ],
)
def test_mesh_shapes(config, shape):
    mesh = make_mesh(config)
    assert tuple(mesh.shape.values()) == shape
    assert batch_devices(mesh) == shape[0] * shape[1]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(data=3), "does not fit 8 devices: 3 x 1 x 1; one of them may be -1"),
        (MeshConfig(data=-1, fsdp=3), "does not fit 8 devices: -1 x 3 x 1"),
        (MeshConfig(data=-1, tensor=16), "does not fit 8 devices: -1 x 1 x 16"),
        (MeshConfig(data=-1, fsdp=-1), "one of them may be -1 .*; got -1, -1 and 1"),
        (MeshConfig(data=0), "must be positive.*; got 0, 1 and 1"),
        (MeshConfig(data=-2), "must be positive.*; got -2, 1 and 1"),
        (MeshConfig(data=4, fsdp=4), "does not fit 8 devices: 4 x 4 x 1"),
    ],
)
def test_mesh_errors(config, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(config)


def test_mesh_of_given_devices():
    mesh = make_mesh(MeshConfig(tensor=2), jax.devices()[:2])
    assert tuple(mesh.shape.values()) == (1, 1, 2)


@pytest.mark.parametrize(
    ("config", "sampling"),
    [
        (MeshConfig(data=2, fsdp=4), (8, 1, 1)),
        (MeshConfig(data=2, fsdp=2, tensor=2), (4, 1, 2)),
        (MeshConfig(data=1, fsdp=8, sampling_tensor=2), (4, 1, 2)),
        (MeshConfig(fsdp=2, sampling_devices=4), (4, 1, 1)),
        (MeshConfig(fsdp=4, sampling_devices=4, sampling_tensor=2), (2, 1, 2)),
        (MeshConfig(fsdp=2, sampling_devices=2, sampling_tensor=2), (1, 1, 2)),
    ],
)
def test_sampling_has_a_layout_of_its_own(golden_model, config, sampling):
    """Parameters arrive cast, cut as the table says for that mesh, on its devices alone; in
    whatever order the runtime lists them (by coordinates, on a slice)."""
    devices = [jax.devices()[k] for k in (0, 1, 3, 2, 6, 7, 5, 4)]
    mesh, sampling_mesh = make_meshes(config, devices)
    assert tuple(sampling_mesh.shape.values()) == sampling
    shared = set(mesh.devices.flat) & set(sampling_mesh.devices.flat)
    assert len(shared) == (0 if config.sampling_devices else 8)
    params = golden_model("qwen2_untied").params
    there = jax.device_put(params, parameter_shardings(params, mesh))
    cast = cast_to_mesh(there, "bfloat16", sampling_mesh)
    for ours, wanted, original in zip(
        *map(jax.tree.leaves, (cast, parameter_shardings(params, sampling_mesh), params)),
        strict=True,
    ):
        assert ours.dtype == jnp.bfloat16
        assert ours.sharding.is_equivalent_to(wanted, ours.ndim)
        np.testing.assert_array_equal(ours, original.astype(jnp.bfloat16))


def test_parameters_arrive_layer_by_layer():
    """Besides its shares before and after, a device holds what is cast and one layer's parameters,
    not those of every layer a second time."""
    mesh, sampling_mesh = make_meshes(MeshConfig(fsdp=8))
    temporaries = []
    for layers in (2, 6):
        model = ModelConfig("qwen2", 64, 64, layers, 4, 2, 16, 256)
        shapes = jax.eval_shape(lambda model=model: init_params(model, jax.random.key(0)))
        there = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            shapes, parameter_shardings(shapes, mesh),
        )  # fmt: skip
        target = parameter_shardings(shapes, sampling_mesh)
        with jax.set_mesh(mesh):
            compiled = cast_function(there, "bfloat16", target).lower(there).compile()
        temporaries.append(compiled.memory_analysis().temp_size_in_bytes)
    kernels = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 256
    each = (temporaries[1] - temporaries[0]) / 4
    # A CPU moves bfloat16 as float32. Norms are held whole.
    assert each < 1.1 * 4 * (kernels / 8 + 2 * 64)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(sampling_devices=8), "must leave devices to update with: 8 of the 8"),
        (MeshConfig(sampling_tensor=3), "8 sampling devices are no multiple of 3"),
        (MeshConfig(sampling_devices=3, sampling_tensor=2), "3 sampling devices are no multiple"),
    ],
)
def test_sampling_mesh_errors(config, message):
    with pytest.raises(ValueError, match=message):
        make_meshes(config)


def test_constrain_without_mesh_is_nothing():
    x = jnp.ones(3)
    assert constrain(x, "data") is x


@pytest.mark.parametrize("name", ["qwen2_untied", "qwen3"])
def test_eight_devices_equal_one(mesh, golden_model, name):
    model = golden_model(name)
    config = model.config
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, config.vocab_size, (8, 16)).astype(np.int32)
    lengths = np.array([16, 3, 9, 16, 1, 12, 7, 16], np.int32)
    step_ids = np.where(np.arange(16) < lengths[:, None], np.arange(16) // 2, -1).astype(np.int32)

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def program(params, tokens, lengths, step_ids):
        out = forward(params, config, tokens, lengths, step_ids=step_ids, delta=1)
        logits = unembed(params, config, out.hidden)
        logprobs = jnp.take_along_axis(
            jax.nn.log_softmax(logits)[:, :-1], tokens[:, 1:, None], axis=-1
        )[:, :, 0]
        mask = jnp.arange(1, 16)[None] < lengths[:, None]
        return jnp.sum(logprobs * mask) / mask.sum(), (logits, out.fci, out.hidden)

    (value, (logits, fci, _)), gradient = program(model.params, tokens, lengths, step_ids)

    shardings = parameter_shardings(model.params, mesh)
    params = load_params(model.folder, config, shardings)
    for path, leaf in by_path(params).items():
        cuts = [2 if axis else 1 for axis in EXPECTED[name][path]]
        cuts += [1] * (leaf.ndim - len(cuts))
        shard = tuple(n // cut for n, cut in zip(leaf.shape, cuts, strict=True))
        assert {s.data.shape for s in leaf.addressable_shards} == {shard}, path
        np.testing.assert_array_equal(leaf, by_path(model.params)[path])
    with jax.set_mesh(mesh):
        rows = batch_sharding(mesh)
        batch = [jax.device_put(x, rows) for x in (tokens, lengths, step_ids)]
        sharded = program(params, *batch)
    (value8, (logits8, fci8, hidden8)), gradient8 = sharded

    # The batch axis stays cut over data and fsdp all the way.
    assert hidden8.sharding.shard_shape(hidden8.shape)[0] == 2
    np.testing.assert_allclose(value8, value, atol=1e-5)
    np.testing.assert_allclose(logits8, logits, atol=1e-4)
    np.testing.assert_allclose(fci8, fci, atol=1e-5)
    assert fci.max() > 0
    for path, leaf in by_path(gradient).items():
        assert np.abs(leaf).max() > 0, path
        np.testing.assert_allclose(by_path(gradient8)[path], leaf, atol=1e-5, err_msg=path)


def test_the_output_matrix_is_gathered_outside_of_branches(golden_model):
    """Regression: inside the branch that skips chunks without a wanted token, parameters cut over
    fsdp were gathered again for every chunk."""
    golden = golden_model("qwen2_tied")
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    with jax.set_mesh(mesh):
        params = jax.device_put(golden.params, parameter_shardings(golden.params, mesh))
        x = jax.device_put(np.zeros((8, 64), np.int32), batch_sharding(mesh))
        packed = PackedTokens(x, x, x, x, layout="packed")
        lowered = score_packed.lower(params, golden.config, packed, x > 0, None, chunk_length=16)
    text = lowered.compile().as_text()
    branches = re.findall(r"branch_computations=\{(.*?)\}", text)
    names = {name.strip() for group in branches for name in group.split(",")}
    assert names
    for name in names:
        body = text[text.index(f"\n{name} (") :]
        assert "all-gather" not in body[: body.index("\n}")]
    assert "all-gather" in text
