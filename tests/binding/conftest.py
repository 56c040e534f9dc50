from __future__ import annotations

import pytest
import torch
from fastpe._load import _C


@pytest.fixture(params=_C.available_isas())
def isa(request):
    """Runs a test once with every instruction set of this machine."""
    before = _C.current_isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.fixture
def threads():
    """Puts the number of threads back after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
