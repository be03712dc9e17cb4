"""Crop, flip and normalise as tensors: exact on any device, and the same through the loader on a GPU."""

import numpy as np
import pytest
import torch
from data_samples import make_cifar10_arrays, make_image_tree, write_binary_version

from train.data.augment import crop_and_flip, mirrored, normalised
from train.data.cifar10 import Cifar10
from train.data.digits import Digits
from train.data.imagenet import ImageNetFolder
from train.data.loader import Prefetcher
from train.data.source import Source, Staged
from train.data.synthetic import Synthetic

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def some_pixels(count: int, size: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(1, 256, (count, size, size, 3), dtype=np.uint8))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [32, 20])
def test_crop_and_flip_is_padding_cutting_and_mirroring_one_by_one(device, size):
    pixels, random, pad = some_pixels(40, size), np.random.default_rng(1), size // 8
    top, left = (torch.from_numpy(random.integers(0, 2 * pad + 1, 40)) for _ in range(2))
    mirror = torch.from_numpy(random.random(40) < 0.5)
    ours = crop_and_flip(*(tensor.to(device) for tensor in (pixels, top, left, mirror))).cpu().numpy()
    padded = np.pad(pixels.numpy(), ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    for image, whole, y, x, flip in zip(ours, padded, top, left, mirror, strict=True):
        cut = whole[y : y + size, x : x + size]
        assert (image == (cut[:, ::-1] if flip else cut)).all()
    assert {int(y) for y in top} == set(range(2 * pad + 1))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [7, 32, 224])  # in parts of many images, of some, of one
def test_normalised_to_the_last_bit(device, size):
    pixels = some_pixels(43, size)
    mirror = torch.arange(43) % 3 == 0
    ours = normalised(pixels.to(device), MEAN, STD, mirror.to(device))
    assert ours.device.type == device and ours.is_contiguous(memory_format=torch.channels_last)
    expected = pixels.numpy().astype(np.float32)
    expected[::3] = expected[::3, :, ::-1]
    expected *= (1 / (255 * np.array(STD))).astype(np.float32)
    expected -= (np.array(MEAN) / STD).astype(np.float32)
    assert (ours.permute(0, 2, 3, 1).cpu().numpy() == expected).all()


def test_mirrored_with_none_some_and_all():
    pixels = some_pixels(3, 5)
    for which in ([False] * 3, [True, False, True], [True] * 3):
        expected = [image.flip(1) if flip else image for image, flip in zip(pixels, which, strict=True)]
        assert torch.equal(mirrored(pixels, torch.tensor(which)), torch.stack(expected))
    assert normalised(pixels[:0], MEAN, STD).shape == (0, 3, 5, 5)


def sources(tmp_path) -> dict[str, Source]:
    write_binary_version(tmp_path / "cifar-10-batches-bin", make_cifar10_arrays())
    tree = make_image_tree(tmp_path / "photos", classes=3, per_class=4, size=60)
    return {
        "cifar10": Cifar10(str(tmp_path)),
        "digits": Digits(),
        "photos by threads": ImageNetFolder(str(tree), image_size=48, workers=0, decode="pillow"),
        "photos by processes": ImageNetFolder(str(tree), image_size=48, workers=2),
        "synthetic": Synthetic(image_size=48, num_classes=7),
    }


@pytest.mark.gpu
def test_the_loader_gives_a_gpu_what_a_cpu_gets(tmp_path):
    batches = [(epoch, np.arange(first, first + 5)) for epoch in (0, 1) for first in (0, 5, 2, 7)]
    for name, source in sources(tmp_path).items():
        for dataset in (source.train, source.eval):
            with Prefetcher(dataset, batches, seed=3, device="cuda") as loader:
                for (epoch, indices), (images, labels) in zip(batches, loader, strict=True):
                    expected, of = dataset.batch(indices, seed=3, epoch=epoch)
                    assert images.is_cuda and labels.is_cuda and torch.equal(labels.cpu(), of)
                    assert images.is_contiguous(memory_format=torch.channels_last) and images.dtype == torch.float32
                    # digits are sampled between scans' pixels, where a GPU may round the last bits otherwise
                    tolerance = 1e-5 if name == "digits" else 0
                    torch.testing.assert_close(images.cpu(), expected, rtol=0, atol=tolerance, msg=f"{name} {epoch}")


class Watched(Staged):
    """Says of each batch whether its parts were on the GPU when they were finished, and on which stream."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, bool]] = []

    def start(self, indices, *, seed, epoch):
        return lambda: (torch.full((len(indices), 512, 512, 3), epoch, dtype=torch.uint8), torch.from_numpy(indices))

    def finish(self, pixels):
        beside = torch.cuda.current_stream() != torch.cuda.default_stream()
        self.seen.append((pixels.device.type, beside))
        return normalised(pixels, (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))


@pytest.mark.gpu
def test_finished_on_a_stream_beside_the_training_and_whole_when_handed_over():
    dataset = Watched()
    busy = torch.randn(4096, 4096, device="cuda")
    with Prefetcher(dataset, [(epoch, np.arange(32)) for epoch in range(20)], seed=0, device="cuda") as loader:
        for epoch, (images, labels) in enumerate(loader):
            busy = torch.tanh(busy @ busy)  # the training's stream has work: what it gets must be complete all the same
            assert (images == epoch).all() and labels.tolist() == list(range(32))
            del images  # its memory is used again, by the other stream
    assert dataset.seen == [("cuda", True)] * 20


@pytest.mark.gpu
def test_copies_to_the_gpu_start_from_pinned_memory(tmp_path):
    from torch.profiler import ProfilerActivity, profile

    dataset = Watched()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        with Prefetcher(dataset, [(0, np.arange(8))] * 4, seed=0, device="cuda") as loader:
            for _ in loader:
                pass
        torch.cuda.synchronize()
    copies = {event.key: event.count for event in seen.key_averages() if "Memcpy HtoD" in event.key}
    assert copies.get("Memcpy HtoD (Pinned -> Device)", 0) >= 8, copies  # bytes and labels of four batches
