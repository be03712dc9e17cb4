import numpy as np

from train.data.streams import outputs, permutation, uniform


def test_outputs_are_splitmix64s():
    # The published sequences of seeds 0 and 1234567.
    assert [hex(word) for word in outputs(0, np.arange(3)).tolist()] == [
        "0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4", "0x6c45d188009454f",
    ]  # fmt: skip
    assert outputs(1234567, np.arange(3)).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_uniform_golden():
    numbers = uniform(7, 2, np.array([0, 1, 1000]), 3)
    assert numbers.dtype == np.float64
    assert numbers.tolist() == [0.7238083122015551, 0.23222475413400345, 0.8964490130762284]


def test_a_number_depends_on_its_own_sample_only():
    alone = np.concatenate([uniform(3, 1, np.array([sample]), 0) for sample in range(100)])
    assert (uniform(3, 1, np.arange(100), 0) == alone).all()
    assert (uniform(3, 1, np.arange(99, -1, -1), 0) == alone[::-1]).all()


def test_keys_are_independent():
    samples = np.arange(2000)
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (-1, 0, 0), (2**63, 0, 0)]
    correlation = np.corrcoef([uniform(seed, epoch, samples, stream) for seed, epoch, stream in keys])
    assert np.abs(correlation - np.eye(len(keys))).max() < 0.08  # 3.6 standard deviations of 1 / sqrt(2000)


def test_uniform_is_uniform():
    numbers = uniform(0, 0, np.arange(64_000), 0)
    assert 0 <= numbers.min() and numbers.max() < 1
    counts = np.histogram(numbers, bins=64, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 107  # chi squared, 63 degrees of freedom, p = 0.0005


def test_permutation_golden():
    assert permutation(10, 7, 2).tolist() == [1, 7, 2, 9, 4, 5, 3, 6, 0, 8]
    assert sorted(permutation(1000, 7, 3).tolist()) == list(range(1000))
    assert (permutation(1000, 7, 3) != permutation(1000, 7, 4)).any()
    assert (permutation(1000, 7, 3) != permutation(1000, 3, 7)).any()
