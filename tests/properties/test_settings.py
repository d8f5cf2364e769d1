"""Any configuration: settings of the declared types, or a refusal that names a setting."""

from __future__ import annotations

import copy
import dataclasses
import math
import types
import typing
from pathlib import Path

import pytest
from absl import flags
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict, config_flags

from experiments.commands import config_fault, without_traceback
from experiments.settings import METHODS, SettingError, build, default_config
from tests.properties.strategies import FLOATS, HUGE, JSON_VALUES, STRANGE_TEXT, cases

EXPERIMENT = Path(__file__).parents[2] / "experiments" / "configs" / "attnrl_graph.py"
DEFAULTS = default_config().to_dict()


def places_of(values, prefix=()):
    """Every setting and every group of settings, by its path."""
    for name, value in values.items():
        yield (*prefix, name)
        if isinstance(value, dict):
            yield from places_of(value, (*prefix, name))


PLACES = sorted(places_of(DEFAULTS))
LEAVES = [".".join(place) for place in PLACES if not isinstance(DEFAULTS.get(place[0]), dict)]
LEAVES += [".".join(place) for place in PLACES if len(place) > 1]
# Values that some setting allows, so that much is accepted, beside anything at all.
USUAL = st.sampled_from(
    [0, 1, 2, 64, 8192, 0.0, 0.5, 1.0, 1e-3, True, False, None, "", "none", "auto", "fci",
     "entropy", "random", "initial", "on_policy", "scorer", "sampler", "tree", "rows", "position",
     "problem_std", "seq-mean-token-sum", "micro-batch", "attnrl", "grpo", "+*", "x.jsonl",
     [0.5, 2.0], [1, 2, 3]]
)  # fmt: skip
VALUES = USUAL | HUGE | FLOATS | JSON_VALUES
CHANGES = st.lists(st.tuples(st.sampled_from(PLACES), VALUES), min_size=1, max_size=3)
UNKNOWN = st.none() | st.tuples(
    st.sampled_from([place for place in PLACES if len(place) > 1]), STRANGE_TEXT
)


def set_in(values, place, value):
    *groups, name = place
    for group in groups:
        values = values.get(group)
        if not isinstance(values, dict):
            return
    values[name] = copy.deepcopy(value)


def assert_typed(value, hint, place):
    """Whether a value is what its field was declared as, with every part of it."""
    options = typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        assert type(value) is hint, place
        hints = typing.get_type_hints(hint)
        for field in dataclasses.fields(hint):
            assert_typed(getattr(value, field.name), hints[field.name], f"{place}.{field.name}")
    elif typing.get_origin(hint) in (typing.Union, types.UnionType):
        if value is None:
            assert types.NoneType in options, place
        else:
            [hint] = [option for option in options if option is not types.NoneType]
            assert_typed(value, hint, place)
    elif typing.get_origin(hint) is typing.Literal:
        assert value in options, place
    elif typing.get_origin(hint) is tuple:
        assert type(value) is tuple, place
        for part, option in zip(value, options, strict=True):
            assert_typed(part, option, place)
    else:
        assert type(value) is hint, place
        assert not (hint is float and math.isnan(value)), place
        assert not (hint is int and abs(value) > 2**63), place


def looked_up(values, place):
    for part in place:
        values = values.get(part) if isinstance(values, dict) else None
    return values


def setting_of(settings, place):
    value = settings if hasattr(settings, place[0]) else settings.train
    for part in place:
        value = getattr(value, part)
    return value


def is_same(found, given_):
    """Lists become tuples and integers floats; nothing else changes its type."""
    if isinstance(given_, list):
        return all(is_same(*pair) for pair in zip(found, given_, strict=True))
    kinds = (type(found), type(given_))
    return found == given_ and (kinds[0] is kinds[1] or kinds == (float, int))


def built(config):
    """The settings, of the declared types, or the words of the refusal."""
    try:
        settings = build(config)
    except SettingError as error:
        return str(error)
    hints = typing.get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        assert_typed(getattr(settings, field.name), hints[field.name], field.name)
    assert settings.method in METHODS
    assert build(config) == settings
    return settings


@cases(900)
@given(CHANGES, UNKNOWN)
def test_what_is_given_is_typed_or_named(changes, unknown):
    values = copy.deepcopy(DEFAULTS)
    named = {part for place, _ in changes for part in place}
    if unknown is not None:
        place, name = unknown
        # ml_collections itself refuses names with dots.
        name = name.replace(".", "") + "_"
        set_in(values, (*place[:-1], name), 1)
        named.add(name)
    for place, value in changes:
        set_in(values, place, value)
        if isinstance(value, dict):
            named |= {str(key) for key in value}
    try:
        config = ConfigDict(values)
    except (ValueError, OverflowError, TypeError):
        # Not a configuration that a file could make: a key with a dot in a group of mixed kinds.
        return
    before = config.to_dict()
    settings = built(config)
    if isinstance(settings, str):
        assert any(name in settings for name in named)
    elif unknown is not None:
        group = values
        for part in unknown[0][:-1]:
            group = group[part]
        assert name not in group, "an unknown setting is never passed over"
    else:
        for place, _ in changes:
            given_, found = looked_up(values, place), setting_of(settings, place)
            assert given_ is None or isinstance(given_, dict) or is_same(found, given_)
    assert repr(config.to_dict()) == repr(before)


@cases(200)
@given(st.sampled_from(PLACES), st.sampled_from([math.nan, 2**63, -(2**64), 10**5000]))
def test_numbers_beyond_any_setting_are_refused_everywhere(place, value):
    """Bugs: nan passed for a loss's bound, integers of thousands of digits for numbers of anything;
    an integer too large for a float, and a method that is a list, ended in bare errors."""
    values = copy.deepcopy(DEFAULTS)
    set_in(values, place, value)
    refusal = built(ConfigDict(values))
    assert isinstance(refusal, str)
    assert place[-1] in refusal
    assert len(refusal) < 6000
    set_in(values, place, [value])
    assert isinstance(built(ConfigDict(values)), str)


def parsed(*arguments):
    """Flags as the commands define them, or the exception that ended their parsing."""
    values, given_ = flags.FlagValues(), ["run", *arguments]
    try:
        # Overrides are looked for in the command's arguments before flags are parsed.
        config_flags.DEFINE_config_file(
            "config", str(EXPERIMENT), "", flag_values=values, sys_argv=given_
        )
        values(given_)
        return values.config
    except Exception as error:
        return error


WORDS = (
    STRANGE_TEXT
    | st.sampled_from(["1", "0", "-1", "0.5", "nan", "inf", "-inf", "1e999", "None", "True", "fci",
                       "(1,2)", "(0.5,2.0)", "[1", "9" * 5000, "1" * 400, "{}", "'", '"', "=", ""])
)  # fmt: skip


@cases(250)
@given(st.lists(st.tuples(st.sampled_from(LEAVES) | STRANGE_TEXT, WORDS), max_size=2))
def test_a_command_line_is_typed_or_named(overrides):
    found = parsed(*(f"--config.{name}={word}" for name, word in overrides))
    if isinstance(found, Exception):
        fault = config_fault(found)
        assert fault.strip()
        assert "Traceback" not in fault
        assert overrides
    else:
        settings = built(found)
        if isinstance(settings, str):
            assert any(name.split(".")[-1] in settings for name, _ in overrides)


def test_overrides_reach_the_settings():
    settings = built(parsed("--config.seed=5", "--config.branching.delta=3"))
    assert (settings.train.seed, settings.train.branching.delta) == (5, 3)


RAISED = st.sampled_from(["ValueError", "KeyError", "TypeError", "RuntimeError", "AttributeError"])


@cases(80)
@given(RAISED, st.text("ab :\n'Error.", max_size=12))
def test_a_file_that_raises_is_told_in_its_own_words(tmp_path, kind, words):
    path = tmp_path / "raises.py"
    path.write_text(f"def get_config():\n    raise {kind}({'said ' + words!r})\n")
    fault = config_fault(parsed(f"--config={path}"))
    assert "said" in fault
    assert "Traceback" not in fault
    assert "\n" not in fault


@cases(150)
@given(st.text("a b:\n.'", max_size=20), st.text("a b:\n.'E", max_size=20))
def test_a_traceback_is_left_out_wherever_it_stands(before, after):
    """Bug: one that nothing follows was an IndexError."""
    told = without_traceback(f"{before}Traceback (most recent call last):{after}")
    assert told.startswith(before.strip())
    assert "Traceback" not in told
    for error in (ValueError, KeyError, AttributeError, RuntimeError):
        assert isinstance(config_fault(error(told)), str)


def test_the_words_of_a_file_that_raises_are_whole(tmp_path):
    """Bugs: of "no such file: x" only x was told, and of an error of several lines what came after
    the last that was indented."""
    path = tmp_path / "raises.py"
    path.write_text(
        "def get_config():\n    raise ValueError('no such file: x\\n  is: there\\nnow')"
    )
    assert config_fault(parsed(f"--config={path}")) == "no such file: x is: there now"


@pytest.mark.parametrize("method", [["attnrl"], {"attnrl": 1}, None, 3, "ATTNRL"])
def test_a_method_is_a_name(method):
    """Bug: a list or a group of settings was an unhashable TypeError."""
    config = ConfigDict({**DEFAULTS, "method": method})
    with pytest.raises(SettingError, match="method must be one of attnrl, treerl, random, grpo"):
        build(config)
