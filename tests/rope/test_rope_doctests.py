import doctest
import importlib

import pytest

MODULES = ("_rope", "_rope_rules", "_rope_hf", "rotary", "positions", "_nn_rope", "_reference_rope")


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    result = doctest.testmod(importlib.import_module(f"fastpe.{name}"))
    assert result.attempted > 0 and result.failed == 0
