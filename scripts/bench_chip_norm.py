"""Measures batch norm per chip: its forms layer by layer, and the chip tax of a whole ResNet-50.

    python scripts/bench_chip_norm.py [--json] [--quick] [--threads 1] [--repeats 7] [--device cpu]
                                      [--precision auto]

The chip tax is the time of one plain batch norm over the whole batch, divided by the time of K chips with as many
images in all: 1 means that chips cost nothing. Everything is forward and backward with channels last, in the precision
that training chooses (bfloat16 where the machine multiplies it), interleaved in one run. On one CPU thread the clock is
the processor time of that thread, which other programs disturb less than wall time; else it is wall time. Beside ours
stands the plain loop: torch's batch norm on every chip's images, concatenated. `--quick` takes a few small cases.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.precision_option import parse  # noqa: E402
from train.models.chip_norm import ChipBatchNorm2d, ChipPass, allocate_chips, finished, normalise  # noqa: E402
from train.models.layout import pixels_first  # noqa: E402
from train.models.resnet import ResNet, resnet  # noqa: E402
from train.precision import choose_precision  # noqa: E402

# image size, chips, images of a chip, the tax that is aimed at
CASES = ((224, 2, 32, 0.95), (224, 4, 8, 0.95), (224, 16, 2, 0.9), (32, 256, 8, 0.95), (32, 256, 2, 0.85))
QUICK_CASES = ((32, 16, 8, 0.95), (32, 16, 2, 0.85))
# channels and height = width of ResNet-50's batch norms at 32 and 224 pixels
LAYERS = {
    32: ((64, 16), (64, 8), (256, 8), (128, 4), (512, 4), (256, 2), (1024, 2), (512, 1), (2048, 1)),
    224: ((64, 56), (256, 56), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7)),
}
EPS = 1e-5


class PlainBatchNorm2d(nn.BatchNorm2d):
    """torch's own over the whole pass, called as ours is."""

    def forward(self, images: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        return finished(super().forward(images), residual, relu)


class LoopBatchNorm2d(nn.BatchNorm2d):
    """The plain loop over chips: every chip's images through torch's batch norm, then one concatenation."""

    def __init__(self, num_features: int, chip_pass: ChipPass) -> None:
        super().__init__(num_features)
        self.chip_pass = chip_pass
        self.register_buffer("means", torch.zeros(chip_pass.count, num_features), persistent=False)
        self.register_buffer("variances", torch.ones(chip_pass.count, num_features), persistent=False)

    def forward(self, images: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        parts = zip(images.chunk(self.chip_pass.count), self.means, self.variances, strict=True)
        rest = (self.weight, self.bias, True, self.momentum, self.eps)
        normalised = [functional.batch_norm(part, mean, var, *rest) for part, mean, var in parts]
        return finished(torch.cat(normalised), residual, relu)


def network(kind: str, chips: int, device: str) -> ResNet:
    """ResNet-50 of `chips` in a pass with ours, one plain batch norm (plain) or the plain loop (loop)."""
    torch.manual_seed(0)
    model = resnet(zero_init_last_gamma=False)
    model.chip_pass.count = chips
    if kind == "ours":
        allocate_chips(model, chips, span=1)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, ChipBatchNorm2d) and kind != "ours":
                channels = len(child.weight)
                swap = PlainBatchNorm2d(channels) if kind == "plain" else LoopBatchNorm2d(channels, model.chip_pass)
                setattr(module, name, swap)
    return model.to(device, memory_format=torch.channels_last).train()


def chip_tax(
    image_size: int, chips: int, chip_batch: int, repeats: int, device: str = "cpu", precision: str = "auto"
) -> dict:
    """The chip tax of ResNet-50: medians of `repeats` interleaved rounds of plain, loop and ours; seconds per pass.

    Uses the threads that torch is set to. `tax` is ours, `loop_tax` the plain loop's; above 1 is faster than plain.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(chips * chip_batch, 3, image_size, image_size, generator=generator)
    images = images.to(device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (len(images),), generator=generator).to(device)

    chosen = choose_precision(precision, device)

    def step(model: ResNet) -> None:
        with chosen.autocast(device):
            logits = model(images)
        functional.cross_entropy(logits.float(), labels).backward()
        model.zero_grad(set_to_none=True)

    models = {kind: network(kind, chips, device) for kind in ("plain", "loop", "ours")}
    times = in_turns({kind: lambda model=model: step(model) for kind, model in models.items()}, repeats, device)
    seconds = {kind: statistics.median(values) for kind, values in times.items()}
    taxes = {
        kind: statistics.median(plain / other for plain, other in zip(times["plain"], times[kind], strict=True))
        for kind in ("ours", "loop")
    }
    return {
        "image_size": image_size,
        "chips": chips,
        "chip_batch": chip_batch,
        "threads": torch.get_num_threads(),
        "precision": chosen.name,
        "plain_s": seconds["plain"],
        "loop_s": seconds["loop"],
        "ours_s": seconds["ours"],
        "tax": taxes["ours"],
        "loop_tax": taxes["loop"],
    }


def layer_row(
    channels: int,
    size: int,
    chips: int,
    chip_batch: int,
    repeats: int,
    device: str = "cpu",
    precision: str = "auto",
) -> dict:
    """Milliseconds of each form on one layer, forward and backward: the shortest of `repeats` interleaved rounds."""
    dtype = choose_precision(precision, device).dtype
    images = torch.randn(chips * chip_batch, channels, size, size, device=device).to(dtype)
    images = images.contiguous(memory_format=torch.channels_last).requires_grad_()
    gradient = torch.randn_like(images)
    weight = torch.ones(channels, device=device, requires_grad=True)
    bias = torch.zeros(channels, device=device, requires_grad=True)
    mean, var = torch.zeros(channels, device=device), torch.ones(channels, device=device)
    sizes = (chip_batch,) * chips

    def plain(part: Tensor) -> Tensor:
        return functional.batch_norm(part, mean, var, weight, bias, True, 0.1, EPS)

    forms = {
        "plain": lambda: plain(images),
        "plain loop": lambda: torch.cat([plain(part) for part in images.chunk(chips)]),
        "loop": lambda: normalise(images, weight, bias, EPS, sizes)[0],
        "beside": lambda: normalise(mixed, weight, bias, EPS, sizes, beside=True)[0],
    }
    # neighbouring layers keep images in the layout of the form
    mixed, mixed_gradient = (pixels_first(tensor.detach()).requires_grad_() for tensor in (images, gradient))
    given = {name: ((images, weight, bias), gradient) for name in forms} | {
        "beside": ((mixed, weight, bias), mixed_gradient)
    }
    runs = {name: lambda name=name: torch.autograd.grad(forms[name](), *given[name]) for name in forms}
    times = {name: min(values) * 1e3 for name, values in in_turns(runs, repeats, device).items()}
    fastest = min(("plain loop", "loop", "beside"), key=times.__getitem__)
    shape = {"chips": chips, "chip_batch": chip_batch, "channels": channels, "size": size}
    return {**shape, "values": chip_batch * channels * size**2, "ms": times, "fastest": fastest}


def in_turns(runs: dict[str, Callable[[], object]], repeats: int, device: str) -> dict[str, list[float]]:
    """Seconds of each run in `repeats` rounds after one to warm up; every other round goes backwards."""
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    seconds = {name: [] for name in runs}
    for turn in range(-1, repeats):
        for name in list(runs) if turn % 2 else list(reversed(runs)):
            start = clock()
            runs[name]()
            if device != "cpu":
                torch.cuda.synchronize(device)
            if turn >= 0:
                seconds[name].append(clock() - start)
    return seconds


def layer_line(row: dict) -> str:
    times = "".join(
        f"{row['ms'][name]:11.2f}{'*' if name == row['fastest'] else ' '}"
        for name in ("plain", "plain loop", "loop", "beside")
    )
    shape = f"{row['chips']:4d} x {row['chip_batch']:<2d} {row['channels']:5d} {row['size']:3d}px"
    return f"{shape} {row['values']:8d}{times}"


def tax_line(row: dict) -> str:
    times = f"{row['plain_s']:8.2f}{row['loop_s']:12.2f}{row['ours_s']:8.2f}"
    case = f"{row['image_size']:4d} px {row['chips']:4d} x {row['chip_batch']:<2d}"
    return f"{case}{times}{row['loop_tax']:12.3f}{row['tax']:8.3f}{row['target']:8.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--quick", action="store_true", help="a few small cases")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--only", choices=("layers", "tax"), help="one of the two tables")
    options, _ = parse(parser)
    torch.set_num_threads(options.threads)
    how = options.repeats, options.device, options.precision
    say = (lambda line: None) if options.json else (lambda line: print(line, flush=True))
    result = {key: getattr(options, key) for key in ("device", "precision", "threads")}
    result |= {"torch": torch.__version__, "layers": [], "tax": []}
    if options.only != "tax":
        say("milliseconds a layer, forward and backward; * fastest of the three forms")
        say("chips x images, channels, size, values of a chip       plain  plain loop        loop      beside")
        for size, chips, chip_batch in ((32, 64, 2),) if options.quick else ((32, 256, 2), (32, 256, 8), (224, 8, 2)):
            for layer in LAYERS[size]:
                result["layers"].append(layer_row(*layer, chips, chip_batch, *how))
                say(layer_line(result["layers"][-1]))
    if options.only != "layers":
        say("\nResNet-50, seconds a pass and chip tax (plain batch norm's time / chips' time)")
        say("   size chips x images  plain  plain loop    ours    loop tax     tax  target")
        for size, chips, chip_batch, target in QUICK_CASES if options.quick else CASES:
            row = chip_tax(size, chips, chip_batch, *how)
            result["tax"].append({**row, "target": target})
            say(tax_line(result["tax"][-1]))
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
