"""What 16-bit sums do to the gradients of a small residual network on scikit-learn's digits: growth, range, training.

Per-chip gradients are added in the order of each plan, every sum rounded to the wire's dtype, and compared with their
sum in float64; scripts/wire_dtype.py runs it and writes the page.
"""

import math
import time
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from launch.compose import compose
from train.comm.algorithms import halving_doubling, hierarchical, ring
from train.comm.plan import Plan
from train.comm.wire import sum_on_plan
from train.data.digits import Digits
from train.data.order import Order
from train.emulator import make
from train.models.chip_norm import ChipBatchNorm2d, ChipPass, allocate_chips, chip_moments, evaluation_moments
from train.models.conv import Conv2d
from train.models.resnet import BasicBlock
from train.precision import DTYPES

PLANS = {plan.__name__: plan for plan in (ring, halving_doubling, hierarchical)}
CHIPS = (8, 64, 1024)
CHIP_BATCH = 2
IMAGE_SIZE = 8
WIDTH = 8
TRAINED_CHIPS = 64
STEPS = 44  # four epochs of 64 chips x 2 images
LEARNING_RATE, MOMENTUM, WARMUP_STEPS = 0.2, 0.9, 5
TRAINED = (  # plan, dtype, loss scale; the first is what the others are compared with, the second the control
    ("hierarchical", "fp32", 1),
    ("ring", "fp32", 1),
    ("hierarchical", "fp16", 1),
    ("hierarchical", "fp16", 1024),
    ("ring", "fp16", 1024),
    ("hierarchical", "bf16", 1),
    ("ring", "bf16", 1),
)


class Network:
    """A residual network of 20,000 parameters, with the statistics of `chips`."""

    def __init__(self, chips: int) -> None:
        torch.manual_seed(0)
        self.chip_pass = shared = ChipPass()
        self.model = nn.Sequential(
            *(Conv2d(3, WIDTH, 3), ChipBatchNorm2d(WIDTH, shared), nn.ReLU()),
            BasicBlock(WIDTH, WIDTH, 1, shared),
            BasicBlock(WIDTH, 2 * WIDTH, 2, shared),
            BasicBlock(2 * WIDTH, 4 * WIDTH, 2, shared),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * WIDTH, 10)),
        ).to(memory_format=torch.channels_last)
        allocate_chips(self.model, chips, 1)
        self.parameters = list(self.model.parameters())
        self.sizes = [p.numel() for p in self.parameters]

    def gradients(self, images: Tensor, labels: Tensor) -> tuple[Tensor, float]:
        """(float32 [chips, parameters]: of each chip's mean loss, their mean loss)."""
        rows, losses = [], []
        for chip, own in enumerate(range(0, len(labels), CHIP_BATCH)):
            self.chip_pass.first = chip
            logits = self.model(images[own : own + CHIP_BATCH])
            loss = functional.cross_entropy(logits, labels[own : own + CHIP_BATCH])
            rows.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, self.parameters)]))
            losses.append(loss.item())
        return torch.stack(rows), float(np.mean(losses))

    @torch.inference_mode()
    def accuracy(self, data: Digits) -> float:
        for mean, moment in zip(evaluation_moments(self.model), chip_moments(self.model), strict=True):
            mean.copy_(moment.mean(0))
        images, labels = data.eval.batch(np.arange(len(data.eval)), seed=0, epoch=0)
        self.model.eval()
        right = (self.model(images).argmax(1) == labels).float().mean().item()
        self.model.train()
        return right

    def weights(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.parameters])

    def load(self, weights: Tensor) -> None:
        with torch.no_grad():
            for p, part in zip(self.parameters, weights.split(self.sizes), strict=True):
                p.copy_(part.view_as(p))


@cache
def plan_of(name: str, chips: int) -> Plan:
    mesh = make(compose(["mesh=atlas900_1024"])["mesh"])
    return PLANS[name](mesh.first_hosts(chips // mesh.chips_per_host))


@cache
def sums_in_a_row(plan: Plan) -> int:
    """The most sums that an addend goes through on its way to chip 0."""
    depth = np.zeros((plan.mesh.num_chips, plan.num_chunks), int)
    for turn in plan.rounds():
        before = depth.copy()
        for source, destination, first, last in zip(*turn[:4], strict=True):
            arriving = before[source, first:last]
            at = depth[destination, first:last]
            at[:] = np.maximum(at, arriving) + 1 if turn.reduce else arriving
    return int(depth[0].max())


def images_for(data: Digits, chips: int, step: int) -> tuple[Tensor, Tensor]:
    """The images of a global step; where an epoch is too small for one, it goes on in the next epochs."""
    order = Order(len(data.train), CHIP_BATCH, min(chips, TRAINED_CHIPS), seed=0)
    pieces = range(step * (chips // order.num_chips), (step + 1) * (chips // order.num_chips))
    places = [divmod(piece, order.steps_per_epoch) for piece in pieces]
    drawn = [(epoch, order.indices(epoch, at, 0, order.num_chips).reshape(-1)) for epoch, at in places]
    batches = [data.train.batch(indices, seed=0, epoch=epoch) for epoch, indices in drawn]
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


def unit(dtype: str) -> float:
    return torch.finfo(DTYPES[dtype]).eps / 2


def relative(result: Tensor, exact: Tensor) -> float:
    return ((result - exact).norm() / exact.norm()).item()


def growth(gradients: Tensor, sizes: list[int], chips: int, name: str, dtype: str) -> dict:
    """Errors of a sum in which nothing leaves the range: loss scale 1,024, divided by the chips before the sum."""
    plan = plan_of(name, chips)
    scaled = gradients * (1024 / chips)
    sent = scaled.to(DTYPES[dtype])
    exact, exact_of_sent, magnitudes = (part.sum(0, dtype=torch.float64) for part in (scaled, sent, sent.abs()))
    result = sum_on_plan(plan, sent, DTYPES[dtype]).double()
    layers = [relative(*pair) for pair in zip(result.split(sizes), exact.split(sizes), strict=True)]
    depth = sums_in_a_row(plan)
    same = sum_on_plan(plan, torch.ones_like(sent[:, :1]).expand(-1, 1024), DTYPES[dtype]).double()
    of_magnitudes = sum_on_plan(plan, sent.abs(), DTYPES[dtype]).double()
    return {
        "chips": chips,
        "plan": name,
        "dtype": dtype,
        "sums_in_a_row": depth,
        "error": relative(result, exact),
        "worst_layer": max(layers),
        "random_bound": math.sqrt(depth) * unit(dtype),
        "worst_bound": depth * unit(dtype),
        "worst_measured": ((result - exact_of_sent).abs() / magnitudes.clamp_min(1e-30)).max().item(),
        "error_of_equal_gradients": relative(same, torch.full_like(same, chips)),
        "error_of_magnitudes": relative(of_magnitudes, magnitudes),
    }


def reach(gradients: Tensor, chips: int, loss_scale: int, divide_first: bool, dtype: str = "fp16") -> dict:
    """What falls out of the dtype's range on the hierarchical plan: below it on a chip, above it in the sum."""
    factor = loss_scale / chips if divide_first else loss_scale
    sent = (gradients * factor).to(DTYPES[dtype])
    exact = gradients.sum(0, dtype=torch.float64) * factor
    result = sum_on_plan(plan_of("hierarchical", chips), sent, DTYPES[dtype]).double()
    finite = result.isfinite()
    return {
        "chips": chips,
        "dtype": dtype,
        "loss_scale": loss_scale,
        "divided": "before" if divide_first else "after",
        "lost": ((sent == 0) & (gradients != 0)).sum().item() / (gradients != 0).sum().item(),
        "overflowed": 1 - finite.double().mean().item(),
        "error_of_the_rest": relative(result[finite], exact[finite]),
    }


def train(data: Digits, name: str, dtype: str, loss_scale: int) -> tuple[dict, Tensor]:
    """(result, weights) of STEPS steps of SGD on TRAINED_CHIPS chips; a step whose sum is not finite is left out."""
    network, losses, skipped = Network(TRAINED_CHIPS), [], 0
    optimizer = torch.optim.SGD(network.parameters, lr=LEARNING_RATE, momentum=MOMENTUM)
    plan = plan_of(name, TRAINED_CHIPS)
    for step in range(STEPS):
        gradients, loss = network.gradients(*images_for(data, TRAINED_CHIPS, step))
        losses.append(loss)
        summed = sum_on_plan(plan, gradients * loss_scale, DTYPES[dtype]).float() / (TRAINED_CHIPS * loss_scale)
        if not summed.isfinite().all():
            skipped += 1
            continue
        for p, part in zip(network.parameters, summed.split(network.sizes), strict=True):
            p.grad = part.view_as(p)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1, (step + 1) / WARMUP_STEPS)
        optimizer.step()
    result = {
        "plan": name,
        "dtype": dtype,
        "loss_scale": loss_scale,
        "skipped": skipped,
        "loss": float(np.mean(losses[-5:])),
        "top1": network.accuracy(data),
        "losses": losses,
    }
    return result, network.weights()


def study() -> dict:
    started = time.perf_counter()
    data = Digits(IMAGE_SIZE)
    trained = [train(data, *case) for case in TRAINED]
    reference = trained[0][1]
    for result, weights in trained:
        result["weights_apart"] = relative(weights, reference)
    network = Network(max(CHIPS))
    states = {"start": network.weights(), "trained": reference}
    grown, reached = [], []
    for state, weights in states.items():
        network.load(weights)
        gradients, _ = network.gradients(*images_for(data, max(CHIPS), step=1))
        for chips in CHIPS:
            own = gradients[:chips]
            for dtype in DTYPES:
                grown += [{"state": state} | growth(own, network.sizes, chips, name, dtype) for name in PLANS]
            for dtype, scale, first in (
                *(("fp16", s, f) for s in (1, 1024) for f in (False, True)),
                ("bf16", 1, False),
            ):
                reached.append({"state": state} | reach(own, chips, scale, first, dtype))
    return {
        "parameters": sum(network.sizes),
        "chip_batch_size": CHIP_BATCH,
        "torch": str(torch.__version__),
        "growth": grown,
        "range": reached,
        "training": [result for result, _ in trained],
        "seconds": time.perf_counter() - started,
    }
