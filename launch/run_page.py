"""A finished run on one page of TensorBoard: a text (claimed, emulated and measured side by side; the run's differences
from the claim) and a picture (time to accuracy, where a step's time goes, how far the chips are apart).

It is drawn when the run has ended, from its folder alone, and stands in tb/page.
"""

from pathlib import Path

from train.conditions import as_rate
from train.metrics import read_rows
from train.report import RunReport, markdown_table, side_by_side

CLAIMED, EMULATED, MEASURED, PUBLISHED = "#c0392b", "#2471a3", "#1e8449", "#222222"
EMULATED_PARTS = {
    "compute": "emulated/compute_s",
    "exposed communication": "emulated/exposed_comm_s",
    "waiting for the slowest chip": "emulated/straggler_s",
    "input": "emulated/input_s",
    "other": "emulated/other_s",
    "recovery": "emulated/recovery_s",
}
MEASURED_PARTS = {"waiting for data": "measured/data_wait_s", "communication": "measured/comm_s"}
PART_COLORS = ("#4c72b0", "#c44e52", "#dd8452", "#8172b3", "#937860", "#55a868")
DISTANCES = {
    "bn_mean_shift": "batch-norm means,\nstandard deviations",
    "bn_var_off": "batch-norm variances,\nshare of the mesh's",
}
ENOUGH = 2
"""Evaluations from which on there is a curve to draw."""


def write(run: RunReport) -> None:
    """Writes page.png, where there is a curve, and tb/page of the run's folder."""
    from train.tensorboard import write_page

    rows, pictures = list(read_rows(run.run_dir)), {}
    if sum(row["kind"] == "eval" for row in rows) >= ENOUGH:
        pictures["one_minute/picture"] = run.run_dir / "page.png"
        draw(run.data, rows, run.run_dir / "page.png")
    write_page(run.run_dir / "tb" / "page", texts(run.data), pictures)


def texts(data: dict) -> dict[str, str]:
    """Tag -> Markdown, of a report's data. A card of the page holds about ten rows, so the claim has two."""
    reached = "reached its target" if data["reached"] else "did NOT reach its target"
    found = {"one_minute/1_result": [f"### Run {data['run']}: {data['status']}, {reached}", "", *side_by_side(data)]}
    if claim := data["claim"]:
        rows = data["conditions"]
        differ = [one for one in rows if one["differs"]]
        same = ", ".join(one["name"] for one in rows if one["differs"] is False) or "nothing"
        unknown = [one for one in rows if one["differs"] is None]
        found["one_minute/2_differs_from_the_claim"] = [
            f"### The run differs from the claim in {len(differ)} of {len(rows)} circumstances",
            *("", markdown_table([("", "the claim", "this run"), *(_row(one) for one in differ)])),
        ]
        found["one_minute/3_not_comparable_and_same"] = [
            *("### Not published with the claim", ""),
            *(markdown_table([("", "this run"), *((one["name"], _cell(one["run"])) for one in unknown)]), ""),
            *(f"Same as the claim: {same}.", "", f"Claim: {_cell(claim['system'])}. Source: {_cell(claim['source'])}."),
            *("", "How likely the claimed time is: `python -m launch.verdict` adds a run `verdict/tb`."),
        ]
    return {tag: "\n".join(lines) + "\n" for tag, lines in found.items()}


def _row(one: dict) -> tuple[str, str, str]:
    return one["name"], _cell(one["claim"]), _cell(one["run"])


def _cell(words: str) -> str:
    return str(words).replace("|", "/").replace("\n", " ")


def draw(data: dict, rows: list[dict], path: Path) -> None:
    """Writes the picture as PNG, aside and renamed."""
    from matplotlib.figure import Figure

    steps, evals = ([row for row in rows if row["kind"] == kind] for kind in ("step", "eval"))
    evals = [row for row in evals if row["step"]]
    chips = [name for name in DISTANCES if any(f"chips/{name}_median" in row["values"] for row in evals)]
    figure = Figure(figsize=(16, 8))  # placed by hand: a layout engine takes as long as all the drawing
    edges = {"left": 0.045, "right": 0.99, "top": 0.9, "bottom": 0.14, "wspace": 0.27, "hspace": 0.32}
    grid = figure.add_gridspec(2 if chips else 1, 3, width_ratios=(2, 1, 1), **edges)
    figure.suptitle(_title(data), fontsize=15, fontweight="bold")
    accuracy(figure.add_subplot(grid[:, 0]), data, evals)
    parts(figure.add_subplot(grid[0, 1]), steps, "emulated/step_s", EMULATED_PARTS, "A step of the emulated machine")
    parts(figure.add_subplot(grid[0, 2]), steps, "measured/step_s", MEASURED_PARTS, "A step here, measured")
    for column, name in enumerate(chips, 1):
        apart(figure.add_subplot(grid[1, column]), evals, name, data["emulated"]["chips"])
    aside = path.with_name(f".{path.name}")
    figure.savefig(aside, format="png", dpi=75)
    aside.replace(path)


def _title(data: dict) -> str:
    ends = []
    for label in ("claimed", "emulated", "measured"):
        seconds = data[label].get("time_to_target_s")
        ends += [f"{label} {seconds:,.3g} s"] if seconds else [f"{label}: not reached"] if data[label] else []
    return f"{data['run']}: time to the target: {', '.join(ends)}"


def accuracy(axes, data: dict, evals: list[dict]) -> None:
    """Top-1 over seconds of each clock, logarithmic; claimed and published results are points at their ends."""
    top1 = [100 * row["values"]["eval/top1"] for row in evals]
    images = next((one["run"].partition(",")[0] for one in data["conditions"] if one["name"] == "data set"), "this run")
    for clock, color in (("emulated", EMULATED), ("measured", MEASURED)):
        seconds = [row[f"{clock}_s"] for row in evals]
        axes.plot(seconds, top1, color=color, marker="o", ms=4, lw=2, label=f"{clock}, {images}")
        _beside(axes, f"{clock}\n{seconds[-1]:,.3g} s", (seconds[-1], top1[-1]), color, (-8, 6), "right")
    if interval := data["emulated"]["interval_s"]:
        axes.plot(interval, [top1[-1]] * 2, color=EMULATED, lw=7, alpha=0.3, label="emulated end, 5 to 95 %")
    axes.axhline(100 * data["measured"]["target_top1"], color="0.4", lw=1, ls="--", label="target of this run")
    published = [one for one in (data["claim"], *data["neighbours"]) if one and one["seconds"]]
    for number, one in enumerate(published):
        height = one["reached_top1"] or one["target_top1"]
        if not height:
            continue
        claimed = one is data["claim"]
        color = CLAIMED if claimed else PUBLISHED
        shape = {"marker": "*", "ms": 18} if claimed else {"marker": "o", "ms": 8, "mfc": "white"}
        words = "claimed, ImageNet-1k" if claimed else "published neighbours, ImageNet-1k" if number == 1 else None
        axes.plot(one["seconds"], height, color=color, ls="none", label=words, **shape)
        who = "claimed" if claimed else one["system"].split()[0]
        place = (0, -34) if claimed else (-6, 8) if one["seconds"] < published[0]["seconds"] else (6, 8)
        align = "center" if claimed else "right" if place[0] < 0 else "left"
        _beside(axes, f"{who}\n{one['seconds']:.1f} s", (one["seconds"], height), color, place, align)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    low, high = axes.get_xlim()
    axes.set(xlim=(low / 1.5, high * 1.5), ylim=(0, 112))
    axes.set_xlabel("seconds of each clock, logarithmic")
    axes.set_ylabel("top-1 accuracy, %")
    axes.set_title("Time to accuracy", loc="left")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=3, fontsize=10, frameon=False)


def _beside(axes, words: str, at: tuple[float, float], color: str, offset: tuple[int, int], align: str) -> None:
    """Words, which a line passes behind."""
    from matplotlib.patheffects import withStroke

    outline = [withStroke(linewidth=3, foreground="white")]
    where = {"xytext": offset, "textcoords": "offset points", "ha": align}
    axes.annotate(words, at, color=color, fontsize=10, zorder=5, path_effects=outline, **where)


def parts(axes, steps: list[dict], whole: str, of: dict[str, str], title: str) -> None:
    """Stacked milliseconds over epochs; what the parts leave of the whole is computing."""
    epochs = [row["epoch"] for row in steps]
    total = [1000 * row["values"][whole] for row in steps]
    layers = {name: [1000 * row["values"].get(source, 0.0) for row in steps] for name, source in of.items()}
    layers = {name: values for name, values in layers.items() if any(values)}
    if whole == "measured/step_s":
        rest = [max(0.0, all_ - sum(each)) for all_, *each in zip(total, *layers.values(), strict=True)]
        layers = {"computing": rest, **layers}
    axes.stackplot(epochs, *layers.values(), colors=PART_COLORS, labels=list(layers))
    middle = sorted(total)[len(total) // 2]
    axes.set_ylim(0, 2.2 * middle)
    axes.set_xlim(epochs[0], epochs[-1])
    axes.set_title(f"{title}: median {as_rate(middle)} ms", loc="left", fontsize=11)
    axes.set_xlabel("epochs")
    axes.set_ylabel("ms")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="upper left", fontsize=9, framealpha=0.9)


def apart(axes, evals: list[dict], name: str, chips: int) -> None:
    """Band from the minimum to the maximum over the chips, and the median."""
    seen = [row for row in evals if f"chips/{name}_median" in row["values"]]
    epochs = [row["epoch"] for row in seen]
    low, median, high = ([row["values"][f"chips/{name}_{which}"] for row in seen] for which in ("min", "median", "max"))
    axes.fill_between(epochs, low, high, color=MEASURED, alpha=0.25, lw=0, label="minimum to maximum")
    axes.plot(epochs, median, color=MEASURED, lw=2, label="median")
    axes.set_ylim(0, 1.4 * max(high) or 1)
    axes.set_title(f"How far {chips:,} chips are apart", loc="left", fontsize=11)
    axes.set_xlabel("epochs")
    axes.set_ylabel(DISTANCES[name])
    axes.legend(loc="upper right", fontsize=9)
