"""Writes conf/network/fitted.yaml: the constants of launch/fitting, from conf/records and conf/chip.

    python scripts/fit_records.py

A test refits and compares.
"""

import math
import sys

from launch.fitting import PRIORS, TWIN_ERROR, TWIN_ROWS, fit, load
from launch.validation import CONF
from train.metrics import write_aside

PAGE = CONF / "network/fitted.yaml"


def sources(found: dict) -> dict[str, str]:
    rows = f"fitted: {len(found['fitted_on'])} multi-host MLPerf rows (fitted_on) and a prior"
    texts = {}
    for prior in PRIORS:
        within = f"{prior.median:g} within a factor {math.exp(prior.deviation):.2g}"
        texts[prior.name] = f"{rows} ({within}: {prior.source})"
    clock = "fitted: whole clock less steady epochs, anchors and rows of fitted_on"
    return texts | {
        "startup_s": clock,
        "first_epoch_s": f"{clock}; the first pass over the data is shared by the hosts",
        "software": "fitted: least squares over the chips' single-host anchors, chip x year; MXNet 2021 is 1",
        "model_error": "fitted: sqrt(pi/2) x mean |ln(predicted / published time)| of fitted_on, with "
        f"{TWIN_ROWS} rows at {TWIN_ERROR:g} as a prior",
    }


def page(found: dict) -> str:
    """The text of conf/network/fitted.yaml."""
    values = {name: value for name, value in found.items() if name not in ("software", "fitted_on")}
    lines = [
        "# alpha_beta with the constants that published records give. Written by `python scripts/fit_records.py`, never by hand;",  # noqa: E501
        "# docs/validation.md holds its errors. No 1,024-chip Ascend record has a part in it.",
        "_target_: train.sim.network.AlphaBeta",
        "calibration:",
        "  _target_: train.sim.calibration.Calibration",
        *(f"  {name}: {value:g}" for name, value in values.items()),
        f"  software: {{{', '.join(f'{name}: {factor:g}' for name, factor in found['software'].items())}}}",
        "  source:",
        *(f'    {name}: "{text}"' for name, text in sources(found).items()),
        "  fitted_on:",
        *(f"    - {id}" for id in found["fitted_on"]),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    found = fit(load())
    write_aside(PAGE, page(found))
    print(PAGE.read_text(encoding="utf-8"), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
