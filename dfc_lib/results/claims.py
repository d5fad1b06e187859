"""What the studies claim, and a verdict on what was found here, by the same rules for all.

The claims are in ``claims.toml``; what was found are *readings* (:mod:`dfc_lib.results.readings`),
one number with its interval each, which notebooks write. The rules for a reading:

- it is *untestable* unless a **positive control** shows that it could have come out otherwise: at
  the same site, on the same prompts and by the same outcome, something moves by at least half of
  the published effect, in its direction (for a zero: beyond the margin, either way), and the
  interval of that excludes zero. Nor is there a test without an interval, or where nothing at all
  changed (0 with an interval of width 0: a change of length zero looks like this);
- an **effect** *holds* if its interval lies above zero in the claimed direction and it exceeds the
  strongest control by a margin whose interval lies above zero too; it *fails* if its interval
  excludes half of the published effect, or if the control does as well: the effect lies above zero,
  but the whole interval of its margin below a tenth of the published effect; otherwise it is
  *undecided*;
- a **zero** (nothing happens, no difference) *holds* if the interval lies within +-``expected``,
  *fails* if it excludes zero and reaches beyond, and is *undecided* otherwise.

A claim has one verdict, that of its **primary** reading, which ``claims.toml`` names before it is
made; until it is there, the nearest one stands in. A claim of several parts asserts them all: it
fails if one of them does, else it is untestable or undecided if one of them is, else it holds.

The primaries share one error rate of 5 % (Holm): where the p-value of what a verdict asserts does
not survive, it is *undecided*. The p-value is two-sided and follows from the interval, of which
that half counts that faces what is excluded: Student's with the reading's degrees of freedom, else
a normal's. So at 95 % it is below 5 % exactly where the interval excludes it. A primary that
asserts nothing counts as p = 1.
"""

import re
import tomllib
from dataclasses import asdict, dataclass
from math import inf, isnan, nan
from pathlib import Path
from typing import Literal

import pandas as pd
from scipy.stats import t as student

from dfc_lib.profiles import Profile
from dfc_lib.results import readings
from dfc_lib.results.readings import Reading

Verdict = Literal["fails", "untestable", "undecided", "holds"]
DECISIVE: tuple[Verdict, ...] = ("fails", "untestable", "undecided", "holds")  # of parts, the first
NEGLIGIBLE = 0.1  # of the published effect: a margin over the control below this says nothing


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A published claim, or a part of one."""

    id: str  # C4; with the part in brackets where there are several: C5 (DFC)
    statement: str
    published: str  # the published figure, as published
    kind: Literal["effect", "zero"]
    expected: float  # the published effect in the quantity's unit; for a zero, the margin
    quantity: str  # what is measured
    primary: str  # the id of the reading that the verdict stands on
    definition: str  # what that reading is
    stand_in: str  # the id of the nearest reading, for as long as that one is not there


CLAIMS = tuple(
    Claim(**row)
    for row in tomllib.loads(Path(__file__).with_name("claims.toml").read_text("utf-8"))["claim"]
)


def _directed(claim: Claim, effect: float, low: float, high: float) -> tuple[float, float, float]:
    """An effect and its interval, the claimed direction upwards."""
    return (-effect, -high, -low) if claim.expected < 0 else (effect, low, high)


def testable(claim: Claim, reading: Reading) -> bool:
    """Whether the reading could have come out otherwise, by the rules above."""
    numbers = reading.effect, reading.low, reading.high
    moved = reading.positive_effect, reading.positive_low, reading.positive_high
    if not reading.positive_control or any(map(isnan, numbers + moved)) or not any(numbers):
        return False
    effect, low, high = _directed(claim, *moved)
    if claim.kind == "zero":
        return abs(effect) > claim.expected and (low > 0 or high < 0)
    return effect >= abs(claim.expected) / 2 and low > 0


def judge(claim: Claim, reading: Reading) -> tuple[Verdict, float]:
    """The verdict on one reading, by the rules above, and the p-value of what it asserts.

    The p-value is NaN where nothing is asserted.
    """
    if not testable(claim, reading):
        return "untestable", nan
    effect, low, high = _directed(claim, reading.effect, reading.low, reading.high)
    over, over_low, over_high = _directed(claim, reading.over, reading.over_low, reading.over_high)

    def p(estimate: float, end: float, null: float, df: float = reading.df) -> float:
        """The p-value of ``null``, from that end of the interval which faces it."""
        spread = student(df if df > 0 else inf)
        reach = spread.ppf(0.5 + _level(reading) / 2)
        return 2 * spread.cdf(-reach * abs(estimate - null) / max(abs(estimate - end), 1e-12))

    def margin(end: float, null: float) -> float:
        return p(over, end, null, reading.over_df)

    if claim.kind == "zero":
        within = claim.expected
        if -within <= low and high <= within:
            return "holds", max(p(effect, low, -within), p(effect, high, within))
        if (low > 0 and high > within) or (high < 0 and low < -within):
            return "fails", p(effect, low if low > 0 else high, 0)
        return "undecided", nan
    half, little = abs(claim.expected) / 2, abs(claim.expected) * NEGLIGIBLE
    if high < half:
        return "fails", p(effect, high, half)
    if low > 0 and reading.control and over_high < little:
        return "fails", margin(over_high, little)
    if low > 0 and (not reading.control or over_low > 0):
        return "holds", max(p(effect, low, 0), margin(over_low, 0) if reading.control else 0)
    return "undecided", nan


def _level(reading: Reading) -> float:
    """The confidence level of a reading's interval, which is named in words."""
    if found := re.search(r"(\d+) %", reading.interval):
        return int(found[1]) / 100
    raise ValueError(
        f"{reading.claim}, {reading.id}: the interval {reading.interval!r} names no level; begin "
        "it as in '95 % bootstrap over prompts'"
    )


def details(profile: Profile) -> pd.DataFrame:
    """One line per claim or part and reading, in the order of the claims.

    Returns:
        the columns of :class:`Claim` but for the names of readings, those of :class:`Reading`,
        ``notebook``, ``stands_in`` (for the primary, which is not there), ``p``, ``p_holm``
        (primaries only) and ``verdict``. Every claim has one line with ``primary``; where neither
        that reading nor its stand-in exists, its ``id`` is empty.

    Raises:
        FileNotFoundError: a notebook's readings are missing; the message says how to make them.
        ValueError: a reading is of a claim that does not exist, or has the name of another.
    """
    from statsmodels.stats.multitest import multipletests

    found = readings.load_readings(profile)
    known = [claim.id for claim in CLAIMS]
    if unknown := set(found.claim) - set(known):
        raise ValueError(
            f"readings of {', '.join(sorted(unknown))}: claims.toml has no such claim; it has "
            f"{', '.join(known)}"
        )
    for reading in found[found.duplicated(["claim", "id"])].itertuples():
        raise ValueError(
            f"{reading.notebook}: {reading.claim}, {reading.id}: another notebook has a reading of "
            "that name; rename one"
        )
    rows = []
    for claim in CLAIMS:
        mine = found[found.claim == claim.id]
        there = [id for id in (claim.primary, claim.stand_in) if id in set(mine.id)]
        if not there:
            none = Reading(claim=claim.id, id="", what="", effect=nan, low=nan, high=nan, n=0)
            mine = pd.DataFrame([asdict(none) | {"notebook": ""}])
        primary = there[0] if there else ""
        for reading in mine.itertuples(index=False):
            verdict, p = judge(claim, reading)
            row = asdict(claim) | reading._asdict() | {"verdict": verdict, "p": p}
            row |= {"claim": claim.id, "primary": reading.id == primary}
            rows.append(row | {"stands_in": row["primary"] and primary == claim.stand_in})
    table = pd.DataFrame(rows).drop(columns="stand_in")
    table = table[["claim", *table.columns.drop("claim")]]
    family = table.p[table.primary]
    table.loc[table.primary, "p_holm"] = multipletests(family.fillna(1), method="holm")[1]
    table.loc[table.p.notna() & (table.p_holm > 0.05), "verdict"] = "undecided"
    return table


def scorecard(profile: Profile) -> pd.DataFrame:
    """One line per claim, C1 to C14 and D1 to D4: the primary reading and the claim's verdict.

    Returns:
        the columns of :func:`details`, and ``part``, the part that decides the verdict: its
        reading is shown. Further ``agree`` of ``others``: how many of the claim's other readings
        have its verdict.
    """
    table = details(profile)
    table = table.assign(part=table.claim, claim=table.claim.str.split(" ").str[0])
    primaries = table[table.primary]
    decisive = primaries.verdict.map(DECISIVE.index).sort_values(kind="stable").index
    card = primaries.loc[decisive].drop_duplicates("claim").sort_index().set_index("claim")
    words = primaries.groupby("claim")[["statement", "published"]].agg("; ".join)
    same = table.verdict == table.claim.map(card.verdict)
    counts = same.groupby(table.claim).agg(["sum", "size"]) - 1
    card[["statement", "published"]] = words
    return card.assign(agree=counts["sum"], others=counts["size"]).reset_index()
