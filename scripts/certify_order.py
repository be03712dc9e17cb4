"""The order certificate: the same images in the same order, whoever loads them.

    python scripts/certify_order.py data.root=/data/photos [--shards] [--epochs 2] [--size 64] [--json]

Two epochs of 8 chips are loaded by 1, 2 and 3 workers (unequal shares), each with loader processes or threads, in one
go and stopped in the middle of an epoch and resumed by another number of workers. A line's SHA-256 is over the images
and labels of all steps, in the order of the chips. All must be equal, and each epoch must count every image that its
steps hold once; evaluation must count every image once. Exit status: 0 equal, 1 not, 2 the photos are wrong.
"""

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

import numpy as np

from train.data.imagenet import ImageNetFolder
from train.data.loader import Prefetcher
from train.data.order import Order, eval_batches
from train.data.shards import ImageNetShards

CHIPS, SEED = 8, 0
WORKERS = {1: (0, 8), 2: (0, 4, 8), 3: (0, 1, 6, 8)}  # the chips where each worker's share begins, and the end

# loader processes of each worker, workers, and workers that go on in the middle of the second epoch
WAYS = ((0, 1, 1), (0, 2, 2), (0, 3, 3), (2, 1, 1), (3, 2, 2), (1, 3, 2), (0, 2, 1))


def load(source: ImageNetFolder, order: Order, workers: int, steps: range, digest: "hashlib._Hash") -> Counter:
    """Add the steps' batches, chip after chip, to the digest; returns how often each (epoch, image) was taken."""
    seen: Counter = Counter()
    shares = list(pairwise(WORKERS[workers]))

    def batches(first: int, last: int):
        for step in steps:
            epoch, in_epoch = divmod(step, order.steps_per_epoch)
            indices = order.indices(epoch, in_epoch, first, last).reshape(-1)
            seen.update((epoch, int(index)) for index in indices)
            yield epoch, indices

    loaders = [Prefetcher(source.train, batches(*share), seed=SEED) for share in shares]
    for parts in zip(*loaders, strict=True):
        for images, labels in parts:
            for image, label in zip(images.permute(0, 2, 3, 1).contiguous().numpy(), labels.numpy(), strict=True):
                digest.update(image)
                digest.update(label)
    for loader in loaders:
        loader.close()
    return seen


def certify(root: str, shards: bool, epochs: int, size: int, ways: Iterable[tuple] = WAYS) -> tuple[list[dict], bool]:
    """A row for each way of loading, and whether all are as they must be."""
    rows, counted = [], True
    for processes, workers, resumed_by in ways:
        make = ImageNetShards if shards else ImageNetFolder
        source = make(root, image_size=size, workers=processes)
        order = Order(len(source.train), max(1, len(source.train) // CHIPS // 3), CHIPS, SEED, last_batch="pad")
        total = epochs * order.steps_per_epoch
        stop = total if workers == resumed_by else order.steps_per_epoch + 1
        digest = hashlib.sha256()
        seen = load(source, order, workers, range(stop), digest)
        if stop < total:
            source = make(root, image_size=size, workers=processes)  # as a new process would
            seen += load(source, order, resumed_by, range(stop, total), digest)
        padded = order.steps_per_epoch * order.global_batch_size - len(source.train)
        once, twice = epochs * (len(source.train) - padded), epochs * padded
        counted &= Counter(seen.values()) == Counter([1] * once + [2] * twice)
        how = f"{workers} workers" if workers == resumed_by else f"{workers} workers, resumed by {resumed_by}"
        loads = f"{processes} loader processes" if processes else "threads"
        rows.append({"workers": how, "by": loads, "steps": total, "sha256": digest.hexdigest()})
        if processes:
            source.train.pool.close()
    evaluated = np.concatenate(eval_batches(len(source.eval), 64))
    counted &= evaluated.tolist() == list(range(len(source.eval)))
    return rows, counted and len({row["sha256"] for row in rows}) == 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", metavar="data.root=FOLDER")
    parser.add_argument("--shards", action="store_true", help="the folder holds shards")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    options = parser.parse_args()
    try:
        rows, equal = certify(options.root.removeprefix("data.root="), options.shards, options.epochs, options.size)
    except ValueError as error:
        print(f"certify_order: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps({"equal": equal, "rows": rows}))
    else:
        for row in rows:
            print(f"{row['workers']:26s} {row['by']:20s} {row['steps']:4d} steps  {row['sha256']}")
        print("all equal, every image counted as it must be" if equal else "NOT EQUAL")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
