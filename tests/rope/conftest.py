import pytest
from fastpe._load import _C


@pytest.fixture(params=_C.available_isas())
def isa(request):
    before = _C.current_isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)
