import importlib.util
import sys

import numpy as np
import pytest
import torch
from rank_processes import run_ranks

from train.data.digits import Digits, random_affine, read_digits, sampling_grid


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits()


def test_the_scans_are_scikit_learns():
    from sklearn.datasets import load_digits

    scans, labels = read_digits()
    assert (scans == load_digits().images).all()
    assert (labels == load_digits().target).all()


def loaded_by_digits(rank: int, world_size: int, store) -> set[str]:
    Digits()
    return {name.partition(".")[0] for name in sys.modules}


def test_the_file_is_read_without_scikit_learn():
    (loaded,) = run_ranks(1, loaded_by_digits)  # a process that has loaded the library alone
    assert "torch" in loaded and "sklearn" not in loaded


def test_a_fixed_stratified_split(digits):
    assert (len(digits.train), len(digits.eval)) == (1437, 360)
    assert np.bincount(digits.eval.labels).tolist() == [36] * 10
    assert digits.describe()["fingerprint"] == "65e5b4619795efb40c1082f4c350c049e4ad552200d369b6ae99e21eef5e72c5"
    assert digits.eval.labels[:10].tolist() == Digits(image_size=8).eval.labels[:10].tolist()


def test_batches(digits):
    for dataset in (digits.train, digits.eval):
        images, labels = dataset.batch(np.arange(5), seed=0, epoch=0)
        assert images.shape == (5, 3, 32, 32) and images.dtype == torch.float32 and labels.dtype == torch.int64
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(images[:, 0], images[:, 1]) and torch.equal(images[:, 0], images[:, 2])


def test_normalised_with_the_training_scans():
    images, _ = Digits(image_size=8, augment=False).train.batch(np.arange(1437), seed=0, epoch=0)
    assert images.mean().item() == pytest.approx(0, abs=1e-5)
    assert images.std().item() == pytest.approx(1, abs=1e-4)


def test_a_sample_has_the_same_bits_in_every_batch(digits):
    whole, _ = digits.train.batch(np.arange(200), seed=4, epoch=3)
    for indices in ([0], [199, 0, 7], list(range(63, 3, -1)), list(range(100, 117))):
        images, _ = digits.train.batch(np.array(indices), seed=4, epoch=3)
        assert torch.equal(images, whole[indices])


def test_augmentation_is_keyed_by_seed_and_epoch(digits):
    indices = np.arange(4)
    images, _ = digits.train.batch(indices, seed=1, epoch=1)
    assert torch.equal(images, digits.train.batch(indices, seed=1, epoch=1)[0])
    assert not torch.equal(images, digits.train.batch(indices, seed=1, epoch=2)[0])
    assert not torch.equal(images, digits.train.batch(indices, seed=2, epoch=1)[0])
    assert torch.equal(digits.eval.batch(indices, seed=1, epoch=1)[0], digits.eval.batch(indices, seed=2, epoch=2)[0])


def test_the_affine_maps_stay_in_their_ranges():
    matrix = random_affine(0, 0, np.arange(5000))
    scale = np.sqrt(np.linalg.det(matrix[:, :, :2]))
    turn = np.degrees(np.arctan2(matrix[:, 1, 0], matrix[:, 0, 0]))
    assert (scale.min(), scale.max()) == (pytest.approx(0.95, abs=1e-3), pytest.approx(1.05, abs=1e-3))
    assert (turn.min(), turn.max()) == (pytest.approx(-8, abs=0.05), pytest.approx(8, abs=0.05))
    assert np.abs(matrix[:, :, 2]).max() == pytest.approx(0.1, abs=1e-3)  # a twentieth of a width of 2


def test_the_grid_is_affine_grids():
    maps = torch.from_numpy(random_affine(0, 0, np.arange(6))).float()
    reference = torch.nn.functional.affine_grid(maps, [6, 1, 9, 9], align_corners=False)
    torch.testing.assert_close(sampling_grid(maps, 9), reference, rtol=0, atol=1e-6)


def test_scikit_learn_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="data=digits needs scikit-learn.*pip install scikit-learn"):
        Digits()


def test_negative_size():
    with pytest.raises(ValueError, match="data.image_size=-32: must be at least 1"):
        Digits(image_size=-32)
