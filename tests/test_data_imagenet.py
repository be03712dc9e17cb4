import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from data_samples import make_image_tree
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional

from train.data.imagenet import ImageNetFolder
from train.data.photos import MEAN, STD
from train.data.pixels import random_crop_box, scaled

INDICES = np.arange(6)


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    return make_image_tree(tmp_path_factory.mktemp("photos"), classes=3, per_class=2, size=40)


@pytest.fixture
def own_tree(tmp_path) -> Path:
    return make_image_tree(tmp_path, classes=3, per_class=2, size=40)


def opened(tree: Path, part: str) -> list[Image.Image]:
    return [Image.open(path) for path in sorted((tree / part).rglob("*.JPEG"))]


def test_batches_and_description(tree):
    source = ImageNetFolder(str(tree), image_size=24, workers=0)
    for dataset in (source.train, source.eval):
        images, labels = dataset.batch(INDICES, seed=0, epoch=0)
        assert images.shape == (6, 3, 24, 24) and images.dtype == torch.float32 and labels.dtype == torch.int64
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    described = source.describe()
    assert len(described.pop("fingerprint")) == 64
    assert described == {
        "name": "imagenet", "num_classes": 3, "image_size": 24,
        "num_train": 6, "num_eval": 6, "num_skipped": 0, "notes": [],
    }  # fmt: skip


def test_evaluation_is_torchvisions(tree):
    reference = transforms.Compose(
        [
            transforms.Resize(32),
            transforms.CenterCrop(28),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    images, _ = ImageNetFolder(str(tree), image_size=28, workers=0).eval.batch(INDICES, seed=0, epoch=0)
    expected = torch.stack([reference(photo) for photo in opened(tree, "val")])
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)


def test_the_training_crop_is_torchvisions_on_the_same_box(tree):
    for photo in opened(tree, "train"):
        left, top, right, bottom = box = random_crop_box(*photo.size, [0.3] * 10, [0.8] * 10, 0.5, 0.9)
        ours = np.asarray(scaled(photo, box, 24, 24), np.int64)
        reference = functional.resized_crop(photo, top, left, bottom - top, right - left, [24, 24])
        assert np.abs(ours - np.asarray(reference, np.int64)).max() <= 1


def test_crop_boxes_follow_the_rule():
    random = np.random.default_rng(0)
    for _ in range(300):
        width, height = random.integers(20, 500, 2).tolist()
        area, ratio = random.random((2, 10)).tolist()
        left, top, right, bottom = random_crop_box(width, height, area, ratio, *random.random(2).tolist())
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        slack = 1 + 2 / min(right - left, bottom - top)  # sides are rounded to whole pixels
        assert 3 / 4 / slack <= (right - left) / (bottom - top) <= 4 / 3 * slack
    # Nothing of 95 % of the area and a ratio near 1 fits into a strip: the centre, cut to ratio 4/3.
    assert random_crop_box(300, 30, [0.95] * 10, [0.5] * 10, 0.0, 0.0) == (130, 0, 170, 30)
    assert random_crop_box(30, 300, [0.95] * 10, [0.5] * 10, 0.0, 0.0) == (0, 130, 30, 170)


def test_a_sample_has_the_same_bits_in_every_batch(tree):
    one, two = (ImageNetFolder(str(tree), image_size=24, workers=workers, repeat=3).train for workers in (1, 2))
    whole, _ = one.batch(np.arange(18), seed=4, epoch=3)
    for indices in ([0], [17, 0, 7], list(range(15, 2, -1))):
        assert torch.equal(two.batch(np.array(indices), seed=4, epoch=3)[0], whole[indices])
    assert not torch.equal(one.batch(np.arange(18), seed=4, epoch=4)[0], whole)
    assert not torch.equal(one.batch(np.arange(18), seed=5, epoch=3)[0], whole)


def test_repetitions_are_augmented_on_their_own(tree):
    train = ImageNetFolder(str(tree), image_size=24, workers=0, repeat=5).train
    assert len(train) == 30
    images, labels = train.batch(np.array([1, 7, 13]), seed=0, epoch=0)
    assert labels.tolist() == [0, 0, 0]
    assert not torch.equal(images[0], images[1]) and not torch.equal(images[1], images[2])


def test_class_folders_directly_in_root(tree):
    source = ImageNetFolder(str(tree / "val"), image_size=24)
    assert source.describe()["num_train"] == source.describe()["num_eval"] == 6
    assert "the same photos train and evaluate" in source.describe()["notes"][0]


def test_the_fingerprint_is_of_paths_and_sizes(own_tree):
    before = ImageNetFolder(str(own_tree), image_size=24).fingerprint
    assert ImageNetFolder(str(own_tree), image_size=8).fingerprint == before
    photo = own_tree / "train" / "n00000001" / "1_0.JPEG"
    photo.write_bytes(photo.read_bytes() + b"\0")
    longer = ImageNetFolder(str(own_tree), image_size=24).fingerprint
    photo.rename(photo.with_name("1_5.JPEG"))
    assert len({before, longer, ImageNetFolder(str(own_tree), image_size=24).fingerprint}) == 3


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA"])
def test_other_colour_modes_become_rgb(own_tree, mode):
    photo = own_tree / "val" / "n00000000" / "0_0.JPEG"
    Image.open(photo).convert(mode).save(photo, format="PNG" if mode in ("P", "RGBA") else "JPEG")
    images, _ = ImageNetFolder(str(own_tree), image_size=24).eval.batch(INDICES, seed=0, epoch=0)
    assert images.isfinite().all()


BROKEN = {"zero bytes": b"", "text": b"no image at all", "truncated": None}


@pytest.fixture(params=BROKEN)
def broken_photo(request, own_tree) -> Path:
    photo = own_tree / "train" / "n00000001" / "1_1.JPEG"
    content = BROKEN[request.param]
    photo.write_bytes(photo.read_bytes()[:400] if content is None else content)
    return photo


def test_an_unreadable_image_is_named(own_tree, broken_photo):
    source = ImageNetFolder(str(own_tree), image_size=24)
    named = r"unreadable image .*n00000001/1_1\.JPEG \(\w+Error: .*data.on_error=skip"
    with pytest.raises(ValueError, match=named) as error:
        source.train.batch(INDICES, seed=0, epoch=0)
    assert "\n" not in str(error.value)


def test_skip_takes_the_next_image_and_counts(own_tree, broken_photo):
    source = ImageNetFolder(str(own_tree), image_size=24, augment=False, on_error="skip")
    with pytest.warns(UserWarning, match="1_1.JPEG"):
        images, labels = source.train.batch(INDICES, seed=0, epoch=0)
    assert labels.tolist() == [0, 0, 1, 2, 2, 2]
    assert torch.equal(images[3], images[4])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # met again, but told and counted once
        source.train.batch(INDICES, seed=0, epoch=1)
    assert source.num_skipped == source.describe()["num_skipped"] == 1


def test_skip_with_nothing_left(own_tree):
    for photo in own_tree.rglob("*.JPEG"):
        photo.write_bytes(b"")
    source = ImageNetFolder(str(own_tree), image_size=24, on_error="skip")
    with pytest.raises(ValueError, match="none of the 6 images can be read; the first is .*0_0.JPEG"):
        source.train.batch(INDICES[:1], seed=0, epoch=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 0}, "data.image_size=0: must be at least 1"),
        ({"repeat": -1}, "data.repeat=-1: must be at least 1"),
        ({"workers": -1}, "data.workers=-1: must be at least 0"),
        ({"crop_ratio": 1.5}, "data.crop_ratio=1.5: must be above 0 and at most 1"),
        ({"train_sizes": [[1, 24]]}, r"data.train_sizes=\[\[1, 24\]\]: must be \[\[first epoch, pixels\]"),
        ({"train_sizes": [[0, 24], [0, 32]]}, "epochs rising"),
    ],
)
def test_bad_numbers(tree, arguments, message):
    with pytest.raises(ValueError, match=message):
        ImageNetFolder(str(tree), **arguments)


@pytest.mark.sample
def test_sample_photos():
    """Photos of the user's own, in folders by class: decoded, cut and normalised as torchvision does."""
    root = os.environ.get("RESNET_RECORD_SAMPLE")
    if root is None:
        pytest.skip("RESNET_RECORD_SAMPLE names no folder of photos")
    source = ImageNetFolder(root)
    reference = transforms.Compose(
        [
            transforms.Resize(256),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    indices = np.arange(min(50, len(source.eval)))
    images, _ = source.eval.batch(indices, seed=0, epoch=0)
    photos = [Image.open(source.eval.cutter.store.path(index)).convert("RGB") for index in indices]
    torch.testing.assert_close(images, torch.stack([reference(photo) for photo in photos]), rtol=0, atol=1e-5)
