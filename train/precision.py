"""The arithmetic of a run: what `precision` and `device` mean on the machine at hand."""

import platform
from dataclasses import dataclass
from pathlib import Path

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Precision:
    """`dtype`: of convolutions and products; weights, statistics, gradients' sums and the optimizer stay in float32."""

    name: str
    dtype: torch.dtype
    reason: str

    def autocast(self, device: str) -> torch.autocast:
        return torch.autocast(device.split(":")[0], self.dtype, enabled=self.dtype != torch.float32)


def choose_precision(precision: str, device: str) -> Precision:
    """`auto` takes bfloat16 where the hardware computes in it and float32 elsewhere."""
    if precision == "auto":
        gpu = device.startswith("cuda")
        native = torch.cuda.is_bf16_supported(including_emulation=False) if gpu else cpu_has_bf16()
        if native:
            return Precision("bf16", torch.bfloat16, f"auto: {describe_device(device)} multiplies bfloat16 natively")
        return Precision("fp32", torch.float32, f"auto: {describe_device(device)} has no native bfloat16")
    if precision not in DTYPES:
        raise ValueError(
            f"precision={precision}: training knows {', '.join(DTYPES)} and auto "
            "(fp16 needs loss scaling, which it does not have)"
        )
    return Precision(precision, DTYPES[precision], "as configured")


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
