"""The margin against its definition, and the scores of an evaluation."""

import math

import pytest
import torch

from dfc_lib import paths, profiles
from dfc_lib.data import prompts
from dfc_lib.data.pair import load_pair
from dfc_lib.steering import evaluation
from dfc_lib.steering.interventions import AddVector, Clean, OtherModel
from tools.make_pair import world


def test_margin_is_the_log_odds_of_all_openers():
    logits = torch.tensor([[1.0, 2.0, 0.5, -1.0]])
    p = logits.double().softmax(-1)[0]
    expected = math.log((p[1] + p[3]) / (p[0] + p[2]))
    assert evaluation.margin(logits, [1, 3]).item() == pytest.approx(expected)


def test_margin_does_not_overflow():
    logits = torch.tensor([[1e4, 0.0], [0.0, 1e4]])
    assert evaluation.margin(logits, [0]).tolist() == [1e4, -1e4]


def test_score_of_gold_and_of_a_hedge():
    record = next(r for r in world.draw_records("selection", 20, seed=0) if r.kind == "call")
    gold = evaluation.score(record, record.gold)
    assert (gold["lenient"], gold["strict"], gold["format"]) == (1, 1, 1)
    hedge = evaluation.score(record, "I cannot do that.")
    assert (hedge["lenient"], hedge["called"], hedge["format"]) == (0, 0, 0)


@pytest.mark.parametrize("shift", [-60.0, -3.0, 0.0, 5.0, 25.0])
def test_margin_from_the_openers_alone_equals_the_margin(shift):
    logits = torch.tensor([shift, 0.0, shift - 1, -0.5])
    log_p = logits.double().log_softmax(-1)[[0, 2]]
    assert evaluation.margin_of(log_p).item() == pytest.approx(
        evaluation.margin(logits, [0, 2]).item(), abs=1e-4
    )


@pytest.fixture(scope="module")
def pair():
    profile = profiles.get("smoke")
    locations = {"A": profile.location(profile.model_a), "B": profile.location(profile.model_b)}
    return load_pair(locations, profile.layer)


@pytest.fixture(scope="module")
def records():
    return prompts.read_records(paths.DATA / "prompts" / "selection.jsonl")[:12]


def test_intervening_with_nothing_equals_evaluating(pair, records):
    """Two paths to the same behaviour: the engine's clean cell, and plain sampling at T = 0."""
    cells = {"clean": Clean(), "the base's activation": OtherModel(1)}
    got = evaluation.intervene(pair, "A", records, cells, progress=False)
    clean = got[got.cell == "clean"].reset_index(drop=True)
    want = evaluation.evaluate(pair.models["A"], pair.tokenizer, records, prompts.FIXED_STYLE)
    assert clean.response.tolist() == want.response.tolist()
    assert clean.lenient.tolist() == want.lenient.tolist()
    assert clean.margin.tolist() == pytest.approx(want.margin.tolist(), abs=1e-3)
    assert (got[got.cell != "clean"].delta > 0).all()


def test_levels_are_columns(pair, records):
    """A grid comes back as a tidy table: nobody splits names again."""
    vector = torch.ones(pair.d_model)
    cells = {"clean": Clean(), ("other",): OtherModel(1)}
    cells |= {("added", seed, a): AddVector(vector, a) for seed in (0, 1) for a in (0.5, 2.0)}
    levels, some = ("cell", "seed", "alpha"), records[:2]
    got = evaluation.intervene(
        pair, "A", some, cells, levels=levels, max_new_tokens=3, progress=False
    )
    rubrics = list(evaluation.score(records[0], ""))
    assert list(got) == ["prompt", *levels, "delta", "response", "margin", "propensity", *rubrics]
    assert got.prompt.tolist() == [0] * 6 + [1] * 6
    assert got.cell.tolist() == ["clean", "other", *["added"] * 4] * 2
    assert got[["seed", "alpha"]].isna().all(axis=1).tolist() == [True, True, *[False] * 4] * 2
    assert got.seed.dropna().tolist() == [0, 0, 1, 1] * 2
    assert got.alpha.dropna().tolist() == [0.5, 2.0, 0.5, 2.0] * 2
    ratio = got[got.cell == "added"].groupby("alpha").delta.mean()
    assert ratio[2.0] == pytest.approx(4 * ratio[0.5])


def test_unusable_records_and_levels_are_named(pair, records):
    cells = {("clean", 1): Clean()}
    with pytest.raises(ValueError, match="records is empty"):
        evaluation.intervene(pair, "A", [], cells, levels=("cell", "seed"))
    with pytest.raises(ValueError, match=r"\('clean', 1\) has more values than the levels"):
        evaluation.intervene(pair, "A", records, cells)
    with pytest.raises(ValueError, match="two columns delta"):
        evaluation.intervene(pair, "A", records, cells, levels=("cell", "delta"))
