"""Every suite's minutes are printed at the end, before pytest's own closing line."""

import os
from collections import defaultdict

import hypothesis
import pytest
from xdist.remote import Producer  # type: ignore[import-untyped]
from xdist.scheduler import LoadFileScheduling  # type: ignore[import-untyped]

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # where libtpu is installed JAX would look for a TPU

hypothesis.settings.register_profile("podlaunch", deadline=None)  # a busy machine is no error; every test has its time limit
hypothesis.settings.load_profile("podlaunch")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--chaos", choices=("short", "full"), default="short", help="full: also the tests that are marked long")
    parser.addoption("--chaos-seed", type=int, default=None, help="of the random schedules of faults; by default a new one each time")


_seconds: defaultdict[str, float] = defaultdict(float)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _seconds[report.nodeid.split("/")[1]] += report.duration


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for suite, seconds in sorted(_seconds.items()):
        terminalreporter.write_line(f"{suite}: {seconds / 60:.1f} min")


ON_ONE_CLUSTER = ("tests/chaos/test_faults.py", "tests/chaos/test_hosts.py")
"""What the short form takes of them goes to one worker, one after another: to start their cluster twice takes longer than most of it."""


class OneClusterForBoth(LoadFileScheduling):  # type: ignore[misc]
    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return ON_ONE_CLUSTER[0] if file in ON_ONE_CLUSTER else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadFileScheduling | None:
    if config.getoption("dist") == "loadfile" and config.getoption("--chaos") == "short":
        return OneClusterForBoth(config, log)
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--chaos") == "full":
        return
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.skip(reason="a long one: run with --chaos=full"))
