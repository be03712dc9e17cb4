"""Writes docs/whatif.md and its plots: what sweeps of `launch.emulate` say, and a published run on other machines.

    python scripts/whatif_page.py

A test prices jobs of every sweep again and compares.
"""

import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from launch import whatif  # noqa: E402
from launch.compose import Job, expand  # noqa: E402
from launch.emulate import configuration, price  # noqa: E402
from launch.retime import price as retimed  # noqa: E402
from launch.retime import table as curve  # noqa: E402
from launch.whatif import Priced  # noqa: E402
from scripts import import_mlperf  # noqa: E402
from train.metrics import write_aside  # noqa: E402

PAGE = ROOT / "docs" / "whatif.md"
LOG = PAGE.parent / "mlperf" / "pcl_1024_result_0.txt"
RUN = "runs/pcl"
HEAD = """# What if

Written by `python scripts/whatif_page.py`. Every table is what the command above it prints at the end, every plot what
it leaves in `out=DIR` (with a CSV). The recipe is the record's (`experiment=imagenet_atlas900`) where nothing else is
said. All times are **emulated**, with the emulator's interval; the claim is **claimed**.

"""
RETIMED = """## A published run on another machine

The first of PCL's five runs of MLPerf v1.0, 38.75 s on 1,024 Ascend 910 Pro A ([its figures]({log})), is
imported as a run, and its steps and evaluations get other machines' clocks. The accuracy stays the published one;
`run=` takes a finished run of this program just so. Its own time is **published**.

"""


class Question(NamedTuple):
    name: str
    asks: str
    command: str
    says: str


QUESTIONS = (
    Question(
        "chips",
        "How many chips?",
        "-m mesh=atlas900_64,atlas900_256,atlas900_512,atlas900_1024,atlas900_2048,atlas900_4096",
        "The batch stays the record's: more chips have fewer images each (`scaling=weak` keeps those instead).",
    ),
    Question(
        "allreduce",
        "Which all-reduce, in which dtype?",
        "-m collective=auto,torus_2d,halving_doubling,nhr,double_tree,ring wire_dtype=fp16,fp32",
        "`auto` is the machine's own choice, hierarchical; `ring` goes once through all 1,024 chips.",
    ),
    Question(
        "overlap",
        "What do slow chips and hidden communication cost?",
        "-m chip.jitter=0,0.0313,0.1 network.calibration.overlap=0,0.409,1",
        "`chip.jitter` is the deviation of a chip's compute time (3.13 % is the catalog's for Ascend 910): a step\n"
        "waits for the slowest of 1,024. `overlap` is the share of the backward pass that may hide communication\n"
        "(0.409 is fitted).",
    ),
    Question(
        "faults",
        "What do a larger batch and broken parts cost?",
        "-m epochs=auto global_batch_size=16384,32768,65536 faults=none,slow_chip,slow_link,dead_chip",
        "Epochs are MLPerf's reference points at each batch. [Each fault's model](faults.md).",
    ),
)
MACHINES = "-m run=runs/pcl mesh=atlas900_1024,atlas900_2048,cloudmatrix384,dgx_h100,tpu_v4"


def words(command: str) -> list[list[str]]:
    """The overrides of each job of a sweep."""
    jobs = expand([word for word in command.split() if word != "-m"], sweep=True)
    return [[word.lstrip("+") for word in given] for given in jobs]


def priced(given: list[str], run: Path | None = None) -> Job:
    """A job of launch.emulate without its printing; `run` is where the page's RUN lies."""
    config = configuration([word.replace(RUN, str(run)) for word in given])
    result, made, rows = retimed(config) if run else price(config)
    if run:
        result["run"], config["run"] = RUN, RUN
    return Job(given, config, Priced(result, made, rows), "")


def section(question: Question, jobs: list[Job]) -> str:
    ends = sorted(jobs, key=lambda job: job.value.result["time_to_train_s"])
    fast, slow = (
        f"{', '.join(f'{key}={each[jobs.index(job)]}' for key, each in whatif.swept(jobs).items())}: "
        f"{job.value.result['time_to_train_s']:.1f} s"
        for job in (ends[0], ends[-1])
    )
    return "\n".join(
        [
            f"## {question.asks}\n",
            f"{question.says}\nFastest: {fast}. Slowest: {slow}.\n",
            shown(question.command, whatif.table(jobs)),
            f"![{question.asks}](whatif_{question.name}.png)\n\n",
        ]
    )


def shown(command: str, printed: str) -> str:
    return f"```\npython -m launch.emulate {command}\n```\n\n```\n{printed}\n```\n"


def published(run: Path) -> str:
    jobs = [priced(given, run) for given in words(MACHINES)]
    commands = f"python scripts/import_mlperf.py docs/mlperf/{LOG.name} --out {RUN}\n"
    text = shown(MACHINES, whatif.table(jobs)).replace("```\n", f"```\n{commands}", 1)
    one = curve(jobs[1].value.result)
    return text + "\n" + shown(" ".join(jobs[1].words), one).replace("```\n\n```\n", "```\n\nends with\n\n```\n", 1)


def page(sweeps: dict[str, list[Job]], imported: Path) -> str:
    parts = [section(question, sweeps[question.name]) for question in QUESTIONS]
    return HEAD + "".join(parts) + RETIMED.format(log=LOG.relative_to(PAGE.parent)) + published(imported)


def main() -> int:
    sweeps = {one.name: [priced(given) for given in words(one.command)] for one in QUESTIONS}
    with tempfile.TemporaryDirectory() as folder:
        text = page(sweeps, import_mlperf.write_run(LOG, Path(folder) / "pcl"))
    for name, jobs in sweeps.items():
        whatif.plot(jobs, PAGE.with_name(f"whatif_{name}.png"))
    write_aside(PAGE, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
