"""Hugging Face safetensors files to parameters and back. Nothing but safetensors is read."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from attnrl_jax import processes
from attnrl_jax.models.config import ModelConfig, ModelError, config_to_hf

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
# Buffers that older checkpoints carry and that are computed here.
_IGNORED = re.compile(r"rotary_emb\.inv_freq$")
# Files of a source folder that travel with saved weights: configs, tokenizer, chat template,
# licence.
_COMPANIONS = re.compile(r".*\.(json|txt|jinja|model|md)|(LICEN[CS]E|NOTICE).*")


@dataclass(frozen=True)
class _Entry:
    """Where a parameter lives in a Hugging Face checkpoint."""

    path: tuple[str, ...]  # in the parameter tree
    name: str  # tensor name; {layer} for stacked parameters
    shape: tuple[int, ...]  # of one tensor, as stored
    transposed: bool


def _entries(config: ModelConfig) -> Iterator[_Entry]:
    width, head = config.width, config.head_dim
    q, kv = config.num_heads * head, config.num_kv_heads * head
    yield _Entry(("embed_tokens", "embedding"), "model.embed_tokens.weight",
                 (config.vocab_size, width), False)  # fmt: skip
    yield _Entry(("norm", "scale"), "model.norm.weight", (width,), False)
    if not config.tie_embeddings:
        yield _Entry(("lm_head", "kernel"), "lm_head.weight", (config.vocab_size, width), True)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield _Entry(("layers", norm, "scale"), f"model.layers.{{layer}}.{norm}.weight",
                     (width,), False)  # fmt: skip
    if config.qk_norm:
        for norm in ("q_norm", "k_norm"):
            name = f"model.layers.{{layer}}.self_attn.{norm}.weight"
            yield _Entry(("layers", "self_attn", norm, "scale"), name, (head,), False)
    linear = (
        ("self_attn", "q_proj", (q, width), config.qkv_bias),
        ("self_attn", "k_proj", (kv, width), config.qkv_bias),
        ("self_attn", "v_proj", (kv, width), config.qkv_bias),
        ("self_attn", "o_proj", (width, q), config.o_bias),
        ("mlp", "gate_proj", (config.mlp_width, width), config.mlp_bias),
        ("mlp", "up_proj", (config.mlp_width, width), config.mlp_bias),
        ("mlp", "down_proj", (width, config.mlp_width), config.mlp_bias),
    )
    for group, name, shape, bias in linear:
        prefix = f"model.layers.{{layer}}.{group}.{name}"
        yield _Entry(("layers", group, name, "kernel"), f"{prefix}.weight", shape, True)
        if bias:
            yield _Entry(("layers", group, name, "bias"), f"{prefix}.bias", shape[:1], False)


def _shard_files(folder: Path) -> dict[str, Path]:
    """Tensor name to the file that holds it."""
    index = folder / INDEX_FILE
    if index.is_file():
        try:
            names = json.loads(index.read_text())["weight_map"]
            files = {str(key): str(value) for key, value in names.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} is not a safetensors index: {error!r}") from error
        for file in files.values():
            # Names come from a file somebody else wrote: they must stay inside the folder.
            if Path(file).name != file:
                raise ModelError(f"{index} names {file!r}, which is outside its folder")
            try:
                exists = (folder / file).is_file()
            except (OSError, ValueError):  # a name that no file can have
                exists = False
            if not exists:
                raise ModelError(f"{index} names {file!r}, which does not exist")
        return {key: folder / file for key, file in files.items()}
    single = folder / SINGLE_FILE
    if not single.is_file():
        raise ModelError(f"no weights at {folder}: neither {SINGLE_FILE} nor {INDEX_FILE} exists")
    with _open(single) as tensors:
        return dict.fromkeys(tensors.keys(), single)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is truncated or not a safetensors file: {error}") from error


def load_params(folder: str | Path, config: ModelConfig, shardings: Any = None) -> Any:
    """Loads float32 parameters from a Hugging Face folder.

    Args:
      folder: holds `model.safetensors`, or shards and their index; float32, bfloat16 or float16.
      config: from `read_config` of the same folder.
      shardings: optional pytree of `NamedSharding` like the parameters; each parameter goes to
        its devices as it is read, so that the host holds one at a time.

    Raises:
      ModelError: a tensor is missing, has another shape than the config says or a dtype that is
        no float, or there are tensors which this architecture does not have.
    """
    folder = Path(folder)
    files = _shard_files(folder)
    if config.num_layers > len(files):
        # Before so many names are made.
        raise ModelError(
            f"{folder}: the config says {config.num_layers} layers, but there are only "
            f"{len(files)} tensors"
        )
    opened: dict[Path, Any] = {}
    entries = list(_entries(config))
    params: dict[str, Any] = {}
    used: set[str] = set()

    def read(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in files:
            raise ModelError(f"{folder}: tensor {name!r} is missing")
        path = files[name]
        if path not in opened:
            opened[path] = _open(path)
        try:
            view = opened[path].get_slice(name)
            stored, dtype = tuple(view.get_shape()), view.get_dtype()
            if stored != shape:
                raise ModelError(
                    f"{path}: tensor {name!r} has shape {stored}, the config says {shape}"
                )
            if dtype not in _DTYPES:
                raise ModelError(f"{path}: tensor {name!r} is {dtype}; known: {', '.join(_DTYPES)}")
            tensor = opened[path].get_tensor(name)
        except SafetensorError as error:
            raise ModelError(f"{path}: cannot read {name!r}: {error}") from error
        used.add(name)
        return np.asarray(tensor).astype(np.float32)

    for entry in entries:
        if entry.path[0] == "layers":
            names = [entry.name.format(layer=i) for i in range(config.num_layers)]
            array = np.stack([_oriented(read(name, entry.shape), entry) for name in names])
        else:
            array = _oriented(read(entry.name, entry.shape), entry)
        sharding = None if shardings is None else _get(shardings, entry.path)
        _set(params, entry.path, processes.to_devices(array, sharding))
    # Tied checkpoints may repeat the embedding as lm_head.
    extra = {
        name
        for name in set(files) - used
        if not _IGNORED.search(name) and not (config.tie_embeddings and name == "lm_head.weight")
    }
    if extra:
        raise ModelError(
            f"{folder}: {len(extra)} tensors do not belong to a {config.family} model of this "
            f"config, such as {sorted(extra)[0]!r}"
        )
    return params


def _oriented(tensor: np.ndarray, entry: _Entry) -> np.ndarray:
    # torch stores [out, in].
    return np.ascontiguousarray(tensor.T) if entry.transposed else tensor


def _get(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _set(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _tensors(params: Any, config: ModelConfig) -> dict[str, Callable[[], np.ndarray]]:
    """Every tensor of a checkpoint by name, made when called."""

    def one(entry: _Entry, layer: int | None) -> Callable[[], np.ndarray]:
        def make() -> np.ndarray:
            array = _get(params, entry.path)
            array = np.asarray(array if layer is None else array[layer], np.float32)
            return _oriented(array, entry)

        return make

    tensors = {}
    for entry in _entries(config):
        if entry.path[0] == "layers":
            for layer in range(config.num_layers):
                tensors[entry.name.format(layer=layer)] = one(entry, layer)
        else:
            tensors[entry.name] = one(entry, None)
    if config.tie_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    return tensors


def _rounded(array: np.ndarray, dtype: Any, name: str) -> np.ndarray:
    """A tensor in the dtype of its file.

    Raises:
      ModelError: a finite value is beyond the largest of the dtype.
    """
    with np.errstate(over="ignore"):  # refused below, by name
        rounded = array.astype(dtype)
    if rounded.dtype != array.dtype:
        lost = np.isfinite(array) & ~np.isfinite(rounded)
        if lost.any():
            raise ModelError(
                f"tensor {name!r} does not fit {np.dtype(dtype).name}: {array[lost][0]:g} would "
                f"become infinite ({lost.sum()} of {array.size} values)"
            )
    return rounded


def check_free(out: str | Path) -> None:
    """Checks that a folder can be made at `out`.

    Raises:
      ModelError: there are files, it is one, or it is an empty folder that cannot be replaced.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(f"{out} exists and is not an empty folder")
    # The finished folder takes the place of an empty one.
    if out.is_symlink() or (out.exists() and (out.is_mount() or out.samefile("."))):
        raise ModelError(
            f"{out} is the present folder, a link or a mount point and cannot be replaced; name a "
            "folder to make"
        )


def save_folder(
    out: str | Path,
    params: Any,
    config: ModelConfig,
    *,
    source: str | Path | None = None,
    end_ids: tuple[int, ...] = (),
    dtype: str = "float32",
) -> None:
    """Writes a Hugging Face folder, whole or not at all.

    Args:
      out: folder to make; must not exist or be empty.
      params: float32 parameters.
      config: the model.
      source: folder the model came from. Keys, shapes, dtypes and the division into files follow
        it, and its other files (config, tokenizer, ...) are copied. Without it a `config.json` is
        written with `end_ids`, and the weights as `dtype` in one file.
      end_ids: ids that end a response.
      dtype: `float32`, `bfloat16` or `float16`.

    Raises:
      ModelError: `out` holds files or cannot be replaced, unknown dtype, the tensors of the source
        are not those of the parameters, or a finite value would become infinite in its dtype.
    """
    out = Path(out)
    if dtype not in ("float32", "float16", "bfloat16"):
        raise ModelError(f"dtype {dtype!r} is not one of float32, float16, bfloat16")
    check_free(out)
    tensors = _tensors(params, config)
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        if source is None:
            names = [n for n in tensors if not (config.tie_embeddings and n == "lm_head.weight")]
            kind = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
            arrays = {name: _rounded(tensors[name](), kind[dtype], name) for name in names}
            save_file(arrays, staging / SINGLE_FILE, metadata={"format": "pt"})
            text = json.dumps(config_to_hf(config, end_ids, dtype), indent=2, sort_keys=True)
            (staging / "config.json").write_text(text + "\n")
        else:
            _save_like(Path(source), staging, tensors)
        # Temporary folders and safetensors files are made for their owner alone.
        staging.chmod(0o755)
        for path in staging.iterdir():
            path.chmod(0o644)
        if out.exists():
            out.rmdir()
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _save_like(source: Path, out: Path, tensors: dict[str, Callable[[], np.ndarray]]) -> None:
    files = _shard_files(source)
    embedding = tensors["model.embed_tokens.weight"]
    # A tied lm_head may or may not be stored.
    lost = {n for n in set(tensors) - set(files) if n[:8] != "lm_head." or tensors[n] != embedding}
    if lost:
        raise ModelError(f"{source}: no place for {sorted(lost)[0]!r}: not the model's source")
    for path in sorted(set(files.values())):
        arrays = {}
        with _open(path) as stored:
            for name in stored.keys():  # noqa: SIM118 (safe_open is no mapping)
                dtype = _DTYPES.get(stored.get_slice(name).get_dtype())
                if name in tensors and dtype is not None:
                    arrays[name] = _rounded(tensors[name](), dtype, name)
                    shape = tuple(stored.get_slice(name).get_shape())
                    if arrays[name].shape != shape:
                        raise ModelError(
                            f"{path}: tensor {name!r} has shape {shape}, the parameters have "
                            f"{arrays[name].shape}"
                        )
                elif _IGNORED.search(name):
                    arrays[name] = stored.get_tensor(name)
                else:
                    raise ModelError(f"{path}: tensor {name!r} is unknown")
            metadata = stored.metadata()
        save_file(arrays, out / path.name, metadata=metadata)
    for path in source.iterdir():
        if path.is_file() and _COMPANIONS.fullmatch(path.name):
            _check_inside(path, source)
            shutil.copyfile(path, out / path.name)


def _check_inside(path: Path, folder: Path) -> None:
    """Refuses a link that leads out of a folder, which somebody else may have made: what it points
    to, a key of the user's maybe, would be published with the copy.

    The cache of the Hugging Face hub links its snapshots to the blobs beside them.

    Raises:
      ModelError: naming the link and where it leads.
    """
    target, allowed = path.resolve(), [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        allowed.append(folder.resolve().parent.parent / "blobs")
    if not any(target.is_relative_to(place) for place in allowed):
        raise ModelError(
            f"{path} is a link out of its folder, to {target}; it is not copied. Put the file "
            "itself there, or remove it"
        )
