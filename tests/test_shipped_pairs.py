"""The shipped pairs do what their data card says, and the card says what was measured."""

import json

import pandas as pd
import pytest

from dfc_lib import paths
from dfc_lib.data.pair import SUMS, load_model, load_tokenizer, verify
from tools.make_pair import card, measure
from tools.make_pair.__main__ import PAIRS

SEEDS = sorted(int(p.name) for p in PAIRS.glob("[0-9]"))
MODELS = ("base", "near", "RL", "SFT")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_checkpoint_behaves_as_the_card_says(seed, model):
    """Greedy answers to 64 prompts under the fixed and the training prompt."""
    pair = PAIRS / str(seed)
    written = pd.read_csv(pair / "check.csv")
    again = card.check({model: card.models_of(pair)[model]}, paths.DATA)
    both = again.merge(written, on=["model", "condition", "metric", "n"], suffixes=("", "_card"))
    assert len(both) == len(again) == 4
    within = (both.low_card <= both.estimate) & (both.estimate <= both.high_card)
    assert within.all(), both[~within]


@pytest.mark.parametrize("seed", SEEDS)
def test_near_threshold_is_the_saved_step_that_the_rule_gives(seed):
    near = pd.read_csv(PAIRS / str(seed) / "near.csv")
    chosen = near[near.near]
    assert len(chosen) == 1
    assert abs(chosen.rate.iloc[0] - measure.NEAR) == (near.rate - measure.NEAR).abs().min()
    assert card.models_of(PAIRS / str(seed))["near"].is_dir()


@pytest.mark.parametrize("seed", SEEDS)
def test_every_pair_has_the_checkpoints_that_the_card_lists(seed):
    pair = PAIRS / str(seed)
    assert len(list(pair.glob("rl/step_*"))) == 6
    assert len(list(pair.glob("sft/step_*"))) == 5
    rows = [json.loads(line) for line in (pair / "pretrain_log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == sorted({r["step"] for r in rows})


def test_pairs_share_a_tokenizer_and_differ_in_their_bases():
    first, *others = (PAIRS / str(seed) / "base" for seed in SEEDS)
    weights = load_model(first).get_input_embeddings().weight
    for other in others:
        assert load_tokenizer(first).get_vocab() == load_tokenizer(other).get_vocab()
        assert not load_model(other).get_input_embeddings().weight.equal(weights)


def test_every_file_is_covered_by_the_checksums():
    listed = {line.split("  ")[1] for line in (PAIRS / SUMS).read_text().splitlines()}
    there = {p.relative_to(PAIRS).as_posix() for p in PAIRS.rglob("*") if p.is_file()}
    assert listed == there - {SUMS}
    verify(PAIRS / "0" / "base")


def test_the_card_shows_what_the_tables_hold():
    assert (PAIRS / "README.md").read_text(encoding="utf-8") == card.card(PAIRS)
