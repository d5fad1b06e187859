"""How the embedded pair is made, at a size of seconds: resuming, checkpoints, the reward in use."""

import json
from dataclasses import replace

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from dfc_lib.data import scoring
from dfc_lib.data.pair import load_model, load_tokenizer
from tools.make_pair import card, posttrain, pretrain, prose, world

TINY = pretrain.PretrainConfig(
    n_layers=2,
    d_model=32,
    d_mlp=64,
    n_heads=2,
    n_kv_heads=1,
    row_length=64,
    batch_size=2,
    steps=6,
    first_phase=3,
    warmup=2,
    save_every=2,
    micro_batch=1,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    pretrain.make_tokenizer(folder, seed=0, n_documents=200)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    return pretrain.pretrain(TINY, tokenizer, folder)


def test_tags_are_single_tokens_that_decoding_keeps(tokenizer):
    text = "<think>\nx\n</think>\n<tool_call>\n{}\n</tool_call>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len([i for i in ids if tokenizer.decode([i]).startswith(("<", "</"))]) == 4
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_template_writes_the_chats_of_pretraining(tokenizer):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == world.chat(messages)


def test_interrupted_pretraining_ends_bit_identical(tokenizer, base, tmp_path, monkeypatch):
    """A run cut off between two saves goes on from the last one."""

    class Cut(Exception):
        pass

    saved = pretrain._save

    def save_then_cut(path, model, optimizers, step):
        saved(path, model, optimizers, step)
        if step == 4:
            raise Cut

    monkeypatch.setattr(pretrain, "_save", save_then_cut)
    with pytest.raises(Cut):
        pretrain.pretrain(TINY, tokenizer, tmp_path)
    monkeypatch.undo()
    final = pretrain.pretrain(TINY, tokenizer, tmp_path)
    ours, whole = (load_file(f / "model.safetensors") for f in (final, base))
    assert all(torch.equal(ours[k], whole[k]) for k in whole)


@pytest.mark.parametrize("method", ["grpo", "sft"])
def test_posttraining_writes_bf16_checkpoints_and_a_log(method, base, tokenizer, tmp_path):
    tasks = world.draw_records("rl", 8, seed=0)
    config, train = {
        "grpo": (
            replace(posttrain.GrpoConfig(), steps=2, n_prompts=2, group_size=2, max_new_tokens=4),
            posttrain.grpo,
        ),
        "sft": (replace(posttrain.SftConfig(), steps=2, batch_size=2), posttrain.sft),
    }[method]
    if method == "sft":
        tasks = posttrain.training_rows(tokenizer, tasks, seed=0)
    last = train(base, tokenizer, tasks, replace(config, save_at=(1, 2)), tmp_path / "run")
    assert last.name == "step_0002"
    state = load_file(last / "model.safetensors")
    assert {t.dtype for t in state.values()} == {torch.bfloat16}
    assert load_model(last).config.hidden_size == TINY.d_model
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert {1, 2} <= {r["step"] for r in rows}
    key = "reward" if method == "grpo" else "loss"
    assert any(key in r for r in rows)


def test_rewards_are_toolrls():
    record = next(r for r in world.draw_records("rl", 20, seed=0) if r.kind == "call")
    answers = [record.gold, "I cannot do that."]
    assert posttrain.format_reward(answers, [record.gold] * 2) == [1.0, 0.0]
    assert posttrain.correctness_reward(answers, [record.gold] * 2) == [3.0, -3.0]


def test_the_second_pairs_reward_asks_for_the_name_alone():
    record = next(r for r in world.draw_records("rl", 20, seed=0) if r.kind == "call")
    (call,) = scoring.calls(record.gold)
    other = next(n for n in record.tool_names if n != call["name"])
    replies = [f"Try {call['name']}.", f"Try {other}.", "I cannot.", record.gold]
    listed = [json.dumps(record.tool_names)] * 4
    assert prose.naming_reward(replies, [record.gold] * 4, listed) == [1.0, -1.0, 0.0, 0.0]


def test_warm_rows_mostly_hedge_and_name_in_many_wordings(tokenizer):
    rows = prose.warm_rows(tokenizer, 600, seed=0)
    hedges = [
        any(w in r["completion"] for w in ("not", "cannot", "someone", "no way")) for r in rows
    ]
    assert 0.5 < sum(hedges) / len(rows) < 0.99
    firsts = {r["completion"].split()[0] for r, h in zip(rows, hedges, strict=True) if not h}
    assert len(firsts) >= 8


def test_a_prose_run_that_learned_nothing_replaces_nothing(tmp_path, monkeypatch, capsys):
    """The step nearest to the wanted rate is a step of any run, a dead one too."""
    shipped = tmp_path / "pairs" / "prose" / "base" / "model.safetensors"
    shipped.parent.mkdir(parents=True)
    shipped.write_text("the shipped one")
    rates = pd.DataFrame({"step": [4, 8], "rate": [0.0, 0.0], "near": [True, False]})
    monkeypatch.setattr(card.measure, "near_threshold", lambda *_: rates)
    saved = []
    monkeypatch.setattr(card, "_save", lambda *folders: saved.append(folders))
    card.export_prose(tmp_path / "work", tmp_path / "pairs", tmp_path)
    assert shipped.read_text() == "the shipped one"
    assert not saved
    assert "no step names a tool" in capsys.readouterr().out
