"""The GPU's max pooling is torch's, to the bit: in Triton's interpreter, and on a GPU where there is one."""

import os

import pytest
import torch
from torch.nn import functional


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("window", [(3, 2, 1), (2, 2, 0), (3, 1, 1)], ids=str)
def test_values_and_gradients_are_torchs(device, window):
    pytest.importorskip("triton", reason="Triton comes with torch for CUDA")
    interprets = os.environ.get("TRITON_INTERPRET") == "1"
    if interprets != (device == "cpu"):
        pytest.skip(f"Triton {'interprets' if interprets else 'compiles'} its kernels here (TRITON_INTERPRET)")
    from train.models.max_pool_cuda import max_pool

    generator = torch.Generator().manual_seed(0)
    images = torch.randint(-3, 4, (2, 70, 7, 6), generator=generator).float()  # with ties, as behind ReLU
    images[0, :, 3, 3], images[1, :, 0, 0] = torch.inf, torch.nan
    images = images.to(device).contiguous(memory_format=torch.channels_last).requires_grad_()
    found, wanted = max_pool(images, *window), functional.max_pool2d(images, *window)
    weights = torch.randint(-8, 9, wanted.shape, generator=generator).float().to(device)  # whose sums are exact
    gradients = [torch.autograd.grad(output, images, weights)[0] for output in (found, wanted)]
    assert torch.equal(found.nan_to_num(7.5), wanted.nan_to_num(7.5)) and torch.equal(*gradients)
    assert found.is_contiguous(memory_format=torch.channels_last)
