"""The training loop, in one process and in two: the same bits however it is cut into workers, stops and resumes."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rank_processes import run_ranks
from torch.distributed import PrefixStore
from training_samples import STEPS_PER_EPOCH, tiny

from train import checkpoint
from train.build import Worker, WorkerContext, run_worker
from train.checkpoint_files import list_checkpoints
from train.metrics import read_rows
from train.models import chip_norm
from train.models.chip_norm import chip_moments, evaluation_moments
from train.optim.update import DivergedError
from train.progress import Wish
from train.sim.run import run_time

LARS_BF16 = ("optim=lars", "precision=bf16", "max_steps=1", "schedule.base_lr=2")


def train(folder: Path, *overrides: str, resume_from: Path | None = None) -> dict:
    return run_worker(tiny(*overrides), WorkerContext(), folder, resume_from)


def rows(folder: Path, kind: str) -> list[dict]:
    return [row for row in read_rows(folder) if row["kind"] == kind]


def values(folder: Path, kind: str, tag: str) -> list[float]:
    return [row["values"][tag] for row in rows(folder, kind)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, dict]:
    """One worker, four steps without a break."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(folder)


def in_two(rank: int, world_size: int, store, folder: Path) -> list[dict]:
    def run(name: str, *overrides: str) -> dict:
        context = WorkerContext(rank=rank, world_size=world_size, store=PrefixStore(name, store))
        return run_worker(tiny(*overrides), context, folder / name)

    results = [run("sgd", "checkpoint_steps=2"), run("lars", *LARS_BF16)]
    assert "torch._dynamo" not in sys.modules, "torch's compiler is nothing that a worker's start has to wait for"
    return results


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory) -> tuple[Path, list[list[dict]]]:
    """The same by two workers, of two hosts and of one, with a checkpoint after two steps; and a step of LARS."""
    folder = tmp_path_factory.mktemp("two")
    for name in ("sgd", "lars"):
        (folder / name).mkdir()
    return folder, run_ranks(2, in_two, folder)


def test_the_loss_falls(tmp_path):
    """Three steps over the same 64 images."""
    images = ["data=synthetic", "data.num_classes=4", "data.num_train=64", "data.num_eval=8", "epochs=100"]
    recipe = ["schedule.warmup_epochs=0", "eval_every=100", "max_steps=3", "schedule.base_lr=0.3"]
    train(tmp_path, *images, *recipe, "mesh.axes.host=1", "chip_batch_size=8")
    first, _, third = values(tmp_path, "step", "train/loss")
    assert first > 1.3 and third < 1.2


def test_rows_count_steps_and_epochs(whole):
    folder, result = whole
    assert [row["step"] for row in rows(folder, "step")] == [1, 2, 3, 4]
    assert [row["step"] for row in rows(folder, "eval")] == [2, 4]
    assert all(row["epoch"] == row["step"] / STEPS_PER_EPOCH for row in read_rows(folder))
    assert values(folder, "step", "train/learning_rate")[0] == pytest.approx(0.05 / (0.05 * STEPS_PER_EPOCH))
    assert (result["status"], result["steps"], result["reached"]) == ("done", 4, False)
    assert result["top1"] == values(folder, "eval", "eval/top1")[-1]


def test_both_clocks_run(whole):
    folder, result = whole
    worker = Worker(tiny(), WorkerContext())
    step, clock = worker.emulator.step(48), worker.trainer.clock
    assert clock.seconds == worker.emulator.startup_s > 0
    measured = [row["measured_s"] for row in read_rows(folder)]
    assert measured == sorted(set(measured)) and measured[0] > 0
    done = {"step": 0, "eval": 0}
    for row in read_rows(folder):
        done[row["kind"]] += 1
        expected = clock.startup_s + done["step"] * step.step_s + done["eval"] * worker.emulator.eval_s(360)
        assert row["emulated_s"] == pytest.approx(expected, rel=1e-12)
    assert result["emulated_s"] == row["emulated_s"] and result["measured_s"] == row["measured_s"]


def test_two_workers_train_the_same_bits_as_one(whole, two_workers):
    folder, results = two_workers
    assert [result["weights_sha256"] for result, _ in results] == [whole[1]["weights_sha256"]] * 2
    for tag in ("train/loss", "train/top1", "train/grad_norm"):
        assert values(folder / "sgd", "step", tag) == values(whole[0], "step", tag)
    for tag in ("eval/top1", "eval/loss"):
        assert values(folder / "sgd", "eval", tag) == values(whole[0], "eval", tag)


def test_the_chips_spread_is_that_of_all_chips_whoever_holds_them(whole, two_workers):
    """Of the chips' variances as the checkpoint of that step has them, from written-out formulas."""
    folder, _ = two_workers
    for tag in sorted(tag for tag in rows(folder / "sgd", "eval")[0]["values"] if tag.startswith("chips/")):
        assert values(folder / "sgd", "eval", tag) == pytest.approx(values(whole[0], "eval", tag), rel=1e-5)
    state = checkpoint.load(list_checkpoints(folder / "sgd" / "checkpoints")[-1])
    widths = [len(tensor) for name, tensor in state["model"].items() if name.endswith("running_var")]
    moments = state["chip_moments"].split([width for width in widths for _ in ("mean", "var")], dim=1)
    offs = [(var - var.mean(0)).norm(dim=1) / var.mean(0).norm() for var in moments[1::2]]
    off = torch.stack(offs).mean(0)
    assert len(off) == 24  # 3 hosts of 8
    for which, expected in (("min", off.min()), ("median", off.quantile(0.5)), ("max", off.max())):
        assert values(whole[0], "eval", f"chips/bn_var_off_{which}")[-1] == pytest.approx(float(expected), rel=1e-3)


def test_two_workers_train_the_same_bits_as_one_in_bfloat16_with_lars(two_workers, tmp_path):
    one = train(tmp_path, *LARS_BF16)
    assert [result["weights_sha256"] for _, result in two_workers[1]] == [one["weights_sha256"]] * 2


def test_a_run_that_broke_off_continues_with_the_same_bits_on_fewer_workers(whole, two_workers, tmp_path):
    """Two workers died after four steps; one goes on from the checkpoint after two. No row stands there twice."""
    shutil.copytree(two_workers[0] / "sgd", tmp_path, dirs_exist_ok=True)
    saved, later = list_checkpoints(tmp_path / "checkpoints")
    assert (saved.name, later.name) == ("step_00000002.pt", "step_00000004.pt")
    result = train(tmp_path, resume_from=saved)
    assert result["weights_sha256"] == whole[1]["weights_sha256"]
    assert result["emulated_s"] == whole[1]["emulated_s"]
    assert [(row["kind"], row["step"]) for row in read_rows(tmp_path)] == [
        (row["kind"], row["step"]) for row in read_rows(whole[0])
    ]
    for kind, tag in (("step", "train/loss"), ("eval", "eval/loss")):
        assert values(tmp_path, kind, tag) == values(whole[0], kind, tag)
    measured = [row["measured_s"] for row in read_rows(tmp_path)]
    assert measured == sorted(set(measured))


def test_a_run_that_was_asked_to_stop_saves_and_continues_with_the_same_bits(whole, tmp_path):
    worker = Worker(tiny(), WorkerContext())
    worker.wishes[Wish.STOP].set()
    result = worker.train(tmp_path)
    assert (result["status"], result["steps"]) == ("interrupted", 1)
    (saved,) = list_checkpoints(tmp_path / "checkpoints")
    assert train(tmp_path, resume_from=saved)["weights_sha256"] == whole[1]["weights_sha256"]


def test_a_finished_run_has_nothing_left_to_train(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    (saved,) = list_checkpoints(tmp_path / "checkpoints")
    result = train(tmp_path, resume_from=saved)
    assert [row["step"] for row in read_rows(tmp_path)] == [row["step"] for row in read_rows(whole[0])]
    for key in ("status", "steps", "top1", "weights_sha256", "emulated_s"):
        assert result[key] == whole[1][key], key


def test_another_seed_is_another_run(whole, tmp_path):
    (saved,) = list_checkpoints(whole[0] / "checkpoints")
    with pytest.raises(ValueError, match=r"step_00000004\.pt: the checkpoint has seed=0, this run 1; start a new run"):
        train(tmp_path, "seed=1", resume_from=saved)
    assert list(tmp_path.iterdir()) == []


def test_fast_numerics_differ_by_rounding_only(tmp_path):
    """All 16 chips in one pass against a block at a time: weights, gradients (the first momentum) and statistics."""
    states = []
    for numerics in ("exact", "fast"):
        folder = tmp_path / numerics
        folder.mkdir()
        small = ["max_steps=1", "data.image_size=16", "mesh.axes.host=2", "model.zero_init_last_gamma=false"]
        train(folder, f"numerics={numerics}", *small)
        state = checkpoint.load(list_checkpoints(folder / "checkpoints")[-1])
        momenta = {f"momentum {i}": velocity for i, velocity in enumerate(state["optimizer"]["velocities"])}
        states.append(state["model"] | momenta | {"statistics": state["chip_moments"]})
    exact, fast = states
    assert len(exact) == 128 + 65 + 1 and len(exact["statistics"]) == 16
    for name, value in exact.items():
        error = (fast[name] - value).double().norm() / value.double().norm().clamp(min=1e-6)
        assert error < 1e-3, name


def test_the_target_ends_the_run(tmp_path):
    result = train(tmp_path, "target_top1=0.001")
    assert (result["status"], result["reached"], result["steps"]) == ("done", True, 2)
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step_00000002.pt"]


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    worker = Worker(tiny("schedule.base_lr=1.0e+30", "schedule.warmup_epochs=0"), WorkerContext())
    message = r"the loss is nan at step 2 \(learning rate 9\.\d+e\+29\); lower schedule.base_lr"
    with pytest.raises(DivergedError, match=message):
        worker.train(tmp_path)
    assert [row["step"] for row in read_rows(tmp_path)] == [1]
    assert list_checkpoints(tmp_path / "checkpoints") == []


def test_an_evaluation_is_that_of_all_images_at_once():
    """Each image counts once, though the last batch is shorter; the statistics are the mean over all chips."""
    worker = Worker(tiny(), WorkerContext())
    torch.manual_seed(5)
    for moment in chip_moments(worker.model):
        moment.copy_(torch.rand_like(moment) + 0.5)
    dataset = worker.source.eval
    seen = []
    original = dataset.start
    dataset.start = lambda indices, **keys: (seen.extend(indices.tolist()), original(indices, **keys))[1]
    record = worker.trainer.evaluate()
    assert sorted(seen) == list(range(360)) and record.images == 360
    for mean, moments in zip(evaluation_moments(worker.model), chip_moments(worker.model), strict=True):
        torch.testing.assert_close(mean, moments.mean(0))
    images, labels = dataset.batch(torch.arange(360).numpy(), seed=0, epoch=0)
    with torch.inference_mode():
        logits = worker.model.eval()(images)
    assert record.top1 * 360 == (logits.argmax(1) == labels).sum().item()
    smoothing = worker.config["label_smoothing"]
    loss = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing).item()
    assert record.loss == pytest.approx(loss, rel=1e-5)


def test_a_step_is_that_of_the_mean_over_chips_of_each_chips_mean_loss(monkeypatch):
    """The gradient that the optimizer gets, in the parameters' own memory layout, against chips computed one by one.

    In the arithmetic that those have: rounded otherwise, a ReLU at zero opens on one side only, and 1 % is different.
    """
    monkeypatch.setattr(chip_norm, "MAX_PIXELS_INTERLEAVED", 0)
    worker = Worker(tiny("max_steps=1", "data.image_size=16", "model.zero_init_last_gamma=false"), WorkerContext())
    reference = Worker(tiny("data.image_size=16", "model.zero_init_last_gamma=false"), WorkerContext())
    given = []
    parameters = list(worker.model.parameters())
    monkeypatch.setattr(worker.optimizer, "step", lambda: given.extend(p.grad.clone() for p in parameters))
    worker.trainer.train([], lambda progress: None)
    model = reference.model
    for chip in range(24):
        model.chip_pass.first, model.chip_pass.count = chip, 1
        samples = reference.order.indices(0, 0, chip, chip + 1)[0]
        images, labels = reference.source.train.batch(samples, seed=0, epoch=0)
        smoothing = reference.config["label_smoothing"]
        (torch.nn.functional.cross_entropy(model(images), labels, label_smoothing=smoothing) / 24).backward()
    for gradient, p in zip(given, model.parameters(), strict=True):
        assert (gradient - p.grad).norm() < 1e-3 * p.grad.norm()
        assert all(a == b for size, a, b in zip(p.shape, gradient.stride(), p.stride(), strict=True) if size > 1)


def test_training_evaluates_as_often_as_the_emulator_charges():
    worker = Worker(tiny("max_steps=null"), WorkerContext())
    trainer, step = worker.trainer, worker.emulator.step(48)
    rhythms = [(6, 1, 0), (6, 4, 1), (6.5, 2, 0), (5, 0.7, 2), (0.5, 1, 0), (3, 0.3, 0.1), (1.1, 9, 0)]
    for epochs, every, offset in rhythms:
        trainer.limits = replace(trainer.limits, epochs=epochs, eval_every=every, eval_offset=offset)
        due = 0
        for step_done in range(trainer.total_steps + 1):
            trainer.progress.step = step_done
            due += trainer._due(every, offset)
        charged = run_time(step, 1.0, 0.0, STEPS_PER_EPOCH, epochs, every, offset)
        assert (trainer.total_steps, due) == (charged.steps, charged.evaluations), (epochs, every, offset)


def test_the_last_batch_of_an_epoch_is_dropped_padded_or_kept(tmp_path):
    """1,437 images in steps of 1,392 (24 chips x 58): 45 are left."""
    one_epoch = ("chip_batch_size=58", "data.image_size=8", "max_steps=2", "eval_every=9", "schedule.base_lr=0.01")
    images = {}
    for rule in ("drop", "pad", "keep"):
        train(tmp_path / rule, *one_epoch, f"last_batch={rule}")
        steps = rows(tmp_path / rule, "step")
        counts = [row["values"]["measured/images_per_s"] * row["values"]["measured/step_s"] for row in steps]
        images[rule] = [(row["epoch"], round(count)) for row, count in zip(steps, counts, strict=True)]
    assert images == {
        "drop": [(1.0, 1392), (2.0, 1392)],
        "pad": [(0.5, 1392), (1.0, 1392)],
        "keep": [(0.5, 1392), (1.0, 45)],
    }
