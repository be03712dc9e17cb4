"""Performance model of one emulated chip: published ResNet-50 rates at two batch sizes give
seconds = fixed + images x per_image (the affine model of small-batch efficiency)."""

import numpy as np

from train.mesh.origin import Origin, check_positive


class Chip:
    """A chip and the software that ran on it.

    anchors: published training rates of ResNet-50 v1.5 at 224 px on one chip, each
      {precision, batch, images_per_s, source}.
    jitter: standard deviation of a chip's step time as a fraction of its compute time.
    bucket_ends: where gradients are cut into buckets, as counts of tensors in backward order.
    startup_s: what the first epoch takes longer than a later one. sources: key -> where its value comes from.
    """

    def __init__(
        self,
        name: str,
        tflops: dict[str, float],
        hbm_gbytes: float,
        anchors: list[dict],
        precision: str = "fp16",
        jitter: float = 0.0,
        startup_s: float = 0.0,
        bucket_ends: list[int] | None = None,
        sources: dict[str, str] | None = None,
    ):
        check_positive(f"chip {name}", hbm_gbytes=hbm_gbytes, **{f"tflops.{k}": v for k, v in tflops.items()})
        for key, value in {"jitter": jitter, "startup_s": startup_s}.items():
            if not 0 <= value < float("inf"):
                raise ValueError(f"chip {name}: {key}={value!r} must not be negative")
        ends = list(bucket_ends or [])
        if ends != sorted(set(ends)) or any(end <= 0 for end in ends):
            raise ValueError(f"chip {name}: bucket_ends={ends} must be positive and rising")
        for anchor in anchors:
            missing = {"precision", "batch", "images_per_s"} - set(anchor)
            if missing:
                raise ValueError(f"chip {name}: anchor {anchor} lacks {', '.join(sorted(missing))}")
            check_positive(f"chip {name}, anchor", batch=anchor["batch"], images_per_s=anchor["images_per_s"])
        self.name = name
        self.precision = precision
        self.peak_flops = {dtype: value * 1e12 for dtype, value in tflops.items()}
        self.hbm_bytes = hbm_gbytes * 1e9
        self.anchors = anchors
        self.jitter = jitter
        self.startup_s = startup_s
        self.bucket_ends = tuple(ends)
        self.sources = sources or {}
        self.affine(precision)

    def affine(self, precision: str) -> tuple[float, float]:
        """(fixed seconds of a step, seconds per image) for ResNet-50 at 224 px: the line through the anchors."""
        points = [(a["batch"], a["batch"] / a["images_per_s"]) for a in self.anchors if a["precision"] == precision]
        if not points:
            known = ", ".join(sorted({a["precision"] for a in self.anchors})) or "none"
            raise ValueError(f"chip {self.name} has no published rate in {precision} (it has: {known}); set precision")
        batches, seconds = zip(*points, strict=True)
        if len(set(batches)) == 1:
            return 0.0, float(np.mean(seconds)) / batches[0]
        per_image, fixed = np.polyfit(batches, seconds, 1)
        if fixed < 0 or per_image <= 0:
            raise ValueError(f"chip {self.name}: its {precision} anchors need less time an image at a larger batch")
        return float(fixed), float(per_image)

    def seconds(self, images: float, work: float = 1.0, precision: str | None = None) -> float:
        """One training step on `images` images; `work` is the FLOPs of an image over those of ResNet-50 at 224 px."""
        fixed, per_image = self.affine(precision or self.precision)
        return fixed + images * per_image * work

    def sustained_flops(self, flops_per_image: float, precision: str | None = None) -> float:
        """FLOP/s while images stream, for the anchors' training FLOPs per image. ValueError if above the peak."""
        precision = precision or self.precision
        sustained = flops_per_image / self.affine(precision)[1]
        if precision in self.peak_flops and sustained > self.peak_flops[precision]:
            raise ValueError(
                f"chip {self.name}: anchors mean {sustained / 1e12:.1f} TFLOP/s, above its {precision} peak of "
                f"{self.peak_flops[precision] / 1e12:g}; correct tflops or the anchors"
            )
        return sustained

    def origins(self, precision: str | None = None) -> list[Origin]:
        precision = precision or self.precision
        fixed, per_image = self.affine(precision)
        anchors = [a for a in self.anchors if a["precision"] == precision]
        lines = [
            Origin(f"chip.anchor[{a['batch']}]", a["images_per_s"], "images/s", a.get("source", "")) for a in anchors
        ]
        derived = f"derived: line through the {len(anchors)} anchors"
        lines.append(Origin("chip.fixed", fixed * 1e3, "ms a step", derived))
        lines.append(Origin("chip.per_image", per_image * 1e3, "ms an image", derived))
        figures = {
            "tflops": (self.peak_flops.get(precision, float("nan")) / 1e12, f"TFLOP/s {precision} peak"),
            "hbm_gbytes": (self.hbm_bytes / 1e9, "GB"),
            "jitter": (self.jitter, "of compute"),
            "startup_s": (self.startup_s, "s"),
            "bucket_ends": (" ".join(map(str, self.bucket_ends)) or "one bucket", "tensors, backward order"),
        }
        for key, (value, unit) in figures.items():
            lines.append(Origin(f"chip.{key}", value, unit, self.sources.get(key, "assumed: no source given")))
        return lines
