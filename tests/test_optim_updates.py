"""LARS and SGD against their formulas, written out in numpy for one parameter at a time, and beside other libraries."""

import copy
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from train.optim.lars import LARS
from train.optim.parameters import split_by_decay
from train.optim.sgd import SGD

RATES = [0.0, 0.5, 1.0, 0.25, 2.0]


def parameters() -> list[nn.Parameter]:
    """A kernel, a matrix of zeros, a matrix that gets no gradient but zeros, a vector."""
    torch.manual_seed(3)
    kernel = torch.randn(4, 3, 3, 3, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    shapes = [kernel, torch.zeros(2, 5), torch.randn(3, 2), torch.randn(6)]
    return [nn.Parameter(value.double()) for value in shapes]


def gradients(step: int) -> list[Tensor]:
    """In the memory format of the parameters, as autograd leaves them."""
    generator = torch.Generator().manual_seed(step)
    made = [torch.empty_like(p.detach()).normal_(generator=generator) for p in parameters()]
    made[2].zero_()
    return made


def run(optimizer: torch.optim.Optimizer, trained: list[nn.Parameter]) -> list[Tensor]:
    for step, rate in enumerate(RATES):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for p, gradient in zip(trained, gradients(step), strict=True):
            p.grad = gradient
        optimizer.step()
    return [p.detach() for p in trained]


def in_numpy(step) -> list[np.ndarray]:
    """Every parameter after RATES; `step(w, v, g, rate)` is one update: (new w, new v)."""
    ended = []
    for number, w in enumerate(p.detach().numpy().copy() for p in parameters()):
        v = np.zeros_like(w)
        for count, rate in enumerate(RATES):
            w, v = step(w, v, gradients(count)[number].numpy(), rate)
        ended.append(w)
    return ended


def same(result: list[Tensor], expected: list) -> None:
    for one, other in zip(result, expected, strict=True):
        np.testing.assert_allclose(one.detach().numpy(), np.asarray(other), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("form", ["lr_inside", "lr_outside"])
@pytest.mark.parametrize("momentum, decay, coefficient, epsilon", [(0.9, 0.01, 0.1, 0.0), (0.0, 0.0, 0.001, 1e-3)])
def test_lars_is_its_formula(momentum, decay, coefficient, epsilon, form):
    def step(w, v, g, rate):
        scaled = g
        if w.ndim > 1:
            w_norm, g_norm = np.sqrt((w * w).sum()), np.sqrt((g * g).sum())
            usable = w_norm > 0 and g_norm > 0
            trust = coefficient * w_norm / (g_norm + decay * w_norm + epsilon) if usable else 1.0
            scaled = trust * (g + decay * w)
        if form == "lr_inside":
            v = momentum * v + rate * scaled
            return w - v, v
        v = momentum * v + scaled
        return w - rate * v, v

    trained = parameters()
    same(run(LARS(trained, momentum, decay, coefficient, epsilon, form), trained), in_numpy(step))


def test_the_momentum_forms_differ_only_while_the_rate_changes(monkeypatch):
    def ended(form: str) -> list[Tensor]:
        trained = parameters()
        return run(LARS(trained, 0.9, 0.01, 0.1, momentum_form=form), trained)

    apart = [(one - other).abs().max() for one, other in zip(ended("lr_inside"), ended("lr_outside"), strict=True)]
    assert min(apart) > 1e-3
    monkeypatch.setattr(f"{__name__}.RATES", [0.5] * 5)
    same(ended("lr_inside"), ended("lr_outside"))


def test_lars_is_that_of_timm():
    found = importlib.util.find_spec("timm")
    if found is None:
        pytest.skip("timm is not installed (it comes with the extra test)")
    # The one file: importing the package would load all of its models.
    path = Path(found.submodule_search_locations[0], "optim", "lars.py")
    spec = importlib.util.spec_from_file_location("timm_lars", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    trained, copied = parameters(), parameters()
    groups = [{"params": copied[:3], "weight_decay": 0.01}, {"params": copied[3:], "weight_decay": 0.0}]
    theirs = module.Lars(groups, momentum=0.9, trust_coeff=0.1, eps=1e-6)
    ours = LARS(trained, 0.9, 0.01, 0.1, 1e-6, "lr_outside")
    same(run(ours, trained), run(theirs, copied))


SGD_SETTINGS = [(0.9, False, 0.01), (0.9, True, 0.01), (0.0, False, 0.0)]


@pytest.mark.parametrize("momentum, nesterov, decay", SGD_SETTINGS)
def test_sgd_is_its_formula(momentum, nesterov, decay):
    def step(w, v, g, rate):
        g = g + (decay if w.ndim > 1 else 0.0) * w
        v = momentum * v + g
        return w - rate * (g + momentum * v if nesterov else v), v

    trained = parameters()
    same(run(SGD(trained, momentum, nesterov, decay), trained), in_numpy(step))


@pytest.mark.parametrize("momentum, nesterov, decay", SGD_SETTINGS)
def test_sgd_is_that_of_torch(momentum, nesterov, decay):
    trained, copied = parameters(), parameters()
    groups = [{"params": copied[:3], "weight_decay": decay}, {"params": copied[3:], "weight_decay": 0.0}]
    theirs = torch.optim.SGD(groups, lr=0.0, momentum=momentum, nesterov=nesterov, fused=True)
    assert all(map(torch.equal, run(SGD(trained, momentum, nesterov, decay), trained), run(theirs, copied)))


def test_the_scale_of_a_gradient_does_not_matter_to_lars_without_decay():
    steps = []
    for scale in (1.0, 1024.0):
        w = nn.Parameter(torch.full((2, 2), 3.0, dtype=torch.float64))
        w.grad = torch.full_like(w, scale)
        optimizer = LARS([w], weight_decay=0.0, coefficient=0.5)
        for group in optimizer.param_groups:
            group["lr"] = 1.0
        optimizer.step()
        steps.append(w.detach())
    assert torch.equal(*steps)
    assert torch.equal(steps[0], torch.full((2, 2), 3 - 0.5 * 3, dtype=torch.float64))  # coefficient * |w| * g / |g|


@pytest.mark.parametrize("made", [LARS, SGD])
def test_a_saved_state_continues_the_same_training(made):
    trained, copied = parameters(), parameters()
    first, second = made(trained), made(copied)
    run(first, trained)
    for p, q in zip(copied, trained, strict=True):
        p.data.copy_(q.data)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for one, other in zip(run(first, trained), run(second, copied), strict=True):
        assert torch.equal(one, other)


def test_vectors_neither_decay_nor_scale():
    kernel, zeros, still, vector = parameters()
    matrices, vectors = split_by_decay(iter([kernel, vector, zeros, still]))
    assert [p.shape for p in matrices] == [kernel.shape, zeros.shape, still.shape]
    assert [p.shape for p in vectors] == [vector.shape]


@pytest.mark.parametrize(
    "made, named",
    [
        (lambda p: LARS(p, momentum=1.0), "optim.momentum=1.0"),
        (lambda p: LARS(p, weight_decay=-1.0), "optim.weight_decay=-1.0"),
        (lambda p: LARS(p, coefficient=-0.1), "optim.coefficient=-0.1"),
        (lambda p: LARS(p, epsilon=-1e-9), "optim.epsilon=-1e-09"),
        (lambda p: LARS(p, momentum_form="inside"), "optim.momentum_form=inside: use lr_inside or lr_outside"),
        (lambda p: SGD(p, momentum=-0.1), "optim.momentum=-0.1"),
        (lambda p: SGD(p, weight_decay=-1.0), "optim.weight_decay=-1.0"),
        (lambda p: SGD(p, momentum=0.0, nesterov=True), "optim.nesterov=true"),
    ],
)
def test_impossible_settings_are_refused(made, named):
    with pytest.raises(ValueError, match=named):
        made(parameters())
