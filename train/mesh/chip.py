"""Performance model of one emulated chip: published ResNet-50 rates give seconds = fixed + images x per_image
(the affine model of small-batch efficiency: a chip reaches half its rate at a batch of fixed / per_image)."""

import re

import numpy as np

from train.mesh.origin import Origin, check_positive

LINE_NEEDS = 2.0
"""Batches less than this factor apart give no line: their difference is noise, not the fixed time of a step."""


ANCHOR_KEYS = set("precision batch images_per_s source chips hosts record software optimizer".split())


class Chip:
    """A chip and the software that ran on it.

    anchors: published training rates of ResNet-50 v1.5 at 224 px on one chip, each {precision, batch, images_per_s},
      and where it is known source, chips and hosts (1; of the run that gave the rate: their communication and the wait
      for the slowest of them are inside), record (id in conf/records), software ("mxnet 2021") and optimizer (sgd, lars
      or none: whose update is inside).
    software: the round (framework and year) to run in; null: the latest that the anchors name. Rounds are not mixed.
    jitter: standard deviation of a chip's step time as a fraction of its compute time; null: not known.
    bucket_ends: where gradients are cut into buckets, as counts of tensors in backward order.
    startup_s: what the first epoch takes longer than a later one; null: not known.
    hbm_gbytes is the memory's size, hbm_gbytes_per_s its rate. sources: key -> where its value comes from.
    """

    def __init__(
        self,
        name: str,
        tflops: dict[str, float],
        hbm_gbytes: float,
        anchors: list[dict],
        precision: str = "fp16",
        jitter: float | None = None,
        startup_s: float | None = None,
        bucket_ends: list[int] | None = None,
        sources: dict[str, str] | None = None,
        hbm_gbytes_per_s: float | None = None,
        software: str | None = None,
    ):
        figures = {"hbm_gbytes": hbm_gbytes, **{f"tflops.{dtype}": value for dtype, value in tflops.items()}}
        if hbm_gbytes_per_s is not None:
            figures["hbm_gbytes_per_s"] = hbm_gbytes_per_s
        check_positive(f"chip {name}", **figures)
        for key, value in {"jitter": jitter, "startup_s": startup_s}.items():
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"chip {name}: {key}={value!r} must not be negative")
        ends = list(bucket_ends or [])
        if ends != sorted(set(ends)) or any(end <= 0 for end in ends):
            raise ValueError(f"chip {name}: bucket_ends={ends} must be positive and rising")
        for anchor in anchors:
            _check_anchor(name, anchor)
        for dtype in {anchor["precision"] for anchor in anchors}:
            if len({"software" in a for a in anchors if a["precision"] == dtype}) > 1:
                raise ValueError(
                    f"chip {name}: some {dtype} anchors name their software, others don't; name all or none"
                )
        if software is not None:
            software_year(software)
        self.name = name
        self.precision = precision
        self.peak_flops = {dtype: value * 1e12 for dtype, value in tflops.items()}
        self.hbm_bytes = hbm_gbytes * 1e9
        self.hbm_bytes_per_s = None if hbm_gbytes_per_s is None else hbm_gbytes_per_s * 1e9
        self.anchors = anchors
        self.software = software
        self.jitter = jitter
        self.startup_s = startup_s
        self.bucket_ends = tuple(ends)
        self.sources = sources or {}
        self.affine(precision)

    def anchors_of(self, precision: str) -> list[dict]:
        """The anchors of one software round: `software`'s, or else the nearest; all where none names its software."""
        found = [anchor for anchor in self.anchors if anchor["precision"] == precision]
        if not found:
            known = ", ".join(sorted({a["precision"] for a in self.anchors})) or "none"
            raise ValueError(f"chip {self.name} has no published rate in {precision} (it has: {known}); set precision")
        if "software" not in found[0]:
            return found
        rounds = list(dict.fromkeys(anchor["software"] for anchor in found))
        if self.software is None:
            chosen = max(rounds, key=software_year)
        else:
            wanted, year = self.software, software_year(self.software)
            framework = wanted.rsplit(" ", 1)[0]
            chosen = min(
                rounds,
                key=lambda r: (r != wanted, r.rsplit(" ", 1)[0] != framework, abs(software_year(r) - year), r[-4:]),
            )
        return [anchor for anchor in found if anchor["software"] == chosen]

    def measured_in(self, precision: str) -> str | None:
        """The software of the anchors in use, where they name it."""
        return self.anchors_of(precision)[0].get("software")

    def measured_on(self, precision: str) -> int:
        """The fewest chips that the anchors in use were measured on."""
        return min(int(anchor.get("chips", 1)) for anchor in self.anchors_of(precision))

    def measured_hosts(self, precision: str) -> int:
        """The fewest hosts that the anchors in use were measured on."""
        return min(int(anchor.get("hosts", 1)) for anchor in self.anchors_of(precision))

    def has_line(self, precision: str) -> bool:
        """Whether the anchors in use are at batches far enough apart to give the fixed time of a step."""
        batches = [anchor["batch"] for anchor in self.anchors_of(precision)]
        return max(batches) >= LINE_NEEDS * min(batches)

    def affine(self, precision: str, half_batch: float = 0.0) -> tuple[float, float]:
        """(fixed seconds of a step, seconds per image) for ResNet-50 at 224 px: the line through the anchors.

        Anchors at one batch give no line: there the fixed time is that of `half_batch` images.
        """
        points = [(a["batch"], a["batch"] / a["images_per_s"]) for a in self.anchors_of(precision)]
        batches, seconds = (np.array(values, dtype=float) for values in zip(*points, strict=True))
        if not self.has_line(precision):
            per_image = float(np.mean(seconds / (batches + half_batch)))
            return half_batch * per_image, per_image
        per_image, fixed = np.polyfit(batches, seconds, 1)
        if fixed < 0 or per_image <= 0:
            raise ValueError(f"chip {self.name}: its {precision} anchors need less time an image at a larger batch")
        return float(fixed), float(per_image)

    def seconds(self, images: float, work: float = 1.0, precision: str | None = None, half_batch: float = 0.0) -> float:
        """One training step on `images` images; `work` is the FLOPs of an image over those of ResNet-50 at 224 px."""
        fixed, per_image = self.affine(precision or self.precision, half_batch)
        return fixed + images * per_image * work

    def sustained_flops(self, flops_per_image: float, precision: str | None = None, half_batch: float = 0.0) -> float:
        """FLOP/s while images stream, for the anchors' training FLOPs per image. ValueError if above the peak."""
        precision = precision or self.precision
        sustained = flops_per_image / self.affine(precision, half_batch)[1]
        if precision in self.peak_flops and sustained > self.peak_flops[precision]:
            raise ValueError(
                f"chip {self.name}: anchors mean {sustained / 1e12:.1f} TFLOP/s, above its {precision} peak of "
                f"{self.peak_flops[precision] / 1e12:g}; correct tflops or the anchors"
            )
        return sustained

    def origins(self, precision: str | None = None, half_batch: float = 0.0) -> list[Origin]:
        precision = precision or self.precision
        fixed, per_image = self.affine(precision, half_batch)
        anchors = self.anchors_of(precision)
        lines = [
            Origin(f"chip.anchor[{a['batch']}]", a["images_per_s"], "images/s", a.get("source", "")) for a in anchors
        ]
        derived = f"derived: line through the {len(anchors)} anchors"
        if not self.has_line(precision):
            derived = f"derived: anchors at one batch, half_batch = {half_batch:g} images"
        lines.append(Origin("chip.fixed", fixed * 1e3, "ms a step", derived))
        lines.append(Origin("chip.per_image", per_image * 1e3, "ms an image", derived))
        figures = {
            "tflops": (self.peak_flops.get(precision, float("nan")) / 1e12, f"TFLOP/s {precision} peak"),
            "hbm_gbytes": (self.hbm_bytes / 1e9, "GB"),
            "bucket_ends": (" ".join(map(str, self.bucket_ends)) or "one bucket", "tensors, backward order"),
        }
        if self.hbm_bytes_per_s is not None:
            figures["hbm_gbytes_per_s"] = self.hbm_bytes_per_s / 1e9, "GB/s"
        if self.jitter is not None:
            figures["jitter"] = self.jitter, "of compute"
        if self.startup_s is not None:
            figures["startup_s"] = self.startup_s, "s"
        for key, (value, unit) in figures.items():
            lines.append(Origin(f"chip.{key}", value, unit, self.sources.get(key, "assumed: no source given")))
        return lines


def software_year(software: str) -> int:
    """The year that ends a name such as "mxnet 2021". ValueError where there is none."""
    found = re.fullmatch(r"\S.* (\d{4})", software)
    if not found:
        raise ValueError(f'software={software!r} must be a framework and a year, such as "mxnet 2021"')
    return int(found[1])


def _check_anchor(chip: str, anchor: dict) -> None:
    missing = {"precision", "batch", "images_per_s"} - set(anchor)
    if missing:
        raise ValueError(f"chip {chip}: anchor {anchor} lacks {', '.join(sorted(missing))}")
    unknown = set(anchor) - ANCHOR_KEYS
    if unknown:
        raise ValueError(f"chip {chip}: anchor {anchor} has no such key: {', '.join(sorted(unknown))}")
    figures = {key: anchor.get(key, 1) for key in ("batch", "images_per_s", "chips", "hosts")}
    check_positive(f"chip {chip}, anchor", **figures)
    if "software" in anchor:
        software_year(anchor["software"])
    if anchor.get("optimizer", "none") not in ("sgd", "lars", "none"):
        raise ValueError(f"chip {chip}: anchor optimizer={anchor['optimizer']}: use sgd, lars or none")
