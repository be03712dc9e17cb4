"""LARS and SGD against their formulas, written out for one parameter at a time."""

import copy

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


@pytest.mark.parametrize("momentum, decay, coefficient, epsilon", [(0.9, 0.01, 0.1, 0.0), (0.0, 0.0, 0.001, 1e-3)])
def test_lars_is_its_formula(momentum, decay, coefficient, epsilon):
    trained = parameters()
    result = run(LARS(trained, momentum, decay, coefficient, epsilon), trained)
    for number, w in enumerate(p.detach().clone() for p in parameters()):
        v = torch.zeros_like(w)
        for step, rate in enumerate(RATES):
            g = gradients(step)[number]
            if w.ndim == 1:
                v = momentum * v + rate * g
            else:
                w_norm, g_norm = w.square().sum().sqrt(), g.square().sum().sqrt()
                trust = 1.0
                if w_norm > 0 and g_norm > 0:
                    trust = coefficient * w_norm / (g_norm + decay * w_norm + epsilon)
                v = momentum * v + rate * trust * (g + decay * w)
            w = w - v
        torch.testing.assert_close(result[number], w, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("momentum, nesterov, decay", [(0.9, False, 0.01), (0.9, True, 0.01), (0.0, False, 0.0)])
def test_sgd_is_its_formula(momentum, nesterov, decay):
    trained = parameters()
    result = run(SGD(trained, momentum, nesterov, decay), trained)
    for number, w in enumerate(p.detach().clone() for p in parameters()):
        v = torch.zeros_like(w)
        for step, rate in enumerate(RATES):
            g = gradients(step)[number] + (decay if w.ndim > 1 else 0.0) * w
            v = momentum * v + g
            w = w - rate * (g + momentum * v if nesterov else v)
        torch.testing.assert_close(result[number], w, rtol=1e-13, atol=1e-13)


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
        (lambda p: SGD(p, momentum=-0.1), "optim.momentum=-0.1"),
        (lambda p: SGD(p, weight_decay=-1.0), "optim.weight_decay=-1.0"),
        (lambda p: SGD(p, momentum=0.0, nesterov=True), "optim.nesterov=true"),
    ],
)
def test_impossible_settings_are_refused(made, named):
    with pytest.raises(ValueError, match=named):
        made(parameters())
