"""Small generated data for tests: photos in ImageNet's layout, and CIFAR-10 in each of its versions."""

import io
import struct
import tarfile
from pathlib import Path

import numpy as np


def make_image_tree(
    root: Path,
    classes: int,
    per_class: int,
    size: int,
    parts: tuple[str, ...] = ("train", "val"),
    suffix: str = ".JPEG",
) -> Path:
    """root/<part>/n0000000<c>/<c>_<i>.JPEG of about `size` pixels (sides differ); the part "." is root itself."""
    from PIL import Image

    random = np.random.default_rng(0)
    for part in parts:
        for label in range(classes):
            folder = root / part / f"n{label:08d}"
            folder.mkdir(parents=True)
            for number in range(per_class):
                height, width = size + int(random.integers(0, 9)), size + int(random.integers(0, 9))
                coarse = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
                coarse[..., label % 3] = 255 * label // max(1, classes - 1)
                image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
                image.save(folder / f"{label}_{number}{suffix}")
    return root


def make_cifar10_arrays(per_batch: int = 4) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Batch name -> (planes uint8 [n, 3072], labels uint8 [n])."""
    random = np.random.default_rng(1)
    names = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    pixels = random.integers(0, 256, (6, per_batch, 3072), np.uint8)
    labels = random.integers(0, 10, (6, per_batch), np.uint8)
    return {name: (pixels[batch], labels[batch]) for batch, name in enumerate(names)}


def write_binary_version(folder: Path, batches: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    folder.mkdir(parents=True)
    for name, (pixels, labels) in batches.items():
        np.concatenate([labels[:, None], pixels], axis=1).tofile(folder / f"{name}.bin")


def write_python_version(folder: Path, batches: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """The opcodes that Python 2 wrote into CIFAR-10's batches (protocol 2, byte strings)."""

    def string(content: bytes) -> bytes:
        if len(content) < 256:
            return b"U" + bytes([len(content)]) + content
        return b"T" + struct.pack("<i", len(content)) + content

    folder.mkdir(parents=True)
    for name, (pixels, labels) in batches.items():
        array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + string(b"b") + b"\x87R(K\x01"
        array += b"K" + bytes([len(labels)]) + b"M\x00\x0c\x86cnumpy\ndtype\n" + string(b"u1") + b"K\x00K\x01\x87R"
        array += b"(K\x03" + string(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        array += string(pixels.tobytes()) + b"tb"
        listed = b"](" + b"".join(b"K" + bytes([label]) for label in labels.tolist()) + b"e"
        names = b"](" + b"".join(string(b"data_%d.png" % number) for number in range(len(labels))) + b"e"
        content = b"\x80\x02}(" + string(b"data") + array + string(b"labels") + listed
        content += string(b"batch_label") + string(b"training batch") + string(b"filenames") + names + b"u."
        (folder / name).write_bytes(content)


def write_tars(tree: Path, folder: Path) -> None:
    """folder/<part>.tar of each part of an image tree, the files in no particular order."""
    folder.mkdir(parents=True)
    for part in sorted(path for path in tree.iterdir() if path.is_dir()):
        with tarfile.open(folder / f"{part.name}.tar", "w") as archive:
            for file in sorted(part.rglob("*.*"), reverse=True):
                content = file.read_bytes()
                member = tarfile.TarInfo(f"{part.name}/{file.parent.name}/{file.name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
