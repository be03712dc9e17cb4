"""Says at the end of every test run what was left out: each skip with its reason, each mark with its count.

And the folder of Ray's files.
"""

import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

LEFT_OUT: pytest.StashKey[Counter] = pytest.StashKey()
MARKS = ("slow", "gpu", "slurm", "sample", "simgrid")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LEFT_OUT] = Counter()


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        marks = [mark for mark in MARKS if item.get_closest_marker(mark)]
        item.config.stash[LEFT_OUT][" and ".join(marks)] += 1


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
