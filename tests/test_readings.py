"""Readings survive their file, and a missing one names the notebook to run."""

from math import isnan

import numpy as np
import pytest

from dfc_lib import paths, profiles
from dfc_lib.results import claims, readings
from dfc_lib.results.readings import Reading

SMOKE = profiles.PROFILES["smoke"]


@pytest.fixture(autouse=True)
def notebooks(tmp_path, monkeypatch):
    """A compendium of two notebooks that write readings and one that does not."""
    for name in ("DFC_FIGURES", "DFC_STAGING", "DFC_NOTEBOOK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DFC_BUILD", str(tmp_path / "build"))
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path)
    for name in ("05_steering", "06_spillover"):
        (tmp_path / f"{name}.ipynb").write_text("save_readings(number, found, profile)")
    (tmp_path / "14_scorecard.ipynb").write_text("{}")


def reading(claim="C1", id="calibrated", **values):
    return Reading(
        **{"claim": claim, "id": id, "what": "x", "effect": 0.5, "low": 0.4, "high": 0.6, "n": 9}
        | values
    )


def test_readings_come_back_as_they_were_saved():
    """An empty control must not come back as NaN, which would be one."""
    first = reading(control="random", control_effect=0.1, over=0.4, over_low=0.3, over_high=0.5)
    readings.save_readings("05", [first, reading(id="raw", unit="seeds")], SMOKE)
    readings.save_readings("06", [reading("C2", note="n")], SMOKE)
    back = readings.load_readings(SMOKE)
    assert back.notebook.tolist() == ["05_steering", "05_steering", "06_spillover"]
    found = [Reading(**row) for row in back.drop(columns="notebook").to_dict("records")]
    assert found[0].control == "random"
    assert (found[1].control, found[1].unit, found[2].note) == ("", "seeds", "n")
    assert isnan(found[1].control_effect)


def test_missing_readings_name_the_notebooks_to_run():
    """A scorecard with half of the claims would look like one with all."""
    with pytest.raises(FileNotFoundError, match=r"05_steering, 06_spillover.*NB='05 06'"):
        readings.load_readings(SMOKE)
    readings.save_readings("05", [reading()], SMOKE)
    with pytest.raises(FileNotFoundError, match=r"of 06_spillover at smoke.*NB=06 PROFILE=smoke"):
        readings.load_readings(SMOKE)


def test_an_id_names_one_reading():
    with pytest.raises(ValueError, match=r"twice: \[\('C1', 'calibrated'\)\]"):
        readings.save_readings("05", [reading(), reading("C2"), reading()], SMOKE)


def test_readings_of_recorded_outcomes_stand_apart(tmp_path):
    """They are of another pair, and their claims are not split by case as the scorecard's are."""
    about = '{"metadata": {"dfc": {"readings": "records"}}, "cells": ["save_readings(...)"]}'
    (tmp_path / "13_records.ipynb").write_text(about)
    for number in ("05", "06"):
        readings.save_readings(number, [reading()], SMOKE)
    assert len(readings.load_readings(SMOKE)) == 2  # nor is it missed
    readings.save_readings("13", [reading("C5")], SMOKE)
    assert readings.load_readings(SMOKE).notebook.tolist() == ["05_steering", "06_spillover"]


def test_a_reading_over_runs_resamples_runs_and_prompts():
    rng = np.random.default_rng(0)
    of_pairs = np.array([[0.1], [0.2], [0.3]]) + 0.01 * rng.normal(size=(3, 50))
    fixed = {"seed": 1, "n_bootstrap": 2_000}
    one = readings.over_runs(
        "C1", "x", "what", of_pairs, ("patch", of_pairs + 0.3), ("mean", of_pairs - 0.1), **fixed
    )
    assert (one.n, one.unit, one.interval) == (3, "pairs", "95 % t over pairs and prompts")
    assert one.effect == pytest.approx(of_pairs.mean())
    assert one.low < 0.0  # three pairs differ: their mean is known less well than any of them
    assert one.high > 0.4
    assert one.df == pytest.approx(2, rel=0.01)
    assert (one.over, one.over_low, one.over_high) == pytest.approx((0.1, 0.1, 0.1))  # paired
    assert one.positive_effect == pytest.approx(of_pairs.mean() + 0.3)
    alike = readings.over_runs("C1", "x", "what", of_pairs[:1], ("patch", of_pairs[:1]), **fixed)
    assert alike.interval == "95 % bootstrap over prompts (one of pairs)"
    assert alike.high - alike.low < 0.01


@pytest.mark.parametrize("values", [[], np.zeros((3, 5))])
def test_a_change_of_length_zero_is_no_reading(values):
    one = readings.over_runs("C1", "x", "", values, ("patch", np.ones((1, 5))), ("mean", [[1.0]]))
    assert np.isnan([one.effect, one.low, one.high, one.over]).all()
    assert (one.n, one.positive_effect) == (0, 1.0)
    assert not claims.testable(claims.CLAIMS[0], one)
