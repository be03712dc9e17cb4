"""Where each number of an emulated run comes from, and what its reader has to be told: for `explain=true` and notes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from train.mesh.origin import Origin
from train.mesh.topology import LinkClass
from train.sim import convergence
from train.sim.convergence import Epochs

if TYPE_CHECKING:
    from train.emulator import Emulator


def origins(made: Emulator) -> list[Origin]:
    """Every number that moves the clock."""
    chip, mesh, workload, constants = made.chip, made.mesh, made.workload, made.calibration
    links = [origin for link in mesh.topology.link_classes for origin in [*link.origins(), *_short(link)]]
    table = "derived: layer table, 2 x multiply-adds of convolutions and classifier"
    lines = chip.origins(made.precision, constants.half_batch) + [
        Origin("chip.sustained", made.sustained_flops / 1e12, "TFLOP/s", "derived: FLOPs / chip.per_image"),
        *links,
        Origin("model.training_flops", workload.training_flops / 1e9, "GFLOP an image", table),
        Origin("model.parameters", workload.parameters, "gradients", "derived: layer table"),
        Origin("data.num_train", made.num_train, "images", made.data_origin),
        Origin("data.num_eval", made.num_eval, "images", made.data_origin),
        Origin("global_batch_size", made.global_batch_size, "images", "the recipe"),
        _epochs(made),
        Origin("eval_every", made.eval_every, f"epochs, from {made.eval_offset or made.eval_every:g} on", "the recipe"),
        Origin("steps_per_epoch", made.steps_per_epoch, "steps", "derived: whole batches alone"),
        Origin("wire_dtype", made.wire_dtype, "", "the recipe"),
        Origin("collective", made.plan.name, f"all-reduce, {made.network.name}", "the recipe"),
    ]
    if made.software_factor != 1:
        why = f"fitted: calibration.software of {made.software} / of {chip.measured_in(made.precision)}"
        lines.append(Origin("chip.software", made.software_factor, "x compute time", why))
    if chip.jitter is None and not constants.jitter:
        lines.append(Origin("jitter", 0.0, "of compute", "assumed: neither the chip nor the calibration states any"))
    else:
        inside = chip.measured_on(made.precision)
        why = f"derived: E[max] of {made.active_chips:,}, {constants.straggler}"
        why += f"; that of the {inside} in the chip's rate is taken out of it" if inside > 1 else ""
        lines.append(Origin("straggler", made.expected_max(made.active_chips), "deviations", why))
    if chip.startup_s is None and not (constants.startup_s or constants.first_epoch_s):
        lines.append(Origin("startup", 0.0, "s", "assumed: neither the chip nor the calibration states any"))
    if made.bn_span > 1:
        why = f"derived: halving-doubling of 2 x channels in fp32, twice a layer, over {made.bn_span} chips"
        lines.append(Origin("bn_sync", made.norm_s * 1e3, "ms a step", why))
    lines += [_input(made), _update(made), *(origin for fault in made.faults for origin in fault.origins())]
    in_calibration = constants.model_error is not None
    if not in_calibration:
        lines.append(Origin("network.model_error", made.model_error, "sigma of ln(time)", made.network.source))
    return lines + [origin for name, origin in constants.origins().items() if moves(made, name)]


def moves(made: Emulator, name: str) -> bool:
    """Whether a constant of the calibration has a part in this run: what chip and recipe state goes before it."""
    chip, software = made.chip, (made.chip.software, made.chip.measured_in(made.precision))
    if name.startswith("software["):
        return made.software_factor != 1 and name[len("software[") : -1] in software
    used = {
        "half_batch": not chip.has_line(made.precision),
        "jitter": chip.jitter is None,
        "startup_s": chip.startup_s is None,
        "first_epoch_s": chip.startup_s is None,
        "epochs_error": isinstance(made.epochs, Epochs),
    }
    return used.get(name, True)


def kind(origin: Origin) -> str:
    """cited, measured, derived, fitted, assumed or given (by the recipe, the data set or the mesh's file)."""
    word = origin.origin.split()[0].rstrip(":,").lower() if origin.origin else "assumed"
    return word if word in ("measured", "derived", "fitted", "assumed") else "given" if word == "the" else "cited"


def _short(link: LinkClass) -> list[Origin]:
    if not link.small_bytes:
        return []
    unit = f"us a message below {link.small_bytes / 1024:g} KiB"
    return [Origin(f"link.{link.name}.small_latency", link.small_latency_s * 1e6, unit, link.source)]


def _epochs(made: Emulator) -> Origin:
    if isinstance(made.epochs, Epochs):
        spread = f"{made.epochs.mean:.4g} +- {made.epochs.stdev:.2g}"
        return Origin("epochs", spread, "epochs", f"derived: {convergence.SOURCE}, linear in the batch")
    return Origin("epochs", str(made.epochs), "epochs", "the recipe")


def _input(made: Emulator) -> Origin:
    rate = made.mesh.host_images_per_s
    if rate is None:
        return Origin("input", 0.0, "s", "assumed: the hosts' input keeps up")
    return Origin("mesh.host_images_per_s", rate, "images/s a host", "the mesh's file")


def _update(made: Emulator) -> Origin:
    inside = made.chip.anchors_of(made.precision)[0].get("optimizer")
    if made.update_s:
        why = f"derived: bytes of {made.optimizer} beyond those inside the chip's rate, at the memory's rate"
    elif inside in (None, made.optimizer):
        why = "assumed: the optimizer is inside the chip's published rate"
    else:
        why = f"assumed: the rate holds {inside}, the recipe's is {made.optimizer}; no more bytes, or no memory rate"
    return Origin("update", made.update_s * 1e3, "ms a step", why)


def notes(made: Emulator) -> list[str]:
    """What the reader has to know: extrapolation, idle chips, mixed software, and every assumption."""
    found, chip, batch, chips = [], made.chip, made.global_batch_size, made.mesh.num_chips
    idle = chips - made.active_chips
    if abs(made.work - 1) > 0.01:  # a few classes more or less are no other network
        found.append(
            f"extrapolated: {made.workload.name} is priced from the rates of ResNet-50 at 224 px by its FLOPs "
            f"({made.work:.3g} of them an image), with the same fixed time a step"
        )
    if idle:
        found.append(f"{idle:,} of {chips:,} chips get no image at a global batch of {batch:,} and stand idle")
    elif batch % chips:
        found.append(f"a global batch of {batch:,} does not divide by {chips:,} chips: the fullest chip sets the pace")
    if batch > convergence.LARGEST and not isinstance(made.epochs, Epochs):
        found.append(
            f"a global batch of {batch:,} is beyond the convergence table "
            f"(up to {convergence.LARGEST:,}): the epochs are no longer backed by it"
        )
    anchors = chip.anchors_of(made.precision)
    sources = dict.fromkeys(anchor.get("source", "") for anchor in anchors)
    if len(sources) > 1 and "software" not in anchors[0]:
        found.append(f"rates of {chip.name} come from different software: " + "; ".join(sources))
    found += _software(made) + _contention(made)
    found += [f"fault: {fault.name}, {fault.when()}: {fault.words()}" for fault in made.faults]
    for origin in origins(made):
        if origin.origin.startswith("assumed"):
            value = f"{origin.value:g}" if isinstance(origin.value, (int, float)) else origin.value
            found.append(f"{origin.name} = {value} {origin.unit}, {origin.origin}".replace(" ,", ","))
    return found


def _contention(made: Emulator) -> list[str]:
    shared = [link.name for link in made.mesh.topology.link_classes if link.shared]
    if made.network.name != "alpha_beta" or not shared:
        return []
    return [
        f"{made.mesh.name}: chips share {' and '.join(shared)}, and network=alpha_beta prices every message alone; "
        "network=fitted_flow prices the contention"
    ]


def _software(made: Emulator) -> list[str]:
    measured, wanted = made.chip.measured_in(made.precision), made.chip.software
    if wanted is None or wanted == measured:
        return []
    if measured is None:
        return [f"software={wanted}: the rates of {made.chip.name} do not name theirs, so they are used as they are"]
    unknown = [name for name in (wanted, measured) if name not in made.calibration.software]
    lacks = f"; no factor for {' or '.join(unknown)}, so 1" if unknown else ""
    instead = f"that in {measured} is used, its time x {made.software_factor:.3g}{lacks}"
    return [f"{made.chip.name} has no rate in {wanted}: {instead}"]
