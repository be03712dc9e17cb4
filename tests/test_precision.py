"""What `precision` and `device` mean, on machines with and without a GPU or bfloat16."""

import pytest
import torch

from train import precision
from train.precision import LossScale, choose_device, choose_loss_scale, choose_precision


@pytest.mark.parametrize("native, name", [(True, "bf16"), (False, "fp32")])
def test_auto_follows_the_processor_and_says_why(monkeypatch, native, name):
    monkeypatch.setattr(precision, "cpu_flags", lambda: {"avx2"} | ({"avx512_bf16"} if native else set()))
    chosen = choose_precision("auto", "cpu")
    assert chosen.name == name and chosen.dtype == precision.DTYPES[name]
    assert chosen.reason.startswith("auto: ") and "bfloat16" in chosen.reason


def test_autocast_touches_products_in_bfloat16_only():
    layer, inputs = torch.nn.Linear(3, 2), torch.randn(4, 3)
    for name, dtype in precision.DTYPES.items():
        with choose_precision(name, "cpu").autocast("cpu"):
            assert layer(inputs).dtype == dtype
    assert choose_precision("bf16", "cpu").reason == "as configured"


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="precision=fp8: training knows fp32, bf16, fp16 and auto"):
        choose_precision("fp8", "cpu")


def test_the_loss_scale_follows_the_precision():
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    assert choose_loss_scale("auto", fp32, bf16) == LossScale(1.0, dynamic=False)
    assert choose_loss_scale("auto", fp32, bf16).off
    for dtypes in ([fp16], [fp32, fp16]):  # computed, or on the wire
        assert choose_loss_scale("auto", *dtypes) == LossScale(2.0**16, dynamic=True) == choose_loss_scale("dynamic")
    assert choose_loss_scale(1024, fp16) == LossScale(1024.0, dynamic=False)
    for wrong in (0, -1, float("inf"), "static"):
        with pytest.raises(ValueError, match=f"loss_scale={wrong}: must be a finite number above 0, auto or dynamic"):
            choose_loss_scale(wrong, fp16)


def test_a_dynamic_scale_moves_as_written_out_and_as_torch_s(monkeypatch):
    """Overflows halve it, every third good step in a row doubles it (2,000 otherwise)."""
    monkeypatch.setattr(precision, "GROWTH_INTERVAL", 3)
    overflows = [1, 1, 0, 0, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0]
    exponents = [15, 14, 14, 14, 15, 15, 15, 14, 14, 14, 13, 13, 13, 14]
    scale = LossScale(2.0**16, dynamic=True)
    theirs, tracker = torch.tensor(2.0**16), torch.tensor(0, dtype=torch.int32)
    for overflowed, exponent in zip(overflows, exponents, strict=True):
        scale.update(bool(overflowed))
        # what GradScaler.update calls with its constants: growth, backoff, interval
        torch._amp_update_scale_(theirs, tracker, torch.tensor(float(overflowed)), 2.0, 0.5, 3)
        assert scale.value == 2.0**exponent == theirs.item() and scale.good_steps == tracker.item()
    assert (scale.skipped, scale.skipped_in_a_row) == (4, 0)


def test_constants_are_torch_s():
    scaler = torch.amp.GradScaler("cpu")
    assert (scaler.get_scale(), scaler.get_growth_interval()) == (precision.START_SCALE, precision.GROWTH_INTERVAL)
    assert (scaler.get_growth_factor(), scaler.get_backoff_factor()) == (2.0, 0.5)


def test_a_scale_that_overflows_for_good_is_named():
    fixed, dynamic = LossScale(1024.0, dynamic=False), LossScale(2.0**16, dynamic=True)
    steps = []
    for scale in (fixed, dynamic):
        steps.append(1)
        scale.update(True)
        while scale.failure(steps[-1]) is None:
            steps[-1] += 1
            scale.update(True)
    assert steps == [20, 31] and fixed.value == 1024 and dynamic.value == 2.0**-15
    assert fixed.failure(20) == (
        "loss_scale=1024: the gradients overflowed in 20 steps in a row, the last was step 20; "
        "lower it, or use loss_scale=dynamic"
    )
    assert dynamic.failure(31) == (
        "loss_scale: dynamic, now 3.05176e-05, and the gradients still overflow at step 31; "
        "lower schedule.base_lr, or use precision=bf16 or fp32"
    )
    fixed.update(False)
    assert fixed.failure(21) is None


def test_auto_takes_a_gpu_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [choose_device(device) for device in ("auto", "cuda", "cpu")] == ["cuda:0", "cuda:0", "cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [choose_device(device) for device in ("auto", "cpu")] == ["cpu", "cpu"]


def test_cuda_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device=cuda: torch sees no GPU here; use device=cpu, or device=auto"):
        choose_device("cuda")
