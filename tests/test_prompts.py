"""Prompt records on disk, and their layout."""

import pytest

from dfc_lib import paths
from dfc_lib.data import prompts
from tools.make_pair import world


def test_records_survive_the_disk(tmp_path):
    records = world.draw_records("selection", 5, seed=0)
    prompts.write_records(tmp_path / "selection.jsonl", records)
    assert prompts.read_records(tmp_path / "selection.jsonl") == records
    assert not list(tmp_path.glob("*.partial"))


def test_missing_file_and_bad_line_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="git checkout"):
        prompts.read_records(tmp_path / "nothing.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"id": "x"}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 1"):
        prompts.read_records(tmp_path / "bad.jsonl")


def test_shipped_splits_are_disjoint():
    splits = {
        s: prompts.read_records(paths.DATA / "prompts" / f"{s}.jsonl")
        for s in world.SPLITS
        if s != "pretrain"
    }
    prompts.assert_disjoint(**splits)
    assert {r.split for r in splits["rl"]} == {"rl"}
    assert sum(r.kind == "call" and not r.held_out for r in splits["evaluation"]) >= 300


@pytest.mark.parametrize("style", prompts.STYLES)
def test_every_style_shows_query_and_tools(style):
    (record,) = world.draw_records("selection", 1, seed=1)
    messages = prompts.STYLES[style].messages(record.tools, record.query)
    assert messages[0]["role"] == "system"
    assert all(name in messages[0]["content"] for name in record.tool_names)
    assert record.query in messages[-1]["content"]
    assert record.query not in prompts.published_text(record, style)


def test_the_fixed_prompt_is_one_that_rl_never_saw():
    assert prompts.FIXED_STYLE not in prompts.TRAINING_STYLES
    assert prompts.ELICITING_STYLE not in prompts.TRAINING_STYLES
