"""`make pair`: remake the embedded pair and its data from nothing, resumably.

Each stage leaves its result under `build/pair/` and is skipped where that exists; the last one
copies the models to `data/pair/`, measures them there and writes the data card.
"""

import argparse
import shutil
import time
from pathlib import Path

from dfc_lib import paths
from dfc_lib.data import prompts
from dfc_lib.data.pair import load_tokenizer
from tools.make_pair import card, posttrain, pretrain, prose, world

DATA_SEED = 0
N_RECORDS = {"rl": 3_000, "crosscoder": 4_000, "ranking": 800, "selection": 400, "evaluation": 900}
N_HELD_OUT = 300  # evaluation prompts about tools that neither SFT nor RL ever saw
N_NEUTRAL = {"crosscoder": 4_000, "ranking": 800, "evaluation": 500}
RL_SEEDS = (0, 1, 2)


def write_data(folder: Path) -> None:
    """Prompt records (asserted to be disjoint) and neutral texts of every split."""
    splits = {}
    for split, n in N_RECORDS.items():
        records = world.draw_records(split, n, DATA_SEED)
        if split == "evaluation":
            records += world.draw_records(split, N_HELD_OUT, DATA_SEED, held_out=True)
        splits[split] = records
    prompts.assert_disjoint(**splits)
    for split, records in splits.items():
        prompts.write_records(folder / "prompts" / f"{split}.jsonl", records)
    for split, n in N_NEUTRAL.items():
        texts = world.neutral_texts(split, n, DATA_SEED)
        prompts.write_neutral(folder / "neutral" / f"{split}.jsonl", texts)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.make_pair", description=__doc__)
    parser.add_argument("--until", choices=("pretrain", "sft", "grpo", "card"), default="card")
    until = parser.parse_args().until
    started = time.time()
    print("from nothing about two hours on two cores; finished stages are skipped", flush=True)

    def done(stage: str) -> None:
        print(f"[{(time.time() - started) / 60:5.1f} min] {stage}", flush=True)

    work = paths.build("pair")
    if not (paths.DATA / "prompts" / "evaluation.jsonl").exists():
        write_data(paths.DATA)
    done("data")

    config = pretrain.PretrainConfig()
    if not (work / "tokenizer" / "tokenizer.json").exists():
        pretrain.make_tokenizer(work / "tokenizer", config.seed)
    tokenizer = load_tokenizer(work / "tokenizer")
    base = pretrain.pretrain(config, tokenizer, work, work / "pretrain.jsonl")
    done("base")
    if until == "pretrain":
        return

    tasks = prompts.read_records(paths.DATA / "prompts" / "rl.jsonl")
    config = posttrain.SftConfig()
    rows = posttrain.training_rows(tokenizer, tasks, config.seed)
    posttrain.sft(base, tokenizer, rows, config, work / "sft")
    done("SFT")
    if until == "sft":
        return
    for seed in RL_SEEDS:
        posttrain.grpo(
            base, tokenizer, tasks, posttrain.GrpoConfig(seed=seed), work / f"rl_seed{seed}"
        )
        done(f"GRPO, seed {seed}")
    prose.make(base, tokenizer, tasks, work / "prose")
    done("the second pair")
    if until == "grpo":
        return

    card.export(work, tokenizer, paths.PAIR)
    card.write_checksums(paths.PAIR)
    done("exported")
    card.write(paths.PAIR, paths.DATA)
    card.write_checksums(paths.PAIR)
    shutil.rmtree(work / "trainer", ignore_errors=True)
    done("data card")


if __name__ == "__main__":
    main()
