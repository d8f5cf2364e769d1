"""How many cases the properties are asked about."""

from tests.properties import (  # noqa: F401 (their import counts their cases)
    test_model_folders,
    test_packing,
    test_problems,
    test_sampling,
    test_segmentation,
    test_selection,
    test_settings,
    test_trees,
)
from tests.properties.strategies import COUNTS


def test_cases_of_this_folder():
    assert sum(COUNTS) >= 10_000
