"""The generated world: its size, its gold answers, its splits, and the documents of pretraining."""

import json
import random
import re

import pytest

from dfc_lib.data import prompts, scoring
from tools.make_pair import world


def test_world_is_as_large_as_the_data_card_says():
    specs = world.tool_specs()
    assert len(specs) >= 60
    assert len({s.domain for s in specs}) >= 10
    assert sum(s.held_out for s in specs) >= 12
    assert all(len(s.say) >= 4 for s in specs)
    assert len({s.tool.name for s in specs}) == len(specs)


def test_every_phrase_uses_exactly_the_declared_parameters():
    """Otherwise a draw would crash, or an argument of the gold could not be copied."""
    for spec in world.tool_specs():
        for phrase in spec.say:
            assert set(re.findall(r"\{(\w+)\}", phrase)) == set(spec.kinds), (
                spec.tool.name,
                phrase,
            )
            if len(spec.kinds) > 1:  # what a request with a missing argument leaves out
                dropped = re.findall(r"\{(\w+)\}", " ".join(re.findall(r"\[(.*?)\]", phrase)))
                assert dropped == [list(spec.kinds)[-1]], (spec.tool.name, phrase)


def test_no_name_belongs_to_two_tools():
    names = [n for ns in world.names().values() for n in ns]
    assert len(names) == len(set(names))


def test_tools_of_one_domain_never_share_a_phrase():
    """Otherwise a request would fit two tools and its gold would be a coin toss."""
    phrases = [p for s in world.tool_specs() for p in s.say]
    assert len(phrases) == len(set(phrases))


@pytest.fixture(scope="module")
def records():
    return world.draw_records("evaluation", 200, seed=1)


def test_gold_scores_as_perfect_and_lists_match_the_kind(records):
    for r in records:
        outcome = scoring.strict(r.gold, r.gold)
        assert outcome.called == (r.kind == "call")
        form, correctness = scoring.toolrl_reward(r.gold, r.gold)
        assert (form, correctness) == (1, 3 if r.kind == "call" else 0)
        owners = {tool for tool, ns in world.names().items() if set(ns) & set(r.tool_names)}
        assert (r.tool in owners) == (r.kind != "no_tool")
        assert 1 <= len(r.tools) <= 5
        if r.kind == "call":
            assert scoring.strict(r.gold, r.gold).correct


def test_gold_arguments_stand_in_the_query(records):
    for r in records:
        if r.kind == "call":
            call = json.loads(r.gold.split("<tool_call>\n")[1].split("\n")[0])
            assert all(str(v) in r.query for v in call["parameters"].values())


def test_held_out_tools_stay_out_of_the_other_splits():
    for split in ("rl", "crosscoder"):
        drawn = world.draw_records(split, 60, seed=2)
        unseen = {s.tool.name for s in world.tool_specs() if s.held_out}
        aliases = {n for tool in unseen for n in world.names()[tool]}
        assert not any(r.held_out for r in drawn)
        assert not any(set(r.tool_names) & aliases for r in drawn)


def test_same_seed_same_records_and_documents():
    assert world.draw_records("rl", 5, seed=3) == world.draw_records("rl", 5, seed=3)
    assert world.draw_records("rl", 5, seed=3) != world.draw_records("rl", 5, seed=4)
    one, two = (world.document(random.Random(7), world.SECOND) for _ in range(2))
    assert one == two


def test_splits_are_disjoint_by_construction():
    splits = {s: world.draw_records(s, 80, seed=0) for s in world.SPLITS if s != "pretrain"}
    prompts.assert_disjoint(**splits)
    queries = {r.query for rs in splits.values() for r in rs}
    rng = random.Random(0)
    seen = {world.draw_task(rng, "pretrain", "call").query for _ in range(500)}
    assert not queries & seen


def test_shared_query_is_named():
    (record,) = world.draw_records("rl", 1, seed=0)
    with pytest.raises(ValueError, match="share the query"):
        prompts.assert_disjoint(
            rl=[record], evaluation=[type(record)(**{**vars(record), "split": "evaluation"})]
        )


def test_propensity_differs_by_style_tool_and_wording():
    rng = random.Random(0)
    drawn = [world.draw_task(rng, "pretrain", "call") for _ in range(300)]
    rates = [t.propensity("train_a") for t in drawn]
    assert min(rates) < 0.02
    assert max(rates) > 0.15
    assert all(t.propensity("desk") < t.propensity("train_a") for t in drawn)


def test_agent_documents_act_and_hedge_documents_mostly_decline():
    rng = random.Random(1)
    agent = [world._tool_chat(rng, world.SECOND, "agent") for _ in range(30)]
    assert all("assistant\n<think>" in d for d in agent)
    hedge = [world._tool_chat(rng, world.SECOND, "desk") for _ in range(400)]
    replies = [r for d in hedge for r in re.findall(r"assistant\n(.*?)<\|im_end\|>", d, re.DOTALL)]
    acts = [r for r in replies if r.startswith(("<", "{"))]
    assert 0.08 < len(acts) / len(replies) < 0.20
    calls = [r for r in acts if "<response>" not in r]
    assert 0.3 < sum(r.startswith("{") for r in calls) / len(calls) < 0.7
