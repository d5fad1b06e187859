"""The rules give the verdicts that they should, and the scorecard lists every reading once."""

from dataclasses import replace
from math import isnan, nan

import hypothesis.strategies as st
import pandas as pd
import pytest
from hypothesis import given, settings

from dfc_lib import profiles
from dfc_lib.results import claims, figures, readings
from dfc_lib.results.claims import Claim
from dfc_lib.results.readings import Reading


def claim(kind="effect", expected=0.6):
    """A claim that is not in claims.toml."""
    words = dict.fromkeys(("statement", "published", "definition"), "")
    ids = {"primary": "propensity", "stand_in": "calibrated"}
    return Claim(id="X", kind=kind, expected=expected, quantity="rate", **words, **ids)


def found(effect, low, high, control=None, over_low=nan, over_high=nan, **more):
    """A reading whose positive control moves by 0.9 or, where told, does something else."""
    against = {}
    if control is not None:
        against = {"control": "random", "control_effect": control, "over": effect - control}
        against |= {"over_low": over_low, "over_high": over_high}
    positive = {"positive_control": "patch", "positive_effect": 0.9}
    positive |= {"positive_low": 0.8, "positive_high": 0.95}
    fixed = {"claim": "X", "id": "calibrated", "what": "", "n": 100} | against | positive
    return Reading(effect=effect, low=low, high=high, **(fixed | more))


def moved(effect, low, high):
    """What the positive control of a reading does."""
    return {"positive_effect": effect, "positive_low": low, "positive_high": high}


DOWN = moved(-0.9, -0.95, -0.8)
ALIVE = found(0.4, 0.35, 0.45, control=0.0, over_low=0.3, over_high=0.5)


@pytest.mark.parametrize(
    ("kind", "expected", "reading", "verdict"),
    [
        ("effect", 0.6, found(0.5, 0.4, 0.6), "holds"),
        ("effect", 0.6, found(0.2, 0.15, 0.25), "fails"),  # excludes half of the published one
        ("effect", 0.6, found(0.3, -0.1, 0.7), "undecided"),
        ("effect", 0.6, found(0.5, 0.4, 0.6, control=0.1, over_low=0.3, over_high=0.5), "holds"),
        # A control does as well only where its margin is small as a whole, not by its sign.
        ("effect", 0.6, found(0.5, 0.4, 0.6, 0.5, over_low=-0.05, over_high=0.05), "fails"),
        ("effect", 0.6, found(0.5, 0.4, 0.6, 0.49, over_low=0.0, over_high=0.02), "fails"),
        ("effect", 0.6, found(0.5, 0.4, 0.6, 0.51, over_low=-0.1, over_high=0.1), "undecided"),
        ("effect", 0.6, found(0.5, 0.4, 0.6, 0.4, -0.1, 0.3), "undecided"),
        ("effect", -0.1, found(-0.2, -0.3, -0.1, **DOWN), "holds"),
        ("effect", -0.1, found(0.1, 0.0, 0.2, **DOWN), "fails"),
        ("effect", -0.1, found(-0.2, -0.3, -0.1, -0.05, -0.25, -0.05, **DOWN), "holds"),
        ("effect", -0.1, found(-0.2, -0.3, -0.1, -0.25, 0.0, 0.1, **DOWN), "fails"),
        ("zero", 0.05, found(0.0, -0.02, 0.03), "holds"),
        ("zero", 0.05, found(0.2, 0.1, 0.3), "fails"),
        ("zero", 0.05, found(-0.2, -0.3, -0.1), "fails"),
        ("zero", 0.05, found(0.04, -0.02, 0.1), "undecided"),
        ("zero", 0.05, found(0.03, 0.01, 0.05), "holds"),  # not zero, but within the margin
    ],
)
def test_verdicts_follow_the_rules(kind, expected, reading, verdict):
    assert claims.judge(claim(kind, expected), reading)[0] == verdict


@pytest.mark.parametrize(
    ("kind", "expected", "reading", "verdict"),
    [
        # Nothing changed on any prompt: a dead block, a silent set times any factor.
        ("effect", 0.6, found(0.0, 0.0, 0.0), "untestable"),
        ("zero", 0.05, found(0.0, 0.0, 0.0), "untestable"),
        ("effect", 0.6, found(0.0, 0.0, 0.0, 0.0, 0.0, 0.0), "untestable"),
        # The base was asked where even model A's whole state yields no call.
        ("effect", 0.6, found(0.0, 0.0, 0.018, **moved(0.0, 0.0, 0.018)), "untestable"),
        ("zero", 0.05, found(0.0, 0.0, 0.018, **moved(0.0, 0.0, 0.018)), "untestable"),
        # With sensitivity the same data speak; the control that is 0 too says nothing.
        ("effect", 0.6, found(0.0, 0.0, 0.018, 0.0, -0.018, 0.018), "fails"),
        ("effect", 0.6, found(0.0, -0.4, 0.4, 0.0, -0.4, 0.4), "undecided"),
        ("zero", 0.05, found(0.0, 0.0, 0.018), "holds"),
        ("zero", 0.05, found(0.0, 0.0, 0.018, **DOWN), "holds"),  # either way, for a zero
        # A control that does as much as the effect, where there is one.
        ("effect", 0.6, found(0.5, 0.4, 0.6, 0.5, 0.0, 0.0), "fails"),
        ("effect", 0.6, found(0.5, 0.4, 0.6, 0.1), "undecided"),  # its margin is not known
        # Too few prompts: wide intervals, or none from a single one.
        ("effect", 0.6, found(0.5, -0.2, 1.0, n=3), "undecided"),
        ("zero", 0.05, found(0.0, 0.0, 0.7, n=3), "undecided"),
        ("effect", 0.6, found(1.0, nan, nan, n=1), "untestable"),
        ("effect", 0.6, replace(ALIVE, **moved(0.7, -0.1, 1.0)), "untestable"),
        # The positive control: half of the published effect, its sign, its interval.
        ("effect", 0.6, replace(ALIVE, **moved(0.3, 0.1, 0.5)), "holds"),
        ("effect", 0.6, replace(ALIVE, **moved(0.29, 0.1, 0.5)), "untestable"),
        ("effect", 0.6, replace(ALIVE, **DOWN), "untestable"),
        ("effect", -0.1, found(-0.2, -0.3, -0.1), "untestable"),
        ("zero", 0.05, found(0.0, -0.02, 0.03, **moved(0.05, 0.01, 0.09)), "untestable"),
        ("effect", 0.6, replace(ALIVE, positive_control=""), "untestable"),
        ("effect", 0.6, replace(ALIVE, **moved(nan, nan, nan)), "untestable"),
        ("zero", 0.05, found(0.0, -0.02, 0.03, **moved(nan, nan, nan)), "untestable"),
        ("effect", 0.6, replace(ALIVE, **moved(0.7, 0.6, nan)), "untestable"),
        ("effect", 0.6, replace(ALIVE, effect=nan), "untestable"),
        ("effect", 0.6, replace(ALIVE, high=nan), "untestable"),
    ],
)
def test_a_verdict_needs_a_test_that_could_have_gone_the_other_way(
    kind, expected, reading, verdict
):
    assert claims.judge(claim(kind, expected), reading)[0] == verdict


NUMBERS = st.one_of(st.just(0.0), st.just(nan), st.floats(-2, 2))
INTERVALS = st.lists(st.one_of(st.just(0.0), st.floats(-2, 2)), min_size=3, max_size=3).map(sorted)


@settings(max_examples=1000)
@given(
    kind=st.sampled_from(["effect", "zero"]),
    expected=st.floats(0.01, 1),
    sign=st.sampled_from([-1, 1]),
    reading=st.lists(NUMBERS, min_size=4, max_size=4),
    interval=INTERVALS,
    control=st.sampled_from(["", "random"]),
    positive=st.sampled_from(["", "patch"]),
    moves=INTERVALS,
    missing=st.sampled_from([None, None, 0, 1, 2]),
)
def test_no_verdict_without_a_positive_control_that_moves(
    kind, expected, sign, reading, interval, control, positive, moves, missing
):
    """Nothing about a reading makes up for that. NaN, a wide interval: it does not move."""
    of = claim(kind, expected if kind == "zero" else sign * expected)
    still = not positive or missing is not None or moves[0] <= 0 <= moves[2]
    if missing is not None:
        moves[missing] = nan
    names = ("control_effect", "over", "over_low", "over_high")
    numbers = dict(zip(names, reading, strict=True))
    numbers |= dict(zip(("low", "effect", "high"), interval, strict=True))
    names = ("positive_low", "positive_effect", "positive_high")
    numbers |= dict(zip(names, moves, strict=True))
    words = {"control": control, "positive_control": positive}
    verdict, p = claims.judge(of, Reading(claim="X", id="x", what="", n=9, **words, **numbers))
    if still:
        assert verdict == "untestable"
    assert isnan(p) or (verdict in ("holds", "fails") and 0 <= p <= 1)


@given(
    effect=st.floats(-1, 1),
    below=st.floats(0.01, 1),
    above=st.floats(0.01, 1),
    kind=st.sampled_from(["effect", "zero"]),
)
def test_the_p_value_is_below_5_percent_where_the_interval_excludes(effect, below, above, kind):
    verdict, p = claims.judge(claim(kind, 0.3), found(effect, effect - below, effect + above))
    assert verdict == "undecided" or p <= 0.05 + 1e-9


def test_the_p_value_counts_the_half_of_the_interval_that_faces_the_null():
    """1.96 standard errors below 0.5, and a control that is two thirds of that away."""
    assert claims.judge(claim(), found(0.5, 0.25, 0.9))[1] == pytest.approx(8.9e-5, rel=0.01)
    weaker = found(0.5, 0.25, 0.9, control=0.2, over_low=0.1, over_high=0.6)
    assert claims.judge(claim(), weaker)[1] == pytest.approx(0.0033, rel=0.01)
    wide = replace(weaker, interval="90 % bootstrap over prompts")
    assert claims.judge(claim(), wide)[1] == pytest.approx(0.0136, rel=0.01)
    with pytest.raises(ValueError, match=r"X, calibrated: the interval 'wide' names no level"):
        claims.judge(claim(), replace(weaker, interval="wide"))


def test_the_p_value_knows_how_few_units_an_interval_rests_on():
    """At its end any interval excludes at 5 %; beyond, three pairs are surer of less than many."""
    many, few = (found(0.5, 0.25, 0.75, df=df) for df in (nan, 2.0))
    p_many, p_few = (claims.judge(claim(), one)[1] for one in (many, few))
    assert p_many == pytest.approx(8.9e-5, rel=0.01)
    assert p_few == pytest.approx(0.0132, rel=0.01)  # t = 2 * 4.303 with 2 degrees of freedom
    margin = found(0.5, 0.45, 0.55, control=0.2, over_low=0.15, over_high=0.45, over_df=2.0)
    assert claims.judge(claim(), margin) == ("holds", pytest.approx(0.0132, rel=0.01))
    at_end = found(0.5, 0.0, 1.0, df=2.0)
    assert claims.judge(claim(), replace(at_end, low=1e-9))[1] == pytest.approx(0.05, rel=1e-3)


def test_every_claim_is_there_once():
    ids = [c.id for c in claims.CLAIMS]
    assert len(set(ids)) == len(ids)
    base = {id.split(" ")[0] for id in ids}
    assert base == {f"C{i}" for i in range(1, 15)} | {f"D{i}" for i in range(1, 5)}
    assert {c.kind for c in claims.CLAIMS} == {"effect", "zero"}
    assert all(c.primary and c.stand_in and c.primary != c.stand_in for c in claims.CLAIMS)


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


def primary(id, *numbers, **more):
    """The reading that a claim's verdict stands on."""
    (name,) = [c.primary for c in claims.CLAIMS if c.id == id]
    return found(*numbers, claim=id, **({"id": name} | more))


def test_every_reading_is_judged_in_the_order_of_the_claims(saved):
    near = claims.CLAIMS[0].stand_in
    half = found(0.2, 0.1, 0.3, claim="C1", id=near)
    profile = saved(found(0.0, -0.01, 0.01, claim="C6"), half, replace(half, id="other"))
    table = claims.details(profile)
    table = table[table.id != ""]
    assert table[["claim", "id", "effect", "verdict", "primary"]].to_numpy().tolist() == [
        ["C1", near, 0.2, "holds", True],
        ["C1", "other", 0.2, "holds", False],
        ["C6", "calibrated", 0.0, "holds", True],
    ]
    assert set(table.notebook) == {"05_x"}


def test_the_scorecard_has_one_line_per_claim(saved):
    """One verdict, from the primary reading; the others are counted."""
    one = primary("C1", 0.3, 0.25, 0.35)
    beside = [replace(one, id=id, effect=0.01, low=-0.02, high=0.03) for id in ("a", "b")]
    card = claims.scorecard(saved(*beside, one, replace(one, id="c")))
    assert card.claim.tolist() == [f"C{i}" for i in range(1, 15)] + [f"D{i}" for i in range(1, 5)]
    first = card.iloc[0]
    assert (first.id, first.effect, first.verdict) == (one.id, 0.3, "holds")
    assert (first.agree, first.others, first.stands_in) == (1, 3, False)
    assert card.verdict[1:].tolist() == ["untestable"] * 17  # nobody read them
    assert not card.stands_in.any()
    assert card.statement.str.len().min() > 0


def test_the_nearest_reading_stands_in_and_the_table_says_so(saved):
    near = replace(primary("C6", 0.0, -0.01, 0.01), id="calibrated")
    row = claims.scorecard(saved(near)).set_index("claim").loc["C6"]
    assert (row.id, row.verdict, row.stands_in) == ("calibrated", "holds", True)
    meant = primary("C6", 0.3, 0.2, 0.4)
    row = claims.scorecard(saved(near, meant)).set_index("claim").loc["C6"]
    assert (row.id, row.verdict, row.stands_in) == (meant.id, "fails", False)


FLAT, STEEP = (0.0, -0.02, 0.02), (0.7, 0.6, 0.8)


@pytest.mark.parametrize(
    ("dfc", "plain", "verdict", "part"),
    [
        (primary("C5 (DFC)", *FLAT), primary("C5 (plain)", *STEEP), "holds", "C5 (DFC)"),
        (primary("C5 (DFC)", *FLAT), primary("C5 (plain)", *FLAT), "fails", "C5 (plain)"),
        (
            primary("C5 (DFC)", 0.0, 0.0, 0.0),
            primary("C5 (plain)", *STEEP),
            "untestable",
            "C5 (DFC)",
        ),
        (primary("C5 (DFC)", 0.0, 0.0, 0.0), primary("C5 (plain)", *FLAT), "fails", "C5 (plain)"),
        (
            primary("C5 (DFC)", 0.1, 0.0, 0.2),
            primary("C5 (plain)", *STEEP),
            "undecided",
            "C5 (DFC)",
        ),
    ],
)
def test_a_claim_of_two_parts_asserts_both(saved, dfc, plain, verdict, part):
    card = claims.scorecard(saved(dfc, plain)).set_index("claim")
    assert card.loc["C5", ["verdict", "part"]].tolist() == [verdict, part]
    assert len(card) == 18


def test_holm_takes_back_what_one_of_many_primaries_shows_by_chance(saved):
    """Just outside zero: p = 0.04, one of 21 primaries. Others are not corrected, nor is 1e-8."""
    barely = {"effect": 0.3, "low": 0.3 * (1 - 1.96 / 2.054), "high": 0.6}
    weak = primary("C1", *barely.values())
    strong = primary("C2", 0.3, 0.2, 0.4)
    table = claims.details(saved(weak, replace(weak, id="other"), strong)).set_index(
        ["claim", "id"]
    )
    assert table.loc[("C1", "other"), "verdict"] == "holds"
    assert table.loc[("C1", weak.id), "verdict"] == "undecided"
    assert table.loc[("C2", strong.id), "verdict"] == "holds"
    assert table.loc[("C1", weak.id), "p"] == pytest.approx(0.04, abs=1e-3)
    assert table.loc[("C1", weak.id), "p_holm"] == pytest.approx(20 * 0.04, abs=0.02)
    assert table.loc[("C2", strong.id), "p_holm"] < 1e-6
    assert table.p_holm.notna().tolist() == table.primary.tolist()


def test_a_reading_of_no_claim_is_an_error(saved):
    """A misspelt claim would vanish from the scorecard."""
    with pytest.raises(ValueError, match=r"readings of C99: claims\.toml has no such claim"):
        claims.scorecard(saved(found(0.2, 0.1, 0.3, claim="C99")))


def test_two_notebooks_cannot_use_one_name(saved, tmp_path):
    profile = saved(primary("C1", 0.3, 0.25, 0.35))
    (tmp_path / "06_y.ipynb").write_text("save_readings(")
    readings.save_readings("06", [primary("C1", 0.0, -0.1, 0.1)], profile)
    with pytest.raises(ValueError, match=r"06_y: C1, joint.* another notebook has a reading"):
        claims.details(profile)


COMMITTED = figures.folder(profiles.get("toy"))


@pytest.mark.skipif(not (COMMITTED / "05_readings.csv").exists(), reason="no readings at toy yet")
def test_the_committed_results_answer_every_claim():
    """What Notebook 14 shows: each reading has its interval around it, and a verdict."""
    toy = profiles.get("toy")
    table = claims.details(toy)
    assert (table.id != "").all()  # every primary is there, or its stand-in
    known = table[table.effect.notna() & table.low.notna()]
    assert (known.low <= known.effect + 1e-9).all()
    assert (known.effect <= known.high + 1e-9).all()
    assert pd.read_csv(COMMITTED / "14_claims.csv").verdict.tolist() == table.verdict.tolist()
    card = claims.scorecard(toy)
    assert pd.read_csv(COMMITTED / "14_scorecard.csv").verdict.tolist() == card.verdict.tolist()


def faults(table):
    """What no reading may do, as "claim, id: fault": one line per fault of a table of details."""

    def still(*columns):
        return (table[list(columns)].abs() < 1e-9).all(axis=1)

    judged, named = table.verdict != "untestable", table.control != ""
    own = table[["effect", "low", "high"]].to_numpy()
    positive = table[["positive_effect", "positive_low", "positive_high"]].to_numpy()
    found = {
        "a verdict on a change of length zero": judged & still("effect", "low", "high"),
        "a verdict without a positive control": judged & (table.positive_control == ""),
        "its control differs from it nowhere": (
            judged & named & still("over", "over_low", "over_high")
        ),
        "it is its own control": named
        & ((table.control == table.id) | (table.control == table.what)),
        "it is its own positive control": judged & (own == positive).all(axis=1),
    }
    return [
        f"{row.claim}, {row.id}: {fault}"
        for fault, bad in found.items()
        for row in table[bad].itertuples()
    ]


@pytest.mark.skipif(not (COMMITTED / "05_readings.csv").exists(), reason="no readings at toy yet")
def test_no_committed_verdict_stands_on_a_cell_beside_itself_or_on_no_change():
    """But for C14, where two changes turn the very same prompts: yes or no is a coarse outcome.

    That they are two shows in the propensity, which differs at every dose and seed.
    """
    doses = pd.read_csv(COMMITTED / "05_doses.csv")
    mean = doses[doses.what == "mean A - B"].set_index("dose").gain
    anchored = doses[(doses.what == "feature") & (doses.variant == "last anchored")]
    assert ((anchored.gain - anchored.dose.map(mean)).abs() > 0).all()
    allowed = {"C14, share that turns: its control differs from it nowhere"}
    assert set(faults(claims.details(profiles.get("toy")))) <= allowed


def test_such_verdicts_would_be_found(saved):
    """Tables as the rule alone would let them pass, one fault each."""
    good = primary("C1", 0.3, 0.25, 0.35, control=0.1, over_low=0.1, over_high=0.3)
    at = {"over": 0.0, "over_low": 0.0, "over_high": 0.0}
    profile = saved(
        good,
        replace(good, id="itself", control="itself"),
        replace(good, id="what", what="one feature", control="one feature"),
        replace(good, id="beside itself", control_effect=0.3, **at),
        replace(good, id="positive", **moved(0.3, 0.25, 0.35)),
    )
    table = claims.details(profile)
    assert faults(table) == [
        "C1, beside itself: its control differs from it nowhere",
        "C1, itself: it is its own control",
        "C1, what: it is its own control",
        "C1, positive: it is its own positive control",
    ]
    nothing = {"effect": 0.0, "low": 0.0, "high": 0.0, "positive_control": "", "verdict": "holds"}
    bad = table[table.id == good.id].assign(**nothing)  # a rule that forgot both
    assert faults(bad) == [
        f"C1, {good.id}: a verdict on a change of length zero",
        f"C1, {good.id}: a verdict without a positive control",
    ]
