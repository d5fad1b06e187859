"""The rules give the verdicts that they should, and the scorecard lists every reading once."""

from math import nan

import pandas as pd
import pytest

from dfc_lib import profiles
from dfc_lib.results import claims, figures, readings
from dfc_lib.results.claims import Claim
from dfc_lib.results.readings import Reading


def claim(kind="effect", expected=0.6):
    return Claim(id="X", statement="", published="", kind=kind, expected=expected, quantity="rate")


def found(effect, low, high, control=None, over_low=nan, over_high=nan, claim="X"):
    against = {}
    if control is not None:
        against = {"control": "random", "control_effect": control, "over": effect - control}
        against |= {"over_low": over_low, "over_high": over_high}
    return Reading(
        claim=claim, id="calibrated", what="", effect=effect, low=low, high=high, n=100, **against
    )


@pytest.mark.parametrize(
    ("kind", "expected", "reading", "verdict"),
    [
        ("effect", 0.6, found(0.5, 0.4, 0.6), "holds"),
        ("effect", 0.6, found(0.2, 0.15, 0.25), "fails"),  # excludes half of the published one
        ("effect", 0.6, found(0.3, -0.1, 0.7), "undecided"),
        ("effect", 0.6, found(0.5, 0.4, 0.6, control=0.1, over_low=0.3, over_high=0.5), "holds"),
        ("effect", 0.6, found(0.5, 0.4, 0.6, control=0.5, over_low=-0.1, over_high=0.1), "fails"),
        ("effect", 0.6, found(0.5, 0.4, 0.6, 0.4, -0.1, 0.3), "undecided"),
        ("effect", -0.1, found(-0.2, -0.3, -0.1), "holds"),
        ("effect", -0.1, found(0.1, 0.0, 0.2), "fails"),
        ("effect", -0.1, found(-0.2, -0.3, -0.1, -0.05, -0.25, -0.05), "holds"),
        ("effect", -0.1, found(-0.2, -0.3, -0.1, -0.25, -0.05, 0.15), "fails"),
        ("zero", 0.05, found(0.0, -0.02, 0.03), "holds"),
        ("zero", 0.05, found(0.2, 0.1, 0.3), "fails"),
        ("zero", 0.05, found(0.04, -0.02, 0.1), "undecided"),
        ("zero", 0.05, found(0.03, 0.01, 0.05), "holds"),  # not zero, but within the margin
        ("effect", 0.6, found(nan, nan, nan), "undecided"),
    ],
)
def test_verdicts_follow_the_rules(kind, expected, reading, verdict):
    assert claims.judge(claim(kind, expected), reading) == verdict


def test_every_claim_is_there_once():
    ids = [c.id for c in claims.CLAIMS]
    assert len(set(ids)) == len(ids)
    base = {id.split(" ")[0] for id in ids}
    assert base == {f"C{i}" for i in range(1, 15)} | {f"D{i}" for i in range(1, 5)}
    assert {c.kind for c in claims.CLAIMS} == {"effect", "zero"}


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """Saves readings as a notebook would, into an empty build folder."""
    smoke = profiles.PROFILES["smoke"]
    monkeypatch.setenv("DFC_BUILD", str(tmp_path))
    monkeypatch.setattr("dfc_lib.paths.NOTEBOOKS", tmp_path)
    (tmp_path / "05_x.ipynb").write_text("save_readings(")

    def save(*some):
        readings.save_readings("05", some, smoke)
        return smoke

    return save


def test_the_scorecard_judges_every_reading(saved):
    """In the order of the claims; a claim without a reading has no line."""
    half = found(0.2, 0.1, 0.3, claim="C1")
    card = claims.scorecard(saved(found(0.0, -0.01, 0.01, claim="C6"), half))
    assert card[["claim", "id", "effect", "verdict", "notebook"]].to_numpy().tolist() == [
        ["C1", "calibrated", 0.2, "holds", "05_x"],
        ["C6", "calibrated", 0.0, "holds", "05_x"],
    ]
    assert card.statement.str.len().min() > 0
    assert card.quantity.tolist() == ["rate", "rate"]


def test_a_reading_of_no_claim_is_an_error(saved):
    """A misspelt claim would vanish from the scorecard."""
    with pytest.raises(ValueError, match=r"readings of C99: claims\.toml has no such claim"):
        claims.scorecard(saved(found(0.2, 0.1, 0.3, claim="C99")))


COMMITTED = figures.folder(profiles.get("toy"))


@pytest.mark.skipif(not (COMMITTED / "05_readings.csv").exists(), reason="no readings at toy yet")
def test_the_committed_results_answer_every_claim():
    """What notebook 11 shows: each reading has its interval around it, and a verdict."""
    card = claims.scorecard(profiles.get("toy"))
    assert set(card.claim) == {c.id for c in claims.CLAIMS}
    known = card[card.effect.notna() & card.low.notna()]
    assert (known.low <= known.effect + 1e-9).all()
    assert (known.effect <= known.high + 1e-9).all()
    assert pd.read_csv(COMMITTED / "11_claims.csv").verdict.tolist() == card.verdict.tolist()
