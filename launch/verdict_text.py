"""The verdict as a value, as text and as a JSON object: one line first, then the tables behind it.

Claimed, emulated and recomputed figures have columns of their own. Nothing here is measured.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from launch.verdict_odds import Odds, PublishedRun
from train.claims import AGAINST, CONSISTENT, INCONSISTENT, NOT_TESTABLE, Audited
from train.records import Record
from train.report import markdown_table
from train.sim.region import Priced

RULE = (
    "consistent: every value recomputed from published figures lies in what the words admit (an exact figure: half a "
    "unit of its last digit; about: 5 %; a bound or a range as it is; of an emulated quantity the 5 to 95 % interval "
    "counts). inconsistent: none does, all on the same side. not testable: a needed figure was not published, or the "
    "published ones lie on both sides. Consistent with the vendor's own figures is no proof by others: see `against`."
)
HOW = (
    "Emulated: the recipe is our reading (batch, epochs), the chip's rate a published one; the constants shared by all "
    "machines are fitted on published results, none of them of 1,024 Ascend chips (the nearest: 512). Nothing was "
    "chosen because it gives the claimed time."
)

SAME = "(the same)"


@dataclass(frozen=True)
class Verdict:
    """What launch.verdict found out. odds: of the claimed time or less under the emulator as it is."""

    experiment: str
    claim: Record
    neighbours: list[Record]
    emulated: dict
    run: Priced
    odds: float
    changed: list[Odds]
    needed: list[tuple[float, float]]
    reference: list[tuple[int, float, float, Priced]]
    published: list[PublishedRun]
    audit: list[Audited]
    articles: list[dict]
    claimed: dict

    @property
    def counts(self) -> dict[str, int]:
        counted = Counter(one.verdict for one in self.audit)
        return {word: counted[word] for word in (CONSISTENT, INCONSISTENT, NOT_TESTABLE)}

    @property
    def machine(self) -> str:
        return f"{self.emulated['chips']:,} x {self.emulated['chip']} ({self.emulated['mesh']})"

    @property
    def where(self) -> str:
        low, high = self.run.interval_s
        seconds = self.claim.seconds
        return "less than" if seconds < low else "more than" if seconds > high else "within"

    @property
    def line(self) -> str:
        """The verdict in one line."""
        low, high = self.run.interval_s
        made = [one for one in self.changed if one.run]
        least, most = min(made, key=lambda one: one.odds), max(made, key=lambda one: one.odds)
        return (
            f"{self.claim.seconds:g} s is {self.where} what the emulator expects of {self.machine}: "
            f"{self.run.median_s:.1f} s, 5 to 95 %: {low:.1f} to {high:.1f} s. Odds of {self.claim.seconds:g} s or "
            f"less: {percent(self.odds)}; with one assumption changed, from {percent(least.odds)} ({least.about}: "
            f"{least.name}) to {percent(most.odds)} ({most.about}: {most.name}). Of {len(self.audit)} readings of what "
            f"the articles say of systems, {', '.join(f'{count} are {word}' for word, count in self.counts.items())}."
        )

    def as_dict(self) -> dict:
        low, high = self.run.interval_s
        return {
            "verdict": self.line,
            "experiment": self.experiment,
            "claim": self.claimed,
            "emulated": {
                "label": "emulated",
                "machine": self.machine,
                "time_to_train_s": self.run.median_s,
                "interval_s": [low, high],
                "epochs": list(self.run.epochs_interval),
                "images_per_s_per_chip": self.run.images_per_s_per_chip,
                "model_error": self.run.sigma,
                "odds": self.odds,
                "notes": self.emulated["notes"],
            },
            "assumptions": [one.as_dict() for one in self.changed],
            "region": {
                "line": [
                    {"epochs": epochs, "images_per_s_per_chip": rate if math.isfinite(rate) else None}
                    for epochs, rate in self.needed
                ],
                "reference_points": [
                    {
                        "label": "emulated",
                        "global_batch_size": batch,
                        "epochs": epochs,
                        "epochs_stdev": deviation,
                        "images_per_s_per_chip": at.images_per_s_per_chip,
                        "time_to_train_s": at.median_s,
                    }
                    for batch, epochs, deviation, at in self.reference
                ],
                "published_runs": [
                    {
                        "label": "claimed",
                        "record": one.record.id,
                        "chips": one.record.chips,
                        "epochs": one.record.epochs,
                        "seconds": one.record.seconds,
                        "images_per_s_per_chip": one.images_per_s_per_chip,
                    }
                    for one in self.published
                ],
            },
            "audit": {"rule": RULE, "counts": self.counts, "claims": [one.as_dict() for one in self.audit]},
        }


def as_text(found: Verdict, explain: bool) -> str:
    """For a terminal. explain: also the arithmetic and the sources of every claim."""
    parts = [f"Verdict: {found.line}", HOW]
    for title, words, table in sections(found)[:-1]:
        parts += [f"{title}\n" + "\n".join(filter(None, [words, aligned(table)]))]
    parts += [audit_text(found)]
    parts += [RULE] + (
        [proofs(found, markdown=False)] if explain else ["explain=true prints every claim's arithmetic and sources."]
    )
    return "\n\n".join(parts)


def as_markdown(found: Verdict) -> str:
    """For verdict.md and TensorBoard's text page."""
    parts = [f"**{found.line}**", HOW]
    for title, words, table in sections(found):
        parts += [f"## {title}", *filter(None, [words, markdown_table(table)])]
    parts += [RULE, "## Arithmetic and sources", proofs(found, markdown=True)]
    return "\n\n".join(parts) + "\n"


def sections(found: Verdict) -> list[tuple[str, str, list[list[str]]]]:
    """(title, a sentence, table) in the order of reading."""
    seconds = f"{found.claim.seconds:g} s"
    return [
        ("The claim and its neighbours", "", beside(found)),
        (
            f"What {seconds} needs",
            f"Evaluations and start-up of the emulated run are inside the {seconds}.",
            needs(found),
        ),
        (
            f"Odds of {seconds} or less, one assumption changed at a time",
            "All emulated; the first row changes nothing.",
            odds_table(found),
        ),
        (
            "Published runs in the same plane",
            "The rate is a steady epoch's, evaluations inside, start-up outside.",
            runs_table(found),
        ),
        (
            "MLPerf's reference convergence points on this machine",
            "Epochs are the reference's; rate and time are emulated.",
            reference_table(found),
        ),
        ("What the articles say of systems", "", audit_table(found)),
    ]


def beside(found: Verdict) -> list[list[str]]:
    rows = [["who", "chips", "batch", "epochs", "claimed", "emulated", "5 to 95 %"]]
    for record in (found.claim, *found.neighbours):
        batch = f"{record.global_batch:,}" if isinstance(record.global_batch, int) else record.global_batch or "-"
        epochs = f"{record.epochs:g}" if record.epochs else "-"
        rows.append([record.system, f"{record.chips:,}", batch, epochs, f"{record.seconds:.1f} s", "", ""])
    low, high = found.run.interval_s
    size = f"{found.run.global_batch_size:,}"
    rows.append([f"this emulator, {found.experiment}", f"{found.run.chips:,}", size, spread(found.run), ""])
    rows[-1] += [f"{found.run.median_s:.1f} s", f"{low:.1f} to {high:.1f} s"]
    return rows


def needs(found: Verdict) -> list[list[str]]:
    rows = [
        [
            "epochs",
            f"images/s a chip that {found.claim.seconds:g} s needs",
            "emulated images/s a chip",
            "needed / emulated",
        ]
    ]
    rate = found.run.images_per_s_per_chip
    for epochs, needed in found.needed:
        rows.append([f"{epochs:g}", f"{needed:,.0f}", f"{rate:,.0f}", f"{needed / rate:.2f}"])
    return rows


def odds_table(found: Verdict) -> list[list[str]]:
    rows = [["about", "assumption", "epochs", "images/s a chip", "time, emulated", "5 to 95 %", "odds"]]
    plain = Odds("", "as it is", found.run, found.odds)
    for one in (plain, *found.changed):
        if one.run is None:
            rows.append([one.about, one.name, "", "", "", "", f"left out: {one.left_out}"])
            continue
        low, high = one.run.interval_s
        rows.append([one.about, one.name, spread(one.run), f"{one.run.images_per_s_per_chip:,.0f}"])
        rows[-1] += [f"{one.run.median_s:.1f} s", f"{low:.1f} to {high:.1f} s", percent(one.odds)]
    return rows


def runs_table(found: Verdict) -> list[list[str]]:
    rows = [["run", "batch", "epochs", "claimed", "images/s a chip, claimed"]]
    for one in found.published:
        rows.append([one.short, f"{one.record.global_batch:,}", f"{one.record.epochs:g}"])
        rows[-1] += [f"{one.record.seconds:.1f} s", f"{one.images_per_s_per_chip:,.0f}"]
    return rows


def reference_table(found: Verdict) -> list[list[str]]:
    rows = [["batch", "epochs", "images/s a chip, emulated", "time, emulated"]]
    for batch, epochs, deviation, at in found.reference:
        rows.append([f"{batch:,}", f"{epochs:.1f} +- {deviation:.1f}", f"{at.images_per_s_per_chip:,.0f}"])
        rows[-1].append(f"{at.median_s:.1f} s")
    return rows


def audit_table(found: Verdict) -> list[list[str]]:
    rows = [["statement", "read as", "claimed", "recomputed", "emulated", "against", "verdict"]]
    said = None
    for one in found.audit:
        words = one.statement if (one.article, one.statement) != said else SAME
        said = one.article, one.statement
        claimed = with_unit(one.claimed, one.unit)
        recomputed, emulated = (values(span, one.shows) for span in (one.recomputed, one.emulated))
        rows.append([words, one.reading, claimed, recomputed, emulated, one.against, one.verdict])
    return rows


def audit_text(found: Verdict) -> str:
    """The audit's table for a terminal: the statement above its readings, what it is read as below each."""
    head, *rows = audit_table(found)
    cells = aligned([head[2:], *(row[2:] for row in rows)]).splitlines()
    lines, article = ["What the articles say of systems", f"    {cells[0]}"], None
    for one, row, cell in zip(found.audit, rows, cells[1:], strict=True):
        if one.article != article:
            article = one.article
            lines += ["", f"{article}, {one.date}"]
        lines += [f'  "{row[0]}"'] if row[0] != SAME else []
        lines += [f"    {cell}"] + ([f"        read as: {row[1]}"] if row[1] else [])
    return "\n".join([*lines, "", *silent(found)])


def proofs(found: Verdict, markdown: bool) -> str:
    """Every claim's arithmetic, figures, and what is missing, by article."""
    lines, article = [], None
    head, item, inner, code = ("\n### ", "- ", "    - ", "`") if markdown else ("\n", "  ", "      ", "")
    for one in found.audit:
        if one.article != article:
            article = one.article
            lines += [f"{head}{article}, {one.date}", *([""] if markdown else [])]
        read = f" ({one.reading})" if one.reading else ""
        lines.append(f"{item}{one.id}: {one.statement}{read}: {one.verdict}, against {AGAINST[one.against]}")
        if one.arithmetic:
            span = values(one.recomputed or one.emulated, one.shows)
            lines.append(f"{inner}{code}{one.arithmetic}{code} = {span}")
        lines += [f"{inner}{code}{each.name}{code} = {each.value:.10g}: {each.source}" for each in one.figures]
        lines += [f"{inner}not published: {one.missing}"] if one.missing else []
        lines += [f"{inner}{one.note}"] if one.note else []
    return "\n".join([*lines, "", *silent(found)]).strip()


def silent(found: Verdict) -> list[str]:
    """The articles without a figure of a system."""
    return [
        f"{article['outlet']}: {article['title']}, {article['date']}: no figure of a system"
        for article in found.articles
        if not article["claims"]
    ]


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; the last is not padded."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def values(span: tuple[float, float] | None, unit: str) -> str:
    if span is None:
        return ""
    low, high = (figure(each, unit) for each in span)
    return with_unit(low if low == high else f"{low} to {high}", unit)


def with_unit(text: str, unit: str) -> str:
    return text if unit == "year" else f"{text} {unit}".strip()


def figure(value: float, unit: str) -> str:
    """Four digits, or all of a whole number."""
    if unit == "year":
        return f"{value:.0f}"
    return f"{value:,.0f}" if value >= 1000 or value == round(value) else f"{value:.4g}"


def spread(run: Priced) -> str:
    low, high = run.epochs_interval
    return f"{low:g}" if low == high else f"{low:.3g} to {high:.3g}"


def percent(odds: float) -> str:
    """Whole percents; what is nearly impossible or sure is said to be so."""
    return "below 1 %" if odds < 0.01 else "above 99 %" if odds > 0.99 else f"{100 * odds:.0f} %"
