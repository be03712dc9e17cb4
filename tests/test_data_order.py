from itertools import pairwise

import numpy as np
import pytest

from train.data.order import Order, eval_batches
from train.data.streams import permutation


def test_cut_by_step_and_chip():
    order = Order(num_samples=50, chip_batch_size=3, num_chips=4, seed=5)
    assert order.steps_per_epoch == 4  # 48 of 50 samples
    drawn = permutation(50, 5, 2)
    assert (order.indices(2, 1, 0, 4) == drawn[12:24].reshape(4, 3)).all()
    assert (order.indices(2, 1, 1, 3) == drawn[15:21].reshape(2, 3)).all()


def test_an_epoch_sees_no_sample_twice_and_drops_the_remainder():
    order = Order(num_samples=50, chip_batch_size=3, num_chips=4, seed=5)
    seen = np.concatenate([order.indices(0, step, 0, 4).ravel() for step in range(order.steps_per_epoch)])
    assert len(seen) == len(set(seen.tolist())) == 48


@pytest.mark.parametrize("cuts", [(0, 8), (0, 4, 8), (0, 1, 7, 8)])
def test_any_split_over_workers_is_the_same_order(cuts):
    whole = Order(100, 2, 8, seed=1).indices(3, 4, 0, 8)
    workers = [Order(100, 2, 8, seed=1).indices(3, 4, first, last) for first, last in pairwise(cuts)]
    assert (np.concatenate(workers) == whole).all()


def test_going_back_to_an_epoch_gives_the_same_samples():
    order = Order(100, 2, 8, seed=1)
    before = order.indices(0, 2, 0, 8).copy()
    assert (order.indices(1, 2, 0, 8) != before).any()
    assert (order.indices(0, 2, 0, 8) == before).all()


@pytest.mark.parametrize("last_batch", ["drop", "pad", "keep"])
@pytest.mark.parametrize("num_samples", [48, 50, 53, 59])
def test_the_last_batch(num_samples, last_batch):
    """Twelve images a step: what four chips see in an epoch, and how often."""
    if last_batch == "keep" and num_samples == 50:
        with pytest.raises(ValueError, match="last_batch=keep: 2 images are left over for 4 chips"):
            Order(num_samples, 3, 4, seed=5, last_batch=last_batch)
        return
    order = Order(num_samples, 3, 4, seed=5, last_batch=last_batch)
    whole, left = divmod(num_samples, 12)
    assert order.steps_per_epoch == whole + (left > 0 and last_batch != "drop")
    steps = [order.indices(7, step, 0, 4).ravel() for step in range(order.steps_per_epoch)]
    drawn, seen = permutation(num_samples, 5, 7), np.concatenate(steps)
    if last_batch == "drop" or not left:
        assert seen.tolist() == drawn[: 12 * whole].tolist()
    elif last_batch == "pad":
        assert seen.tolist() == drawn.tolist() + drawn[: 12 - left].tolist()
    else:
        assert seen.tolist() == drawn.tolist()
        sizes = order.sizes(order.steps_per_epoch - 1, 0, 4)
        assert sum(sizes) == left == order.images(order.steps_per_epoch - 1) and max(sizes) - min(sizes) <= 1
        assert order.images(order.steps_per_epoch - 1, lost={0, 3}) == left - sizes[0] - sizes[3]
    assert order.sizes(0, 0, 4) is None and order.images(0) == 12 and order.images(0, lost={3}) == 9
    last = order.steps_per_epoch - 1  # cut among workers, chip by chip
    parts = [order.indices(7, last, first, first + 1).ravel() for first in range(4)]
    assert np.concatenate(parts).tolist() == steps[-1].tolist()
    if order.sizes(last, 0, 4):
        assert tuple(map(len, parts)) == order.sizes(last, 0, 4) == order.sizes(last, 0, 1) + order.sizes(last, 1, 4)


def test_batch_larger_than_the_data_set():
    numbers = r"global_batch_size=512 \(64 chips x 8\).*\(360 images\)"
    with pytest.raises(ValueError, match=numbers + ".*lower chip_batch_size"):
        Order(360, 8, 64, seed=0)
    with pytest.raises(ValueError, match="chip_batch_size=-8: must be at least 1"):
        Order(360, -8, 64, seed=0)


@pytest.mark.parametrize(("num_samples", "sizes"), [(10, [4, 4, 2]), (8, [4, 4]), (3, [3])])
def test_evaluation_counts_every_image_once(num_samples, sizes):
    batches = eval_batches(num_samples, 4)
    assert [len(batch) for batch in batches] == sizes
    assert np.concatenate(batches).tolist() == list(range(num_samples))
