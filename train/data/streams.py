"""Random numbers as a function of (seed, epoch, sample, stream), never of call order.

SplitMix64: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014; its mixer and increment
are those of https://prng.di.unimi.it/splitmix64.c. Integer arithmetic and one exact scaling: the same bits everywhere.
"""

import numpy as np

GAMMA = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, the increment of SplitMix64
MASK = 2**64 - 1


def mix(words: np.ndarray) -> np.ndarray:
    """SplitMix64's bijective finaliser on uint64."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def outputs(key: int, samples: np.ndarray) -> np.ndarray:
    """Outputs number `samples` (from 0) of a SplitMix64 generator seeded with `key`, as uint64."""
    positions = np.asarray(samples).astype(np.uint64) + np.uint64(1)
    return mix(np.uint64(key & MASK) + positions * np.uint64(GAMMA))


def uniform(seed: int, epoch: int, samples: np.ndarray, stream: int) -> np.ndarray:
    """float64 in [0, 1) for each sample index: 53 bits of output number `sample` of generator (seed, epoch, stream)."""
    key = 0
    for word in (seed, epoch, stream):
        key = int(outputs(key + word, np.zeros(1, np.int64))[0])
    return (outputs(key, samples) >> np.uint64(11)) * 2.0**-53


def permutation(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of range(num_samples) as int64: NumPy's Generator on Philox4x64-10 with the key (seed, epoch)."""
    key = np.array([seed & MASK, epoch & MASK], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).permutation(num_samples)
