"""Configuration -> what the emulator reads of a recipe: global batch, optimizer, image sizes, epochs of the references.

And what training refuses of it.
"""

import math

from train.sim import convergence
from train.sim import workload as workloads
from train.sim.convergence import Epochs
from train.sim.course import checked_sizes
from train.sim.step import WIRE_BYTES
from train.sim.workload import Workload


def optimizer(config: dict) -> str:
    """lars, or else sgd: which of the two updates of train/sim/step is priced."""
    return "lars" if "lars" in str(config["optim"].get("_target_", "")).lower() else "sgd"


def reference_epochs(config: dict, workload: Workload, batch: int, notes: list[str]) -> Epochs:
    """What the reference convergence points say; ValueError for anything but ResNet-50 on ImageNet."""
    data = str(config["data"].get("_target_", "")).split(".")[-2:-1]
    if data != ["imagenet"] or not workload.name.startswith("ResNet-50 (imagenet stem)"):
        raise ValueError(
            f"epochs=auto: the reference points are of ResNet-50 on ImageNet, not of {workload.name} on "
            f"{' '.join(data) or 'this data'}; give epochs"
        )
    found = convergence.epochs_at(batch)
    if found.note:
        notes.append(found.note)
    if config["target_top1"] != convergence.TARGET_TOP1:
        notes.append(
            f"epochs=auto: the reference points are for {100 * convergence.TARGET_TOP1:g} % top-1, the target is "
            f"{100 * config['target_top1']:g} %"
        )
    if optimizer(config) != "lars":
        notes.append("epochs=auto: the reference points were reached with LARS, the recipe's optimizer is another one")
    return found


def sized(config: dict, classes: int, notes: list[str]) -> tuple[list[tuple[int, Workload]], Workload | None]:
    """(The model's table from each epoch on at which the training images change their size, that of evaluation).

    Empty and None where data.image_size holds throughout. `classes`: of the data.
    """
    data, model = config["data"], config["model"]
    sizes = checked_sizes(data["train_sizes"]) if data.get("train_sizes") else ()
    eval_size = data.get("eval_size") or data["image_size"]
    if sizes or eval_size != data["image_size"]:
        steps = ", ".join(f"at {size} px from epoch {first}" for first, size in sizes) or f"at {data['image_size']} px"
        notes.append(f"steps are priced {steps}; evaluations at {eval_size} px")

    def table(pixels: int) -> Workload:
        return workloads.of_model(model, pixels, model.get("num_classes") or classes)

    return [(first, table(size)) for first, size in sizes], table(eval_size) if data.get("eval_size") else None


def check_training(config: dict) -> None:
    """ValueError for keys that training can't have (together), though a run of them can be priced."""
    if config["epochs"] == "auto":
        batch = config["global_batch_size"] or config["chip_batch_size"] * math.prod(config["mesh"]["axes"].values())
        mean = convergence.epochs_at(batch).mean
        raise ValueError(
            f"epochs=auto only prices a run; to train, give a number (ResNet-50 on ImageNet needs about {mean:.1f} at "
            f"a global batch of {batch:,}: epochs={math.ceil(mean)})"
        )
    rounded = config["gradient_sum"]
    if rounded == "fp32":
        return
    if config["numerics"] == "exact":
        raise ValueError(
            f"gradient_sum={rounded}: numerics=exact sums in full precision and refuses compression; use "
            "numerics=fast, or gradient_sum=fp32"
        )
    if config["wire_dtype"] not in WIRE_BYTES:
        raise ValueError(f"wire_dtype={config['wire_dtype']}: use one of {', '.join(WIRE_BYTES)}")
    if rounded == "wire":
        return
    needed = {
        "workers": ((1,), "one worker adds up all chips"),
        "bn_span": ((1,), "every chip is computed by itself"),
        "chips_per_pass": (("auto", 1), "every chip is computed by itself"),
    }
    for key, (possible, why) in needed.items():
        if config[key] not in possible:
            raise ValueError(f"{key}={config[key]}: with gradient_sum=plan {why}; set {key}={possible[0]}")


def global_batch_size(config: dict, num_chips: int, notes: list[str]) -> int:
    """Images a step; up to the largest reference point unless scaling=weak. ValueError where the two sizes disagree."""
    chip, total = config.get("chip_batch_size"), config.get("global_batch_size")
    for key, value in {"chip_batch_size": chip, "global_batch_size": total}.items():
        if value is not None and value < 1:
            raise ValueError(f"{key}={value} must be at least 1")
    if config.get("scaling") == "weak":
        if chip is None:
            raise ValueError("scaling=weak keeps the chip batch: give chip_batch_size")
        notes.append(f"scaling=weak: {chip} images a chip, whatever the convergence table says of the global batch")
        return chip * num_chips
    if chip is None and total is None:
        raise ValueError("chip_batch_size and global_batch_size are both null: give one of the two")
    if chip is not None and total is not None and chip * num_chips != total:
        raise ValueError(
            f"global_batch_size={total} is not chip_batch_size={chip} x {num_chips} chips: set one to null"
        )
    if total is None and chip * num_chips > convergence.LARGEST:
        notes.append(
            f"global batch kept at {convergence.LARGEST:,}, the largest reference point of convergence "
            f"({chip} images on each of {num_chips:,} chips would be {chip * num_chips:,}); scaling=weak lifts this"
        )
        return convergence.LARGEST
    return total or chip * num_chips
