from pathlib import Path

import pytest
from data_samples import make_image_tree

from scripts import certify_order
from train.data.imagenet import ImageNetFolder


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    return make_image_tree(tmp_path_factory.mktemp("photos"), classes=5, per_class=10, size=40)


def test_any_workers_and_a_resumed_run_see_the_same(tree):
    """50 images in steps of 16: the last one of an epoch is padded."""
    rows, equal = certify_order.certify(str(tree), False, 2, 16, [(0, 1, 1), (0, 2, 2), (0, 3, 2), (2, 1, 3)])
    assert equal and {row["steps"] for row in rows} == {8}
    assert rows[2]["workers"] == "3 workers, resumed by 2" and rows[3]["by"] == "2 loader processes"


def test_it_notices_another_order(tree, monkeypatch):
    """Augmentation that depends on the position in the batch, not on the sample, is not the same for all workers."""
    batch = ImageNetFolder(str(tree), image_size=16, workers=0).train.cutter.fill

    def by_position(self, indices, *, seed, epoch, out):
        labels, left_out = batch(indices, seed=seed, epoch=epoch, out=out)
        out += range(len(out))[-1]
        return labels, left_out

    monkeypatch.setattr("train.data.photos.Cutter.fill", by_position)
    assert not certify_order.certify(str(tree), False, 1, 16, [(0, 1, 1), (0, 2, 2)])[1]
