"""Says at the end of every test run what was left out: each skip with its reason, each mark with its count.

Two processes run the tests (pytest-xdist; `-n 0` for one), whole files each, so that a file's fixtures are made once:
the files that start Ray one after another in one of them, since they mostly wait, the others beside them. And the
folder of Ray's files.
"""

import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # two times two threads on two cores wait for each other

if not Path("/dev/nvidiactl").exists():  # without a GPU its kernels are interpreted; Triton must know when it is loaded
    os.environ.setdefault("TRITON_INTERPRET", "1")

LEFT_OUT: pytest.StashKey[Counter] = pytest.StashKey()
START_RAY = {"test_certify", "test_chaos", "test_launch_placement", "test_launch_run", "test_launch_submit_runs"}
MARKS = ("slow", "gpu", "slurm", "sample", "simgrid", "netns")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LEFT_OUT] = Counter()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Its own, for pytest 9.2 hides the names of groups from xdist 3.8's `--dist loadgroup`."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            stem = Path(nodeid.partition("::")[0]).stem
            return "ray" if stem in START_RAY else stem

    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first."""
    items.sort(key=lambda item: item.path.stem not in START_RAY)


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        marks = [mark for mark in MARKS if item.get_closest_marker(mark)]
        item.config.stash[LEFT_OUT][" and ".join(marks)] += 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:  # in a process of xdist
        output["left_out"] = dict(session.config.stash[LEFT_OUT])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    """Every process has left out the same."""
    node.config.stash[LEFT_OUT] |= Counter(getattr(node, "workeroutput", {}).get("left_out", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    reasons = {line.partition(":")[0]: line.partition(": ")[2] for line in config.getini("markers")}
    skipped = terminalreporter.stats.get("skipped", [])
    lines = []
    for marks, count in sorted(config.stash[LEFT_OUT].items()):
        why = "; ".join(reasons[mark] for mark in marks.split(" and ") if mark)
        lines.append(f"{count} {marks}: {why}" if marks else f"{count} unmarked: not chosen by -k or -m")
    for reason, count in sorted(Counter(_reason(report) for report in skipped).items()):
        lines.append(f"{count} skipped: {reason}")
    if lines:
        terminalreporter.section("left out")
        for line in lines:
            terminalreporter.line(line)


def _reason(report: pytest.TestReport) -> str:
    return report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else report.longreprtext


@pytest.fixture(scope="session")
def ray_folder() -> Iterator[Path]:
    """Where Ray keeps its sessions in tests; its path is short, as Unix sockets need."""
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        yield Path(folder)
