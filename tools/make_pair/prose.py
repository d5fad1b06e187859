"""A second pair, whose rewarded behaviour has no fixed surface template: naming the right tool in
plain prose, in whatever words.

Its base is the first pair's base after a short SFT in which the assistant still mostly hedges and
now and then names the fitting tool, in one of many wordings. GRPO then rewards naming it. There is
no tag to detect, no fixed first token and no JSON; only the tool's name is checked.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dfc_lib.data import prompts
from dfc_lib.data.prompts import Record
from dfc_lib.data.scoring import names_tool
from tools.make_pair import posttrain, world

ODDS = 5.0
SFT = replace(posttrain.SftConfig(), steps=80, save_at=(80,))
GRPO = replace(posttrain.GrpoConfig(), steps=28, save_at=tuple(range(4, 29)))


def _propensity(task: world.Task, style: str) -> float:
    """The first pair's, at `ODDS` times the odds: GRPO needs something to reward."""
    p = task.propensity(style)
    return ODDS * p / (1 - p + ODDS * p)


def warm_rows(tokenizer, n: int, seed: int) -> list[dict[str, str]]:
    """Chats in the styles of the first pair's hedging chats: mostly a hedge, now and then a
    reply that names the fitting tool.
    """
    rng = random.Random(f"prose-{seed}")
    rows = []
    for i in range(n):
        style = rng.choice(list(world.STYLE_PROPENSITY))
        kind = world.draw_kind(rng)
        task = world.draw_task(rng, "pretrain", kind, held_out=False)
        tools = world.draw_tools(rng, task, kind, rng.randint(1, 4), held_out=False)
        acts = kind == "call" and rng.random() < _propensity(task, style)
        reply = rng.choice(world.TEXTS["namings" if acts else "hedges"])
        name = world.listed_name(task, tools) or ""
        reply = reply.replace("{name}", name).replace("{p}", task.phrase)
        record = world.record_of(f"prose-{i:05d}", "pretrain", kind, task, tools)
        prompt = prompts.chat_text(tokenizer, record, style)
        rows.append({"prompt": prompt, "completion": reply + tokenizer.eos_token})
    return rows


def naming_reward(
    completions: list[str], gold: list[str], tools: list[str], **_: object
) -> list[float]:
    """1 where the reply names the gold call's tool in prose, -1 where it names another listed one
    or any although none fits, else 0. `tools`: the listed names as JSON lists.
    """
    rewards = []
    for completion, answer, listed in zip(completions, gold, tools, strict=True):
        named = names_tool(completion, answer, json.loads(listed))
        rewards.append(1.0 if named.right else -1.0 if named.wrong else 0.0)
    return rewards


def make(base: Path, tokenizer, records: Sequence[Record], folder: Path) -> None:
    """The second base in `folder/base/step_*`, its GRPO checkpoints in `folder/rl/step_*`."""
    rows = warm_rows(tokenizer, 40 * SFT.steps, SFT.seed)
    warm = posttrain.sft(base, tokenizer, rows, SFT, folder / "base")
    posttrain.grpo(warm, tokenizer, records, GRPO, folder / "rl", rewards=[naming_reward])
