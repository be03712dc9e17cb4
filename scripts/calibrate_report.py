"""What scripts/calibrate.py found, in words: for a terminal, and for docs/calibration.md."""

from train.report import markdown_table

WORKERS = {1: "one_worker", 2: "two_workers"}
IMAGE_SIZE = 224
"""Of ResNet-50's own, for which the aim is."""
AIM = 0.1
MARKS = "<!-- figures -->", "<!-- /figures -->"


def report(result: dict) -> str:
    """What was measured, class by class, and predicted beside measured."""
    lines = [f"{result['device']}, {result['cores']} cores, {result['date']}", ""]
    for name, found in result["machine"].items():
        lines.append(
            f"{name.replace('_', ' ')}, {found['threads']} thread(s) each: matmul {found['matmul_per_s'] / 1e9:.1f} "
            f"GFLOP/s in {found['precision']}, copy {found['copy_per_s'] / 1e9:.2f} GB/s"
        )
    link = result["link"]
    lines.append(f"all-reduce: {link['latency_s'] * 1e6:.0f} us a message, {link['bytes_per_s'] / 1e9:.2f} GB/s")
    for case in result["cases"]:
        lines += ["", f"{title(case)}: the layers of a step, each timed alone"]
        for kind, own in case["classes"].items():
            lines.append(f"  {kind:<12} {own['layers']:>3} layers {share(case, kind, result['machine'])}")
    head = f"{'a step of ResNet-50':<36} {'predicted':>11} {'measured':>11} {'error':>8}   by its own layers"
    lines += ["", head]
    for case in result["cases"]:
        lines.append(
            f"{title(case):<36} {case['predicted_s']:>9.4f} s {case['measured_s']:>9.4f} s "
            f"{100 * case['error']:>+6.1f} %   {case['layers_predicted_s']:.4f} s {100 * case['layers_error']:+.1f} %"
            f"   {judged(case)}".rstrip()
        )
    lines += ["", "predicted is emulated, from chip and mesh file alone; measured are medians of the trainer's steps"]
    for files in result["files"].values():
        lines.append(
            f"python -m launch.emulate mesh={files['mesh']} chip_batch_size={result['cases'][0]['chip_batch']}"
        )
    return "\n".join(lines)


def page(text: str, result: dict) -> str:
    """docs/calibration.md with the figures of a run between its marks."""
    head, rest = text.split(MARKS[0])
    cpus = "; ".join(
        f"{name.replace('_', ' ')} with {found['threads']} thread(s) each: matmul {found['matmul_per_s'] / 1e9:.1f} "
        f"GFLOP/s, copy {found['copy_per_s'] / 1e9:.2f} GB/s"
        for name, found in result["machine"].items()
    )
    link = result["link"]
    steps = [["a step of ResNet-50", "predicted", "measured", "error", "by its own layers", "error", ""]]
    shares = [["class of layers", *(title(case) for case in result["cases"])]]
    for case in result["cases"]:
        steps.append(
            [
                title(case),
                f"{case['predicted_s']:.3f} s",
                f"{case['measured_s']:.3f} s",
                f"{100 * case['error']:+.1f} %",
                f"{case['layers_predicted_s']:.3f} s",
                f"{100 * case['layers_error']:+.1f} %",
                judged(case),
            ]
        )
    for kind in result["cases"][0]["classes"]:
        shares.append([kind, *(share(case, kind, result["machine"]) for case in result["cases"])])
    figures = [
        f"{result['device']}, {result['cores']} cores, {result['date']}, medians of {result['rounds']} rounds. {cpus}; "
        f"all-reduce {link['latency_s'] * 1e6:.0f} us a message and {link['bytes_per_s'] / 1e9:.2f} GB/s.",
        "",
        markdown_table(steps),
        "",
        "Seconds of a step in each class, and the share of the limit that it reaches:",
        "",
        markdown_table(shares),
    ]
    return head + "\n".join([MARKS[0], *figures, MARKS[1]]) + rest.split(MARKS[1])[1]


def judged(case: dict) -> str:
    """Against the aim, which is one of ResNet-50 at its own image size."""
    if case["image_size"] != IMAGE_SIZE:
        return ""
    return "within the aim" if abs(case["error"]) <= AIM else f"**MISSED**: the aim is {100 * AIM:g} %"


def share(case: dict, kind: str, machine: dict) -> str:
    own, found = case["classes"][kind], machine[WORKERS[case["workers"]]]
    limit, unit = ("matmul", "flops") if own["flops"] else ("copy", "bytes")
    return f"{own['seconds']:.4f} s, {100 * own[unit] / own['seconds'] / found[f'{limit}_per_s']:.0f} % of {limit}"


def title(case: dict) -> str:
    workers = f"{case['workers']} worker{'s' if case['workers'] > 1 else ''}"
    return f"{workers}, {case['chip_batch']} images of {case['image_size']} px"
