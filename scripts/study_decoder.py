"""Does the fast decoder change what is learnt? A table from finished runs of experiment=photos_decoder.

    python -m launch.run -m experiment=photos_decoder data.root=/data/photos \\
        seed=0,1,2,3,4 data.decode=turbo,pillow resume=auto
    python scripts/study_decoder.py runs

The argument is the folder of the run folders. Spread is the sample standard deviation over seeds (n - 1). The decoders
are equal within seed noise where the difference of the means is below the two-sided 95 % limit of Student's t, in
standard errors of a difference of two means. Exit status: 0 so it is, 1 not, 2 runs are missing or of several recipes.
"""

import argparse
import math
import statistics
import sys
from pathlib import Path

from yaml import safe_load

from launch.run_folder import HERE, OF_THE_COMMAND, leaves, read_json
from train.report import markdown_table

EXPERIMENT = "photos_decoder"
DECODERS = ("turbo", "pillow")
MEASURES = (("top1", "top-1, %", 100, 2), ("eval_loss", "loss", 1, 3))
MAY_DIFFER = {"seed", "data.decode", "data.workers"}
FEWEST = 3  # seeds
# Two-sided 95 % limits of Student's t by degrees of freedom, 2 (n - 1) for n seeds of either decoder (any table of it)
LIMITS = {4: 2.776, 6: 2.447, 8: 2.306, 10: 2.228, 12: 2.179, 14: 2.145, 16: 2.120, 18: 2.101}
LIMIT_OF_MANY = 2.1


def runs_below(root: Path) -> dict[tuple[str, int], dict]:
    """(decoder, seed) -> result.json of the finished runs of the experiment. ValueError where their recipes differ."""
    found, recipe = {}, None
    for path in sorted(root.glob("*/config.yaml")):
        config = safe_load(path.read_text(encoding="utf-8"))
        result = read_json(path.parent / "result.json")
        if config.get("experiment") != EXPERIMENT or result.get("status") != "done":
            continue
        own = {key: value for key, value in leaves("", config, {*HERE, *OF_THE_COMMAND}) if key not in MAY_DIFFER}
        recipe = recipe or own
        differing = [key for key in own.keys() | recipe.keys() if own.get(key) != recipe.get(key)]
        if differing:
            raise ValueError(f"{path.parent} has another {min(differing)} than the runs before it: leave it out")
        found[config["data"]["decode"], config["seed"]] = result
    return found


def compared(found: dict[tuple[str, int], dict], measure: str) -> tuple[dict[str, list[float]], float, float]:
    """(Values of each decoder by seed, difference of their means, its standard error)."""
    seeds = sorted({seed for _, seed in found})
    missing = [f"data.decode={one} seed={seed}" for one in DECODERS for seed in seeds if (one, seed) not in found]
    if missing or len(seeds) < FEWEST:
        raise ValueError(f"no finished run of {', '.join(missing) or f'at least {FEWEST} seeds'}")
    values = {one: [found[one, seed][measure] for seed in seeds] for one in DECODERS}
    error = math.sqrt(sum(statistics.variance(each) for each in values.values()) / len(seeds))
    fast, plain = (statistics.fmean(values[one]) for one in DECODERS)
    return values, fast - plain, error


def limit(num_seeds: int) -> float:
    return LIMITS.get(2 * (num_seeds - 1), LIMIT_OF_MANY)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder of the run folders")
    given = parser.parse_args(argv)
    try:
        found = runs_below(given.root)
        results = [(*rest, *compared(found, measure)) for measure, *rest in MEASURES]
    except ValueError as error:
        print(f"study_decoder: {given.root}: {error}", file=sys.stderr)
        return 2
    rows, lines, equal = [("held-out views", "decoder", "mean +- sd", "each seed")], [], True
    for name, factor, digits, values, difference, error in results:
        for one, each in values.items():
            mean, deviation = factor * statistics.fmean(each), factor * statistics.stdev(each)
            shown = ", ".join(f"{factor * value:.{digits}f}" for value in each)
            rows.append((name, one, f"{mean:.{digits}f} +- {deviation:.{digits}f}", shown))
        most = limit(len(values["turbo"])) * error
        equal &= abs(difference) <= most
        lines.append(
            f"{name}: turbo - pillow = {factor * difference:+.{digits}f}, standard error {factor * error:.{digits}f}, "
            f"at most {factor * most:.{digits}f} is seed noise: {'equal' if abs(difference) <= most else 'NOT equal'}"
        )
    print(markdown_table(rows))
    print("\n".join(lines))
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
