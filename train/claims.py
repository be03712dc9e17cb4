"""The claims audit: what articles say of systems, recomputed from published records and the catalog.

A claim is data: the words, what they admit, the figures by name, and the arithmetic. The rule of the verdict:

    consistent    every recomputed value lies in what the words admit
    inconsistent  none does, and the published figures all lie on the same side
    not testable  a figure that the arithmetic needs was not published, or published figures lie on both sides

Of an emulated quantity the 5 to 95 % interval counts: consistent where it holds what the words admit. Words admit half
a unit of the last digit of an exact figure, 5 % around a round one ("about"), a range, or all above or below a bound.
Claimed figures, recomputed ones and emulated ones are kept in columns of their own.
"""

import ast
import itertools
import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

CONSISTENT, INCONSISTENT, NOT_TESTABLE = "consistent", "inconsistent", "not testable"
ABOUT = 0.05
AGAINST = {
    "others": "measurements or figures of others",
    "vendor": "the vendor's own other figures",
    "emulator": "this emulator",
    "nothing": "nothing published",
}
KEYS = set("id statement reading says unit with arithmetic shows against missing note".split())
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
}


@dataclass(frozen=True)
class Figure:
    """One number that a claim is held against."""

    name: str
    path: str
    value: float
    source: str


@dataclass(frozen=True)
class Audited:
    """A reading of one statement with its verdict. Recomputed and emulated values are [lowest, highest], or None.

    unit is that of the claimed figure, shows that of the recomputed one.
    """

    id: str
    article: str
    date: str
    statement: str
    reading: str
    claimed: str
    unit: str
    admits: tuple[float, float]
    recomputed: tuple[float, float] | None
    emulated: tuple[float, float] | None
    shows: str
    arithmetic: str
    figures: tuple[Figure, ...]
    against: str
    verdict: str
    missing: str = ""
    note: str = ""

    def as_dict(self) -> dict:
        """As JSON: infinite bounds are null, and each number stands under its label."""
        bounds = [bound if math.isfinite(bound) else None for bound in self.admits]
        plain = {
            name: getattr(self, name)
            for name in "id article date statement reading verdict against arithmetic missing note".split()
        }
        return {
            **plain,
            "claimed": {"label": "claimed", "words": self.claimed, "unit": self.unit, "admits": bounds},
            "recomputed": _labelled("from published figures", self.recomputed, self.shows),
            "emulated": _labelled("emulated", self.emulated, self.shows),
            "figures": [vars(figure) for figure in self.figures],
        }


@dataclass
class Facts:
    """What claims may name: records (by id), epochs (of their logs), figures, chips and meshes (as in conf/), the
    recipe, and what is emulated.

    A path is group.name.field: `records.huawei-2019-atlas900.seconds`, `chips.v100_16gb.tflops.fp16`,
    `figures.v100_w`, `emulated.interval_s`.
    """

    records: dict[str, Any] = field(default_factory=dict)
    epochs: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Figure] = field(default_factory=dict)
    chips: dict[str, dict] = field(default_factory=dict)
    meshes: dict[str, dict] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    emulated: dict[str, Any] = field(default_factory=dict)

    def find(self, name: str, path: str) -> list[Figure]:
        """One figure, or two where the path leads to a range. LookupError with the path where it leads nowhere."""
        group, _, rest = path.partition(".")
        try:
            if group in ("records", "epochs"):
                id, _, column = rest.rpartition(".")
                row = getattr(self, group)[id]
                value, source = getattr(row, column), row.source
            elif group == "figures":
                value, source = self.figures[rest].value, self.figures[rest].source
            elif group == "recipe":
                value, source = self.recipe[rest], "the recipe of the record's experiment: our reading"
            elif group == "emulated":
                value, source = self.emulated[rest], "this emulator, the record's experiment"
            elif group in ("chips", "meshes"):
                value, source = _walk(getattr(self, group), rest.split("."), {"chips": "chip", "meshes": "mesh"}[group])
            else:
                raise KeyError(group)
        except (KeyError, AttributeError, IndexError, ValueError) as error:
            raise LookupError(f"{path}: leads to no figure ({error})") from error
        values = value if isinstance(value, (list, tuple)) else [value]
        if not all(isinstance(each, (int, float)) for each in values):
            raise LookupError(f"{path}: {value!r} is no number")
        return [Figure(name, path, float(each), source) for each in values]


def audit(articles: Iterable[dict], facts: Facts) -> list[Audited]:
    """Every reading of every article. Each article: title, outlet, date, claims. ValueError names the claim."""
    found, seen = [], set()
    for article in articles:
        for claim in article["claims"]:
            unknown, id = set(claim) - KEYS, claim.get("id", "?")
            if unknown or id in seen or claim.get("against") not in AGAINST:
                raise ValueError(f"claim {id}: unknown keys {sorted(unknown)}, id twice, or no `against`")
            seen.add(id)
            try:
                found.append(_audited(claim, article, facts))
            except (LookupError, SyntaxError, KeyError, TypeError) as error:
                raise ValueError(f"claim {id}: {error}") from error
    return found


def paths(articles: Iterable[dict]) -> list[str]:
    """Every figure that the claims name."""
    return [
        path
        for article in articles
        for claim in article["claims"]
        for given in claim.get("with", {}).values()
        for path in (given if isinstance(given, list) else [given])
    ]


def judge(values: list[float], admits: tuple[float, float], interval: bool = False) -> str:
    """The rule above. `interval`: the values span what is likely, instead of being figures that must agree."""
    low, high = min(values), max(values)
    if all(admits[0] <= value <= admits[1] for value in values):
        return CONSISTENT
    if high < admits[0] or low > admits[1]:
        return INCONSISTENT
    return CONSISTENT if interval else NOT_TESTABLE


def admitted(says: dict) -> tuple[float, float]:
    """[lowest, highest] of {exactly: x}, and likewise about, more_than, at_least, at_most; or {between: [x, y]}."""
    ((word, figure),) = says.items()
    if word == "between":
        low, high = figure
        return float(low), float(high)
    value = float(figure)
    if word == "exactly":
        digits = str(figure).partition(".")[2]
        half = 0.5 * 10.0 ** -len(digits)
        return value - half, value + half
    if word == "about":
        return value * (1 - ABOUT), value * (1 + ABOUT)
    if word == "more_than":
        return math.nextafter(value, math.inf), math.inf
    if word in ("at_least", "at_most"):
        return (value, math.inf) if word == "at_least" else (-math.inf, value)
    raise KeyError(f"says: {word} is none of exactly, about, more_than, at_least, at_most, between")


def evaluate(arithmetic: str, names: dict[str, float]) -> float:
    """Numbers, names, + - * /, min, max and round; nothing else."""

    def value(node: ast.AST) -> float:
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return node.value
        if isinstance(node, ast.Name) and node.id in names:
            return names[node.id]
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.operand))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
            called = {"min": min, "max": max, "round": round}.get(node.func.id)
            if called:
                return called(*map(value, node.args))
        raise SyntaxError(f"arithmetic {arithmetic!r}: {ast.unparse(node)!r} is not allowed or not given")

    return float(value(ast.parse(arithmetic, mode="eval").body))


def _audited(claim: dict, article: dict, facts: Facts) -> Audited:
    admits, missing = admitted(claim["says"]), claim.get("missing", "")
    given = {
        name: [figure for path in (which if isinstance(which, list) else [which]) for figure in facts.find(name, path)]
        for name, which in claim.get("with", {}).items()
    }
    ((_, said),) = claim["says"].items()
    names = {} if isinstance(said, list) else {"claimed": float(said)}
    values = []
    if claim.get("arithmetic"):
        for chosen in itertools.product(*given.values()):
            values.append(evaluate(claim["arithmetic"], names | {each.name: each.value for each in chosen}))
    emulated = any(figure.path.startswith("emulated.") for figures in given.values() for figure in figures)
    if not values and not missing:
        raise KeyError("give arithmetic, or what is missing")
    span = (min(values), max(values)) if values else None
    return Audited(
        id=claim["id"],
        article=f"{article['outlet']}: {article['title']}",
        date=str(article["date"]),
        statement=claim["statement"],
        reading=claim.get("reading", ""),
        claimed=spell(claim["says"], claim.get("unit", "")),
        unit=claim.get("unit", ""),
        admits=admits,
        recomputed=None if emulated else span,
        emulated=span if emulated else None,
        shows=claim.get("shows", claim.get("unit", "")),
        arithmetic=claim.get("arithmetic", ""),
        figures=tuple(figure for figures in given.values() for figure in figures),
        against=claim["against"],
        verdict=NOT_TESTABLE if missing else judge(values, admits, interval=emulated),
        missing=missing,
        note=claim.get("note", ""),
    )


def spell(says: dict, unit: str = "") -> str:
    """{about: 1000} -> "about 1,000"."""
    ((word, figure),) = says.items()
    if word == "between":
        return " to ".join(f"{each:,}" for each in figure)
    text = str(figure) if unit == "year" else f"{figure:,}"
    return {"exactly": text, "more_than": f"more than {text}"}.get(word, f"{word.replace('_', ' ')} {text}")


def _labelled(label: str, span: tuple[float, float] | None, unit: str) -> dict | None:
    return None if span is None else {"label": label, "low": span[0], "high": span[1], "unit": unit}


def _walk(tree: dict, keys: list[str], group: str) -> tuple[Any, str]:
    """The value of a YAML node and its source: what the node's own `source` or `sources` says, else the file."""
    value: Any = tree
    source = f"conf/{group}/{keys[0]}.yaml"
    if group == "mesh" and keys[1:] == ["chips"]:
        return math.prod(tree[keys[0]]["axes"].values()), f"{source}: product of its axes"
    for key in keys:
        if isinstance(value, dict):
            source = (value.get("sources") or {}).get(key) or value.get("source") or source
        value = value[int(key)] if isinstance(value, list) else value[key]
    return value, source
