"""Measures the input pipeline on photos of yours: images per second and core, from the files to a normalised batch.

    python scripts/bench_loader.py data.root=/data/photos [--json] [--rounds 7] [--photos 250]

Random resized crop to 224 pixels, flip, normalise, in batches of 50. All sides run in one process on one thread with
malloc told alike, in turns, every other round backwards; the clock is the processor time of the process, the figure the
median of the rounds, a ratio the median of the rounds' ratios. reference: torchvision's references/classification
(Pillow, its transforms, its ImageFolder and collation); ours: data=imagenet; shards: data=imagenet_shards of the same
photos, as they are and shrunk to 256; webdataset reads those shards with the reference's transforms; full decode: only
libjpeg-turbo's decode of whole photos that are in memory already.

Beside it stand how far the fast path's pixels are from the plain one's, the shards' sequential rate, the first batch
with an index of 1,281,167 entries, and `prepare` against decode plus encode alone, both on all cores at once.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import torch

from train.data.archives import Photo, list_photos
from train.data.folder import UnreadableImage
from train.data.imagenet import ImageNetFolder
from train.data.photos import MEAN, STD
from train.data.pixels import decode
from train.data.prepare import WORK, Job, Large, Maker, Options, begin, encoded, finish, plan
from train.data.shards import ENTRY, INDEX, ImageNetShards
from train.data.turbojpeg import TurboJpeg, find_library
from train.memory import keep_freed_memory

SIZE, BATCH, SHRINK, QUALITY = 224, 50, 256, 90
IMAGENET = 1_281_167
PER_SHARD = 64
REPEATED = 4  # photos of a shard of `prepare`, which has 2,048 by default, so that its end counts as little


def reference_transform() -> Callable:
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
            transforms.ConvertImageDtype(torch.float),
            transforms.Normalize(MEAN, STD),
        ]
    )


def reference(root: Path, count: int) -> Callable[[int], Iterator]:
    """torchvision's own loading: ImageFolder, its transforms, DataLoader's collation; no processes, as on all sides."""
    from torchvision.datasets import ImageFolder

    data = torch.utils.data.Subset(ImageFolder(str(root), reference_transform()), range(count))
    return lambda turn: iter(torch.utils.data.DataLoader(data, BATCH, shuffle=True))


def webdataset(folder: Path, count: int) -> Callable[[int], Iterator] | None:
    """The reference's transforms on the same shards; None where the package is not installed."""
    try:
        import webdataset
    except ImportError:
        return None
    urls = [str(path) for path in sorted(folder.glob("train-*.tar"))]
    transform = reference_transform()

    def batches(turn: int) -> Iterator:
        data = webdataset.WebDataset(urls, shardshuffle=False).decode("pilrgb").to_tuple("jpeg;jpg;png", "__key__")
        data = data.map_tuple(transform, lambda key: 0).batched(BATCH)
        yield from data

    return batches


def ours(source: ImageNetFolder | ImageNetShards, count: int) -> Callable[[int], Iterator]:
    return lambda turn: (
        source.train.batch(np.arange(first, min(first + BATCH, count)), seed=0, epoch=turn)
        for first in range(0, count, BATCH)
    )


def full_decode(blobs: list[bytes]) -> Callable[[int], Iterator]:
    turbo = TurboJpeg(find_library())

    def decode(turn: int) -> Iterator:
        for data in blobs:
            turbo.crop(data, (0, 0, *turbo.size(data)))
            yield [data], None

    return decode


def in_turns(sides: dict[str, Callable[[int], Iterator]], rounds: int, count: int) -> dict[str, list[float]]:
    """Images per second of processor time of each side in each round, after one to warm up."""
    rates = {name: [] for name in sides}
    for turn in range(-1, rounds):
        for name in list(sides) if turn % 2 else list(reversed(sides)):
            start, images = time.process_time(), 0
            for batch, _ in sides[name](turn + 1):
                images += len(batch)
            assert images == count, (name, images, count)
            if turn >= 0:
                rates[name].append(count / (time.process_time() - start))
    return rates


def make_shards(root: Path, folder: Path, options: Options) -> None:
    """Shards of a folder tree, by this process alone."""
    photos = list_photos(root, None)
    jobs, maker = plan(photos, options), Maker(folder, options, find_library())
    begin(folder, photos, options, jobs)
    for job in jobs:
        maker.make(job)
    finish(folder, photos, options, jobs)


def codecs_alone(maker: Maker, photos: list[Photo]) -> dict[str, Callable[[], None]]:
    """To decode each photo, which is in memory, and to encode it at the size that `prepare` gives it, no more.

    plain: all its pixels by libjpeg-turbo, and Pillow's encoder. own: the very calls that `prepare` makes for both.
    """
    turbo, work = maker.turbo, []
    for photo in photos:
        opened = maker.opened(photo)
        if not isinstance(opened, UnreadableImage):
            small = opened.scaled() if isinstance(opened, Large) else None
            pixels = None if small is None else np.asarray(decode(maker.encoded(small), photo.place))
            work.append((photo.read(), photo.place, small, pixels))
    work *= REPEATED

    def plain() -> None:
        for data, place, _, pixels in work:
            whole = turbo.size(data)
            if whole is None or turbo.crop(data, (0, 0, *whole)) is None:
                decode(data, place)
            if pixels is not None:
                encoded(pixels, QUALITY)

    def own() -> None:
        for data, place, small, _ in work:
            maker.decoded(data, place)
            if small is not None:
                maker.encoded(small)

    return {"plain": plain, "own": own}


def at_work(
    core: int, cores: int, root: Path, folder: Path, count: int, rounds: int, meet: Barrier, tell: Queue
) -> None:
    """One process of `on_all_cores`: its share of the photos by each side, after one round to warm up."""
    torch.set_num_threads(1)
    keep_freed_memory()
    share = list_photos(root, None).parts["train"][:count][core::cores]
    maker = Maker(folder, Options(SHRINK, QUALITY), find_library())
    sides = {"prepare": lambda: maker.make(Job("train", core, 0, share * REPEATED)), **codecs_alone(maker, share)}
    for turn in range(-1, rounds):
        for name in list(sides) if turn % 2 else list(reversed(sides)):
            meet.wait()
            wall, busy = time.perf_counter(), time.process_time()
            sides[name]()
            busy = time.process_time() - busy
            meet.wait()
            tell.put((turn, name, time.perf_counter() - wall, busy))


def on_all_cores(root: Path, folder: Path, count: int, rounds: int) -> dict[str, float]:
    """`prepare` against decode plus encode alone, each on all cores at once, in turns: times as fast.

    By the clock on the wall, which shows waiting for the disk and for the slowest process; and by processor time.
    """
    cores, context = len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")
    (folder / WORK).mkdir(parents=True)
    meet, tell = context.Barrier(cores), context.Queue()
    arguments = cores, root, folder, count, rounds, meet, tell
    processes = [context.Process(target=at_work, args=(core, *arguments), daemon=True) for core in range(cores)]
    for process in processes:
        process.start()
    wall, busy = defaultdict(float), defaultdict(float)
    for _ in range(cores * (1 + rounds) * 3):
        turn, name, elapsed, used = tell.get(timeout=600)
        wall[turn, name] = max(wall[turn, name], elapsed)
        busy[turn, name] += used
    for process in processes:
        process.join()

    def against(side: str, spent: dict[tuple[int, str], float]) -> float:
        return statistics.median(spent[turn, side] / spent[turn, "prepare"] for turn in range(rounds))

    return {
        "prepare_processes": cores,
        "prepare_images_per_s": REPEATED * count / statistics.median(wall[turn, "prepare"] for turn in range(rounds)),
        "prepare_x_decode_and_encode": against("plain", wall),
        "prepare_x_own_codecs": against("own", wall),
        "prepare_x_decode_and_encode_processor_time": against("plain", busy),
        "prepare_x_own_codecs_processor_time": against("own", busy),
    }


def pixel_difference(root: Path, count: int) -> dict[str, float]:
    """Levels of 255 between the fast path and the plain one on the same crops; crops that the DCT shrank apart."""
    fast, plain = (ImageNetFolder(str(root), SIZE, workers=0, decode=decode) for decode in ("turbo", "pillow"))
    pixels = [
        source.train.start(np.arange(count), seed=0, epoch=0)()[0].numpy().astype(np.int16) for source in (fast, plain)
    ]
    difference = np.abs(pixels[0] - pixels[1])
    return {"mean": float(difference.mean()), "percentile_99": float(np.percentile(difference, 99))}


def sequential_rate(folder: Path) -> dict[str, float]:
    """Bytes per second of reading every photo of the shards in order, and of reading the same files whole.

    The files are written to disk and dropped from the page cache before each.
    """
    source = ImageNetShards(str(folder), workers=0)
    store, paths = source.train.cutter.store, sorted(folder.glob("train-*.tar"))

    def whole() -> int:
        return sum(len(path.read_bytes()) for path in paths)

    def by_index() -> int:
        return sum(len(store.read(file)) for file in range(len(store.labels)))

    rates = {}
    for name, read in (("files", whole), ("photos", by_index)):
        for path in paths:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        nbytes = read()
        rates[name] = nbytes / (time.perf_counter() - start)
    return rates


def memory_growth(side: Callable[[int], Iterator], epochs: int = 4) -> int:
    """Bytes by which this process grows from the end of an epoch to that of the last of `epochs` further ones."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    after = []
    for turn in range(1 + epochs):
        for _ in side(turn):
            pass
        after.append(resident())
    return after[-1] - after[0]


FIRST_BATCH = """
import sys, time
import numpy as np
from train.data.order import Order
from train.data.shards import ImageNetShards
start = time.perf_counter()
source = ImageNetShards(sys.argv[1], workers=0)
order = Order(len(source.train), chip_batch_size=32, num_chips=1, seed=0)
source.train.batch(order.indices(0, 0, 0, 1).reshape(-1), seed=0, epoch=0)
print(time.perf_counter() - start)
"""


def first_batch_s(folder: Path, scratch: Path) -> float:
    """Seconds from nothing to 32 images, with the photos of `folder` entered again up to ImageNet's number."""
    index = json.loads((folder / INDEX).read_text())
    entries = np.fromfile(folder / "train.index", ENTRY)
    scratch.mkdir()
    np.resize(entries, IMAGENET).tofile(scratch / "train.index")
    for path in folder.glob("train-*.tar"):
        (scratch / path.name).symlink_to(path)
    index["parts"] = {"train": index["parts"]["train"] | {"photos": IMAGENET}}
    (scratch / INDEX).write_text(json.dumps(index))
    command = [sys.executable, "-c", FIRST_BATCH, str(scratch)]
    root = Path(__file__).resolve().parents[1]
    return float(subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout)


def measure(root: Path, rounds: int, count: int, say: Callable[[str], None]) -> dict:
    if find_library() is None:
        raise ValueError("no TurboJPEG library of version 3 here: pip install turbojpeg")
    with tempfile.TemporaryDirectory(prefix="bench-loader-") as scratch:
        plain, small = Path(scratch) / "photos", Path(scratch) / "shrunk"
        folder = ImageNetFolder(str(root), SIZE, workers=0)
        store = folder.train.cutter.store
        count = min(count, len(store.labels))
        blobs = [store.read(file) for file in range(count)]
        make_shards(root, plain, Options(photos_per_shard=PER_SHARD))
        make_shards(root, small, Options(SHRINK, QUALITY, True, PER_SHARD))
        sides = {
            "reference": reference(root, count),
            "ours": ours(folder, count),
            "ours, shards": ours(ImageNetShards(str(plain), SIZE, workers=0), count),
            "ours, shards shrunk": ours(ImageNetShards(str(small), SIZE, workers=0), count),
            "full decode": full_decode(blobs),
        }
        for name, path in (("webdataset, shards", plain), ("webdataset, shards shrunk", small)):
            if count == len(store.labels) and (side := webdataset(path, count)):
                sides[name] = side
        rates = in_turns(sides, rounds, count)
        against = {
            name: statistics.median(one / base for one, base in zip(values, rates["reference"], strict=True))
            for name, values in rates.items()
        }
        medians = {name: statistics.median(values) for name, values in rates.items()}
        say("images/s on one core       median     lowest to highest    x reference")
        for name, values in rates.items():
            say(f"{name:26s} {medians[name]:7.0f}    {min(values):7.0f} to {max(values):7.0f}    {against[name]:11.2f}")
        result = {
            "reference_images_per_s_core": medians["reference"],
            "ours_images_per_s_core": medians["ours"],
            "ratio": against["ours"],
            "shards_ratio": against["ours, shards shrunk"],
            "decode_limit_images_per_s_core": medians["full decode"],
            "images_per_s_core": medians,
            "x_reference": against,
            "pixel_difference": pixel_difference(root, count),
            "sequential_bytes_per_s": sequential_rate(plain),
            "memory_growth_bytes": memory_growth(sides["ours, shards"]),
            "first_batch_s": first_batch_s(small, Path(scratch) / "large"),
            "photos": count,
            "rounds": rounds,
            "mean_photo_bytes": statistics.mean(map(len, blobs)),
        }
        result |= on_all_cores(root, Path(scratch) / "all cores", count, rounds)
    difference, rate = result["pixel_difference"], result["sequential_bytes_per_s"]
    say(f"fast path against plain: {difference['mean']:.3f} levels of 255 in the mean, "
        f"{difference['percentile_99']:.0f} at the 99th percentile")  # fmt: skip
    say(f"shards, from disk in order: photos {rate['photos'] / 1e6:.0f} MB/s, files {rate['files'] / 1e6:.0f} MB/s")
    say(f"memory after four further epochs of shards: {result['memory_growth_bytes'] / 1e6:+.1f} MB")
    say(f"first batch of 32 with an index of {IMAGENET:,}: {result['first_batch_s']:.2f} s")
    for name, beside in (
        ("decode_and_encode", "a whole decode plus Pillow's encoder"),
        ("own_codecs", "its own codecs"),
    ):
        ratio, busy = result[f"prepare_x_{name}"], result[f"prepare_x_{name}_processor_time"]
        say(f"prepare --shrink {SHRINK} against {beside} alone, {result['prepare_processes']} processes each: "
            f"{ratio:.2f} x (in processor time {busy:.2f} x)")  # fmt: skip
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", metavar="data.root=FOLDER", help="photos in folders by class")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--photos", type=int, default=250, help="at most so many")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    say = (lambda line: None) if options.json else (lambda line: print(line, flush=True))
    try:
        result = measure(Path(options.root.removeprefix("data.root=")), options.rounds, options.photos, say)
    except ValueError as error:
        print(f"bench_loader: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
