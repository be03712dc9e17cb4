"""The arithmetic of a run: what `precision`, `loss_scale` and `device` mean on the machine at hand.

Loss scaling: Micikevicius et al. 2018 (arXiv 1710.03740), with the constants of torch.amp.GradScaler.
"""

import math
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

START_SCALE = 2.0**16  # of a dynamic loss scale
GROWTH_INTERVAL = 2_000  # steps without an overflow after which it doubles
SMALLEST_SCALE = 2.0**-14  # float16's smallest normal number: a loss that overflows below it is not a matter of scale
MAX_SKIPPED = 20  # steps in a row that a fixed loss scale may overflow


@dataclass(frozen=True)
class Precision:
    """`dtype`: of convolutions and products; weights, statistics, loss, gradients' sums and optimizer are float32."""

    name: str
    dtype: torch.dtype
    reason: str

    def autocast(self, device: str) -> torch.autocast:
        return torch.autocast(device.split(":")[0], self.dtype, enabled=self.dtype != torch.float32)


def choose_precision(precision: str, device: str) -> Precision:
    """`auto` takes bfloat16 where the hardware computes in it and float32 elsewhere; never fp16, which can overflow."""
    if precision == "auto":
        gpu = device.startswith("cuda")
        native = torch.cuda.is_bf16_supported(including_emulation=False) if gpu else cpu_has_bf16()
        if native:
            return Precision("bf16", torch.bfloat16, f"auto: {describe_device(device)} multiplies bfloat16 natively")
        return Precision("fp32", torch.float32, f"auto: {describe_device(device)} has no native bfloat16")
    if precision not in DTYPES:
        raise ValueError(f"precision={precision}: training knows {', '.join(DTYPES)} and auto")
    return Precision(precision, DTYPES[precision], "as configured")


def use_arithmetic(device: str, precision: Precision, exact: bool) -> None:
    """What a GPU's libraries may do: float32 means float32 (no TF32); `exact` takes the same algorithm every time.

    Otherwise cuDNN tries its algorithms on each new shape and takes the fastest.
    """
    if device.startswith("cuda"):
        tf32 = precision.dtype != torch.float32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = exact, not exact


@dataclass
class LossScale:
    """The factor of the loss, so that gradients do not vanish below float16's range, and what an overflow does to it.

    Dynamic: halved by a step whose summed gradients are not finite, doubled after GROWTH_INTERVAL steps that were.
    Fixed: stays, and such a step is merely skipped (MindSpore's FixedLossScaleManager, drop_overflow_update).
    It stands before each chip's mean loss, so float16 has a real chip's range; but the gradient of a weight is summed
    over the chips of a pass before it is rounded to float16, and overflows that much sooner. chips_per_pass=1 (in
    fast numerics) is free of that.
    """

    value: float
    dynamic: bool
    good_steps: int = 0  # since the last overflow or doubling
    skipped: int = 0
    skipped_in_a_row: int = 0

    @property
    def off(self) -> bool:
        """Without a scale nothing is skipped: gradients that are not finite are the training's own."""
        return self.value == 1 and not self.dynamic

    def update(self, overflowed: bool) -> None:
        """Count a step that was made, or skipped since its gradients overflowed."""
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if overflowed else 0
        self.good_steps = 0 if overflowed else self.good_steps + 1
        self.skipped += overflowed
        if self.dynamic and overflowed:
            self.value /= 2
        elif self.dynamic and self.good_steps == GROWTH_INTERVAL:
            self.value, self.good_steps = self.value * 2, 0

    def failure(self, step: int) -> str | None:
        """Why the run can't go on after `step`, in one line; None while it can."""
        if self.dynamic and self.value < SMALLEST_SCALE:
            return (
                f"loss_scale: dynamic, now {self.value:g}, and the gradients still overflow at step {step}; "
                "lower schedule.base_lr, or use precision=bf16 or fp32"
            )
        if not self.dynamic and self.skipped_in_a_row >= MAX_SKIPPED:
            return (
                f"loss_scale={self.value:g}: the gradients overflowed in {self.skipped_in_a_row} steps in a row, the "
                f"last was step {step}; lower it, or use loss_scale=dynamic"
            )
        return None

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, state: dict) -> None:
        """Go on counting; a scale that is now fixed keeps its value, one that is now dynamic goes on from the saved."""
        self.good_steps, self.skipped, self.skipped_in_a_row = (
            state[name] for name in ("good_steps", "skipped", "skipped_in_a_row")
        )
        if self.dynamic and state["dynamic"]:
            self.value = state["value"]


def gradient_dtypes(config: dict, precision: Precision) -> list[torch.dtype]:
    """What gradients are rounded to on their way to the optimizer."""
    wire = [DTYPES[config["wire_dtype"]]] if config["gradient_sum"] != "fp32" else []
    return [precision.dtype, *wire]


def choose_loss_scale(loss_scale: float | str, *gradients: torch.dtype) -> LossScale:
    """`auto` is dynamic where gradients pass through fp16, which needs it, and 1 elsewhere; powers of two cost no bits.

    `gradients`: the dtypes that gradients are rounded to, computed or on the wire.
    """
    if loss_scale == "auto":
        loss_scale = "dynamic" if torch.float16 in gradients else 1.0
    if loss_scale == "dynamic":
        return LossScale(START_SCALE, dynamic=True)
    if isinstance(loss_scale, str) or not 0 < loss_scale < math.inf:
        raise ValueError(f"loss_scale={loss_scale}: must be a finite number above 0, auto or dynamic")
    return LossScale(float(loss_scale), dynamic=False)


def choose_device(device: str) -> str:
    """`auto` takes a GPU where torch sees one."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda: torch sees no GPU here; use device=cpu, or device=auto")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return "cuda:0" if device == "cuda" else device


def cpu_flags() -> set[str]:
    """The processor's feature flags as Linux names them (empty elsewhere)."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith(("flags", "Features"))), set())


def cpu_has_bf16() -> bool:
    """True for x86 with AVX512-BF16 or AMX and for Arm with BF16."""
    return bool(cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"})


def describe_device(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    capability = torch.backends.cpu.get_cpu_capability()
    special = sorted(cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"})
    return f"{platform.machine()} CPU ({', '.join([capability, *special])})"
