"""Training while the emulated machine breaks: the arithmetic and the clock, in one process and in two."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from rank_processes import run_ranks
from test_recovery import Dies, die_at, train_on
from torch.distributed import PrefixStore
from training_samples import tiny

from train.build import Worker, WorkerContext, run_worker
from train.checkpoint_files import list_checkpoints
from train.metrics import read_rows
from train.models import chip_norm
from train.models.chip_norm import chip_moments, evaluation_moments
from train.models.damage import flipped


def fault(kind: str, **settings) -> dict:
    return {"_target_": f"train.sim.faults.{kind}", **settings}


def faults(**of: dict) -> str:
    """An override of `tiny`; a mapping of YAML as of JSON."""
    return "faults=" + json.dumps({"_target_": "train.sim.faults.Several", "of": of})


ALL = faults(
    slow=fault("SlowChip", factor=3, chip=2, at_steps=2, for_steps=2),
    link=fault("SlowLink", factor=2, at_steps=4),
    dead=fault("DeadChip", chip=20, at_steps=2, recovery="shrink"),
    spare=fault("DeadChip", at_steps=4),
    flip=fault("FlippedBit", chip=3, at_steps=3, bit=27),
    stale=fault("StaleBatchNorm", chip=9, at_steps=2, for_steps=2),
    often=fault("FlippedBit", per_step=0.7, bit=20),
)
SMALL = ("max_steps=1", "mesh.axes.host=2", "data.image_size=16", "model.zero_init_last_gamma=false")
SHRINK = {"recovery": "shrink", "at_steps": 1}


def train(folder: Path, *overrides: str, resume_from: Path | None = None) -> dict:
    return run_worker(tiny(*overrides), WorkerContext(), folder, resume_from)


def in_two(rank: int, world_size: int, store, folder: Path) -> list[dict]:
    """The faults in two processes; and once more, where one of the processes dies as well."""
    results = []
    for name in ("two", "one left"):
        (folder / name).mkdir(exist_ok=True)
        context = WorkerContext(rank=rank, world_size=world_size, store=PrefixStore(name, store))
        worker = Worker(tiny(ALL, "checkpoint_steps=2"), context)
        if (name, rank) == ("one left", 1):
            die_at(worker, "summed", 2)
        try:
            results.append(worker.train(folder / name))
        except Dies:
            worker.group.abort()
    if rank == 0:
        results[-1] = train_on(worker, folder / "one left", store, [[0]], 0, 0)
    return results


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("sound")
    return folder, train(folder, "checkpoint_steps=2")


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("broken")
    return folder, train(folder, ALL, "checkpoint_steps=2")


def given_gradients(worker: Worker) -> list[torch.Tensor]:
    """Those that the optimizer gets in the worker's first step."""
    given, parameters = [], list(worker.model.parameters())
    worker.optimizer.step = lambda: given.extend(p.grad.clone() for p in parameters)
    worker.trainer.train([], lambda progress: None)
    return given


def own_gradients(config: dict, chips: range | list[int]) -> list[torch.Tensor]:
    """Of the sum over `chips` of each one's mean loss in the first step, computed chip by chip."""
    reference = Worker(config, WorkerContext())
    model = reference.model
    for chip in chips:
        model.chip_pass.first, model.chip_pass.count = chip, 1
        samples = reference.order.indices(0, 0, chip, chip + 1)[0]
        images, labels = reference.source.train.batch(samples, seed=0, epoch=0)
        smoothing = reference.config["label_smoothing"]
        torch.nn.functional.cross_entropy(model(images), labels, label_smoothing=smoothing).backward()
    return [p.grad for p in model.parameters()]


def test_a_faulted_run_has_the_same_bits_on_two_workers_on_the_one_that_is_left_and_after_a_resume(
    sound, broken, tmp_path
):
    (two, left), (other,) = run_ranks(2, in_two, tmp_path)
    assert other["weights_sha256"] == two["weights_sha256"] and left["joined"]["source"] == "memory"
    shutil.copytree(tmp_path / "two", tmp_path / "resumed")
    saved = list_checkpoints(tmp_path / "resumed" / "checkpoints")[0]
    resumed = train(tmp_path / "resumed", ALL, "checkpoint_steps=2", resume_from=saved)
    for result in (two, left, resumed):
        for key in ("weights_sha256", "emulated_s", "faults", "top1", "eval_loss", "images"):
            assert result[key] == broken[1][key], key
    rows = [(row["step"], row["emulated_s"]) for row in read_rows(broken[0])]
    for name in ("two", "one left", "resumed"):
        assert [(row["step"], row["emulated_s"]) for row in read_rows(tmp_path / name)] == rows
    assert broken[1]["weights_sha256"] != sound[1]["weights_sha256"]


def test_a_checkpoint_of_a_run_with_faults_is_another_trainings(sound, broken, tmp_path):
    saved = list_checkpoints(sound[0] / "checkpoints")[0]
    with pytest.raises(ValueError, match="the checkpoint has faults=None, this run"):
        train(tmp_path, ALL, resume_from=saved)


def test_a_run_tells_what_struck_it(broken):
    folder, result = broken
    told = [(event["fault"], event["step"]) for event in result["faults"]["events"]]
    expected = {("dead chip", 2), ("slow chip", 2), ("stale batch norm", 2), ("flipped bit", 3), ("slow link", 4)}
    assert set(told) >= expected | {("dead chip", 4)}
    words = {event["fault"]: event["what"] for event in result["faults"]["events"]}
    assert words["slow chip"] == "computes 3 times as long" and words["dead chip"] == "a spare takes over"
    assert words["flipped bit"].startswith("bit 20 of its gradient of ")
    assert result["images"] == 2 * (24 + 3 * 23) and result["faults"]["lost_chips"] == 1
    rows = [row["values"] for row in read_rows(folder) if row["kind"] == "step"]
    assert [row["emulated/living_chips"] for row in rows] == [24, 23, 23, 23]
    assert rows[-1]["emulated/fault_events"] == result["faults"]["num_events"] == len(told)
    assert rows[-1]["emulated/faults_s"] == pytest.approx(result["faults"]["cost_s"])
    assert ["emulated/recovery_s" in row for row in rows] == [False, True, False, True]
    assert rows[1]["train/top1"] * 46 == pytest.approx(round(rows[1]["train/top1"] * 46))
    lanes = json.loads((folder / "trace.json").read_text())["traceEvents"]
    drawn = [event for event in lanes if event["ph"] == "X" and event["name"] == "recovering from a fault"]
    recoveries_s = [rows[step]["emulated/recovery_s"] for step in (1, 3)]
    assert [event["dur"] for event in drawn] == pytest.approx([1e6 * seconds for seconds in recoveries_s])


def test_a_spare_changes_the_clock_and_nothing_else(sound, tmp_path):
    dead = fault("DeadChip", at_steps=4, detect_s=3, restart_s=4)
    result = train(tmp_path, faults(dead=dead), "checkpoint_steps=2")
    assert result["weights_sha256"] == sound[1]["weights_sha256"] and result["images"] == sound[1]["images"]
    step_s = Worker(tiny(), WorkerContext()).emulator.step(48).step_s
    assert result["emulated_s"] - sound[1]["emulated_s"] == pytest.approx(7 + 2 * step_s, rel=1e-9)
    assert result["faults"]["recovery_s"] == pytest.approx(7 + 2 * step_s, rel=1e-9)


def test_without_a_chip_and_a_host_the_step_is_the_mean_over_the_others(monkeypatch):
    monkeypatch.setattr(chip_norm, "MAX_PIXELS_INTERLEAVED", 0)
    lost = faults(dead=fault("DeadChip", chip=5, **SHRINK), host=fault("LostHost", host=1, **SHRINK))
    living = [chip for chip in range(8) if chip != 5]
    reference = own_gradients(tiny(*SMALL), living)
    for gradient, own in zip(given_gradients(Worker(tiny(*SMALL, lost), WorkerContext())), reference, strict=True):
        assert (gradient - own / 7).norm() < 1e-3 * (own / 7).norm()


def test_a_chip_that_is_gone_has_no_part_in_evaluation():
    lost = faults(dead=fault("DeadChip", chip=5, recovery="shrink", at_steps=2))
    worker = Worker(tiny(lost, "model.zero_init_last_gamma=false"), WorkerContext())
    torch.manual_seed(5)
    for moment in chip_moments(worker.model):
        moment.copy_(torch.rand_like(moment) + 0.5)
    for step, living in ((1, list(range(24))), (2, [chip for chip in range(24) if chip != 5])):
        worker.trainer.progress.step = step
        worker.trainer.average_statistics()
        for mean, moments in zip(evaluation_moments(worker.model), chip_moments(worker.model), strict=True):
            torch.testing.assert_close(mean, moments[living].mean(0))


def test_a_flipped_bit_is_flipped_in_one_element_of_one_chips_gradient(monkeypatch):
    monkeypatch.setattr(chip_norm, "MAX_PIXELS_INTERLEAVED", 0)
    broken = Worker(tiny(*SMALL, faults(flip=fault("FlippedBit", chip=11, at_steps=1, bit=31))), WorkerContext())
    (flip,) = broken.trainer.damage.flips(1, broken.trainer.passes[1])
    own = own_gradients(tiny(*SMALL), [11])[flip.parameter][flip.index].item()
    right, wrong = given_gradients(Worker(tiny(*SMALL), WorkerContext())), given_gradients(broken)
    places = [torch.nonzero(one != other).tolist() for one, other in zip(right, wrong, strict=True)]
    differing = [(number, tuple(index)) for number, indices in enumerate(places) for index in indices]
    assert differing == [(flip.parameter, flip.index)] and abs(own) > 1e-6
    change = (wrong[flip.parameter] - right[flip.parameter])[flip.index].item()
    assert change == pytest.approx((flipped(np.float32(own), 31) - own) / 16, rel=2e-3)
    statistics = [Worker(tiny(*SMALL), WorkerContext()), broken]
    statistics[0].trainer.train([], lambda progress: None)
    for sound, flipped_once in zip(*(chip_moments(worker.model) for worker in statistics), strict=True):
        assert torch.equal(sound, flipped_once)  # the chip's gradient was computed twice, its statistics saw it once


def test_stale_statistics_stand_still_for_as_long_as_they_are_told():
    stale = fault("StaleBatchNorm", chip=9, at_steps=1, for_steps=1)
    worker = Worker(tiny("max_steps=2", faults(stale=stale)), WorkerContext())
    seen = []
    callback = type("Callback", (), {"on_step": lambda *_: seen.append(chip_moments(worker.model)[0].clone())})()
    callback.on_eval = lambda record: None
    worker.trainer.train([callback], lambda progress: None)
    assert not seen[0][9].any() and seen[1][9].any()
    assert all(seen[0][chip].any() for chip in range(24) if chip != 9)
