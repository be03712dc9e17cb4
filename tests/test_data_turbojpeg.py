import io
from concurrent.futures import ThreadPoolExecutor

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
        turbo.size(data)
        assert (turbo.crop(data, (left, top, right, bottom)) == whole[top:bottom, left:right]).all()


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


def test_threads_do_not_disturb_each_other(turbo):
    files = [jpeg(picture(300 + i, 200, seed=i)) for i in range(8)]

    def opened(data: bytes) -> np.ndarray:
        for _ in range(20):
            crop = turbo.crop(data, (0, 0, *turbo.size(data)))
        return crop

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(opened, files))
    assert all((one == np.asarray(Image.open(io.BytesIO(data)))).all() for one, data in zip(found, files, strict=True))


def of_colour(image: Image.Image) -> np.ndarray:
    """Cb and Cr of an image in YCbCr, [rows, 2, columns]."""
    return np.asarray(image)[:, :, 1:].transpose(0, 2, 1)


@pytest.mark.parametrize("name", [name for name in FOR_TURBO if name != "greyscale"])
def test_planes_are_what_pillow_decodes_before_it_turns_them_into_rgb(turbo, name):
    """Colours of half the resolution are compared at half the size, at which libjpeg leaves them as they are."""
    data = READABLE[name]
    turbo.size(data)
    planes = turbo.planes(data)
    whole, half = (Image.open(io.BytesIO(data)) for _ in range(2))
    whole.draft("YCbCr", None)
    half.draft("YCbCr", (45, 35))
    assert whole.mode == half.mode == "YCbCr" and half.size == (45, 35)
    assert (planes.luma[:70, 0, :90] == np.asarray(whole)[:, :, 0]).all()
    sampling = (planes.down, planes.across)
    assert sampling == {"4:4:4": (1, 1), "4:2:2": (1, 2)}.get(name, (2, 2))
    if sampling == (1, 2):  # interpolated by libjpeg: at even columns by a quarter of the difference to the left one
        colours = planes.colours[:, :, :45].astype(int)
        left = np.concatenate([colours[:, :, :1], colours[:, :, :-1]], axis=2)
        assert ((3 * colours + left + 1) // 4 == of_colour(whole)[:, :, ::2]).all()
    else:
        assert (planes.colours[:, :, : 90 // sampling[1]] == of_colour(whole if sampling == (1, 1) else half)).all()


def test_planes_of_grey_have_no_colour(turbo):
    turbo.size(READABLE["greyscale"])
    planes = turbo.planes(READABLE["greyscale"])
    assert (planes.luma[:70, 0, :90] == np.asarray(Image.open(io.BytesIO(READABLE["greyscale"])))).all()
    assert (planes.colours == 128).all()


@pytest.mark.parametrize("width, height", [(90, 70), (31, 17), (2, 1)])
@pytest.mark.parametrize("quality", [50, 90])
def test_each_plane_is_encoded_as_pillow_encodes_a_grey_image(turbo, width, height, quality):
    data = jpeg(picture(width, height), subsampling=2)
    turbo.size(data)
    planes = turbo.planes(data)
    made = turbo.encoded(planes, quality)
    tables = Image.open(io.BytesIO(made)).quantization
    assert tables == Image.open(io.BytesIO(encoded(np.asarray(picture(8, 8)), quality))).quantization
    assert turbo.size(made) == (width, height)
    again = turbo.planes(made)
    rows, columns = -(-height // 2), -(-width // 2)
    for before, after, table, shape in (
        (planes.luma[:, 0], again.luma[:, 0], tables[0], (2 * rows, 2 * columns)),
        (planes.colours[:, 0], again.colours[:, 0], tables[1], (rows, columns)),
        (planes.colours[:, 1], again.colours[:, 1], tables[1], (rows, columns)),
    ):
        file, part = io.BytesIO(), tuple(map(slice, shape))
        Image.fromarray(before[part]).save(file, "JPEG", qtables=[table])
        assert (after[part] == np.asarray(Image.open(file))).all()


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
