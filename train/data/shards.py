"""Shards: photos in plain tars, with an index for random access beside them; made by scripts/prepare_imagenet.py.

    folder/index.json              what is there: format, parts, classes, shards with their SHA-256
    folder/train.index             ENTRY for each photo, in the order of class and name; mapped, not read
    folder/train-00000.tar …       members <class>/<name>, in the same order; any tar program opens them
    folder/skipped.csv             what was left out, and why

A photo's number is the same as in the folder tree it came from, as long as nothing was left out.
"""

import hashlib
import json
import os
import resource
import tarfile
import threading
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from train.data.folder import data_root, unreadable
from train.data.imagenet import PhotoSource

FORMAT = 1
INDEX = "index.json"
ENTRY = np.dtype([("offset", "<u8"), ("size", "<u4"), ("shard", "<u4"), ("label", "<u4"), ("crc32", "<u4")])
BLOCK = tarfile.BLOCKSIZE


def shard_name(part: str, number: int) -> str:
    return f"{part}-{number:05d}.tar"


class ShardStore:
    """One part. Files are opened when first read, and stay open."""

    def __init__(self, folder: Path, part: str, shards: list[str], count: int) -> None:
        self.folder, self.part, self.shards = folder, part, shards
        path = folder / f"{part}.index"
        if not path.is_file() or path.stat().st_size != count * ENTRY.itemsize:
            raise ValueError(f"data.root: {path} is not the index of {count} photos: run prepare_imagenet.py again")
        self.entries = np.memmap(path, ENTRY, mode="r")
        self.labels = self.entries["label"].astype(np.int64)
        self._lock, self._descriptors = threading.Lock(), {}
        allow_open_files(len(shards))

    def __reduce__(self) -> tuple:
        return ShardStore, (self.folder, self.part, self.shards, len(self.labels))

    def read(self, file: int) -> bytes:
        entry = self.entries[file]
        try:
            data = os.pread(self._descriptor(int(entry["shard"])), int(entry["size"]), int(entry["offset"]))
        except OSError as error:
            raise unreadable(self.place(file), error) from error
        if len(data) < entry["size"]:
            raise unreadable(self.place(file), EOFError("the shard is shorter than its index says"))
        return data

    def place(self, file: int) -> str:
        """The shard and the member's name, as its header in the tar has it."""
        entry = self.entries[file]
        shard = self.folder / self.shards[int(entry["shard"])]
        try:
            with open(shard, "rb") as tar:
                tar.seek(int(entry["offset"]) - BLOCK)
                name = tarfile.TarInfo.frombuf(tar.read(BLOCK), "utf-8", "surrogateescape").name
        except (OSError, tarfile.TarError):
            name = f"photo {file}"
        return f"{shard}:{name}"

    def _descriptor(self, shard: int) -> int:
        with self._lock:
            if shard not in self._descriptors:
                self._descriptors[shard] = os.open(self.folder / self.shards[shard], os.O_RDONLY)
            return self._descriptors[shard]


def allow_open_files(count: int) -> None:
    """Raise this process's limit of open files by as many, as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 1024
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, limit), hard))


class ImageNetShards(PhotoSource):
    """A folder of shards; without a part val, the photos of train also evaluate, and `notes` says so."""

    name = "imagenet_shards"

    def __init__(
        self,
        root: str | None,
        image_size: int = 224,
        eval_size: int | None = None,
        augment: bool = True,
        crop_ratio: float = 0.875,
        train_sizes: list[list[int]] | None = None,
        repeat: int = 1,
        workers: int | Literal["auto"] = "auto",
        decode: Literal["auto", "turbo", "pillow"] = "auto",
        on_error: Literal["stop", "skip"] = "stop",
        cache_gbytes: float = 0.0,
    ) -> None:
        folder = data_root(root)
        self._index = folder / INDEX
        index = read_index(self._index)
        self.num_classes = len(index["classes"])
        made = index["made"]
        if made["shrink"]:
            self.notes += (f"photos shrunk to a shorter side of {made['shrink']} px, JPEG quality {made['quality']}",)
        stores = {
            part: ShardStore(folder, part, [shard["name"] for shard in content["shards"]], content["photos"])
            for part, content in index["parts"].items()
        }
        super().__init__(
            stores["train"],
            stores.get("val", stores["train"]),
            image_size=image_size,
            eval_size=eval_size,
            augment=augment,
            crop_ratio=crop_ratio,
            train_sizes=train_sizes,
            repeat=repeat,
            workers=workers,
            decode=decode,
            on_error=on_error,
            cache_gbytes=cache_gbytes,
        )

    @cached_property
    def fingerprint(self) -> str:
        """Of the index, which holds the SHA-256 of every shard."""
        return hashlib.sha256(self._index.read_bytes()).hexdigest()


def read_index(path: Path) -> dict:
    if not path.is_file():
        raise ValueError(
            f"data.root={path.parent}: no {INDEX} there: make shards by scripts/prepare_imagenet.py, "
            "or set data=imagenet for a folder tree"
        )
    try:
        index = json.loads(path.read_text())
        if index["format"] != FORMAT:
            raise ValueError(f"format {index['format']}, not {FORMAT}")
        return index
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"data.root: {path} is no index of shards ({error}): run prepare_imagenet.py again") from error
