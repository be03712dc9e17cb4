"""The verdict as a picture: left the plane of epochs and images/s a chip with the line of the claimed time, right the
emulated time under each changed assumption.
"""

import math
from pathlib import Path

import numpy as np

from launch.verdict_odds import Odds
from launch.verdict_text import Verdict, percent

CLAIMED, EMULATED, REFERENCE, PUBLISHED = "#c0392b", "#2471a3", "#d68910", "#222222"
EPOCHS = (20, 96)
OTHER_TIMES = (30, 40, 80, 120)
SIGMAS = 1.6448536269514722
"""From the median to 5 % or 95 % of a normal distribution."""


def draw(found: Verdict, path: Path) -> None:
    """Writes the picture as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 8.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.3, 1))
    figure.suptitle(title(found), fontsize=15, fontweight="bold")
    plane(left, found)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=10, frameon=False)
    assumptions(right, found)
    figure.savefig(path, dpi=100)


def title(found: Verdict) -> str:
    low, high = found.run.interval_s
    return (
        f"{found.emulated['model'].partition(' (')[0]} on {found.machine}: claimed {found.claim.seconds:g} s, emulated "
        f"{found.run.median_s:.1f} s ({low:.0f} to {high:.0f} s); odds of {found.claim.seconds:g} s or less: "
        f"{percent(found.odds)}"
    )


def plane(axes, found: Verdict) -> None:
    """Every point is a run; above the red line it ends before the claimed time."""
    run, seconds = found.run, found.claim.seconds
    epochs = np.linspace(*EPOCHS, 400)
    needed = np.array([run.needed_rate(at, seconds) for at in epochs])
    top = 100 * math.ceil(max([2200, *(1.1 * one.images_per_s_per_chip for one in found.published)]) / 100)
    axes.fill_between(epochs, needed, top, color=CLAIMED, alpha=0.06, lw=0)
    axes.plot(epochs, needed, color=CLAIMED, lw=2.5)
    (x, y), (onward_x, onward_y) = at_rate(run, seconds, 480), at_rate(run, seconds, 900)
    axes.text(
        *(x + 1.2, y),
        f"{seconds:g} s (claimed)",
        color=CLAIMED,
        fontweight="bold",
        rotation=math.degrees(math.atan2(onward_y - y, onward_x - x)),
        rotation_mode="anchor",
        transform_rotates_text=True,
        va="top",
    )
    axes.text(EPOCHS[1] - 1, 420, f"slower than {seconds:g} s", color="0.4", ha="right", fontsize=11)
    axes.text(EPOCHS[0] + 1, top - 25, f"faster than {seconds:g} s", color=CLAIMED, va="top", fontsize=11)
    for other in OTHER_TIMES:
        rates = np.array([run.needed_rate(at, other) for at in epochs])
        axes.plot(epochs, rates, color="0.75", lw=0.8, ls=":")
        right = rates[-1] < top
        x, y = (EPOCHS[1] - 0.5, rates[-1]) if right else at_rate(run, other, top - 40)
        axes.text(x, y, f"{other} s", color="0.55", fontsize=8, ha="right", va="bottom" if right else "top")
    band(axes, found)
    reference(axes, found)
    published(axes, found)
    axes.set(xlim=EPOCHS, ylim=(400, top))
    axes.set_xlabel("epochs to the target (75.9 % top-1 of the published runs)")
    axes.set_ylabel(f"images/s of each of {run.chips:,} chips while training")
    axes.set_title("Which runs end in time: fewer epochs or faster chips", loc="left", fontsize=12)


def at_rate(run, seconds: float, rate: float) -> tuple[float, float]:
    """The point of a line of equal time at a rate."""
    epochs = np.linspace(*EPOCHS, 400)
    rates = [run.needed_rate(at, seconds) for at in epochs]
    return float(epochs[int(np.argmin(np.abs(np.array(rates) - rate)))]), rate


def band(axes, found: Verdict) -> None:
    """The emulator's epochs, and its rate x the error of the whole time."""
    run = found.run
    low, high = run.epochs_interval
    if low == high:
        low, high = low - 0.3, high + 0.3
    epochs = np.linspace(low, high, 60)
    wide = math.exp(SIGMAS * run.sigma)
    slow, fast = ([run.needed_rate(at, run.seconds(at) * factor) for at in epochs] for factor in (wide, 1 / wide))
    axes.fill_between(
        epochs, slow, fast, color=EMULATED, alpha=0.3, lw=0, label="the emulator: recipe's epochs, 5 to 95 %"
    )
    axes.plot(epochs, [run.images_per_s_per_chip] * len(epochs), color=EMULATED, lw=2.5)
    axes.annotate(
        f"emulated {run.median_s:.1f} s",
        (epochs[len(epochs) // 2], min(slow)),
        xytext=(0, -4),
        textcoords="offset points",
        color=EMULATED,
        fontweight="bold",
        ha="center",
        va="top",
    )


def reference(axes, found: Verdict) -> None:
    """What the reference needed at each batch, at the rate that the emulator gives this machine there."""
    if not found.reference:
        return
    x, y = [at[1] for at in found.reference], [at[3].images_per_s_per_chip for at in found.reference]
    label = "MLPerf's reference epochs by batch, at the emulated rate"
    axes.plot(x, y, color=REFERENCE, lw=1, marker="D", ms=6, label=label)
    for batch, epochs, _, run in found.reference:
        own = batch == found.run.global_batch_size
        left = found.run.global_batch_size <= batch < found.reference[-1][0]
        if batch == 65_536 and not own:
            continue  # its label would lie on the last one's
        axes.annotate(
            f"batch {batch:,}: {run.median_s:.0f} s" if own else f"{batch:,}",
            (epochs, run.images_per_s_per_chip),
            xytext=(-8, 4) if left else (8, -4),
            textcoords="offset points",
            fontsize=9,
            color=REFERENCE,
            ha="right" if left else "left",
            fontweight="bold" if own else "normal",
        )


def published(axes, found: Verdict) -> None:
    """Filled: as many chips as the run; hollow: other numbers, which the lines of equal time do not fit."""
    labelled = set()
    for one in found.published:
        same = one.record.chips == found.run.chips
        label = (
            f"published, {found.run.chips:,} chips"
            if same
            else "published, other numbers of chips (their own time beside)"
        )
        axes.plot(
            one.record.epochs,
            one.images_per_s_per_chip,
            marker="o",
            ms=8,
            ls="none",
            color=PUBLISHED,
            mfc=PUBLISHED if same else "white",
            label=None if label in labelled else label,
        )
        labelled.add(label)
        near_edge = one.record.epochs > 80
        axes.annotate(
            f"{one.short}\n{one.record.seconds:.1f} s",
            (one.record.epochs, one.images_per_s_per_chip),
            xytext=(-9 if near_edge else 9, 0),
            textcoords="offset points",
            fontsize=9,
            va="center",
            ha="right" if near_edge else "left",
        )


def assumptions(axes, found: Verdict) -> None:
    """A row each: median and 5 to 95 % of the emulated time, and the odds."""
    rows = [Odds("", "as it is", found.run, found.odds), *(one for one in found.changed if one.run)]
    seconds = found.claim.seconds
    longest = min(max(one.run.interval_s[1] for one in rows), 110)
    labels = []
    for place, one in enumerate(rows):
        low, high = one.run.interval_s
        color = EMULATED if place else "black"
        median = one.run.median_s
        beyond = median > longest
        if beyond:
            axes.annotate(f"{median:.0f} s", (longest - 1, place), ha="right", va="center", color=color, fontsize=9)
        else:
            axes.plot([low, min(high, longest)], [place, place], color=color, lw=2, solid_capstyle="butt")
            axes.plot(median, place, "o", color=color, ms=6)
        axes.text(longest + 2, place, percent(one.odds), va="center", fontsize=9, color=color)
        labels.append(f"{one.about}: {one.name}" if one.about else "the emulator as it is")
    axes.axvline(seconds, color=CLAIMED, lw=2)
    axes.text(seconds, -1.15, f"{seconds:g} s (claimed)", color=CLAIMED, ha="center", va="bottom", fontweight="bold")
    axes.text(longest + 2, -1.15, "odds", va="bottom", fontsize=10, fontweight="bold")
    axes.set_yticks(range(len(rows)), labels, fontsize=9)
    axes.set(ylim=(len(rows) - 0.4, -1.2), xlim=(30, longest))
    axes.set_xlabel("emulated time to train (s): median, and 5 to 95 %")
    axes.set_title("One assumption changed at a time\n", loc="left", fontsize=12)
    axes.grid(axis="x", color="0.9", lw=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
