"""Packs ImageNet into tar shards with an index for random access, which data=imagenet_shards reads.

    python scripts/prepare_imagenet.py SRC DST [--shrink 256] [--quality 90] [--processes 16] [--val-labels FILE]
    python scripts/prepare_imagenet.py --verify DST

SRC is a folder tree, train/<class>/*.JPEG and val/<class>/*.JPEG, or a folder with ImageNet's own archives:
ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz (or --val-labels, a file with lines
of photo and class). Photos are copied as they are, or with --shrink made smaller: shorter side at most so many pixels.
Every photo is decoded once; those that can't be are left out and listed, with the reason, in DST/skipped.csv.

Interrupted at any moment, by kill -9 too, the same command goes on with the first unfinished shard; the result is the
same to the last byte. Exit status: 0 done, 1 failed or a checksum differs, 2 SRC, DST or an option is wrong.
"""

import argparse
import fcntl
import multiprocessing
import os
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from datetime import timedelta
from multiprocessing.connection import wait as wait_for
from pathlib import Path

import torch

from train.data.archives import list_photos
from train.data.prepare import Job, Maker, Options, begin, finish, plan, verify
from train.data.shards import INDEX, read_index
from train.data.turbojpeg import find_library
from train.memory import keep_freed_memory

EVERY_S = 2.0  # between lines of progress


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SRC", type=Path, nargs="?")
    parser.add_argument("folder", metavar="DST", type=Path)
    parser.add_argument("--shrink", type=int, help="shorter side of larger photos, in pixels")
    parser.add_argument("--quality", type=int, default=90, help="JPEG quality of photos made smaller")
    parser.add_argument("--no-check", action="store_true", help="don't decode what is copied")
    parser.add_argument("--photos-per-shard", type=int, default=2048)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--val-labels", type=Path, help="lines of validation photo and class, or the development kit")
    parser.add_argument("--verify", action="store_true", help="hold DST against its checksums")
    options = parser.parse_args()
    try:
        return check(options.folder) if options.verify else prepare(options)
    except ValueError as error:
        print(f"prepare_imagenet: {error}", file=sys.stderr)
        return 2
    except (OSError, BrokenProcessPool) as error:
        print(f"prepare_imagenet: {error}; the same command goes on from here", file=sys.stderr)
        return 1


def check(folder: Path) -> int:
    wrong = verify(folder, read_index(folder / INDEX), lambda name: print(name, flush=True))
    for line in wrong:
        print(f"prepare_imagenet: {line}: make it again, by the same command in an empty folder", file=sys.stderr)
    return 1 if wrong else 0


def prepare(arguments: argparse.Namespace) -> int:
    if arguments.source is None:
        raise ValueError("SRC is missing: prepare_imagenet.py SRC DST")
    ranges = {"shrink": (1, 65_500), "quality": (1, 95), "photos_per_shard": (1, 1 << 20), "processes": (1, 1024)}
    for name, (low, high) in ranges.items():
        value = getattr(arguments, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"--{name.replace('_', '-')}={value}: must be from {low} to {high}")
    options = Options(arguments.shrink, arguments.quality, not arguments.no_check, arguments.photos_per_shard)
    print(f"listing {arguments.source}", flush=True)
    photos = list_photos(arguments.source, arguments.val_labels)
    counts = ", ".join(f"{len(listed):,} {part}" for part, listed in photos.parts.items())
    print(f"{counts} photos of {len(photos.classes):,} classes", flush=True)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with open(arguments.folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"DST={arguments.folder}: another prepare_imagenet.py is at work there") from None
        jobs = plan(photos, options)
        to_do = begin(arguments.folder, photos, options, jobs)
        if len(to_do) < len(jobs):
            print(f"{len(jobs) - len(to_do)} of {len(jobs)} shards are there already", flush=True)
        make_all(Maker(arguments.folder.resolve(), options, find_library()), to_do, arguments.processes)
        index = finish(arguments.folder, photos, options, jobs)
    nbytes = sum(shard["bytes"] for content in index["parts"].values() for shard in content["shards"])
    print(f"{len(jobs)} shards, {nbytes / 1e9:.2f} GB, in {arguments.folder}; {index['skipped']} photos were left out"
          + (f", see {arguments.folder / 'skipped.csv'}" if index["skipped"] else ""))  # fmt: skip
    return 0


def make_all(maker: Maker, jobs: list[Job], processes: int) -> None:
    """All jobs on so many processes, which end when this one does, with a line of progress now and then."""
    if not jobs:
        return
    total, done = sum(len(job.photos) for job in jobs), 0
    started = told = time.monotonic()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train.data.prepare"])
    with ProcessPoolExecutor(min(processes, len(jobs)), context, follow_the_parent) as pool:
        running = {pool.submit(maker.make, job) for job in jobs}
        while running:
            finished, running = wait(running, EVERY_S, FIRST_COMPLETED)
            done += sum(future.result() for future in finished)
            now = time.monotonic()
            if done and (now - told >= EVERY_S or not running):
                rate, told = done / (now - started), now
                left = timedelta(seconds=round((total - done) / rate))
                print(f"{done:,} of {total:,} photos, {rate:,.0f} a second, {left} left", flush=True)


def follow_the_parent() -> None:
    """End when the main process does, even by kill -9: an orphan would go on writing."""
    torch.set_num_threads(1)
    keep_freed_memory()  # every photo's pixels need as much again
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (wait_for([parent.sentinel]), os._exit(1)), daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
