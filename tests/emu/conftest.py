"""Loads the emulator's test module."""

from __future__ import annotations

import sys

import emulated
import pytest


@pytest.fixture(scope="session")
def emu():
    """The module fastpe_emu_tests."""
    folder = str(emulated.build("fastpe_emu_tests"))
    if folder not in sys.path:
        sys.path.insert(0, folder)
    import fastpe_emu_tests

    return fastpe_emu_tests


@pytest.fixture(autouse=True)
def default_options(request):
    """Every test starts, and leaves, with the default schedule."""
    yield
    if "emu" in request.fixturenames:
        request.getfixturevalue("emu").set_options()
