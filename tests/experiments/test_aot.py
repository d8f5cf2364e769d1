"""The command that compiles for a TPU that is not there; its own parts, without that compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from attnrl_jax.compilation.chips import parse_topology
from attnrl_jax.compilation.counts import Collectives
from attnrl_jax.compilation.programs import Compiled, Program
from attnrl_jax.models.transformer import init_params
from experiments import aot, aot_table
from experiments.configs import qwen3_1p7b, r1_distill_qwen_1p5b, r1_distill_qwen_7b
from experiments.settings import build

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (r1_distill_qwen_1p5b, 1_777_088_000),
        (r1_distill_qwen_7b, 7_615_616_512),
        (qwen3_1p7b, 1_720_574_976),
    ],
)
def test_shapes_of_published_models_come_with_the_project(config, parameters):
    model = aot.model_shape(build(config.get_config()).model)
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters
    assert model.dtype == "bfloat16"


def result(name, compiled, **held):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    return aot.Result(Program(name, None, (), mesh, held), 1.0, compiled)


def compiled(temporaries, **held):
    found = {"all-gather": Collectives(2, GIB, 200e9), "all-reduce": Collectives(1, GIB, 0)}
    return Compiled(2 * GIB, temporaries, GIB, held, int(3 * 8 * 197e12), 819_000_000, found)


def test_sums_are_held_against_the_chip():
    topology = parse_topology("v5e:2x4")
    small = result("small", compiled(4 * GIB, parameters=8 * GIB))
    large = result("large", compiled(5 * GIB, parameters=8 * GIB))
    refused = aot.Result(small.program, 1.0, None, "RESOURCE_EXHAUSTED")
    assert [r.fits(topology) for r in (small, large, refused)] == [True, False, False]
    assert small.bounds(topology) == pytest.approx(
        {"compute": 3.0, "memory": 0.001, "interconnect": 1.0}
    )
    rows = aot.memory_table([small, large, refused], topology).splitlines()
    assert rows[0].split("|")[-2].strip() == "of 15.75"
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows[2:]]
    assert cells[0] == ["small", "1", "2.00", "4.00", "1.00", "8.00", "15.00", "95%"]
    assert cells[1][-2:] == ["16.00", "102%, does not fit"]
    assert cells[2][-1] == "refused"
    assert "compute |" in aot.time_table([small], topology).splitlines()[-1]
    assert len(aot.collective_table([small]).splitlines()) == 4


def test_json_holds_what_tables_hold():
    settings = build(r1_distill_qwen_1p5b.get_config())
    topology = parse_topology("v5e:2x4")
    values = aot.as_json([result("small", compiled(GIB))], topology, settings)
    values = json.loads(json.dumps(values))
    assert values["accelerator_type"] == "v5litepod-8"
    assert values["jax"] == jax.__version__
    [program] = values["programs"]
    assert (program["total"], program["fits"]) == (4 * GIB, True)
    assert program["collectives"]["all-gather"]["count"] == 2


def test_errors_end_the_command_in_one_line():
    def run(*arguments):
        done = subprocess.run(
            [sys.executable, "-m", "experiments.aot", *arguments],
            cwd=ROOT, capture_output=True, text=True,
            env={k: v for k, v in os.environ.items() if k != "TPU_LIBRARY_PATH"},
        )  # fmt: skip
        return done.returncode, done.stderr

    config = f"--config={ROOT}/experiments/configs/attnrl_graph.py"
    code, said = run(config, "--topology=v5e:2x2x2")
    assert code == 2
    assert "error: topology 'v5e:2x2x2': v5e has 2 dimensions; got 3" in said
    assert "Traceback" not in said
    code, said = run(config, "--topology=v5e:2x4", "--json=no/such/folder/x.json")
    assert (code, "there is no folder" in said) == (2, True)
    # Without libtpu, which tests have not; where it is installed the model's mesh is refused.
    code, said = run(config, "--topology=v5e:2x4", "--config.mesh.data=3")
    assert code == 2
    assert "requirements-tpu-aot.txt" in said or "does not fit 8 devices" in said


def test_committed_table_is_of_the_committed_results():
    results = aot_table.read_results()
    assert aot_table.page(results) == (aot_table.RESULTS / "README.md").read_text()


def test_table_says_what_does_not_fit():
    found = aot_table.read_results()
    name, result = next(iter(found.items()))
    whole = result | {"programs": [p | {"fits": True} for p in result["programs"]]}
    first = whole["programs"][0]
    refused = {"name": first["name"], "unit": first["unit"], "error": "out of memory"}
    [*_, fits] = aot_table.summary({name: whole}).splitlines()
    [*_, fails] = aot_table.summary(
        {name: whole | {"programs": [refused, *whole["programs"][1:]]}}
    ).splitlines()
    assert fits.split("|")[-2].strip() == "yes"
    assert fails.split("|")[-2].strip() == f"no: {first['name']}"
