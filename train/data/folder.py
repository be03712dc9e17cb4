"""Image folders: one folder for each class, in train/ and val/ (or test/), as torchvision's ImageFolder reads them."""

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".tif", ".tiff", ".webp")
EVAL_NAMES = ("val", "test")
LAYOUT = "expected train/<class>/*.jpg and val/<class>/*.jpg"
SAME_PHOTOS = "data.root has no train/ and val/: the same photos train and evaluate; accuracy says nothing of new ones"


@dataclass(frozen=True)
class ImageFolder:
    """Images of one part, sorted by class and name. `files` are relative to `root` ("class/name"); labels int64 [n]."""

    root: Path
    classes: tuple[str, ...]
    files: tuple[str, ...]
    labels: np.ndarray

    def path(self, index: int) -> str:
        return os.path.join(self.root, self.files[index])

    place = path

    def read(self, index: int) -> bytes:
        path = self.path(index)
        try:
            with open(path, "rb") as file:
                return file.read()
        except OSError as error:
            raise unreadable(path, error) from error


class UnreadableImage(ValueError):
    """A file that no decoder makes sense of."""


def unreadable(where: str, error: Exception) -> UnreadableImage:
    return UnreadableImage(
        f"unreadable image {where} ({reason(error)}): repair or remove it, or set data.on_error=skip"
    )


def reason(error: BaseException) -> str:
    """In one line. Pillow names the object that it read by its address, which is another in every run."""
    return f"{type(error).__name__}: {' '.join(re.sub('<[^<>]* object at 0x[^<>]*>', '', str(error)).split())}"


def data_root(root: str | None) -> Path:
    """The data's folder as a path."""
    if root is None:
        raise ValueError("data.root=null: name the folder of the images, data.root=<folder>")
    path = Path(root).expanduser()
    if not path.is_dir():
        problem = "is a file, not a folder" if path.exists() else "does not exist"
        raise ValueError(f"data.root={root}: {problem}: set data.root to the folder of the images")
    return path


def is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def list_images(root: Path) -> ImageFolder:
    """The images below root/<class>/."""
    with os.scandir(root) as entries:
        classes = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise ValueError(f"data.root: {root} is not an image folder, it has no class folders: {LAYOUT}")
    files: list[str] = []
    counts: list[int] = []
    for name in classes:
        with os.scandir(root / name) as entries:
            images = sorted(f"{name}/{entry.name}" for entry in entries if is_image(entry.name))
        files += images
        counts.append(len(images))
    if not files:
        raise ValueError(f"data.root: {root} is not an image folder, no images in its {len(classes)} folders: {LAYOUT}")
    if 0 in counts:
        empty = root / classes[counts.index(0)]
        raise ValueError(f"data.root: class folder {empty} has no images ({', '.join(SUFFIXES)}): fill or remove it")
    return ImageFolder(root, tuple(classes), tuple(files), np.repeat(np.arange(len(classes)), counts))


def list_parts(root: Path) -> tuple[ImageFolder, ImageFolder]:
    """Training and evaluation images; one and the same object where the class folders lie directly in root."""
    evals = [root / name for name in EVAL_NAMES if (root / name).is_dir()]
    if not (root / "train").is_dir() and not evals:
        images = list_images(root)
        return images, images
    if not (root / "train").is_dir() or not evals:
        missing = "val/" if (root / "train").is_dir() else "train/"
        raise ValueError(f"data.root={root}: {missing} is missing: {LAYOUT}")
    train, evaluation = list_images(root / "train"), list_images(evals[0])
    same_classes(train.classes, evaluation.classes, root)
    return train, evaluation


def same_classes(train: tuple[str, ...], evaluation: tuple[str, ...], root: Path) -> None:
    """Refuse parts whose classes differ: their labels would not mean the same."""
    odd = sorted(set(train) ^ set(evaluation))
    if odd:
        raise ValueError(
            f"data.root={root}: train has {len(train)} classes and the evaluation part {len(evaluation)}; "
            f"only one of them has {odd[0]!r}: give both the same class folders"
        )


def fingerprint(root: Path, parts: tuple[ImageFolder, ...]) -> str:
    """SHA-256 over the sorted relative paths and the sizes in bytes (one stat a file, no content)."""
    digest = hashlib.sha256()
    for part in parts:
        below = part.root.relative_to(root).as_posix()
        for index, file in enumerate(part.files):
            digest.update(f"{below}/{file} {os.stat(part.path(index)).st_size}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
