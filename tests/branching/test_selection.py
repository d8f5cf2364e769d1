import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnrl_jax.algorithms.adaptive import (
    AdaptiveExpansionConfig,
    CumulativeMean,
    attention_level,
    select_expanded,
)
from attnrl_jax.branching.positions import BranchingConfig, BranchPositions, check_positions
from attnrl_jax.branching.selection import (
    best_step_positions,
    branch_positions,
    entropy_branch_positions,
    fci_branch_positions,
    random_branch_positions,
)
from attnrl_jax.branching.steps import count_steps, step_bounds
from tests.golden_data import RecordedChoices, load_json, question_arrays

NUM_RANGES = 64
NUM_QUESTIONS = 10
fci_positions_jit = jax.jit(fci_branch_positions, static_argnums=4)


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("session", range(5))
def test_golden_sessions(session, jitted):
    """Expansion, easy filter and branch offsets of every question; the running mean persists."""
    session = load_json("branch_selection")["sessions"][session]
    config = BranchingConfig.golden(
        num_positions=session["N"], min_distance=session["token_distance"]
    )
    easy_mean, seen = CumulativeMean(), 0
    for batch in session["batches"]:
        questions = batch["questions"]
        arrays = [question_arrays(question, NUM_RANGES) for question in questions]
        level = np.array([attention_level(a["fci"], a["num_steps"]) for a in arrays])
        np.testing.assert_allclose(level, [q["mean_fci"] for q in questions], rtol=1e-12)
        mixed = [question for question in questions if question["chosen"] is not None]
        recorded = RecordedChoices([q["choice_pool"] for q in mixed], [q["chosen"] for q in mixed])
        correct = np.array([question["acc"] for question in questions]) == 1
        expansion, easy_mean = select_expanded(
            correct, level, easy_mean, recorded, AdaptiveExpansionConfig()
        )
        assert recorded.exhausted()
        assert easy_mean.count == batch["ra_count"]
        np.testing.assert_allclose(easy_mean.mean, batch["ra_mean"], rtol=1e-6)
        np.testing.assert_array_equal(expansion.dropped, [q["filtered"] for q in questions])

        n = session["n"]
        stacked = {key: np.concatenate([a[key] for a in arrays]) for key in arrays[0]}
        if jitted:
            pad = NUM_QUESTIONS * n - len(stacked["fci"])
            stacked = {
                key: jnp.asarray(np.concatenate([x, np.repeat(x[:1], pad, axis=0)]))
                for key, x in stacked.items()
            }
        positions = (fci_positions_jit if jitted else fci_branch_positions)(
            *(stacked[key] for key in ("fci", "starts", "ends", "num_steps")), config
        )
        for q, question in enumerate(questions):
            assert list(np.flatnonzero(expansion.expanded[q])) == question["expanded"]
            assert len(question["expanded"]) == question["n_expand"]
            for response, expected in question["positions"].items():
                row = q * n + int(response)
                assert np.asarray(positions.valid[row]).all()
                assert list(np.asarray(positions.offsets[row])) == expected
                seen += 1
    assert seen > 30


def walk(fci, starts, ends, num_steps, config):
    """One response, one candidate at a time, as the rule is told in words; range 0 the prompt."""
    f = fci[1 : num_steps + 1]
    threshold = np.quantile(f.astype(np.float64), config.quantile) if num_steps else 0.0
    if threshold == 0 and (f > 0).any():
        threshold = f[f > 0].min()
    candidates = [k for k in range(2, num_steps + 1) if fci[k] >= threshold]
    if config.fill == "none":
        candidates = [k for k in candidates if fci[k] > 0]
    if config.order == "score":
        candidates.sort(key=lambda k: (-fci[k], k))
    taken = []
    for k in candidates:
        apart = all(starts[max(k, t)] - ends[min(k, t)] >= config.min_distance for t in taken)
        if starts[k] >= config.min_distance and apart and len(taken) < config.num_positions:
            taken.append(k)
    by_importance = {k for k in taken if fci[k] > 0}
    if config.fill == "first_steps" and num_steps >= 2:
        steps = range(2, num_steps + 1)
        queue = [k for k in steps if k not in taken] + list(steps) * config.num_positions
        taken += queue[: config.num_positions - len(taken)]
    offsets = sorted(int(starts[k] - ends[0]) for k in taken)
    return offsets, len(by_importance)


def random_responses(count=120, num_ranges=24, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 9, (count, num_ranges))
    num_steps = rng.integers(1, num_ranges, count)
    lengths *= np.arange(num_ranges) <= num_steps[:, None]
    ends = np.cumsum(lengths, axis=1)
    starts = ends - lengths
    # Few distinct values, so that ties are common, and responses of zeros alone.
    fci = rng.integers(0, 5, (count, num_ranges)).astype(np.float32) / 8
    fci *= rng.random((count, 1)) < 0.9
    fci[:, :2] = 0
    fci *= np.arange(num_ranges) <= num_steps[:, None]
    return fci, starts, ends, num_steps


@pytest.mark.parametrize("order", ["score", "position"])
@pytest.mark.parametrize("fill", ["none", "first_steps"])
@pytest.mark.parametrize(
    ("min_distance", "num_positions", "quantile"), [(0, 2, 0.75), (6, 3, 0.5), (20, 2, 0.8)]
)
def test_equals_a_walk_over_candidates(order, fill, min_distance, num_positions, quantile):
    config = BranchingConfig(
        order=order,
        fill=fill,
        min_distance=min_distance,
        num_positions=num_positions,
        quantile=quantile,
    )
    responses = random_responses()
    positions = fci_branch_positions(*responses, config)
    counts = set()
    for row, response in enumerate(zip(*responses, strict=True)):
        offsets, num_by_importance = walk(*response, config)
        valid = positions.valid[row]
        assert list(positions.offsets[row, valid]) == offsets
        assert not valid[len(offsets) :].any()
        assert not positions.offsets[row, ~valid].any()
        assert positions.by_importance[row].sum() == num_by_importance
        starts = response[1]
        np.testing.assert_array_equal(
            starts[positions.steps[row, valid]] - response[2][0], positions.offsets[row, valid]
        )
        counts.add(len(offsets))
    assert {0, num_positions} <= counts


# Prompt of 10 tokens, then seven steps of 5; ranges 0..7, padded to 9.
STEP_IDS = np.concatenate([np.zeros(10, int), np.repeat(np.arange(1, 8), 5), np.full(3, -1)])[None]
STARTS, ENDS = step_bounds(STEP_IDS, 9)
NUM_STEPS = count_steps(STEP_IDS)
FCI = np.array([[0, 0, 0.2, 0.9, 0.8, 0, 0.5, 0, 0]], np.float32)


@pytest.mark.parametrize(
    ("settings", "offsets", "by_importance"),
    [
        # The threshold is the FCI at rank 0.5 · 6: 0.2.
        ({"min_distance": 0, "quantile": 0.5}, [10, 15], 2),
        ({"min_distance": 0, "quantile": 0.5, "order": "position"}, [5, 10], 2),
        # Steps 3 and 4 touch; between 3 and 6 lie ten tokens.
        ({"min_distance": 1, "quantile": 0.5}, [10, 25], 2),
        ({"min_distance": 10, "quantile": 0.5}, [10, 25], 2),
        # Step 3 and nothing else, or filled with the second step.
        ({"min_distance": 11, "quantile": 0.5}, [10], 1),
        ({"min_distance": 11, "quantile": 0.5, "fill": "first_steps"}, [5, 10], 1),
        # The default distance: no step of a short response.
        ({}, [], 0),
        ({"fill": "first_steps", "num_positions": 3}, [5, 10, 15], 0),
        # Rank 0.8 · 6 = 4.8 interpolates to 0.74; rank 5 is 0.8.
        ({"min_distance": 0, "quantile": 0.8}, [10, 15], 2),
        ({"min_distance": 0, "quantile": 0.8, "num_positions": 4}, [10, 15], 2),
        ({"min_distance": 0, "quantile": 1.0}, [10], 1),
        # Rank 1.2 is a zero, so the smallest positive FCI is the threshold.
        ({"min_distance": 0, "quantile": 0.2, "num_positions": 5}, [5, 10, 15, 25], 4),
    ],
)
def test_hand_computed_positions(settings, offsets, by_importance):
    positions = fci_branch_positions(FCI, STARTS, ENDS, NUM_STEPS, BranchingConfig(**settings))
    assert list(positions.offsets[positions.valid]) == offsets
    assert positions.by_importance.sum() == by_importance


def test_after_think_steps_are_refused_unless_asked_for():
    choose = functools.partial(fci_branch_positions, FCI, STARTS, ENDS, NUM_STEPS)
    config = {"min_distance": 0, "quantile": 0.5, "num_positions": 2}
    refused = choose(BranchingConfig(**config), np.array([4]))
    assert list(refused.offsets[refused.valid]) == [5, 10]
    allowed = choose(BranchingConfig(**config, after_think=True), np.array([4]))
    assert list(allowed.offsets[allowed.valid]) == [10, 15]
    none_left = choose(BranchingConfig(**config), np.array([1]))
    assert not none_left.valid.any()


def test_nothing_is_chosen_where_nothing_has_importance():
    config = BranchingConfig(min_distance=0)
    assert not fci_branch_positions(FCI * 0, STARTS, ENDS, NUM_STEPS, config).valid.any()
    golden = fci_branch_positions(
        FCI * 0, STARTS, ENDS, NUM_STEPS, BranchingConfig.golden(min_distance=0)
    )
    assert golden.offsets.tolist() == [[5, 10]]
    assert not golden.by_importance.any()


@pytest.mark.parametrize("fill", ["none", "first_steps"])
@pytest.mark.parametrize("steps", [0, 1])
def test_one_step_has_no_position(steps, fill):
    """The released program never ends on a response of one step."""
    step_ids = np.array([[0, 0] + [1] * (4 * steps) + [-1] * 3])
    starts, ends = step_bounds(step_ids)
    config = BranchingConfig(min_distance=0, fill=fill)
    fci = np.ones(starts.shape, np.float32)
    positions = fci_branch_positions(fci, starts, ends, count_steps(step_ids), config)
    assert not positions.valid.any()
    assert not positions.offsets.any()


@pytest.mark.parametrize("jitted", [False, True])
def test_entropy_positions(jitted):
    entropy = np.array([[9, 9, 5, 1, 3, 2, 3, 8, 7], [9, 9, 4, 6, 0, 0, 0, 0, 0]], np.float32)
    step_ids = np.array([[0, 0, 1, 1, 2, 2, 3, 3, -1], [0, 0, 1, 1, -1, -1, -1, -1, -1]])
    arguments = (entropy, step_ids, np.array([2, 2]), np.array([8, 4]))
    config = BranchingConfig(rule="entropy", num_positions=2, min_distance=512)
    function = entropy_branch_positions
    if jitted:
        arguments = tuple(jnp.asarray(x) for x in arguments)
        function = jax.jit(entropy_branch_positions, static_argnums=4)
    positions = function(*arguments, config)
    # First and last response tokens are left out; ties go to the earlier, order is by offset.
    np.testing.assert_array_equal(positions.offsets, [[2, 4], [0, 0]])
    np.testing.assert_array_equal(positions.steps, [[2, 3], [0, 0]])
    np.testing.assert_array_equal(positions.valid, [[True, True], [False, False]])
    assert not np.asarray(positions.by_importance).any()
    refused = function(*arguments, config, arguments[2] * 0 + 2)
    np.testing.assert_array_equal(refused.offsets[0], [1, 0])
    np.testing.assert_array_equal(refused.valid[0], [True, False])


def test_random_positions():
    config = BranchingConfig(rule="random", min_distance=5, num_positions=2)
    many = [np.repeat(x, 400, axis=0) for x in (STARTS, ENDS, NUM_STEPS)]
    positions = random_branch_positions(np.random.default_rng(0), *many, config)
    again = random_branch_positions(np.random.default_rng(0), *many, config)
    np.testing.assert_array_equal(positions.offsets, again.offsets)
    offsets = positions.offsets[positions.valid.all(axis=1)]
    assert (np.diff(offsets, axis=1) >= 10).all()
    assert set(offsets.ravel()) == {5, 10, 15, 20, 25, 30}
    first_step = positions.offsets[positions.valid]
    assert (first_step >= 5).all()
    assert not positions.by_importance.any()
    before = random_branch_positions(np.random.default_rng(0), *many, config, np.full(400, 4))
    assert set(before.offsets[before.valid]) == {5, 10}


@pytest.mark.parametrize("rule", ["fci", "entropy", "random", "none"])
def test_rules_share_one_entry(rule):
    config = BranchingConfig(rule=rule, min_distance=0, quantile=0.5)
    entropy = np.zeros(STEP_IDS.shape, np.float32)
    entropy[0, [13, 31]] = 1
    positions = branch_positions(
        config,
        fci=FCI,
        entropy=entropy,
        step_ids=STEP_IDS,
        prompt_length=np.array([10]),
        length=np.array([45]),
        first_after_think=None,
        rng=np.random.default_rng(1),
    )
    drawn = random_branch_positions(np.random.default_rng(1), STARTS, ENDS, NUM_STEPS, config)
    expected = {
        "fci": [10, 15],
        "entropy": [3, 21],
        "random": drawn.offsets[0].tolist(),
        "none": [],
    }
    assert positions.offsets.shape == (1, 2)
    assert positions.offsets[positions.valid].tolist() == expected[rule]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("rule", "attention"),
        ("order", "random"),
        ("fill", "first"),
        ("num_positions", 0),
        ("num_continuations", 1.5),
        ("delta", -1),
        ("min_distance", -1),
        ("min_distance", True),
        ("quantile", 1.2),
    ],
)
def test_invalid_settings_are_named(setting, value):
    with pytest.raises(ValueError, match=f"branching {setting}="):
        BranchingConfig(**{setting: value})


def test_positions_at_the_steps_of_the_highest_scores():
    """The rule of the user's that is the FCI equals the rule by FCI where every FCI counts."""
    config = BranchingConfig(num_positions=2, min_distance=3, quantile=0.0)
    step_ids = np.arange(24)[None, :] // 4 + np.zeros((3, 1), int)
    scores = np.random.default_rng(0).random((3, 6)).astype(np.float32) + 0.1
    starts, ends = step_bounds(step_ids, 6)
    expected = fci_branch_positions(scores, starts, ends, count_steps(step_ids), config)
    found = best_step_positions(scores, step_ids, config)
    np.testing.assert_array_equal(found.offsets, expected.offsets)
    np.testing.assert_array_equal(found.valid, expected.valid)
    assert found.valid.all()
    assert not found.by_importance.any()
    scores[:, 2:5] = -np.inf
    found = best_step_positions(scores, step_ids, config)
    assert found.steps[found.valid].tolist() == [5, 5, 5]


def test_what_a_rule_returns_is_checked():
    good = best_step_positions(FCI, STEP_IDS, BranchingConfig())
    check_positions(good, np.full(len(FCI), 5), 2)
    with pytest.raises(ValueError, match=r"offsets of shape .* must be an array of \[\d+, 3\]"):
        check_positions(good, np.full(len(FCI), 5), 3)
    with pytest.raises(ValueError, match="returned NoneType; it must return BranchPositions"):
        check_positions(None, np.full(len(FCI), 5), 2)
    wrong = dataclasses.replace(good, offsets=good.offsets.astype(float))
    with pytest.raises(ValueError, match="offsets of type float64; it must be an integer"):
        check_positions(wrong, np.full(len(FCI), 5), 2)
    wrong = dataclasses.replace(good, valid=good.valid.astype(int))
    with pytest.raises(ValueError, match="valid of type int64; it must be bool"):
        check_positions(wrong, np.full(len(FCI), 5), 2)
    twice = np.array([[2, 2]], np.int32)
    with pytest.raises(ValueError, match=r"an offset twice in one response: \[2, 2\]"):
        check_positions(BranchPositions(twice, twice, twice < 0, twice > 0), np.array([5]), 2)
    for offset in (0, 5):
        one = np.array([[offset]], np.int32)
        wrong = BranchPositions(one, one, one < 0, one >= 0)
        with pytest.raises(ValueError, match=f"offset {offset} of a response of 5 tokens"):
            check_positions(wrong, np.array([5]), 1)
