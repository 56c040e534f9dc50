from golden_files import pytest_runtest_logreport, pytest_terminal_summary  # noqa: F401
