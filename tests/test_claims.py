"""The rules give the verdicts that they should, and every claim can be read from the results."""

from math import nan

import pandas as pd
import pytest

from dfc_lib import profiles
from dfc_lib.results import claims, figures
from dfc_lib.results.claims import Claim, Finding


def claim(kind="effect", expected=0.6):
    return Claim("X", "", "", kind, expected, "rate", "", lambda load: [])


def finding(effect, low, high, control=None, over_low=nan, over_high=nan):
    if control is None:
        return Finding("calibrated", effect, low, high, 100)
    over = effect - control
    return Finding(
        "calibrated", effect, low, high, 100, "control", control, over, over_low, over_high
    )


@pytest.mark.parametrize(
    ("kind", "expected", "found", "verdict"),
    [
        ("effect", 0.6, finding(0.5, 0.4, 0.6), "holds"),
        ("effect", 0.6, finding(0.2, 0.15, 0.25), "fails"),  # excludes half of the published one
        ("effect", 0.6, finding(0.3, -0.1, 0.7), "undecided"),
        ("effect", 0.6, finding(0.5, 0.4, 0.6, control=0.1, over_low=0.3, over_high=0.5), "holds"),
        ("effect", 0.6, finding(0.5, 0.4, 0.6, control=0.5, over_low=-0.1, over_high=0.1), "fails"),
        (
            "effect",
            0.6,
            finding(0.5, 0.4, 0.6, control=0.4, over_low=-0.1, over_high=0.3),
            "undecided",
        ),
        ("effect", -0.1, finding(-0.2, -0.3, -0.1), "holds"),
        ("effect", -0.1, finding(0.1, 0.0, 0.2), "fails"),
        ("effect", -0.1, finding(-0.2, -0.3, -0.1, -0.05, -0.25, -0.05), "holds"),
        ("effect", -0.1, finding(-0.2, -0.3, -0.1, -0.25, -0.05, 0.15), "fails"),
        ("zero", 0.05, finding(0.0, -0.02, 0.03), "holds"),
        ("zero", 0.05, finding(0.2, 0.1, 0.3), "fails"),
        ("zero", 0.05, finding(0.04, -0.02, 0.1), "undecided"),
        ("zero", 0.05, finding(0.03, 0.01, 0.05), "holds"),  # not zero, but within the margin
        ("effect", 0.6, finding(nan, nan, nan), "undecided"),
    ],
)
def test_verdicts_follow_the_rules(kind, expected, found, verdict):
    assert claims.judge(claim(kind, expected), found) == verdict


def test_a_control_measured_apart_is_judged_conservatively():
    own = Finding("calibrated", 0.5, 0.4, 0.6, 100)
    beyond = claims._unpaired(own, "c", 0.3, 0.2, 0.45)
    assert beyond.over == pytest.approx(0.2)
    assert (beyond.over_low, beyond.over_high) == (pytest.approx(-0.05), pytest.approx(0.4))


def test_every_claim_is_there_once():
    ids = [c.id for c in claims.CLAIMS]
    assert len(set(ids)) == len(ids)
    base = {id.split(" ")[0] for id in ids}
    assert base == {f"C{i}" for i in range(1, 15)} | {f"D{i}" for i in range(1, 5)}


def test_a_table_that_has_changed_is_an_error():
    table = pd.DataFrame({"a": [1, 1], "b": [1, 2]})
    with pytest.raises(ValueError, match="no row with"):
        claims._where(table, a=3)
    with pytest.raises(ValueError, match="2 rows"):
        claims._one(table, a=1)


COMMITTED = figures.folder(profiles.get("toy")) / "11_claims.csv"


@pytest.mark.skipif(not COMMITTED.exists(), reason="notebook 11 has not run at toy yet")
def test_the_committed_results_answer_every_claim():
    """What notebook 11 shows: each finding has its interval around it, and a verdict."""
    profile = profiles.get("toy")
    card = claims.scorecard(profile)
    assert set(card.claim) == {c.id for c in claims.CLAIMS}
    known = card[card.effect.notna() & card.low.notna()]
    assert (known.low <= known.effect + 1e-9).all()
    assert (known.effect <= known.high + 1e-9).all()
    assert set(card.verdict) <= {"holds", "fails", "undecided"}
    assert (figures.folder(profile) / "11_scorecard.png").exists()
