import numpy as np
import pytest
import torch

from train.data.synthetic import Synthetic


def test_images_depend_on_the_sample_alone():
    source = Synthetic(image_size=16, num_classes=5, num_train=40, num_eval=10)
    images, labels = source.train.batch(np.arange(40), seed=0, epoch=0)
    assert images.shape == (40, 3, 16, 16) and images.is_contiguous(memory_format=torch.channels_last)
    assert labels.tolist() == [0, 1, 2, 3, 4] * 8
    again, _ = source.train.batch(np.array([39, 3]), seed=9, epoch=7)
    assert torch.equal(again, images[[39, 3]])
    assert len({image.numpy().tobytes() for image in images}) == 40


def test_classes_can_be_told_apart():
    images, labels = Synthetic(image_size=32, num_classes=4).train.batch(np.arange(64), seed=0, epoch=0)
    means = images.mean((2, 3))
    assert torch.stack([means[labels == c].std(0) for c in range(4)]).max() < 0.1
    centres = torch.stack([means[labels == c].mean(0) for c in range(4)])
    assert torch.pdist(centres).min() > 0.3


def test_train_and_evaluation_differ():
    source = Synthetic(image_size=8, num_classes=2, num_train=10, num_eval=10)
    train, evaluation = (part.batch(np.arange(10), seed=0, epoch=0)[0] for part in (source.train, source.eval))
    assert not torch.equal(train, evaluation)
    assert source.describe()["num_eval"] == 10


def test_negative_number():
    with pytest.raises(ValueError, match="data.num_train=-1: must be at least 1"):
        Synthetic(num_train=-1)
