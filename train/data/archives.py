"""Photos to make shards of: a folder tree, or ImageNet's own archives, read where they lie.

Archives: ILSVRC2012_img_train.tar holds one tar for each class, n01440764.tar with its photos; ILSVRC2012_img_val.tar
the 50,000 photos of the validation set, whose classes stand in the development kit, or in a file of `name class` lines.
"""

import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np

from train.data.folder import ImageFolder, is_image, list_parts, same_classes

TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
META, TRUTH = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"
WHOLE = -1


@dataclass(frozen=True)
class Photo:
    """`size` bytes of a file from `offset` on (WHOLE: all of it), to be member `name` of a shard."""

    name: str
    label: int
    file: str
    offset: int = 0
    size: int = WHOLE

    @property
    def place(self) -> str:
        return self.file if self.size == WHOLE else f"{self.file}:{self.name}"

    def read(self) -> bytes:
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True)
class Photos:
    """Sorted by class and name."""

    classes: tuple[str, ...]
    parts: dict[str, list[Photo]]


def list_photos(source: Path, val_labels: Path | None) -> Photos:
    """The training and validation photos of `source`; class folders directly in it are training photos alone."""
    if not source.is_dir():
        raise ValueError(f"SRC={source}: no such folder: name the one with train/ and val/, or with {TRAIN_TAR}")
    train_tar, val_tar = source / TRAIN_TAR, source / VAL_TAR
    if not train_tar.is_file():
        if val_tar.is_file():
            raise ValueError(f"SRC={source}: {VAL_TAR} without {TRAIN_TAR}: put both into one folder")
        return list_folders(source)
    train = list(train_photos(train_tar))
    classes = tuple(sorted({folder for folder, _, _, _ in train}))
    parts = {"train": labelled(train, classes, train_tar)}
    if val_tar.is_file():
        truth = val_classes(source, val_labels)
        val = []
        for name, offset, size in images(val_tar, 0, None):
            if name not in truth:
                raise ValueError(f"{val_tar}: no class is known for {name}: give --val-labels with all photos")
            val.append((truth[name], name, offset, size))
        same_classes(classes, tuple(sorted({folder for folder, _, _, _ in val})), source)
        parts["val"] = labelled(val, classes, val_tar)
    return Photos(classes, parts)


def list_folders(source: Path) -> Photos:
    train, evaluation = list_parts(source)

    def photos(part: ImageFolder) -> list[Photo]:
        labels = part.labels.tolist()
        return [Photo(name, labels[i], part.path(i)) for i, name in enumerate(part.files)]

    parts = {"train": photos(train)}
    if evaluation is not train:
        parts["val"] = photos(evaluation)
    return Photos(train.classes, parts)


def labelled(found: list[tuple[str, str, int, int]], classes: tuple[str, ...], tar: Path) -> list[Photo]:
    numbers = {name: number for number, name in enumerate(classes)}
    return [Photo(f"{folder}/{name}", numbers[folder], str(tar), *where) for folder, name, *where in sorted(found)]


def train_photos(tar: Path) -> Iterator[tuple[str, str, int, int]]:
    """(class, name, offset in the outer tar, size) of every photo of every inner tar."""
    empty = True
    for name, offset, size in members(tar, 0, None):
        if name.endswith(".tar"):
            for photo, where, nbytes in images(tar, offset, size):
                empty = False
                yield PurePosixPath(name).stem, photo, where, nbytes
    if empty:
        raise ValueError(f"{tar} holds no tars of photos: expected n01440764.tar and so on, as ImageNet has them")


def images(tar: Path, start: int, length: int | None) -> Iterator[tuple[str, int, int]]:
    for name, offset, size in members(tar, start, length):
        base = PurePosixPath(name).name
        if is_image(base):
            yield base, offset, size


def members(tar: Path, start: int, length: int | None) -> Iterator[tuple[str, int, int]]:
    """(name, offset in the file, size) of the plain files of a tar that lies in a file from `start` on."""
    try:
        with open(tar, "rb") as file, tarfile.open(fileobj=Window(file, start, length), mode="r:") as archive:
            for member in archive:
                if member.isfile():
                    yield member.name, start + member.offset_data, member.size
                archive.members = []  # else tarfile keeps them all
    except tarfile.TarError as error:
        raise ValueError(f"{tar} at byte {start} is not a whole plain tar ({error}): download it again") from error


class Window(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, file: IO[bytes], start: int, length: int | None) -> None:
        self._file, self._start = file, start
        self._length = os.fstat(file.fileno()).st_size - start if length is None else length
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = base + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._at)
        self._file.seek(self._start + self._at)
        data = self._file.read(left if size < 0 else min(size, left))
        self._at += len(data)
        return data


def val_classes(source: Path, given: Path | None) -> dict[str, str]:
    """The class of every validation photo by its name."""
    path = given or source / DEVKIT
    if not path.is_file():
        raise ValueError(
            f"the classes of {VAL_TAR} are unknown, {path} does not exist: put {DEVKIT} beside it, "
            "or give --val-labels FILE with lines of photo and class"
        )
    if path.name.endswith((".tar.gz", ".tgz")):
        return devkit_classes(path)
    pairs = [line.replace(",", " ").split() for line in path.read_text().splitlines() if line.strip()]
    bad = next((number for number, pair in enumerate(pairs, 1) if len(pair) != 2), None)
    if bad is not None:
        raise ValueError(f"{path}, line {bad}: expected a photo and its class, x.JPEG n01751748")
    return {name: folder for name, folder in pairs}


def devkit_classes(path: Path) -> dict[str, str]:
    """Line i of the ground truth is the ILSVRC2012_ID of photo i; meta.mat gives each of them its WordNet name."""
    from scipy.io import loadmat  # a dependency of scikit-learn

    try:
        with tarfile.open(path) as archive:
            found = {name: archive.extractfile(member).read() for member in archive if (name := inside(member.name))}
        synsets = loadmat(io.BytesIO(found[META]), squeeze_me=True)["synsets"]
        names = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in np.atleast_1d(synsets)}
        truth = [names[int(line)] for line in found[TRUTH].split()]
    except (tarfile.TarError, KeyError, ValueError, OSError) as error:
        raise ValueError(f"{path} is not ImageNet's development kit ({error}): download {DEVKIT} again") from error
    return {f"ILSVRC2012_val_{number:08d}.JPEG": name for number, name in enumerate(truth, 1)}


def inside(name: str) -> str | None:
    return next((wanted for wanted in (META, TRUTH) if name.endswith("/" + wanted)), None)
