"""Makes shards (train.data.shards) of photos: each shard is one piece of work, done or not done, whoever is killed.

A shard is written aside, renamed, and only then its record; the index is made of all records at the end. The bytes
depend on the photos, the options and the decoder alone, not on the number of processes or on interruptions.
"""

import csv
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from train.data.archives import Photo, Photos
from train.data.folder import UnreadableImage, reason, unreadable
from train.data.photos import rescaled
from train.data.pixels import decode
from train.data.planes import Planes
from train.data.shards import ENTRY, FORMAT, INDEX, shard_name
from train.data.turbojpeg import SHRINKS, TurboJpeg

WORK = ".prepare"  # records of finished shards, until the index is there
METHOD = "planes"  # of shrinking; another one makes other bytes, and never goes on with these
PADDING = 2 * tarfile.BLOCKSIZE  # the end of a tar
AT_ONCE = 12 << 20  # bytes of decoded photos: some twenty of them


@dataclass(frozen=True)
class Options:
    """`shrink`: shorter side of larger photos, in pixels; None: files as they are. `check`: decode each of them."""

    shrink: int | None = None
    quality: int = 90
    check: bool = True
    photos_per_shard: int = 2048


@dataclass(frozen=True)
class Job:
    part: str
    number: int
    first: int
    photos: list[Photo]

    @property
    def name(self) -> str:
        return shard_name(self.part, self.number)


@dataclass(frozen=True)
class Large:
    """A decoded photo, planes or uint8 [h, w, 3], that is to become height x width."""

    image: Planes | np.ndarray
    height: int
    width: int

    def scaled(self) -> Planes | np.ndarray:
        if isinstance(self.image, Planes):
            return self.image.scaled(self.height, self.width)
        return np.ascontiguousarray(rescaled(self.image, self.height, self.width).permute(1, 2, 0).numpy())


@dataclass(frozen=True)
class Maker:
    """Makes one shard at a time, in any process."""

    folder: Path
    options: Options
    library: str | None

    @cached_property
    def turbo(self) -> TurboJpeg | None:
        return TurboJpeg(self.library) if self.library else None

    def make(self, job: Job) -> int:
        """Write the shard and its record; returns the number of its photos, skipped ones included."""
        aside = self.folder / f"{job.name}.{os.getpid()}.part"
        entries, skipped, digest = [], [], hashlib.sha256()
        with open(aside, "wb") as file:

            def write(data: bytes) -> None:
                digest.update(data)
                file.write(data)

            for photo, data in zip(job.photos, self.contents(job.photos), strict=True):
                if isinstance(data, UnreadableImage):
                    skipped.append([job.part, photo.place, reason(data.__cause__)])
                    continue
                write(header(photo.name, len(data)))
                entries.append((file.tell(), len(data), job.number, photo.label))
                write(data + bytes(-len(data) % tarfile.BLOCKSIZE))
            write(bytes(PADDING))
            nbytes = file.tell()
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, self.folder / job.name)
        record = {"name": job.name, "bytes": nbytes, "sha256": digest.hexdigest()}
        record |= {"entries": entries, "skipped": skipped}
        write_aside(self.folder / WORK / f"{job.name}.json", json.dumps(record).encode())
        return len(job.photos)

    def contents(self, photos: list[Photo]) -> Iterator[bytes | UnreadableImage]:
        """What becomes of each photo, in their order.

        Some twenty are decoded, then scaled, then encoded: a core's caches hold the code of one of these at a time.
        """
        waiting, held = [], 0
        for photo in photos:
            opened = self.opened(photo)
            waiting.append(opened)
            held += in_memory(opened)
            if held >= AT_ONCE:
                yield from self.finished(waiting)
                waiting, held = [], 0
        yield from self.finished(waiting)

    def finished(self, waiting: list[bytes | Large | UnreadableImage]) -> list[bytes | UnreadableImage]:
        small = [each.scaled() if isinstance(each, Large) else each for each in waiting]
        return [self.encoded(each) if isinstance(each, Planes | np.ndarray) else each for each in small]

    def encoded(self, image: Planes | np.ndarray) -> bytes:
        quality = self.options.quality
        return self.turbo.encoded(image, quality) if isinstance(image, Planes) else encoded(image, quality)

    def opened(self, photo: Photo) -> bytes | Large | UnreadableImage:
        try:
            return self.decoded(read(photo), photo.place)
        except UnreadableImage as error:
            return error

    def decoded(self, data: bytes, place: str) -> bytes | Large:
        """The file's bytes where they stay as they are; UnreadableImage where no decoder makes sense of them.

        Pixels where libjpeg-turbo can't read the photo, or its planes are others.
        """
        shrink, turbo = self.options.shrink, self.turbo
        if shrink is None and not self.options.check:
            return data
        whole = turbo.size(data) if turbo else None
        if shrink is None or (whole and min(whole) <= shrink):
            if not whole or turbo.crop(data, (0, 0, *whole)) is None:
                decode(data, place)
            return data
        factor = next((factor for factor in SHRINKS if whole and min(whole) >= factor * shrink), 1)
        image = turbo.planes(data, factor) if whole else None
        if image is None:
            image = np.array(decode(data, place))
            whole = image.shape[1::-1]
        ratio = min(1.0, shrink / min(whole))
        width, height = (max(1, round(side * ratio)) for side in whole)
        return Large(image, height, width)


def in_memory(opened: bytes | Large | UnreadableImage) -> int:
    """Bytes."""
    if isinstance(opened, Large):
        return opened.image.nbytes
    return len(opened) if isinstance(opened, bytes) else 0


def read(photo: Photo) -> bytes:
    """Not empty."""
    try:
        data = photo.read()
        if not data:
            raise EOFError("no bytes")
        return data
    except (OSError, EOFError) as error:
        raise unreadable(photo.place, error) from error


def header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = size
    try:
        return member.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")
    except ValueError:  # a long name, or one beyond ASCII (UnicodeError is a ValueError)
        return member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def encoded(pixels: np.ndarray, quality: int) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return file.getvalue()


def write_aside(path: Path, data: bytes) -> None:
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    with open(aside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def plan(photos: Photos, options: Options) -> list[Job]:
    jobs = []
    for part, listed in photos.parts.items():
        size = options.photos_per_shard
        starts = range(0, len(listed), size)
        jobs += [Job(part, number, first, listed[first : first + size]) for number, first in enumerate(starts)]
    return jobs


def begin(folder: Path, photos: Photos, options: Options, jobs: list[Job]) -> list[Job]:
    """The jobs that are still to be done; what an interrupted writer left aside is removed.

    ValueError where the folder holds shards of other photos or of other options.
    """
    (folder / WORK).mkdir(parents=True, exist_ok=True)
    for path in [*folder.glob("*.part"), *(folder / WORK).glob("*.part")]:
        path.unlink(missing_ok=True)
    digest = hashlib.sha256(json.dumps([METHOD, photos.classes, asdict(options)]).encode())
    for job in jobs:
        digest.update(json.dumps([(photo.name, photo.label, photo.size) for photo in job.photos]).encode())
    identity = folder / WORK / "plan"
    if identity.is_file() and identity.read_text() != digest.hexdigest():
        raise ValueError(f"DST={folder} holds shards of other photos, options or another version: use an empty folder")
    if not identity.is_file() and any(folder.glob("*.tar")):
        raise ValueError(f"DST={folder} holds tars that are not from here: take an empty folder")
    write_aside(identity, digest.hexdigest().encode())
    return [job for job in jobs if not is_done(folder, job)]


def is_done(folder: Path, job: Job) -> bool:
    """A record is written after its shard; a shard that has shrunk since is made again."""
    try:
        record = json.loads((folder / WORK / f"{job.name}.json").read_text())
        return os.stat(folder / job.name).st_size == record["bytes"]
    except (OSError, ValueError):
        return False


def finish(folder: Path, photos: Photos, options: Options, jobs: list[Job]) -> dict:
    """Write the indices and skipped.csv; returns index.json's content."""
    index = {"format": FORMAT, "classes": list(photos.classes), "made": asdict(options), "parts": {}}
    skipped = []
    for part in photos.parts:
        records = [json.loads((folder / WORK / f"{job.name}.json").read_text()) for job in jobs if job.part == part]
        entries = np.array([tuple(entry) for record in records for entry in record["entries"]], ENTRY)
        if not len(entries):
            raise ValueError(f"SRC: none of the {part} photos can be read, {records[0]['skipped'][0][1]} and others")
        write_aside(folder / f"{part}.index", entries.tobytes())
        skipped += [row for record in records for row in record["skipped"]]
        index["parts"][part] = {
            "photos": len(entries),
            "index_sha256": hashlib.sha256(entries.tobytes()).hexdigest(),
            "shards": [{key: record[key] for key in ("name", "bytes", "sha256")} for record in records],
        }
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([["part", "photo", "reason"], *skipped])
    write_aside(folder / "skipped.csv", table.getvalue().encode("utf-8", "surrogateescape"))
    index["skipped"] = len(skipped)
    write_aside(folder / INDEX, (json.dumps(index, indent=1) + "\n").encode())
    return index


def verify(folder: Path, index: dict, say: Callable[[str], None] = lambda line: None) -> list[str]:
    """What differs from the checksums: lines that name the file."""
    wrong = []
    for part, content in index["parts"].items():
        files = [(shard["name"], shard["sha256"]) for shard in content["shards"]]
        for name, expected in [(f"{part}.index", content["index_sha256"]), *files]:
            say(name)
            try:
                with open(folder / name, "rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                found = str(error)
            if found != expected:
                wrong.append(f"{folder / name}: SHA-256 {found}, not {expected}")
    return wrong
