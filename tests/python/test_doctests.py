"""The examples of the public docstrings."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import fastpe

COMPILED = ("_C", "libfastpe_cpu", "libfastpe_ops")
MODULES = sorted(
    m.name
    for m in pkgutil.walk_packages(fastpe.__path__, "fastpe.")
    if m.name.rpartition(".")[2] not in (*COMPILED, "__main__")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def test_public_names_have_examples():
    """Every public function and class of the Python layer shows its use."""
    missing = []
    for module in (fastpe.bias, fastpe.mask, fastpe.nn, fastpe.recipes, fastpe.reference, fastpe.region):
        for name, thing in vars(module).items():
            own = getattr(thing, "__module__", "") == module.__name__ and callable(thing) and not name.startswith("_")
            if own and ">>>" not in (thing.__doc__ or ""):
                missing.append(f"{module.__name__}.{name}")
    allowed = {"fastpe.bias.Bias", "fastpe.reference.softmax_attention", "fastpe.reference.dense_parts"}
    assert set(missing) <= allowed, sorted(set(missing) - allowed)
