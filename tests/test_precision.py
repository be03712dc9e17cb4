"""What `precision` and `device` mean, on machines with and without a GPU or bfloat16."""

import pytest
import torch

from train import precision
from train.precision import choose_device, choose_precision


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


def test_fp16_is_refused():
    with pytest.raises(ValueError, match="precision=fp16: training knows fp32, bf16 and auto"):
        choose_precision("fp16", "cpu")


def test_auto_takes_a_gpu_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [choose_device(device) for device in ("auto", "cuda", "cpu")] == ["cuda:0", "cuda:0", "cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [choose_device(device) for device in ("auto", "cpu")] == ["cpu", "cpu"]


def test_cuda_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device=cuda: torch sees no GPU here; use device=cpu, or device=auto"):
        choose_device("cuda")
