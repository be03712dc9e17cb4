import io

import numpy as np
import pytest
from photo_files import BROKEN, READABLE, jpeg, picture
from PIL import Image

from train.data.folder import UnreadableImage
from train.data.pixels import decode
from train.data.prepare import encoded
from train.data.turbojpeg import TurboJpeg, find_library

pytestmark = pytest.mark.skipif(find_library() is None, reason="no TurboJPEG library of version 3 here")
FOR_TURBO = [name for name in READABLE if name not in ("CMYK", "PNG by the name of .JPEG", "bytes behind the end")]


@pytest.fixture(scope="module")
def turbo() -> TurboJpeg:
    return TurboJpeg(find_library())


@pytest.mark.parametrize("name", FOR_TURBO)
def test_a_crop_has_the_bits_of_the_whole_decode(turbo, name):
    data, random = READABLE[name], np.random.default_rng(1)
    whole = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert turbo.size(data) == (90, 70)
    for _ in range(60):
        left, right = sorted(random.choice(91, 2, replace=False).tolist())
        top, bottom = sorted(random.choice(71, 2, replace=False).tolist())
        for channels in (3, 4):
            turbo.size(data)
            crop = turbo.crop(data, (left, top, right, bottom), channels=channels)
            assert crop.shape[2] == channels and (crop[..., :3] == whole[top:bottom, left:right]).all()


@pytest.mark.parametrize("shrink", [2, 4, 8])
def test_a_shrunk_crop_is_near_the_reduced_image(turbo, shrink):
    image = picture(403, 301)
    data = jpeg(image)
    assert turbo.size(data) == (403, 301)
    box = (5, 3, 33, 30)
    crop = turbo.crop(data, box, shrink).astype(int)
    reduced = np.asarray(Image.open(io.BytesIO(data)).reduce(shrink), int)[box[1] : box[3], box[0] : box[2]]
    assert crop.shape == reduced.shape == (27, 28, 3)
    assert np.abs(crop - reduced).mean() < 3


@pytest.mark.parametrize("width, height", [(90, 70), (31, 17), (1, 1)])
def test_it_encodes_as_pillow_does(turbo, width, height):
    pixels = np.asarray(picture(width, height))
    padded = np.concatenate([pixels, np.full((height, width, 1), 77, np.uint8)], axis=2)
    for quality in (50, 90):
        data = turbo.encoded(np.ascontiguousarray(pixels), quality)
        assert turbo.encoded(padded, quality) == data
        expected = np.asarray(Image.open(io.BytesIO(encoded(pixels, quality))))
        assert (np.asarray(Image.open(io.BytesIO(data))) == expected).all()


def test_a_crop_that_is_encoded_is_not_written_over(turbo):
    data = jpeg(picture(90, 70))
    turbo.size(data)
    crop = turbo.crop(data, (0, 0, *turbo.size(data)))
    expected = crop.copy()
    turbo.encoded(crop, 90)
    assert (crop == expected).all()


def test_what_it_leaves_to_pillow(turbo):
    left = [name for name, data in (READABLE | BROKEN).items() if turbo.size(data) is None]
    assert left == [
        "CMYK", "PNG by the name of .JPEG", "bytes behind the end",
        "zero bytes", "text", "cut off in the middle", "cut off at the last rows", "header alone", "truncated PNG",
    ]  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_pillow_finds_no_image_either(name):
    with pytest.raises(UnreadableImage, match="unreadable image there"):
        decode(BROKEN[name], "there")
