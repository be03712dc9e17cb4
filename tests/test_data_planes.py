"""Planes scaled to 4:2:0 against the same in floating point, by a matrix of the kernel for each side."""

import math
import os
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from photo_files import jpeg, picture

from train.data import planes as module
from train.data.pixels import decode
from train.data.planes import Planes, pitch
from train.data.prepare import encoded
from train.data.turbojpeg import TurboJpeg, find_library

SIZES = [(61, 90, 40, 59), (61, 90, 33, 49), (90, 61, 59, 40), (50, 70, 50, 70), (33, 300, 5, 45), (57, 58, 56, 57)]


def random_planes(height: int, width: int, down: int, across: int) -> Planes:
    random = np.random.default_rng(height)
    planes = Planes.empty(height, width, down, across)
    for each in (planes.luma, planes.colours):
        each[:] = random.integers(0, 256, each.shape, dtype=np.uint8)
    return planes


def kernel(own: int, count: int, factor: float) -> np.ndarray:
    """float64 [count, own]: triangles as wide as 1 / factor samples to either side, at least one, cut at the ends.

    As many as before: the samples as they are, where they are at most half of one beside their place.
    """
    if own == count:
        assert abs(own - own * factor) <= 0.5
        return np.eye(own)
    centres = (np.arange(count) + 0.5) / factor
    reach = max(1.0, 1 / factor)
    weights = np.maximum(0, 1 - np.abs(np.arange(own) + 0.5 - centres[:, None]) / reach)
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("down, across", [(1, 1), (1, 2), (2, 2), (2, 1), (1, 4)])
@pytest.mark.parametrize("height, width, to_height, to_width", SIZES)
def test_every_sample_is_the_kernel_s_at_its_place_in_the_picture(height, width, to_height, to_width, down, across):
    planes = random_planes(height, width, down, across)
    small = planes.scaled(to_height, to_width)
    assert (small.height, small.width, small.down, small.across) == (to_height, to_width, 2, 2)
    rows, columns = -(-to_height // 2), -(-to_width // 2)
    by, over = to_height / height, to_width / width
    luma = kernel(height, to_height, by) @ planes.luma[:height, 0, :width] @ kernel(width, to_width, over).T
    assert np.abs(small.luma[:to_height, 0, :to_width] - luma).max() < 1.1  # rounded twice, its weights once
    own_rows, own_columns = -(-height // down), -(-width // across)
    vertical, horizontal = kernel(own_rows, rows, by * down / 2), kernel(own_columns, columns, over * across / 2)
    for colour in (0, 1):
        expected = vertical @ planes.colours[:, colour, :own_columns] @ horizontal.T
        assert np.abs(small.colours[:, colour, :columns] - expected).max() < 1.1
    assert (small.luma[-1, 0, :to_width] == small.luma[to_height - 1, 0, :to_width]).all()
    assert (small.luma[:, 0, 2 * columns - 1] == small.luma[:, 0, to_width - 1]).all()


def test_bytes_behind_the_columns_mean_nothing(monkeypatch):
    """Whatever the memory held before."""
    made = []
    for level in (0, 255):
        monkeypatch.setattr(module.np, "empty", lambda shape, dtype, level=level: np.full(shape, level, dtype))
        planes = Planes.empty(45, 67, 2, 2)
        planes.luma[:, :, :68] = random_planes(45, 67, 2, 2).luma[:, :, :68]
        planes.colours[:, :, :34] = random_planes(45, 67, 2, 2).colours[:, :, :34]
        small = planes.scaled(30, 45)
        made.append((small.luma[:, :, :46], small.colours[:, :, :23]))
    assert all((one == other).all() for one, other in zip(*made, strict=True))


def test_pitch():
    for columns in range(1, 40):
        assert pitch(columns) >= columns and pitch(columns) % 8 == 4 and pitch(columns) - columns < 8


def decibels(data: bytes, height: int, width: int) -> tuple[float, float]:
    """Peak signal to noise by way of planes, and of a photo decoded, scaled in floating point and encoded by Pillow.

    Both against that scaling, before it is encoded.
    """
    turbo = TurboJpeg(find_library())
    turbo.size(data)
    planar = turbo.encoded(turbo.planes(data).scaled(height, width), 90)
    pixels = torch.from_numpy(np.array(decode(data, ""), np.float64)).permute(2, 0, 1)[None]
    scaled = torch.nn.functional.interpolate(pixels, (height, width), mode="bilinear", antialias=True)
    expected = scaled[0].permute(1, 2, 0).numpy()
    plain = encoded(expected.round().astype(np.uint8), 90)
    errors = [np.mean((np.asarray(decode(file, "")) - expected) ** 2) for file in (planar, plain)]
    return tuple(10 * math.log10(255**2 / error) for error in errors)


@pytest.mark.skipif(find_library() is None, reason="no TurboJPEG library of version 3 here")
@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_as_near_to_the_scaled_photo_as_by_way_of_its_pixels(subsampling):
    planar, plain = decibels(jpeg(picture(385, 256), subsampling=subsampling), 171, 257)
    assert planar > plain - 0.3


@pytest.mark.sample
def test_photos_of_the_users_own_are_as_near(capsys):
    """Prints the means by the resolution of the colours."""
    if "RESNET_RECORD_SAMPLE" not in os.environ:
        pytest.skip("RESNET_RECORD_SAMPLE names no folder of photos")
    turbo, found = TurboJpeg(find_library()), defaultdict(list)
    for path in sorted(Path(os.environ["RESNET_RECORD_SAMPLE"]).rglob("*.JPEG")):
        data = path.read_bytes()
        whole = turbo.size(data)
        if whole and min(whole) > 256 and (planes := turbo.planes(data)):
            width, height = (round(side * 256 / min(whole)) for side in whole)
            found[planes.down, planes.across].append(decibels(data, height, width))
    with capsys.disabled():
        for (down, across), each in sorted(found.items()):
            planar, plain = np.mean(each, axis=0)
            print(f"\n{len(each)} photos, {down} x {across} pixels to a colour: {planar:.2f} dB by way of planes, "
                  f"{plain:.2f} by way of pixels", end="")  # fmt: skip
    planar, plain = np.concatenate(list(found.values())).T
    assert (planar - plain).mean() > -0.3
