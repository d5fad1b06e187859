"""SFT and GRPO of the embedded pair, both by TRL, from the same base and on the same tasks.

The reward is ToolRL's (arXiv 2504.13958): format in {0, 1} plus correctness in [-3, 3]. As there,
GRPO runs at temperature 1 without a KL term; group size, learning rate and steps are those of a
model of a million parameters.
"""

import copy
import json
import os
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dfc_lib.data import prompts
from dfc_lib.data.pair import load_model
from dfc_lib.data.prompts import Record
from dfc_lib.data.scoring import toolrl_reward


@dataclass(frozen=True)
class GrpoConfig:
    """GRPO: one optimiser step per batch of `n_prompts` groups of `group_size` completions."""

    steps: int = 64
    n_prompts: int = 10
    group_size: int = 8
    learning_rate: float = 1e-4
    warmup: int = 5
    max_new_tokens: int = 72
    save_at: tuple[int, ...] = (*range(4, 25), 28, 32, 40, 48, 64)  # one is near threshold
    seed: int = 0


@dataclass(frozen=True)
class SftConfig:
    """SFT on the gold answers."""

    steps: int = 160
    batch_size: int = 32
    learning_rate: float = 5e-4
    warmup: int = 10
    save_at: tuple[int, ...] = (4, 8, 16, 32, 64, 96, 128, 160)
    seed: int = 0


def training_rows(tokenizer, records: Sequence[Record], seed: int) -> list[dict[str, str]]:
    """Prompt, gold and completion of each record, in one of the two training styles drawn per
    record.
    """
    rng = random.Random(f"styles-{seed}")
    return [
        {
            "prompt": prompts.chat_text(tokenizer, record, rng.choice(prompts.TRAINING_STYLES)),
            "gold": record.gold,
            "tools": json.dumps(record.tool_names),
            "completion": record.gold + tokenizer.eos_token,
        }
        for record in records
    ]


def format_reward(completions: list[str], gold: list[str], **_) -> list[float]:
    return [float(toolrl_reward(c, g)[0]) for c, g in zip(completions, gold, strict=True)]


def correctness_reward(completions: list[str], gold: list[str], **_) -> list[float]:
    return [float(toolrl_reward(c, g)[1]) for c, g in zip(completions, gold, strict=True)]


def _checkpointer(folder: Path, tokenizer, save_at: Sequence[int]):
    """A TRL callback that writes bf16 checkpoints at the given steps and the training log as JSON
    lines.
    """
    from transformers import TrainerCallback

    class Checkpointer(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **_):
            if state.global_step in save_at:
                save_bf16(model, tokenizer, folder / f"step_{state.global_step:04d}")

        def on_log(self, args, state, control, logs=None, **_):
            row = {"step": state.global_step} | {
                k: round(float(v), 6) for k, v in (logs or {}).items() if isinstance(v, int | float)
            }
            with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    return Checkpointer()


def save_bf16(model, tokenizer, folder: Path) -> None:
    """Write a model folder in Hugging Face layout, bf16 weights (temporary name, then rename)."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def _train(
    trainer: type,
    arguments: type,
    settings: Mapping[str, Any],
    base: Path,
    tokenizer,
    rows: Sequence[Mapping[str, str]],
    config: "GrpoConfig | SftConfig",
    folder: Path,
    **options: Any,
) -> Path:
    """Run a TRL trainer from a trainable copy of the base, unless its last checkpoint is there; a
    log that was cut off is begun anew. Returns the folder of the last checkpoint.
    """
    from datasets import Dataset

    last = folder / f"step_{config.save_at[-1]:04d}"
    if last.exists():
        return last
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").unlink(missing_ok=True)
    common = {
        "output_dir": str(folder / "trainer"),
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "max_steps": config.steps,
        "learning_rate": config.learning_rate,
        "warmup_steps": config.warmup,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": config.seed,
        "data_seed": config.seed,
        "gradient_checkpointing": False,
    }
    trainer(
        model=load_model(base).requires_grad_(True).train(),
        args=arguments(**common, **settings),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(list(rows)),
        callbacks=[_checkpointer(folder, tokenizer, config.save_at)],
        **options,
    ).train()
    return last


def grpo(
    base: Path,
    tokenizer,
    records: Sequence[Record],
    config: GrpoConfig,
    folder: Path,
    rewards: Sequence[Callable[..., list[float]]] = (format_reward, correctness_reward),
) -> Path:
    """Train with GRPO on the sum of the rewards; returns the folder of the last checkpoint."""
    from trl import GRPOConfig, GRPOTrainer

    rows = training_rows(tokenizer, records, config.seed)
    rows = [{name: row[name] for name in ("prompt", "gold", "tools")} for row in rows]
    settings = {
        "per_device_train_batch_size": config.n_prompts * config.group_size,
        "num_generations": config.group_size,
        "max_completion_length": config.max_new_tokens,
        "temperature": 1.0,
        "beta": 0.0,
        "loss_type": "grpo",
        "lr_scheduler_type": "constant_with_warmup",
        "max_grad_norm": 1.0,
    }
    given = (base, tokenizer, rows, config, folder)
    return _train(GRPOTrainer, GRPOConfig, settings, *given, reward_funcs=list(rewards))


def sft(
    base: Path, tokenizer, rows: Sequence[dict[str, str]], config: SftConfig, folder: Path
) -> Path:
    """Supervised fine-tuning on rows with `prompt` and `completion` (for the gold answers, those of
    `training_rows`); returns the folder of the last checkpoint.
    """
    from trl import SFTConfig, SFTTrainer

    rows = [{name: row[name] for name in ("prompt", "completion")} for row in rows]
    settings = {
        "per_device_train_batch_size": config.batch_size,
        "lr_scheduler_type": "linear",
        "completion_only_loss": True,
        "max_length": 1024,
        "shuffle_dataset": True,
    }
    return _train(SFTTrainer, SFTConfig, settings, base, tokenizer, rows, config, folder)
