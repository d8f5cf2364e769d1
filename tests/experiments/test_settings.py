"""Unknown, mistyped and contradictory settings are refused by name."""

from __future__ import annotations

import pytest

from experiments.settings import METHODS, SettingError, build, default_config


def test_defaults_are_the_papers():
    train = build(default_config()).train
    assert (train.num_problems, train.num_responses) == (64, 6)
    assert (train.prompt_budget, train.response_budget) == (1024, 8192)
    assert (train.branching.num_positions, train.branching.num_continuations) == (2, 2)
    assert (train.branching.delta, train.branching.min_distance) == (4, 512)
    assert train.loss.kl_beta == 1e-3
    assert train.optimizer.learning_rate == 1e-6
    assert train.rows_per_problem == 30


@pytest.mark.parametrize(
    ("method", "rule", "adaptive"),
    [("attnrl", "fci", True), ("treerl", "entropy", False), ("random", "random", False),
     ("grpo", "none", False)],
)  # fmt: skip
def test_a_method_is_one_setting(method, rule, adaptive):
    config = default_config()
    config.method = method
    train = build(config).train
    assert train.branching.rule == rule
    assert train.expansion.filter_easy is adaptive
    assert train.expansion.expand_by_difficulty is adaptive
    # Everything else is equal.
    other = build(default_config()).train
    assert train.batch_size == other.batch_size
    assert train.schedule == other.schedule
    assert train.optimizer == other.optimizer
    assert method in METHODS


def test_each_part_can_be_switched_on_its_own():
    config = default_config()
    config.branching.rule = "random"
    config.expansion.filter_easy = False
    config.batch_size.adaptive = False
    config.schedule = "on_policy"
    train = build(config).train
    assert train.branching.rule == "random"
    assert not train.expansion.filter_easy
    assert train.expansion.expand_by_difficulty
    assert not train.batch_size.adaptive
    assert train.schedule == "on_policy"


def changed(path, value):
    config = default_config()
    section = config
    *groups, name = path.split(".")
    for group in groups:
        section = section[group]
    with section.ignore_type(), section.unlocked():
        section[name] = value
    return config


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("method", "ppo", "method must be one of attnrl"),
        ("branching.rules", "fci", "unknown setting branching.rules; known:.*rule"),
        ("mesh.sampling_devices", 2, "mesh.sampling_devices needs overlap"),
        ("learning_rate", 1.0, "unknown setting learning_rate; known:.*optimizer"),
        ("branching.rule", "attention", "branching: .*rule='attention'"),
        ("branching.rule", "none", "branching.rule is 'none', but method attnrl has entropy or"),
        ("num_problems", 0, "num_problems must be >= 1"),
        ("num_problems", 1.5, "num_problems must be int"),
        ("num_problems", True, "num_problems must be int"),
        ("optimizer.learning_rate", "fast", "optimizer.learning_rate must be float"),
        ("schedule", "asynchronous", "schedule must be one of off_policy, on_policy"),
        ("model.sampling_dtype", "half", "model.sampling_dtype must be empty or one of"),
        ("temperature", 0.0, "temperature must be at least 0.0001 in training"),
        ("eval_temperature", -1.0, "eval_temperature must be 0 or at least 0.0001"),
        ("seed", 2**32, "seed must be within"),
        ("optimizer.weight_decay", float("inf"), "optimizer.weight_decay must be >= 0"),
        ("sampler.cache_length", 100, "sampler.cache_length 100 is below prompt_budget"),
        ("prompt.use_chat_template", "sometimes", "use_chat_template must be 'auto', 'always'"),
        ("loss.aggregation", "sum", "aggregation='sum'"),
        ("data.held_out", "x.jsonl", "data.held_out is given without data.train"),
        ("batch_size.bounds", [2.0, 1.0], "bounds"),
        ("branching", 3, "branching must be a group of settings"),
    ],
)
def test_bad_settings_are_named(path, value, message):
    with pytest.raises(SettingError, match=message):
        build(changed(path, value))


@pytest.mark.parametrize(("method", "rule"), [("grpo", "fci"), ("treerl", "random")])
def test_a_method_with_the_rule_of_another_is_a_contradiction(method, rule):
    config = changed("branching.rule", rule)
    config.method = method
    with pytest.raises(SettingError, match=f"branching.rule is '{rule}', but method {method} has"):
        build(config)
