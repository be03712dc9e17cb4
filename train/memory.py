"""Freed memory stays with the process: a training step allocates again what the step before it freed.

glibc's malloc asks the kernel for every large block and gives it back when it is freed, so that each step has its
memory mapped and zeroed page by page once more. Measured with ResNet-50, 32 images of 224 pixels, one core: 10,000 page
faults and 13 to 22 ms of kernel time an image out of 120, and none where malloc keeps it, in the main thread and in
others. (Up to 32 MiB a block, as with 16 images, malloc learns that by itself.) Huge pages save no more, and finding
them cost up to 70 ms an image on a machine whose memory was in use.

What malloc keeps lies in pieces: until 2.38 it can't put an aligned block into the hole that a block of the same size
has left. jemalloc can. ResNet-50, float32, 2,048 images of 32 pixels in a pass, which need 4.8 GB at once: resident at
most 5.6 GB and 3 s of kernel time in two steps with jemalloc, 6.8 to 8.0 GB and 4 s with malloc told to keep all,
5.6 GB and 22 s with malloc's own settings. Ray's wheel has a jemalloc.
"""

import ctypes
import os
import platform
import resource
from importlib.util import find_spec
from pathlib import Path

# malloc.h; mallopt(3)
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
TOP_PAD = 1 << 30
"""Bytes of address space by which a heap grows. As many stay with the heaps of other threads, which are 64 MiB each."""
KEEPS = {"MALLOC_CONF": "narenas:1,dirty_decay_ms:-1,muzzy_decay_ms:-1"}
"""jemalloc(3): one pool for all threads, and nothing goes back to the kernel."""
RAY_WORKERS = {"RAY_LD_PRELOAD_ON_WORKERS": "1"} | KEEPS
"""Environment of a Ray node whose workers shall have the jemalloc that Ray itself runs on."""


def preloaded() -> dict[str, str]:
    """Environment of a process that shall allocate with Ray's jemalloc; empty where there is none."""
    ray = find_spec("ray")
    library = Path(ray.origin).parent / "core" / "libjemalloc.so" if ray else Path()
    return {"LD_PRELOAD": str(library)} | KEEPS if library.is_file() else {}


def allocator() -> str:
    """What this process allocates with: jemalloc, glibc, or what else its C library is."""
    return "jemalloc" if hasattr(ctypes.CDLL(None), "mallctl") else platform.libc_ver()[0] or platform.system()


def keep_freed_memory() -> None:
    """Have malloc reuse large blocks and give none back to the kernel, where it is glibc's."""
    if allocator() == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        for key, value in {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1, M_TOP_PAD: TOP_PAD}.items():
            mallopt(key, value)


def peak_bytes(device: str = "cpu") -> int:
    """The most memory that this process has had: of its GPU, or else of the machine.

    getrusage's figure begins with that of the process that started it.
    """
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if not status.exists():
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next(1024 * int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM:"))


def use_in_ray_workers() -> None:
    """Of a Ray node that this process is about to start; what the user has set stays."""
    for key, value in RAY_WORKERS.items():
        os.environ.setdefault(key, value)
