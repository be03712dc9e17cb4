"""The table of files: what each kind becomes by either decoder, in training and in evaluation."""

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from photo_files import BROKEN, PICTURE, READABLE, jpeg

from train.data.imagenet import ImageNetFolder
from train.data.turbojpeg import find_library

DECODERS = ["pillow", "turbo"] if find_library() else ["pillow"]


def tree(root: Path, data: bytes) -> Path:
    for part in ("train", "val"):
        (root / part / "n0").mkdir(parents=True)
        (root / part / "n0" / "a.JPEG").write_bytes(data)
        (root / part / "n0" / "b.JPEG").write_bytes(jpeg(PICTURE))
    return root


def pixels(root: Path, decode: str, part: str, **options) -> np.ndarray:
    source = ImageNetFolder(str(root), image_size=32, workers=0, decode=decode, **options)
    return getattr(source, part).start(np.arange(2), seed=3, epoch=1)()[0].numpy().astype(int)


@pytest.mark.parametrize("part", ["train", "eval"])
@pytest.mark.parametrize("name", READABLE)
def test_readable_files_are_the_reference_s(tmp_path, name, part):
    """Both decoders, EXIF rotation ignored as torchvision does; the fast path within what two scalings may differ."""
    root = tree(tmp_path, READABLE[name])
    plain = pixels(root, "pillow", part)
    other = pixels(root, DECODERS[-1], part)
    assert np.abs(plain - other).max() <= (0 if part == "eval" else 1)


def test_rotation_is_ignored(tmp_path):
    root = tree(tmp_path, READABLE["EXIF rotation"])
    for decode in DECODERS:
        first, second = pixels(root, decode, "eval")
        assert (first == second).all()


@pytest.mark.parametrize("decode", DECODERS)
@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_stop_the_run_or_are_skipped_and_counted(tmp_path, name, decode):
    root = tree(tmp_path, BROKEN[name])
    for part, folder in (("train", "train"), ("eval", "val")):
        with pytest.raises(ValueError, match=f"unreadable image .*{folder}/n0/a.JPEG .*data.on_error=skip"):
            pixels(root, decode, part)
        source = ImageNetFolder(str(root), image_size=32, workers=0, decode=decode, on_error="skip", augment=False)
        with pytest.warns(UserWarning, match=f"{folder}/n0/a.JPEG"):
            first, second = getattr(source, part).batch(np.arange(2), seed=0, epoch=0)[0]
        assert first.equal(second) and source.num_skipped == source.describe()["num_skipped"] == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # told once
            getattr(source, part).batch(np.arange(2), seed=0, epoch=0)


@pytest.mark.parametrize("decode", DECODERS)
def test_a_file_that_is_gone_is_named(tmp_path, decode):
    root = tree(tmp_path, jpeg(PICTURE))
    source = ImageNetFolder(str(root), image_size=32, workers=0, decode=decode)
    os.unlink(root / "train" / "n0" / "a.JPEG")
    with pytest.raises(ValueError, match=r"unreadable image .*train/n0/a.JPEG \(FileNotFoundError: "):
        source.train.batch(np.arange(2), seed=0, epoch=0)
