"""A sweep that resumes: names that follow from what is swept, and the same command given again after any death.

The training is real, by one worker in this process; Ray is left out, and a death is an exception that nobody catches.
"""

import gc
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE

import pytest
import torch

from launch import compose, run, run_folder
from launch.cluster import Cluster, Node
from train import checkpoint, checkpoint_files

STEPS = 4
TINY = "model=resnet_cifar20 model.depth=8 data.image_size=8 chip_batch_size=2 mesh=atlas900_64 numerics=fast".split()
SWEEP = ["-m", *TINY, "bn_span=1,2", "seed=0,1", f"max_steps={STEPS}", "checkpoint_steps=2", "resume=auto"]
NAMES = [f"digits_atlas-bn_span.{span}-seed.{seed}" for span in (1, 2) for seed in (0, 1)]


HOLDER = """
import sys
from pathlib import Path
from launch import run_folder
held = run_folder.hold(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


class Killed(BaseException):
    """As kill -9: nothing more is written."""


class Group:
    """Stands for the Ray actors: the one worker, here. It dies before the steps of `deaths`, once each."""

    def __init__(self, deaths: dict[str, int]) -> None:
        self.deaths = deaths

    def prepare(self, config: dict, checkpoint: Path | None, device: str, marks: dict) -> dict:
        from train.account import contract, facts
        from train.build import Worker, WorkerContext

        self.worker = Worker(config, WorkerContext(marks=marks))
        if checkpoint:
            self.worker.restore(checkpoint)
        return {"contract": contract(self.worker), "facts": facts(self.worker), "step": 0}

    def placement(self) -> list[dict]:
        return [{"worker": 0, "hosts": [0, 7], "address": "here"}]

    def train(self, folder: Path) -> dict:
        trainer, died_at = self.worker.trainer, self.deaths.pop(folder.name, None)
        step = trainer._step

        def until_death(loader):
            if trainer.progress.step + 1 == died_at:
                self.worker.writer.close()  # its last checkpoint was on disk by then
                raise Killed
            return step(loader)

        trainer._step = until_death
        return self.worker.train(folder)


class Controller:
    """Stands for the one that looks after Ray's actors: the only worker is here, and no one outlives it."""

    def __init__(self, group: Group, *_) -> None:
        self.group, self.losses, self.restarts = group, [], 0

    def run(self, folder: Path, watch: Callable, from_step: int) -> dict:
        return self.group.train(folder)


@pytest.fixture
def sweep(monkeypatch, capsys) -> Iterator[Callable]:
    """Gives the command; returns (exit status or None when killed, stdout)."""
    deaths: dict[str, int] = {}

    @contextmanager
    def joined(*_):
        yield Cluster(None, [Node("here", "127.0.0.1", {"CPU": 2, "ascend910": 64})], True)

    @contextmanager
    def started(*_):
        yield Group(deaths)

    monkeypatch.setattr(run, "join", joined)
    monkeypatch.setattr(run, "started", started)
    monkeypatch.setattr(run, "Controller", Controller)
    handler, threads = signal.getsignal(signal.SIGTERM), torch.get_num_threads()

    def command(*words: str, kill: dict[str, int] | None = None) -> tuple[int | None, str]:
        deaths.update(kill or {})
        monkeypatch.setattr(sys, "argv", ["launch.run", *words])
        try:
            status = run.main()
        except Killed:
            status = None
        gc.collect()  # a dead process holds no locks
        return status, capsys.readouterr().out

    yield command
    signal.signal(signal.SIGTERM, handler)
    torch.set_num_threads(threads)


def results(root: Path) -> dict[str, dict]:
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(root.glob("*/result.json"))}


def told(out: str) -> list[str]:
    """What the command said of each job's start."""
    return [line for line in out.splitlines() if line.startswith(("done already", "run ", "resumed", "moved aside"))]


def test_a_sweep_killed_thrice_ends_as_one_that_was_not(sweep, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert sweep(*SWEEP, f"run_root={whole}")[0] == 0
    assert list(results(whole)) == NAMES

    again = [*SWEEP, f"run_root={killed}"]
    assert sweep(*again, kill={NAMES[1]: 4})[0] is None  # after its checkpoint of step 2
    status, out = sweep(*again, kill={NAMES[2]: 1})  # with a folder and no row
    assert (status, told(out)) == (
        None,
        [
            f"done already: {killed / NAMES[0]}",
            f"run      {killed / NAMES[1]}",
            "resumed  from step_00000002.pt, with the run's own recipe",
            f"run      {killed / NAMES[2]}",
        ],
    )
    assert sweep(*again, kill={NAMES[3]: 2})[0] is None  # with a row and no checkpoint
    status, out = sweep(*again)
    aside = killed / f"{NAMES[3]}.unsaved-1"
    assert status == 0 and told(out) == [
        *(f"done already: {killed / name}" for name in NAMES[:3]),
        f"moved aside: {aside}, which was stopped before its first checkpoint; {NAMES[3]} begins anew",
        f"run      {killed / NAMES[3]}",
    ]
    assert len((aside / "metrics.jsonl").read_text().splitlines()) == 1
    assert told(sweep(*again)[1]) == [f"done already: {killed / name}" for name in NAMES]

    ended, expected = results(killed), results(whole)
    assert [ended[name]["weights_sha256"] for name in NAMES] == [expected[name]["weights_sha256"] for name in NAMES]
    assert len({result["weights_sha256"] for result in expected.values()}) == len(NAMES)
    assert [ended[name]["restarts"] for name in NAMES] == [0, 1, 1, 1]
    for name in NAMES:
        rows = [json.loads(line) for line in (killed / name / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows if row["kind"] == "step"] == list(range(1, STEPS + 1))


def test_one_run_by_its_name_resumes_or_is_done_or_is_refused(sweep, tmp_path):
    words = [*TINY, "run=mine", "resume=auto", "checkpoint_steps=2", f"run_root={tmp_path}"]
    assert sweep(*words, "max_steps=3", kill={"mine": 3})[0] is None
    assert sweep(*words, "max_steps=3", "seed=5") == (2, "")  # another recipe under this name
    assert "resumed  from step_00000002.pt" in sweep(*words, "max_steps=3")[1]
    assert sweep(*words, "max_steps=3") == (0, f"done already: {tmp_path / 'mine'}\n")
    assert sweep(*words, "max_steps=4") == (2, "")
    assert [path.name for path in tmp_path.iterdir() if path.name != "reference"] == ["mine"]


def config(root: Path, *words: str) -> dict:
    return compose.compose([f"run_root={root}", *words])


def left(root: Path, name: str, status: str | None, **changes) -> Path:
    """A folder as a run leaves it after its first checkpoint."""
    made = config(root, f"run={name}") | changes
    folder = root / name
    run_folder.create(folder, made, {}, resumed=False).close()
    checkpoint.save(checkpoint_files.take_over(folder / "checkpoints"), 1, {})
    if status:
        run_folder.write_json(folder / "result.json", {"status": status})
    return folder


def test_another_recipe_under_the_name_is_named_by_its_key(tmp_path):
    left(tmp_path, "mine", "done", epochs=5)
    with pytest.raises(ValueError, match=r"run=mine: .*/mine has epochs=5, this command 20; take another run_root"):
        run_folder.finished(config(tmp_path, "run=mine", "resume=auto"))
    left(tmp_path, "other", None, schedule={"_target_": "train.optim.schedule.Cosine", "base_lr": 0.5})
    with pytest.raises(ValueError, match=r"run=other: .*/other has schedule\._target_="):
        run_folder.locate(config(tmp_path, "run=other", "resume=auto"))
    elsewhere = config(tmp_path, "run=mine", "resume=auto", "epochs=5", "workers=1", "threads=1", "checkpoint_steps=3")
    assert run_folder.finished(elsewhere) == tmp_path / "mine"


def test_without_resume_or_without_a_name_nothing_is_done_already(tmp_path):
    left(tmp_path, "mine", "done")
    assert run_folder.finished(config(tmp_path, "run=mine")) is None
    assert run_folder.finished(config(tmp_path, "resume=auto")) is None
    with pytest.raises(ValueError, match="exists; take another name, or continue it"):
        run_folder.locate(config(tmp_path, "run=mine"))
    assert run_folder.locate(config(tmp_path, "run=new", "resume=auto")) == (tmp_path / "new", None)


def test_a_run_that_another_process_trains_is_left_alone(tmp_path):
    folder = left(tmp_path, "mine", None)
    wanted = config(tmp_path, "run=mine", "resume=auto")
    with subprocess.Popen([sys.executable, "-c", HOLDER, folder], stdin=PIPE, stdout=PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="run=mine: another process trains it at this moment"):
            run_folder.locate(wanted)
        other.kill()
    assert run_folder.locate(wanted) == (folder, folder / "checkpoints/attempt_0001/step_00000001.pt")


def test_names_say_what_is_swept_and_nothing_else():
    def names(*words: str) -> list[str]:
        return run_folder.sweep_names(compose.expand(words, sweep=True))

    assert names("experiment=digits_atlas", "bn_span=1,4", "seed=0,1") == [
        f"bn_span.{span}-seed.{seed}" for span in (1, 4) for seed in (0, 1)
    ]
    assert names("schedule.base_lr=0.5,2", "seed=3") == ["schedule.base_lr.0.5", "schedule.base_lr.2"]
    assert names("mesh=atlas900_64,atlas800") == ["mesh.atlas900_64", "mesh.atlas800"]
    assert names("seed=3") == [""]


def test_names_are_legal_short_and_different():
    def names(*values: str) -> list[str]:
        return run_folder.sweep_names([[f"++data.root={value}"] for value in values])

    found = names("/a/b", "/a_b", "/a b", "'/a_b'", "[1,2]", "x" * 400, "x" * 401)
    assert len(set(found)) == len(found) == 7
    assert all(run_folder.NAME.fullmatch(name) and len(name) < 80 for name in found)
    assert found == names("/a/b", "/a_b", "/a b", "'/a_b'", "[1,2]", "x" * 400, "x" * 401)
