"""docs/whatif.md: its commands are those that made it, and jobs of every table, priced again, give its rows."""

import pytest

from launch import whatif
from scripts import import_mlperf
from scripts.whatif_page import LOG, MACHINES, PAGE, QUESTIONS, RUN, page, priced, words

TEXT = PAGE.read_text(encoding="utf-8")


def rows(command: str) -> dict[str, list[str]]:
    """Job number -> cells, of the table that follows a command on the page."""
    table = TEXT.partition(f"python -m launch.emulate {command}\n```\n\n```\n")[2].partition("```")[0]
    return {line.split()[0]: line.split() for line in table.splitlines()[2:-1]}


def cells(text: list[str]) -> list[str]:
    return " ".join(text).split()


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.name)
def test_the_last_row_of_a_sweep(question):
    jobs, found = words(question.command), rows(question.command)
    assert list(found) == [str(number) for number in range(1, len(jobs) + 1)], "not the command's jobs"
    assert found[str(len(jobs))][-13:] == cells(whatif._cells(priced(jobs[-1]).value.result))[-13:]
    assert PAGE.with_name(f"whatif_{question.name}.png").exists()


def test_the_published_run_on_a_machine_of_the_page(tmp_path):
    run = import_mlperf.write_run(LOG, tmp_path / "pcl")
    job = priced([f"run={RUN}", "mesh=atlas900_1024"], run)
    found = rows(MACHINES)
    assert found["1"][1:-1] == ["atlas900_1024", *cells(whatif._cells(job.value.result))]
    assert found["1"][-1] == f"{job.value.result['time_to_target_s']:.2f}" and len(found) == 5


@pytest.mark.slow
def test_the_whole_page(tmp_path):
    sweeps = {one.name: [priced(given) for given in words(one.command)] for one in QUESTIONS}
    assert page(sweeps, import_mlperf.write_run(LOG, tmp_path / "pcl")) == TEXT
