import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from data_samples import (
    make_cifar10_arrays,
    make_image_tree,
    write_binary_version,
    write_python_version,
    write_tars,
)

from train.data import cifar10
from train.data.cifar10 import Cifar10

BATCHES = make_cifar10_arrays()
TRAIN_NAMES = [name for name in BATCHES if name != "test_batch"]


@pytest.fixture(scope="module")
def binary(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("binary")
    write_binary_version(root / "cifar-10-batches-bin", BATCHES)
    return root


def test_binary_version(binary):
    source = Cifar10(str(binary), augment=False)
    pixels = np.concatenate([BATCHES[name][0] for name in TRAIN_NAMES]).reshape(-1, 3, 32, 32)
    images, labels = source.train.batch(np.arange(20), seed=0, epoch=0)
    mean, std = (torch.tensor(values)[:, None, None] for values in (cifar10.MEAN, cifar10.STD))
    torch.testing.assert_close(images, (torch.from_numpy(pixels) / 255 - mean) / std, rtol=0, atol=1e-5)
    assert labels.tolist() == np.concatenate([BATCHES[name][1] for name in TRAIN_NAMES]).tolist()
    assert images.is_contiguous(memory_format=torch.channels_last) and labels.dtype == torch.int64
    assert (len(source.train), len(source.eval), source.num_classes) == (20, 4, 10)


def test_python_version_is_the_same(binary, tmp_path):
    write_python_version(tmp_path / "cifar-10-batches-py", BATCHES)
    assert Cifar10(str(tmp_path)).fingerprint == Cifar10(str(binary)).fingerprint
    assert Cifar10(str(tmp_path / "cifar-10-batches-py")).fingerprint == Cifar10(str(binary)).fingerprint


def test_python_version_is_what_torchvision_loads(tmp_path, monkeypatch):
    """The test's files are pickles indeed: torchvision's own reader gives the same images."""
    write_python_version(tmp_path / "cifar-10-batches-py", BATCHES)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_load_meta", lambda self: None)
    reference = torchvision.datasets.CIFAR10(str(tmp_path), train=True)
    images = Cifar10(str(tmp_path)).train.images
    assert (reference.data == images.pixels).all() and reference.targets == images.labels.tolist()


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_a_hostile_pickle_is_refused(tmp_path):
    write_python_version(tmp_path / "cifar-10-batches-py", BATCHES)
    content = pickle.dumps({"data": Hostile(tmp_path / "harm"), "labels": [1]}, protocol=2)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(content)
    with pytest.raises(ValueError, match="data_batch_3 is not a batch of CIFAR-10.*unpack it again"):
        Cifar10(str(tmp_path))
    assert not (tmp_path / "harm").exists()
    pickle.loads(content)
    assert (tmp_path / "harm").exists()  # it would have done it


def test_folder_and_tars_are_the_same(tmp_path):
    tree = make_image_tree(tmp_path / "tree", classes=3, per_class=2, size=28, parts=("train", "test"), suffix=".png")
    write_tars(tree, tmp_path / "tars")
    folder, tars = Cifar10(str(tree)), Cifar10(str(tmp_path / "tars"))
    assert folder.describe() == tars.describe()
    assert (folder.num_classes, len(folder.train), folder.train.images.labels.tolist()) == (3, 6, [0, 0, 1, 1, 2, 2])


def test_other_sizes(binary):
    images, _ = Cifar10(str(binary), image_size=16).train.batch(np.arange(3), seed=0, epoch=0)
    assert images.shape == (3, 3, 16, 16)


def test_training_images_are_moved_by_an_eighth_and_half_are_mirrored(binary):
    train = Cifar10(str(binary), repeat=50).train
    indices = np.arange(1000)
    pixels, top, left, mirror, labels = train.start(indices, seed=0, epoch=0)()
    assert torch.equal(pixels[:20], torch.from_numpy(train.images.pixels)) and labels.tolist() == [*labels[:20]] * 50
    for place in (top, left):
        assert place.unique().tolist() == list(range(9))
    assert 450 < mirror.sum() < 550


def test_a_sample_has_the_same_bits_in_every_batch(binary):
    train = Cifar10(str(binary), repeat=3).train
    assert len(train) == 60
    whole, _ = train.batch(np.arange(60), seed=4, epoch=3)
    for indices in ([0], [59, 0, 7], list(range(50, 3, -1))):
        assert torch.equal(train.batch(np.array(indices), seed=4, epoch=3)[0], whole[indices])
    assert not torch.equal(whole[:20], whole[20:40])
    assert not torch.equal(train.batch(np.arange(60), seed=4, epoch=4)[0], whole)


@pytest.fixture
def broken_tree(tmp_path) -> Path:
    tree = make_image_tree(tmp_path / "tree", classes=2, per_class=2, size=32)
    (tree / "train" / "n00000001" / "1_0.JPEG").write_bytes(b"no image")
    write_tars(tree, tmp_path / "tars")
    return tmp_path


@pytest.mark.parametrize("layout", ["tree", "tars"])
def test_an_unreadable_image(broken_tree, layout):
    root = str(broken_tree / layout)
    with pytest.raises(ValueError, match=r"unreadable image .*n00000001/1_0\.JPEG \(\w+Error"):
        Cifar10(root)
    with pytest.warns(UserWarning, match="left out"):
        source = Cifar10(root, on_error="skip")
    assert (source.num_skipped, len(source.train), source.train.images.labels.tolist()) == (1, 3, [0, 0, 1])


def test_bad_folders(tmp_path, binary):
    def refused(root: Path | None, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Cifar10(None if root is None else str(root))

    refused(None, "data.root=null")
    refused(tmp_path / "nowhere", "nowhere: does not exist")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no CIFAR-10 there: expected cifar-10-batches-bin/")
    shutil.copytree(binary, tmp_path / "cut")
    batch = tmp_path / "cut" / "cifar-10-batches-bin" / "data_batch_2.bin"
    batch.write_bytes(batch.read_bytes()[:-1])
    refused(tmp_path / "cut", "data_batch_2.bin has 12291 bytes, not a multiple of 3073")
    batch.unlink()
    refused(tmp_path / "cut", "data_batch_2.bin is missing")
    tars = tmp_path / "tars"
    write_tars(make_image_tree(tmp_path / "tree", 1, 1, 32), tars)
    (tars / "val.tar").unlink()
    refused(tars, "train.tar has no test.tar beside it")
    (tars / "val.tar").write_bytes(b"not a tar" * 200)
    refused(tars, "val.tar is not a plain tar")
