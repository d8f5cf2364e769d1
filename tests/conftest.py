"""Settings of the whole test session, and the golden models.

Eight simulated CPU devices, full-precision matrix products, no silent rank promotion.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_DEVICES = "--xla_force_host_platform_device_count"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}=8".strip()

import jax  # noqa: E402 (its flags come first)
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

from attnrl_jax.models.config import ModelConfig, read_config  # noqa: E402
from attnrl_jax.models.weights import load_params  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "data" / "golden"
FAMILIES = ("qwen2_tied", "qwen2_untied", "qwen3", "llama")

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
# Compiling is most of the tests' time. Two workers may share the folder: a damaged entry is only
# a warning and compiled anew.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
# Every run asks about the same cases, and none fails because the machine is busy.
settings.register_profile(
    "deterministic",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("deterministic")


@dataclass(frozen=True, eq=False)
class GoldenModel:
    """A small random checkpoint and what Hugging Face transformers says of it."""

    name: str
    folder: Path
    config: ModelConfig
    params: Any
    arrays: dict[str, np.ndarray]
    about: dict[str, Any]


@functools.cache
def _golden_model(name: str) -> GoldenModel:
    folder = GOLDEN / "models" / name
    config = read_config(folder)
    with np.load(f"{folder}_golden.npz") as stored:
        arrays = dict(stored)
    about = json.loads(Path(f"{folder}_golden.json").read_text())
    return GoldenModel(name, folder, config, load_params(folder, config), arrays, about)


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Folder of the golden values."""
    return GOLDEN


@pytest.fixture(scope="session")
def golden_model():
    """Function from a family's name to its `GoldenModel`, loaded once a session."""
    return _golden_model


@pytest.fixture(scope="session", params=FAMILIES)
def model(request) -> GoldenModel:
    """Each of the four golden models in turn."""
    return _golden_model(request.param)


def pytest_terminal_summary(terminalreporter):
    """In CI every test runs, but for those that need an accelerator."""
    skipped = [
        report.nodeid
        for report in terminalreporter.stats.get("skipped", [])
        if "accelerator" not in report.keywords
    ]
    if skipped and os.environ.get("CI"):
        terminalreporter.section("skipped in CI", red=True)
        for nodeid in skipped:
            terminalreporter.line(nodeid)
        terminalreporter._session.exitstatus = pytest.ExitCode.TESTS_FAILED
