"""The margin against its definition, and the scores of an evaluation."""

import math

import pytest
import torch

from dfc_lib import evaluation
from dfc_lib.toyworld import world


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
    assert (gold["lenient"], gold["strict"], gold["reward"]) == (1, 1, 4)
    hedge = evaluation.score(record, "I cannot do that.")
    assert (hedge["lenient"], hedge["called"], hedge["reward"]) == (0, 0, -3)
