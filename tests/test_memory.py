"""What a worker frees stays with it, whichever malloc it has."""

import os
import subprocess
import sys

import pytest

from train.memory import preloaded

ROUNDS = 10
PROGRAM = f"""
import resource
import numpy
from train.memory import allocator, keep_freed_memory
keep_freed_memory()
faults = []
for _ in range({ROUNDS}):
    numpy.empty(64 << 20, numpy.uint8).fill(1)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(allocator(), faults[-1] - faults[0])
"""


@pytest.mark.parametrize(("environment", "expected"), [({}, "glibc"), (preloaded(), "jemalloc")])
def test_freed_memory_is_used_again(environment, expected):
    plain = {key: value for key, value in os.environ.items() if key not in ("LD_PRELOAD", "MALLOC_CONF")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=plain | environment, capture_output=True, text=True, check=True
    )
    name, faults = done.stdout.split()
    assert name == expected
    assert int(faults) < 100  # 64 MiB are 16,384 pages, or 32 large ones, a round
