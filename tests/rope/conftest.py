import collections

import pytest
from fastpe._load import _C

_RAN = collections.defaultdict(set)


@pytest.fixture(params=_C.available_isas())
def isa(request):
    before = _C.current_isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


def pytest_runtest_logreport(report):
    if report.when == "call" and report.passed and "test_rope_golden.py::test_case[" in report.nodeid:
        method, case = report.nodeid.split("[", 1)[1].rstrip("]").rsplit("-", 1)[0].split(".", 1)
        _RAN[method].add(case)


def pytest_terminal_summary(terminalreporter):
    if _RAN:
        counts = ", ".join(f"{method} {len(cases)}" for method, cases in sorted(_RAN.items()))
        terminalreporter.write_line(f"rope golden cases run: {counts}")
