"""What every test run shares: the outcome of `./dev check` becomes part of pytest's result."""

from __future__ import annotations

import os

import pytest

CHECK_FAILED = os.environ.get("HOMESPUN_CHECK") == "failed"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if CHECK_FAILED:
        terminalreporter.section("./dev check failed", red=True)
        terminalreporter.write_line("Lint or types: the findings are above the test run.")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if CHECK_FAILED and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
