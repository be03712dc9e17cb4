"""Photos to squares of pixels: decode, cut and scale as torchvision's transforms do on PIL images.

Source: torchvision.transforms (Resize, CenterCrop, RandomResizedCrop); Szegedy et al., "Going Deeper with
Convolutions", 2015, section 6, for the random crop. Decoding is exact: libjpeg's reduced-size mode is not used.
"""

import io
import math
import os
from collections.abc import Callable
from typing import IO, TYPE_CHECKING

from train.data.folder import unreadable

if TYPE_CHECKING:
    from PIL.Image import Image

CROP_TRIES = 10
CROP_AREA = (0.08, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)

Box = tuple[int, int, int, int]  # left, top, right, bottom


def decode(file: str | os.PathLike | IO[bytes] | bytes, where: str | Callable[[], str]) -> "Image":
    """The whole photo in RGB; EXIF rotation is ignored, as in the reference. `where` names the file in the error."""
    from PIL import Image

    file = io.BytesIO(file) if isinstance(file, bytes) else file
    try:
        with Image.open(file) as image:
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and others on broken files
        raise unreadable(where if isinstance(where, str) else where(), error) from error


def scaled(image: "Image", box: Box | None, width: int, height: int) -> "Image":
    """The box of the image at width x height: bilinear, antialiased. Cut first: outside pixels have no influence."""
    from PIL import Image

    if box is not None:
        image = image.crop(box)
    return image.resize((width, height), Image.Resampling.BILINEAR)


def random_crop_box(width: int, height: int, area: list[float], ratio: list[float], left: float, top: float) -> Box:
    """RandomResizedCrop: 8 to 100 % of the area at a ratio of 3/4 to 4/3; after ten misfits the widest centre cut.

    `area` and `ratio` hold CROP_TRIES numbers in [0, 1), one for each try; `left` and `top` place the box.
    """
    log_low, log_high = math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])
    for area_draw, ratio_draw in zip(area, ratio, strict=True):
        target = width * height * (CROP_AREA[0] + (CROP_AREA[1] - CROP_AREA[0]) * area_draw)
        aspect = math.exp(log_low + (log_high - log_low) * ratio_draw)
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            x, y = int(left * (width - w + 1)), int(top * (height - h + 1))
            return x, y, x + w, y + h
    w = min(width, max(1, round(height * CROP_RATIO[1])))
    h = min(height, max(1, round(width / CROP_RATIO[0])))
    x, y = (width - w) // 2, (height - h) // 2
    return x, y, x + w, y + h


def center_crop(image: "Image", resize: int, size: int) -> "Image":
    """The shorter side scaled to `resize`, then the central size x size (resize >= size)."""
    width, height = image.size
    if width <= height:
        width, height = resize, int(resize * height / width)
    else:
        width, height = int(resize * width / height), resize
    left, top = round((width - size) / 2), round((height - size) / 2)
    return scaled(image, None, width, height).crop((left, top, left + size, top + size))
