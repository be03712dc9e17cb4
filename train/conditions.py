"""The circumstances in which a run and a published record differ, computed from configuration, result and record.

Also how numbers are written in reports: seconds, percent, rates, counts.
"""

from dataclasses import dataclass

from train.records import Record

# What every record of the benchmark shares (MLPerf training rules for resnet; the 2019 press text names ResNet-50 v1.5,
# ImageNet-1k and 75.9 %). Parameters: 23,454,912 in convolutions, 53,120 in batch norms, 2,049,000 in the classifier.
BENCHMARK = {"name": "ImageNet-1k", "num_train": 1_281_167, "num_eval": 50_000, "image_size": 224, "num_classes": 1000}
BENCHMARK_MODEL = {"depth": 50, "stem": "imagenet", "parameters": 25_557_032}
BENCHMARK_TOP1 = 0.759


@dataclass(frozen=True)
class Condition:
    """One circumstance of claim and run; `differs` is None where the claim's side was not published."""

    name: str
    claim: str
    run: str
    differs: bool | None


def conditions(config: dict, result: dict, claim: Record) -> list[Condition]:
    """Every circumstance in which a time of this run and the claim's could differ, from configuration, result and
    record.
    """
    data, model = result.get("data") or {}, result.get("model") or {}
    chips, batch, top1 = result.get("chips"), result.get("global_batch_size"), result.get("top1")
    chip, mesh = (config.get("chip") or {}).get("name"), config.get("mesh") or {}
    same_data = all(data.get(key) == BENCHMARK[key] for key in ("num_train", "num_eval", "num_classes"))
    axes = ", ".join(f"{axis} {size}" for axis, size in (mesh.get("axes") or {}).items())
    optimizer = _class(config.get("optim"))
    precision = result.get("precision") or "?"
    precisions = f"{precision} computed here; {config.get('wire_dtype')} on the emulated wire"
    target = to_fraction(claim.target_top1)

    def published(value, text: str, run: str, same: bool | None) -> tuple[str, str, bool | None]:
        return (text, run, not same) if value not in (None, "") else ("not published", run, None)

    rows = {
        "data set": (_data_set(BENCHMARK), _data_set(data), not same_data),
        "image size": (_px(BENCHMARK), _px(data), data.get("image_size") != BENCHMARK["image_size"]),
        "classes": (
            as_count(BENCHMARK["num_classes"]),
            as_count(data.get("num_classes")),
            data.get("num_classes") != 1000,
        ),
        "model": (
            f"ResNet-50 v1.5, {_model(BENCHMARK_MODEL)}",
            f"ResNet-{model.get('depth', '?')}, {_model(model)}",
            any(model.get(key) != value for key, value in BENCHMARK_MODEL.items()),
        ),
        "chips": (
            f"{claim.chips:,} x {claim.chip}" + (f" ({claim.interconnect})" if claim.interconnect else ""),
            f"{as_count(chips)} x {chip} emulated ({mesh.get('name')}; {axes})",
            (chips, chip) != (claim.chips, claim.chip),
        ),
        "computed by": (
            f"{claim.chips:,} x {claim.chip}",
            f"{as_count(result.get('workers'))} workers on {result.get('device')}; the chips are emulated",
            True,
        ),
        "global batch": published(
            claim.global_batch, as_count(claim.global_batch), as_count(batch), claim.global_batch == batch
        ),
        "epochs": published(
            claim.epochs, as_number(claim.epochs), as_number(result.get("epochs")), claim.epochs == result.get("epochs")
        ),
        "optimizer": published(
            claim.optimizer, claim.optimizer, optimizer, optimizer.lower() in claim.optimizer.lower()
        ),
        "precision": published(claim.precision, claim.precision, precisions, precision in claim.precision.lower()),
        "target": published(
            target, as_percent(target), as_percent(result.get("target_top1")), target == result.get("target_top1")
        ),
        "accuracy": (
            f"{as_percent(to_fraction(claim.reached_top1))} reached"
            if claim.reached_top1
            else f"{as_percent(target)} stated as reached, no value published"
            if target
            else "not published",
            f"{as_percent(top1)} on {data.get('name')}, against {as_percent(BENCHMARK_TOP1)} on ImageNet-1k",
            not (same_data and top1 is not None and top1 >= (target or BENCHMARK_TOP1)),
        ),
        "clock": (
            f"of a real machine; what it includes: {claim.clock_includes or 'not stated'}",
            "of the emulated machine: modelled start-up, steps and evaluations",
            True,
        ),
    }
    return [Condition(name, *row) for name, row in rows.items()]


def _data_set(data: dict) -> str:
    sizes = f"{as_count(data.get('num_train'))} training and {as_count(data.get('num_eval'))} held-out images"
    return f"{data.get('name', 'unknown')}, {sizes}"


def _px(data: dict) -> str:
    return f"{data.get('image_size', '?')} px"


def _model(model: dict) -> str:
    return f"{as_count(model.get('parameters'))} parameters, stem {model.get('stem', '?')}"


def to_fraction(percent: float | None) -> float | None:
    return None if percent is None else round(percent / 100, 6)


def as_percent(fraction: float | None) -> str:
    """Rounded down, so that no accuracy is shown that was not reached."""
    return "-" if fraction is None else f"{int(fraction * 10_000 + 1e-9) / 100:.2f} %"


def as_seconds(value: float | None, missing: str | None = None) -> str:
    return missing or "-" if value is None else f"{value:z,.2f} s"  # z: no minus sign before 0.00


def as_interval(seconds: list[float]) -> str:
    return " to ".join(f"{value:,.2f}" for value in seconds) + " s"


def as_rate(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def as_number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def as_count(value: int | str | None) -> str:
    return "-" if value is None else value if isinstance(value, str) else f"{value:,}"


def _class(node: dict | None) -> str:
    return (node or {}).get("_target_", "").rpartition(".")[2]
