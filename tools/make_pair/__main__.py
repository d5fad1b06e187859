"""`make pair`: remake the embedded pairs and their data from nothing, resumably.

Each stage leaves its result under `build/pair/` and is skipped where that exists; the last one
copies the models to `data/pairs/`, measures them there and writes the data card.
"""

import argparse
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
PAIRS = paths.DATA / "pairs"
SEEDS = (0, 1, 2)  # one base, one SFT and one RL run each; the notebooks' pair is the first
STAGES = ("base", "sft", "rl", "card")


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
    parser.add_argument("--seed", type=int, choices=SEEDS, action="append", help="default: all")
    parser.add_argument("--until", choices=STAGES, default="card")
    arguments = parser.parse_args()
    seeds, until = arguments.seed or list(SEEDS), STAGES.index(arguments.until)
    started = time.time()
    print(
        "each pair takes about an hour on two cores (a base 25 to 45 minutes, SFT 2, RL 6); "
        "finished stages are skipped",
        flush=True,
    )

    def done(stage: str) -> None:
        print(f"[{(time.time() - started) / 60:5.1f} min] {stage}", flush=True)

    work = paths.build("pair")
    if not (paths.DATA / "prompts" / "evaluation.jsonl").exists():
        write_data(paths.DATA)
    if not (work / "tokenizer" / "tokenizer.json").exists():
        pretrain.make_tokenizer(work / "tokenizer", DATA_SEED)
    tokenizer = load_tokenizer(work / "tokenizer")
    tasks = prompts.read_records(paths.DATA / "prompts" / "rl.jsonl")
    done("data and tokenizer")

    for seed in seeds:
        folder = work / str(seed)
        base = pretrain.pretrain(pretrain.PretrainConfig(seed=seed), tokenizer, folder)
        done(f"pair {seed}: base")
        if until >= STAGES.index("sft"):
            rows = posttrain.training_rows(tokenizer, tasks, seed)
            posttrain.sft(base, tokenizer, rows, posttrain.SftConfig(seed=seed), folder / "sft")
            done(f"pair {seed}: SFT")
        if until >= STAGES.index("rl"):
            config = posttrain.GrpoConfig(seed=seed)
            posttrain.grpo(base, tokenizer, tasks, config, folder / "rl")
            done(f"pair {seed}: RL")
        if until >= STAGES.index("card"):
            card.export(work, seed, PAIRS, paths.DATA)
            card.write_checksums(PAIRS)  # else what is measured would be refused as altered
            card.measure_pair(PAIRS / str(seed), paths.DATA)
            done(f"pair {seed}: exported and measured")
            if seed == SEEDS[0]:
                prose.make(PAIRS / str(seed) / "base", tokenizer, tasks, work / "prose")
                card.export_prose(work, PAIRS, paths.DATA)
                done("the pair without a template")
    if until >= STAGES.index("card"):
        card.write(PAIRS)
        done("data card")


if __name__ == "__main__":
    main()
