"""JPEG files of every kind that ImageNet holds, and the broken ones, as bytes."""

import io

import numpy as np
from PIL import Image


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth shapes under a little noise."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    return Image.fromarray(np.clip(smooth + random.integers(-12, 13, smooth.shape), 0, 255).astype(np.uint8))


def jpeg(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90, **options)
    return file.getvalue()


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def rotated(image: Image.Image) -> bytes:
    """With an EXIF orientation of 6: a camera held upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return jpeg(image, exif=exif)


PICTURE = picture(90, 70)
READABLE = {
    "4:4:4": jpeg(PICTURE, subsampling=0),
    "4:2:2": jpeg(PICTURE, subsampling=1),
    "4:2:0": jpeg(PICTURE, subsampling=2),
    "progressive": jpeg(PICTURE, progressive=True),
    "greyscale": jpeg(PICTURE.convert("L")),
    "CMYK": jpeg(PICTURE.convert("CMYK")),
    "EXIF rotation": rotated(PICTURE),
    "PNG by the name of .JPEG": png(PICTURE),
    "bytes behind the end": jpeg(PICTURE) + bytes(500),
}
WHOLE = jpeg(PICTURE)
BROKEN = {
    "zero bytes": b"",
    "text": b"no image at all, but \xff\xd9",
    "cut off in the middle": WHOLE[: len(WHOLE) // 2],
    "cut off at the last rows": WHOLE[:-150],
    "header alone": WHOLE[:300] + b"\xff\xd9",
    "truncated PNG": png(PICTURE)[:-400],
}
