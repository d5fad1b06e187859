"""What the studies claim, and a verdict on what was found here, by the same rules for all.

The claims are in ``claims.toml``; what was found are *readings* (:mod:`dfc_lib.results.readings`),
one number with its interval each, which notebooks write. The rules:

- an **effect** *holds* if its interval lies above zero in the claimed direction and it exceeds the
  strongest control by a margin whose interval lies above zero too; it *fails* if its interval
  excludes half of the published effect, or if the control does at least as well; otherwise it is
  *undecided*;
- a **zero** (nothing happens, no difference) *holds* if the interval lies within +-``expected``,
  *fails* if it excludes zero and reaches beyond, and is *undecided* otherwise.
"""

import tomllib
from dataclasses import asdict, dataclass
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dfc_lib.profiles import Profile
from dfc_lib.results import readings
from dfc_lib.results.readings import Reading

if TYPE_CHECKING:
    import pandas as pd

Verdict = Literal["holds", "fails", "undecided"]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A published claim."""

    id: str
    statement: str
    published: str  # the published figure, as published
    kind: Literal["effect", "zero"]
    expected: float  # the published effect in the quantity's unit; for a zero, the margin
    quantity: str  # what is measured


CLAIMS = tuple(
    Claim(**row)
    for row in tomllib.loads(Path(__file__).with_name("claims.toml").read_text("utf-8"))["claim"]
)


def judge(claim: Claim, reading: Reading) -> Verdict:
    """The verdict on one reading, by the rules above."""
    low, high = reading.low, reading.high
    if isnan(reading.effect):
        return "undecided"
    if claim.kind == "zero":
        margin = claim.expected
        if -margin <= low and high <= margin:
            return "holds"
        outside = (low > 0 and high > margin) or (high < 0 and low < -margin)
        return "fails" if outside else "undecided"
    effect, control, over_low = reading.effect, reading.control_effect, reading.over_low
    if claim.expected < 0:
        low, high, effect, control = -high, -low, -effect, -control
        over_low = -reading.over_high
    if high < abs(claim.expected) / 2 or (reading.control and control >= effect):
        return "fails"
    if low > 0 and (not reading.control or over_low > 0):
        return "holds"
    return "undecided"


def scorecard(profile: Profile) -> "pd.DataFrame":
    """One line per claim and reading, in the order of the claims.

    Returns:
        the claim's ``claim`` (its id), ``statement``, ``published``, ``kind``, ``expected``,
        ``quantity``, the columns of :class:`Reading`, ``notebook`` and ``verdict``. A claim that no
        notebook could read has no line.

    Raises:
        FileNotFoundError: a notebook's readings are missing; the message says how to make them.
        ValueError: a reading is of a claim that does not exist.
    """
    import pandas as pd

    found = readings.load_readings(profile)
    if unknown := set(found.claim) - {claim.id for claim in CLAIMS}:
        raise ValueError(
            f"readings of {', '.join(sorted(unknown))}: claims.toml has no such claim; it has "
            f"{', '.join(claim.id for claim in CLAIMS)}"
        )
    rows = []
    for claim in CLAIMS:
        for reading in found[found.claim == claim.id].itertuples(index=False):
            row = asdict(claim) | reading._asdict()  # the id is the reading's
            rows.append({"claim": claim.id} | row | {"verdict": judge(claim, reading)})
    return pd.DataFrame(rows)
