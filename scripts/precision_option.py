"""The option --precision of benchmarks that train."""

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from train.precision import Precision


def parse(parser: ArgumentParser) -> tuple[Namespace, "Precision"]:
    """The options of a parser that has --device; `precision` is the name of what training chooses for that device.

    Ends the program with status 2 where there is no such device.
    """
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    options = parser.parse_args()
    from train.precision import choose_device, choose_precision  # loads torch, which --help can do without

    try:
        chosen = choose_precision(options.precision, choose_device(options.device))
    except ValueError as error:
        parser.error(str(error))
    options.precision = chosen.name
    return options, chosen
