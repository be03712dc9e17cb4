"""ImageNet, or any photos in its layout: a folder tree, or the shards that scripts/prepare_imagenet.py makes of it."""

from functools import cached_property
from typing import Literal

import torch

from train.data.cache import PhotoCache, check_room
from train.data.folder import SAME_PHOTOS, data_root, fingerprint, list_parts
from train.data.photos import Cutter, Photos, Store
from train.data.pool import MOST, Processes, Threads
from train.data.source import Source, at_least
from train.data.turbojpeg import find_library
from train.sim.course import checked_sizes

FEW_CORES = 4  # with fewer for a worker, `auto` starts no loader processes


class PhotoSource(Source):
    """What folder and shards have in common: photos decoded anew for every batch.

    Training is a random resized crop and flip, evaluation the centre `crop_ratio` of the shorter side. `train_sizes`
    are [[first epoch, pixels], ...]; null: image_size throughout. `repeat` makes the training set so many times as
    long; each repetition is augmented on its own. `workers` are loader processes of each worker; 0: as many threads of
    the worker itself as it has cores; auto: as many processes as the worker has cores (at most 16), with few cores 0.
    `eval_size`: pixels of evaluation; null: image_size. `cache_gbytes`: memory of each node for decoded photos,
    which all its workers share; photos beyond it are decoded every time.
    `decode`: turbo decodes the crop alone by libjpeg-turbo (TurboJPEG 3) and Pillow only what that can't read; pillow
    decodes and scales everything, as the reference does; auto: turbo where the library is installed.
    An unreadable image raises ValueError with its path; with on_error="skip" the next readable image takes its place
    (keeping the random draws of the sample), a warning names it, and `num_skipped` counts it once.
    """

    def __init__(
        self,
        train: Store,
        evaluation: Store,
        *,
        image_size: int,
        eval_size: int | None,
        augment: bool,
        crop_ratio: float,
        train_sizes: list[list[int]] | None,
        repeat: int,
        workers: int | Literal["auto"],
        decode: Literal["auto", "turbo", "pillow"],
        on_error: Literal["stop", "skip"],
        cache_gbytes: float,
    ) -> None:
        eval_size = eval_size or image_size
        at_least(1, image_size=image_size, eval_size=eval_size, repeat=repeat)
        if not 0 < crop_ratio <= 1:
            raise ValueError(f"data.crop_ratio={crop_ratio}: must be above 0 and at most 1")
        sizes = checked_sizes(train_sizes) if train_sizes else ((0, image_size),)
        library = None if decode == "pillow" else find_library()
        if decode == "turbo" and library is None:
            raise ValueError(
                "data.decode=turbo: no TurboJPEG library of version 3 here: pip install turbojpeg (x86-64), "
                "install the system's libturbojpeg 3, or set data.decode=pillow"
            )
        if workers == "auto":
            cores = min(torch.get_num_threads(), MOST)
            workers = cores if cores >= FEW_CORES else 0
        at_least(0, workers=workers)
        self.image_size = image_size
        skip, resize = on_error == "skip", round(eval_size / crop_ratio)
        cutters = (
            Cutter(train, sizes, resize, augment, skip, library),
            Cutter(evaluation, ((0, eval_size),), resize, False, skip, library),
        )
        if cache_gbytes:
            self._add_caches(cutters, cache_gbytes)
        if evaluation is train:
            self.notes += (SAME_PHOTOS,)
        if train_sizes:
            shown = ", ".join(f"{size} px from epoch {first}" for first, size in sizes)
            self.notes += (f"training images of {shown}",)
        self.decoder = "libjpeg-turbo, the crop alone" if library else "Pillow"
        pool = Processes(workers, cutters) if workers else Threads(min(torch.get_num_threads(), MOST))
        self.train, self.eval = Photos(cutters[0], repeat, pool), Photos(cutters[1], 1, pool)

    def _add_caches(self, cutters: tuple[Cutter, Cutter], gbytes: float) -> None:
        """Shared by training and evaluation in proportion to their photos; by both together where they are the same."""
        check_room(gbytes)
        counts = [len(cutter.store.labels) for cutter in cutters]
        if cutters[0].store is cutters[1].store:
            cutters[0].cache = cutters[1].cache = PhotoCache.of_node(self.fingerprint, counts[0], int(gbytes * 1e9))
        else:
            for cutter, count, part in zip(cutters, counts, ("train", "val"), strict=True):
                nbytes = int(gbytes * 1e9 * count / sum(counts))
                cutter.cache = PhotoCache.of_node(f"{self.fingerprint} {part}", count, nbytes)
        self.notes += (f"decoded photos are kept in memory, up to {gbytes:g} GB for all workers of a node",)

    def describe(self) -> dict:
        return super().describe() | {"decoder": self.decoder}

    @property
    def num_skipped(self) -> int:
        """Unreadable images met so far by this process."""
        found = {d.cutter.store.place(i) for d in (self.train, self.eval) for i in d.unreadable}
        return len(found)


class ImageNetFolder(PhotoSource):
    """root/train/<class>/*.JPEG and root/val/<class>/*.JPEG.

    Class folders directly in root: the same photos train and evaluate, and `notes` says so.
    """

    name = "imagenet"

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
        self._root = data_root(root)
        self._parts = list_parts(self._root)
        self.num_classes = len(self._parts[0].classes)
        super().__init__(
            *self._parts,
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
        """Over relative paths and sizes: asks the size of every file, a few seconds for all of ImageNet."""
        train, evaluation = self._parts
        return fingerprint(self._root, (train,) if train is evaluation else (train, evaluation))
