"""Averaged weights: torch's AveragedModel step for step, what evaluation uses of them, and what stays the run's own."""

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from training_samples import tiny

from train import checkpoint
from train.build import Worker, WorkerContext
from train.checkpoint_files import list_checkpoints
from train.models.chip_norm import ChipBatchNorm2d, ChipPass, allocate_chips, chip_moments, evaluation_moments
from train.optim.averaging import AveragedWeights

TINY = ("data.image_size=4", "mesh.axes.host=1", "chip_batch_size=4", "max_steps=2", "eval_every=100")


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    made = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 1), ChipBatchNorm2d(3, ChipPass()), torch.nn.Conv2d(3, 2, 1))
    allocate_chips(made, 4, 1)
    return made


@torch.no_grad()
def disturb(made: torch.nn.Module) -> None:
    for tensor in (*made.parameters(), *chip_moments(made)):
        tensor.add_(torch.randn_like(tensor), alpha=0.1)


def test_the_average_is_torch_s_to_the_bit():
    made = model()
    averages = AveragedWeights(made, 0.9)
    theirs = AveragedModel(made, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    theirs.update_parameters(made)  # the first update copies: the initial weights
    for _ in range(5):
        disturb(made)
        averages.update()
        theirs.update_parameters(made)
    with averages.in_use():
        assert all(torch.equal(p, q) for p, q in zip(made.parameters(), theirs.module.parameters(), strict=True))


def test_the_average_is_that_of_the_formula_for_weights_and_each_chip_s_statistics():
    made = model()
    expected = [tensor.detach().double() for tensor in (*made.parameters(), *chip_moments(made))]
    averages = AveragedWeights(made, 0.75)
    for _ in range(4):
        disturb(made)
        averages.update()
        for e, w in zip(expected, (*made.parameters(), *chip_moments(made)), strict=True):
            e.mul_(0.75).add_(w.detach(), alpha=0.25)
    with averages.in_use():
        found = [*(p.detach().double() for p in made.parameters()), *(m.double() for m in averages.chip_moments)]
    for e, w in zip(expected, found, strict=True):
        torch.testing.assert_close(w, e, rtol=1e-6, atol=1e-7)


def test_the_model_has_its_own_weights_again_after_use_even_of_a_failed_one():
    made = model()
    averages = AveragedWeights(made, 0.5)
    disturb(made)
    averages.update()
    own = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    state = averages.state_dict()
    with pytest.raises(KeyError), averages.in_use():
        assert all(torch.equal(tensor, state[name]) for name, tensor in made.state_dict().items())
        raise KeyError
    assert all(torch.equal(tensor, own[name]) for name, tensor in made.state_dict().items())
    assert not torch.equal(own["0.weight"], state["0.weight"])


@pytest.mark.parametrize("decay", [0, 1, -0.1])
def test_a_decay_that_is_none_is_refused(decay):
    with pytest.raises(ValueError, match=f"ema_decay={decay}: must be above 0 and below 1"):
        AveragedWeights(model(), decay)


def test_evaluation_uses_the_averages_and_the_checkpoint_has_both(tmp_path):
    """The evaluation after the last step is that of the saved averages, and the weights' hash that of the raw ones."""
    worker = Worker(tiny(*TINY, "ema_decay=0.5"), WorkerContext())
    result = worker.train(tmp_path)
    state = checkpoint.load(list_checkpoints(tmp_path / "checkpoints")[-1])
    other = Worker(tiny(*TINY), WorkerContext())
    other.model.load_state_dict(state["model"])
    assert result["weights_sha256"] == checkpoint.weights_sha256(other.model)
    for loaded, loss in (("averages", result["eval_loss"]), ("model", None)):
        other.model.load_state_dict(state[loaded])
        other.trainer.average_statistics = lambda: None  # those of the loaded weights
        found = other.trainer.evaluate().loss
        assert (found == loss) == (loss is not None)
    width = state["chip_moments"].shape[1] // 2
    means = torch.cat([moment for moment in evaluation_moments(worker.model)])
    torch.testing.assert_close(state["chip_moments"][:, :width].mean(0), means)
    averaged = torch.cat([moment for moment in worker.trainer.update.averages.evaluation_moments])
    torch.testing.assert_close(state["chip_moments"][:, width:].mean(0), averaged)


def test_averaging_leaves_the_training_as_it_is(tmp_path):
    results = []
    for name, decay in (("with", "0.9"), ("without", "null")):
        (tmp_path / name).mkdir()
        results.append(Worker(tiny(*TINY, f"ema_decay={decay}"), WorkerContext()).train(tmp_path / name))
    assert results[0]["weights_sha256"] == results[1]["weights_sha256"]
    assert results[0]["eval_loss"] != results[1]["eval_loss"]
