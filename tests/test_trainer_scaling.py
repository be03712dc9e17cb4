"""Loss scale, clipping and the chips' losses: what a step does to the weights, and what it leaves alone."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rank_processes import run_ranks
from torch.distributed import PrefixStore
from torch.nn import functional
from training_samples import tiny

from train import checkpoint, precision
from train.build import Worker, WorkerContext, run_worker
from train.checkpoint_files import attempts, checkpoint_path
from train.compute import chip_losses
from train.metrics import read_rows
from train.models.chip_norm import ChipPass, chip_moments
from train.optim.lars import LARS
from train.optim.sgd import SGD
from train.optim.update import DivergedError, WeightUpdate
from train.precision import LossScale, choose_loss_scale, choose_precision

# 4 x 4 pixels: there oneDNN's float16 convolutions, which are slow, are not needed
SMALL = ("data.image_size=4", "mesh.axes.host=2", "chip_batch_size=8", "eval_every=100", "schedule.warmup_epochs=0")
EVERYTHING = (*SMALL, "schedule.base_lr=0.02", "precision=fp16", "ema_decay=0.5", "clip_norm=5", "max_steps=3")


def train(folder: Path, *overrides: str, resume_from: Path | None = None) -> dict:
    folder.mkdir(exist_ok=True)
    return run_worker(tiny(*overrides), WorkerContext(), folder, resume_from)


def values(folder: Path, tag: str) -> list[float]:
    return [row["values"][tag] for row in read_rows(folder) if row["kind"] == "step"]


def saved(folder: Path, step: int) -> dict:
    """A checkpoint but for its latest records, which hold this machine's seconds."""
    return {name: value for name, value in checkpoint.load(of_step(folder, step)).items() if name != "recent"}


def of_step(folder: Path, step: int) -> Path:
    return checkpoint_path(attempts(folder / "checkpoints")[-1], step)


def parts(state, name: str = "") -> dict:
    """The leaves of a checkpoint by their path."""
    if isinstance(state, dict | list):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {path: leaf for key, inner in items for path, leaf in parts(inner, f"{name}/{key}").items()}
    return {name: state}


def differing(one: dict, other: dict) -> list[str]:
    """The leaves that are not equal to the bit, without the measured seconds."""
    one, other = parts(one), parts(other)
    assert one.keys() == other.keys()
    pairs = ((name, one[name], other[name]) for name in one if name != "/progress/measured_s")
    return [name for name, a, b in pairs if not (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b)]


def linear(optimizer=SGD, name: str = "fp16", scale: float | str = "dynamic", **settings) -> SimpleNamespace:
    """A layer of 3 x 2 weights and its update."""
    torch.manual_seed(0)
    model, chosen = torch.nn.Linear(2, 3), choose_precision(name, "cpu")
    optimizer = optimizer(model.parameters())
    update = WeightUpdate(model, optimizer, chosen, choose_loss_scale(scale, chosen.dtype), **settings)
    return SimpleNamespace(model=model, optimizer=optimizer, update=update)


def gradients(model: torch.nn.Module, factor: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [factor * torch.randn(p.shape, generator=generator) for p in model.parameters()]


def test_the_loss_of_equal_chips_is_the_sum_of_their_means():
    torch.manual_seed(0)
    logits, labels = torch.randn(12, 5, dtype=torch.float64), torch.randint(5, (12,))
    each = [functional.cross_entropy(logits[i : i + 3], labels[i : i + 3], label_smoothing=0.1) for i in (0, 3, 6, 9)]
    loss = chip_losses(logits, labels, ChipPass(count=4, sizes=None), 0.1)
    assert loss.dtype == torch.float64 and loss.item() == pytest.approx(sum(each).item(), rel=1e-14)


def test_the_loss_of_unequal_chips_is_the_sum_of_their_means():
    """Against the formula: - sum over classes of ((1 - s) [class is the label] + s / 5) log p, meaned over a chip."""
    torch.manual_seed(0)
    sizes, smoothing = (1, 5, 2, 4), 0.1
    logits, labels = torch.randn(12, 5, dtype=torch.float64, requires_grad=True), torch.randint(5, (12,))
    expected, first = 0.0, 0
    for size in sizes:
        for i in range(first, first + size):
            target = torch.full((5,), smoothing / 5, dtype=torch.float64)
            target[labels[i]] += 1 - smoothing
            log_p = logits[i] - logits[i].exp().sum().log()
            expected = expected - (target * log_p).sum() / size
        first += size
    (gradient,) = torch.autograd.grad(expected, logits)
    loss = chip_losses(logits, labels, ChipPass(count=4, sizes=sizes), smoothing)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-13)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], gradient, rtol=1e-12, atol=1e-14)
    equal = [chip_losses(logits, labels, ChipPass(count=4, sizes=s), smoothing) for s in ((3,) * 4, None)]
    assert equal[0].item() == pytest.approx(equal[1].item(), rel=1e-14)


@pytest.mark.parametrize("largest", [0.5, 100.0])
def test_clipping_is_torch_s(largest):
    made = linear(name="fp32", scale=1, clip_norm=largest)
    reference = linear(name="fp32", scale=1)
    for p, gradient in zip(reference.model.parameters(), gradients(reference.model), strict=True):
        p.grad = gradient
    norm = torch.nn.utils.clip_grad_norm_(reference.model.parameters(), largest).item()
    clipped = [p.grad for p in reference.model.parameters()]
    given = gradients(made.model)
    assert made.update.apply(given, 1.0, 0.1, 1) == norm > 0.5
    assert all(torch.equal(a, b) for a, b in zip(given, clipped, strict=True))


@pytest.mark.parametrize("optimizer", [SGD, LARS])
def test_a_step_that_overflowed_leaves_weights_velocities_and_averages_as_they_were(optimizer):
    made, undisturbed = (linear(optimizer, ema_decay=0.9) for _ in range(2))
    for step, factor in enumerate([1.0, math.inf, math.nan, 1.0], 1):
        before = [p.clone() for p in made.model.parameters()]
        norm = made.update.apply(gradients(made.model, factor), 1.0, 0.1, step)
        same = [torch.equal(p, old) for p, old in zip(made.model.parameters(), before, strict=True)]
        assert same == [not math.isfinite(factor)] * 2 and math.isfinite(norm) == math.isfinite(factor)
    for step in (1, 2):
        undisturbed.update.apply(gradients(made.model), 1.0, 0.1, step)
    for name in ("model", "optimizer"):
        assert differing(getattr(made, name).state_dict(), getattr(undisturbed, name).state_dict()) == []
    states = [each.update.state_dict() for each in (made, undisturbed)]
    assert differing(states[0]["averages"], states[1]["averages"]) == []
    expected = {"value": 2.0**14, "dynamic": True, "good_steps": 1, "skipped": 2, "skipped_in_a_row": 0}
    assert states[0]["loss_scale"] == expected


def test_what_no_scale_can_help_ends_the_run():
    message = (
        r"the gradient's norm is inf at step 7 \(learning rate 0.1\); lower schedule.base_lr .* loss_scale=dynamic"
    )
    for name in ("fp32", "fp16"):
        made = linear(name=name, scale=1)
        with pytest.raises(DivergedError, match=message):
            made.update.apply(gradients(made.model, math.inf), 1.0, 0.1, 7)
    for name in ("fp32", "bf16"):
        made = linear(name=name, scale="dynamic")
        with pytest.raises(DivergedError, match="the loss is nan at step 7"):
            made.update.apply(gradients(made.model, math.nan), math.nan, 0.1, 7)
    in_fp16 = linear(name="fp16", scale=8)
    in_fp16.update.apply(gradients(in_fp16.model), math.inf, 0.1, 7)  # the forward pass may have overflowed
    assert in_fp16.update.loss_scale == LossScale(8.0, False, good_steps=0, skipped=1, skipped_in_a_row=1)


def test_a_scale_that_overflows_for_good_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "MAX_SKIPPED", 2)
    with pytest.raises(
        DivergedError, match=r"^loss_scale=1e\+20: the gradients overflowed in 2 steps in a row, the last"
    ):
        train(tmp_path, *SMALL, "precision=fp16", "loss_scale=1.0e+20")
    assert values(tmp_path, "train/skipped_steps") == [1]


def test_an_overflow_in_a_run_uses_up_its_images_and_nothing_else(tmp_path):
    """A fixed scale that float16 can't hold: the step counts, and only the running statistics have moved."""
    worker = Worker(tiny(*SMALL, "precision=fp16", "loss_scale=1.0e+20", "max_steps=1"), WorkerContext())
    before = [p.detach().clone() for p in worker.model.parameters()]
    statistics = [moment.clone() for moment in chip_moments(worker.model)]
    result = worker.train(tmp_path)
    assert (result["steps"], result["skipped_steps"]) == (1, 1)
    assert all(torch.equal(p, old) for p, old in zip(worker.model.parameters(), before, strict=True))
    assert not any(torch.equal(m, old) for m, old in zip(chip_moments(worker.model), statistics, strict=True))
    assert values(tmp_path, "train/loss_scale") == [1e20] and math.isfinite(values(tmp_path, "train/loss")[0])


def test_a_scale_that_is_a_power_of_two_costs_no_bits_in_float32(tmp_path):
    results = [train(tmp_path / str(s), *SMALL, "max_steps=1", f"loss_scale={s}") for s in (1, 1024)]
    assert results[0]["weights_sha256"] == results[1]["weights_sha256"]
    rows = [next(row for row in read_rows(tmp_path / str(s)) if row["kind"] == "step") for s in (1, 1024)]
    assert set(rows[1]["values"]) - set(rows[0]["values"]) == {"train/loss_scale", "train/skipped_steps"}


def test_float16_trains_as_float32_does(tmp_path):
    settings = (*SMALL, "mesh.axes.host=1", "schedule.base_lr=0.3", "max_steps=3")
    for name, scale in (("fp32", 1), ("fp16", 256)):
        train(tmp_path / name, *settings, f"precision={name}", f"loss_scale={scale}")
    fp32, fp16 = (values(tmp_path / name, "train/loss") for name in ("fp32", "fp16"))
    assert fp16[2] < fp16[0] - 0.1
    assert fp16 == pytest.approx(fp32, rel=0.01) and fp16 != fp32
    assert values(tmp_path / "fp16", "train/skipped_steps") == [0] * 3


def move_the_scale_at_every_step() -> None:
    precision.START_SCALE, precision.GROWTH_INTERVAL = 2.0**13, 1


def on_two(rank: int, world_size: int, store, folder: Path) -> None:
    move_the_scale_at_every_step()
    context = WorkerContext(rank=rank, world_size=world_size, store=PrefixStore("fp16", store))
    run_worker(tiny(*EVERYTHING, "checkpoint_steps=1"), context, folder)


@pytest.mark.slow
def test_fp16_with_averages_is_the_same_on_two_workers_and_after_a_resume_on_one(tmp_path, monkeypatch):
    """Weights, velocities, averages, statistics and the loss scale."""
    for name in ("START_SCALE", "GROWTH_INTERVAL"):
        monkeypatch.setattr(precision, name, getattr(precision, name))  # so that they are as before afterwards
    move_the_scale_at_every_step()
    one, two, resumed = (tmp_path / name for name in ("one", "two", "resumed"))
    two.mkdir()
    train(one, *EVERYTHING)
    run_ranks(2, on_two, two)
    assert differing(saved(one, 3), saved(two, 3)) == []
    train(resumed, *EVERYTHING, resume_from=of_step(two, 2))
    assert differing(saved(one, 3), saved(resumed, 3)) == []
    state = saved(one, 3)
    assert state["loss_scale"]["skipped"] < 3 and differing(state["model"], state["averages"]) != []
