"""CIFAR-10 from disk: torchvision's files in both versions, an image folder, or tars of images.

Format of the versions: https://www.cs.toronto.edu/~kriz/cifar.html. The "python version" is a pickle; it is never
loaded: its opcodes are listed (pickletools, which runs nothing) and the pixels and labels picked out.
"""

import pickletools
import tarfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from train.data.folder import (
    EVAL_NAMES,
    SAME_PHOTOS,
    UnreadableImage,
    data_root,
    is_image,
    list_parts,
    same_classes,
)
from train.data.pixels import decode

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 32
BYTES = 3 * SIDE * SIDE
TRAIN_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST_BATCH = "test_batch"
LAYOUTS = "cifar-10-batches-bin/, cifar-10-batches-py/, train.tar with test.tar, or train/<class>/ with test/<class>/"

Item = tuple[int, str, Callable[[], str | IO[bytes]]]  # label, where it lies, how to open it


@dataclass(frozen=True)
class Images:
    """Decoded images uint8 [n, size, size, 3] and labels int64 [n]."""

    pixels: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Cifar10Files:
    train: Images
    eval: Images
    num_classes: int
    notes: tuple[str, ...] = ()
    num_skipped: int = 0


def read_cifar10(root: str | None, size: int, skip: bool) -> Cifar10Files:
    """All images at size x size, in the one layout that `root` holds; with `skip` unreadable images are left out."""
    path = data_root(root)
    for folder, suffix, read in (
        ("cifar-10-batches-bin", ".bin", read_binary_batch),
        ("cifar-10-batches-py", "", read_pickled_batch),
    ):
        for place in (path / folder, path):
            if (place / (TRAIN_BATCHES[0] + suffix)).is_file():
                train = [read(existing(place / (name + suffix))) for name in TRAIN_BATCHES]
                test = read(existing(place / (TEST_BATCH + suffix)))
                return Cifar10Files(joined(train, size), joined([test], size), num_classes=10)
    if (path / "train.tar").is_file():
        return read_tars(path, size, skip)
    if not any(entry.is_dir() for entry in path.iterdir()):
        raise ValueError(f"data.root={root}: no CIFAR-10 there: expected {LAYOUTS}")
    return read_folders(path, size, skip)


def existing(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"data.root: {path} is missing: unpack CIFAR-10 again")
    return path


def read_binary_batch(path: Path) -> Images:
    """Records of one label byte and 3 x 32 x 32 pixels."""
    content = np.fromfile(path, np.uint8)
    if not content.size or content.size % (1 + BYTES):
        raise ValueError(f"data.root: {path} has {content.size} bytes, not a multiple of {1 + BYTES}: unpack it again")
    records = content.reshape(-1, 1 + BYTES)
    return planes(records[:, 1:], records[:, 0], path)


def read_pickled_batch(path: Path) -> Images:
    """The string of pixels and the list of labels, found by their keys in the listing of the pickle's opcodes."""
    key, pixels, labels = None, b"", []
    try:
        for opcode, value, _ in pickletools.genops(path.read_bytes()):
            if isinstance(value, str) and "STRING" in opcode.name:
                if value in ("data", "labels", "batch_label", "filenames"):
                    key = value
                elif key == "data" and len(value) > len(pixels):
                    pixels = value.encode("latin-1")
            elif key == "labels" and opcode.name.startswith("BININT"):
                labels.append(value)
    except ValueError as error:
        raise ValueError(f"data.root: {path} is not a batch of CIFAR-10 ({error}): unpack it again") from error
    if not labels or len(pixels) != len(labels) * BYTES:
        raise ValueError(
            f"data.root: {path} is not a batch of CIFAR-10 ({len(pixels)} bytes of pixels, {len(labels)} labels): "
            "unpack it again"
        )
    return planes(np.frombuffer(pixels, np.uint8), np.array(labels), path)


def planes(pixels: np.ndarray, labels: np.ndarray, path: Path) -> Images:
    """Channel planes to interleaved channels."""
    if labels.max() > 9:
        raise ValueError(f"data.root: {path} has label {labels.max()}, above 9: unpack CIFAR-10 again")
    return Images(pixels.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1), labels.astype(np.int64))


def joined(batches: list[Images], size: int) -> Images:
    pixels = np.concatenate([batch.pixels for batch in batches])
    if size != SIDE:
        from PIL import Image

        pixels = np.stack([resized(Image.fromarray(image), size) for image in pixels])
    return Images(np.ascontiguousarray(pixels), np.concatenate([batch.labels for batch in batches]))


def read_folders(root: Path, size: int, skip: bool) -> Cifar10Files:
    train, evaluation = list_parts(root)
    parts = [train] if train is evaluation else [train, evaluation]
    read = []
    for part in parts:
        paths = [part.path(index) for index in range(len(part.files))]
        items = ((int(label), path, lambda path=path: path) for label, path in zip(part.labels, paths, strict=True))
        read.append(decoded(items, len(paths), size, skip, root))
    notes = (SAME_PHOTOS,) if train is evaluation else ()
    return Cifar10Files(read[0][0], read[-1][0], len(train.classes), notes, sum(skipped for _, skipped in read))


def read_tars(root: Path, size: int, skip: bool) -> Cifar10Files:
    """root/train.tar and root/test.tar (or val.tar) with members .../<class>/<name>.jpg."""
    evals = [root / f"{name}.tar" for name in EVAL_NAMES if (root / f"{name}.tar").is_file()]
    if not evals:
        raise ValueError(f"data.root={root}: train.tar has no test.tar beside it: expected {LAYOUTS}")
    read, classes = [], []
    for path in (root / "train.tar", evals[0]):
        try:
            with tarfile.open(path, "r:") as archive:
                members = [member for member in archive if member.isfile() and is_image(Path(member.name).name)]
                members.sort(key=lambda member: Path(member.name).parts[-2:])
                names = tuple(sorted({Path(member.name).parent.name for member in members}))
                if not members or "" in names:
                    raise ValueError(f"data.root: {path} has no images in class folders: expected <class>/<name>.jpg")
                items = tar_items(archive, members, names, path)
                read.append(decoded(items, len(members), size, skip, path))
                classes.append(names)
        except tarfile.TarError as error:
            raise ValueError(f"data.root: {path} is not a plain tar ({error}): pack it uncompressed") from error
    same_classes(*classes, root)
    return Cifar10Files(read[0][0], read[1][0], len(classes[0]), (), read[0][1] + read[1][1])


def tar_items(
    archive: tarfile.TarFile, members: list[tarfile.TarInfo], names: tuple[str, ...], path: Path
) -> Iterator[Item]:
    for member in members:
        label = names.index(Path(member.name).parent.name)
        yield label, f"{path}:{member.name}", lambda member=member: archive.extractfile(member)


def decoded(items: Iterable[Item], count: int, size: int, skip: bool, where: Path) -> tuple[Images, int]:
    """Every item's image, and how many were left out as unreadable."""
    pixels, labels = np.empty((count, size, size, 3), np.uint8), np.empty(count, np.int64)
    filled = 0
    for label, place, opened in items:
        try:
            pixels[filled] = resized(decode(opened(), place), size)
        except UnreadableImage as error:
            if not skip:
                raise
            warnings.warn(f"data.on_error=skip: left out: {error}", stacklevel=2)
            continue
        labels[filled] = label
        filled += 1
    if not filled:
        raise ValueError(f"data.root: none of the {count} images in {where} can be read")
    return Images(pixels[:filled], labels[:filled]), count - filled


def resized(image: "Image", size: int) -> np.ndarray:
    from PIL import Image

    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.frombuffer(image.tobytes(), np.uint8).reshape(size, size, 3)  # half the time of np.asarray(image)
