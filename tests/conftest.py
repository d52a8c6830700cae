"""Every suite's minutes are printed at the end, before pytest's own closing line."""

from collections import defaultdict

import hypothesis
import pytest

hypothesis.settings.register_profile("podlaunch", deadline=None)  # a busy machine is no error; every test has its time limit
hypothesis.settings.load_profile("podlaunch")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--chaos", choices=("short", "full"), default="short", help="how many of the tests under tests/chaos to run")


_seconds: defaultdict[str, float] = defaultdict(float)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _seconds[report.nodeid.split("/")[1]] += report.duration


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for suite, seconds in sorted(_seconds.items()):
        terminalreporter.write_line(f"{suite}: {seconds / 60:.1f} min")
