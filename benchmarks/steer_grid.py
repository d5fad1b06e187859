"""How fast is a grid of interventions? The engine against two plain loops.

    python benchmarks/steer_grid.py            # 40 prompts x 30 cells, loops on a sample of prompts
    python benchmarks/steer_grid.py --full     # loops on every prompt
    python benchmarks/steer_grid.py --quick    # 4 prompts x 6 cells of 16 tokens

The grid has the published shape (arXiv 2606.26474): the top 1, 2, 3, 4, 5 and 7 features, each at
alpha 2, 4, 8, 16 and 32, at the last prompt token of model A, with the clean and the reconstruction
run that the cells are held against. The features are those with the largest mean activation on the
prompts, of all that write to A: in the A-exclusive block most are silent, their cells change
nothing, and the engine decodes equal vectors once, which would flatter it. How many vectors are
distinct is printed. All contenders decode greedily on the embedded pair, in float32, in the same
process:

- ``engine``: ``dfc_lib.steering.generation.generate`` as the notebooks call it, every prompt and
  cell in one call.
- ``fair loop``: ``reference.generate_reference`` (Hugging Face's forward pass and KV cache), a
  batch of one; per prompt both models' activations, clean and reconstruction are computed once.
- ``as published``: the same loop, where every cell of every prompt begins anew: both models'
  activations, the clean run, the reconstruction, the steered run. The activation passes stop at the
  site, which is cheaper than the full passes of the published code.

The loops take all cells of a sample of prompts, evenly spaced by length, and their rates are those
of the sample. Greedy tokens must be equal wherever two contenders ran the same (prompt, cell), else
the program fails. The crosscoder is the notebooks' one (last tokens, tied) where it has been
trained, else a freshly initialised one. Ratios are of the wall clock, and of this process's CPU
time, which other work on the machine does not lengthen. Peak memory is what the process (or the
GPU) holds beyond what it held before the contender started. A GPU is used if there is one. Nothing
is written unless ``--json`` asks for it.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import common
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.reference import generate_reference
from dfc_lib import paths, profiles
from dfc_lib.crosscoder import training
from dfc_lib.crosscoder.model import Crosscoder
from dfc_lib.crosscoder.partition import Normaliser, Partition
from dfc_lib.crosscoder.recipes import Recipe
from dfc_lib.data import prompts
from dfc_lib.data.activations import residual
from dfc_lib.data.pair import Pair, load_pair
from dfc_lib.steering import evaluation, generation
from dfc_lib.steering.interventions import Clean, Codec, Reconstruction, Steer, apply

FEATURES, ALPHAS = (1, 2, 3, 4, 5, 7), (2.0, 4.0, 8.0, 16.0, 32.0)
Tokens = dict[tuple[int, str], list[int]]  # (prompt, cell) -> continuation


# --------------------------------------------------------------------------------------------------
# What is run


def site_of(pair: Pair, prompt: list[int]) -> torch.Tensor:
    """(token, model, d_model): both models' residuals at the site."""
    ids = torch.tensor([prompt], device=next(pair.models["A"].parameters()).device)
    return torch.stack([residual(m, pair.layer, ids)[0] for m in pair.models.values()], 1).float()


def shared_crosscoder(profile: profiles.Profile, h: torch.Tensor) -> tuple[Crosscoder, str]:
    """The notebooks' crosscoder if there is one (nothing is trained here), else a fresh one."""
    build = paths.build(profile.name)
    if (build / "activations" / "train_last" / "manifest.json").is_file():
        job = Recipe(profile, vectors="last", tie_shared=True).job(profile.seeds[0])
        if (training.run_directory(job.config, build, job.data_key) / "cfg.json").is_file():
            return training.get_all({"": job}, build, progress=False)[""], "trained"
    partition = Partition.dedicated(profile.dict_size, profile.exclusive_share)
    torch.manual_seed(0)
    fresh = Crosscoder.create(h.shape[-1], partition, profile.k, Normaliser.fit(h.cpu()))
    return fresh.to(h.device).requires_grad_(False), "freshly initialised"


def published_grid(crosscoder: Crosscoder, h: torch.Tensor, cells: int) -> dict:
    """Clean, reconstruction, and the first ``cells`` cells of the grid."""
    codec, writes_to_a = Codec(crosscoder), crosscoder.partition.mask()[:, 0].to(h.device)
    activity = crosscoder.encode(h).mean(0) * writes_to_a
    top = activity.argsort(descending=True, stable=True).tolist()
    grid = {f"{n}|{a:g}": Steer(codec, tuple(top[:n]), a) for n in FEATURES for a in ALPHAS}
    grid = dict(list(grid.items())[:cells])
    return {"clean": Clean(), "reconstruction": Reconstruction(codec)} | grid


# --------------------------------------------------------------------------------------------------
# Contenders: each gives the tokens of every (prompt, cell) it ran


def run_engine(pair: Pair, ids: list[list[int]], grid: dict, length: int, batch: int) -> Tokens:
    table = generation.generate(
        pair,
        "A",
        ids,
        grid,
        max_new_tokens=length,
        batch_size=batch,
        eos=evaluation.end_tokens(pair.models["A"], pair.tokenizer),
        readout=evaluation.opener_ids(pair.tokenizer),
        progress=False,
    )
    return {(row.prompt, row.cell): row.tokens for row in table.itertuples()}


def _one(pair: Pair, prompt: list[int], cell, length: int, hidden: torch.Tensor) -> list[int]:
    eos = evaluation.end_tokens(pair.models["A"], pair.tokenizer)
    args = pair, "A", prompt, cell
    return generate_reference(*args, max_new_tokens=length, eos=eos, hidden=hidden)[0]


def run_fair(pair: Pair, ids: list[list[int]], grid: dict, length: int, some: list[int]) -> Tokens:
    out = {}
    for i in some:
        hidden = site_of(pair, ids[i])
        for name, cell in grid.items():
            out[i, name] = _one(pair, ids[i], cell, length, hidden)
    return out


def run_published(
    pair: Pair, ids: list[list[int]], grid: dict, length: int, some: list[int]
) -> Tokens:
    out = {}
    for i in some:
        for name in list(grid)[2:]:
            hidden = site_of(pair, ids[i])
            for again in ("clean", "reconstruction", name):
                out[i, again] = _one(pair, ids[i], grid[again], length, hidden)
    return out


def timed(run: Callable[[], Tokens], device: str) -> tuple[Tokens, dict]:
    """What a contender gives, its seconds (wall clock and CPU) and its peak of memory."""
    gc.collect()
    before = common.memory_now(device)
    common.reset_peak(device)
    start, cpu = time.perf_counter(), time.process_time()
    out = run()
    if device == "cuda":
        torch.cuda.synchronize()
    cost = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    return out, cost | {"peak_MB": (common.peak_now(device) - before) / 2**20}


COLUMNS = (
    "{contender:>12} {prompts:>7} {cells:>5} {seconds:9.2f} {pairs_per_s:8.2f} {ms_per_pair:8.2f} "
    "{time_vs_engine:8.1f} {cpu_vs_engine:8.1f} {peak_MB:8.0f} {same_tokens:>12}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--cells", type=int, default=30, help="of the 30 of the grid, the first")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument(
        "--batch-size", type=int, default=512, help="rows the engine decodes at once"
    )
    parser.add_argument(
        "--fair-prompts", type=int, default=6, help="prompts the fair loop is run on"
    )
    parser.add_argument("--published-prompts", type=int, default=2, help="likewise, as published")
    parser.add_argument("--full", action="store_true", help="both loops on every prompt")
    parser.add_argument("--quick", action="store_true", help="4 prompts x 6 cells of 16 tokens")
    common.add_options(parser)
    args = parser.parse_args()
    if args.quick:
        args.prompts, args.cells, args.max_new_tokens = 4, 6, 16
        args.fair_prompts, args.published_prompts = 2, 1
    if args.full:
        args.fair_prompts = args.published_prompts = args.prompts
    device = common.set_up(args)

    profile = profiles.get("toy")
    locations = {"A": profile.location(profile.model_a), "B": profile.location(profile.model_b)}
    pair = load_pair(locations, profile.layer, device=device)
    records = prompts.read_records(paths.DATA / "prompts" / "evaluation.jsonl")
    records = [r for r in records if r.kind == "call" and not r.held_out][: args.prompts]
    texts = [prompts.chat_text(pair.tokenizer, r, prompts.FIXED_STYLE) for r in records]
    ids = sorted(prompts.encode(pair.tokenizer, texts), key=len)
    h = torch.stack([site_of(pair, prompt)[-1] for prompt in ids])
    crosscoder, origin = shared_crosscoder(profile, h)
    grid, length = published_grid(crosscoder, h, args.cells), args.max_new_tokens

    def sample(n: int) -> list[int]:
        """``n`` prompts, evenly spaced by length."""
        return np.unique(((np.arange(n) + 0.5) * len(ids) / n).astype(int)).tolist()

    contenders = {
        "engine": (range(len(ids)), lambda _: run_engine(pair, ids, grid, length, args.batch_size)),
        "fair loop": (
            sample(args.fair_prompts),
            lambda some: run_fair(pair, ids, grid, length, some),
        ),
        "as published": (
            sample(args.published_prompts),
            lambda some: run_published(pair, ids, grid, length, some),
        ),
    }
    processor = f"CPU, {torch.get_num_threads()} thread(s)"
    if device == "cuda":
        processor = torch.cuda.get_device_name()
    lengths = [len(prompt) for prompt in ids]
    print(f"torch {torch.__version__}, {processor}, float32")
    print(
        f"{len(ids)} prompts of {min(lengths)} to {max(lengths)} tokens x {len(grid) - 2} cells of "
        f"up to {length} tokens, {origin} crosscoder"
    )
    print(
        "   contender prompts cells   seconds  pairs/s  ms/pair x engine    x CPU  peak MB  "
        "same tokens"
    )

    small = ids[:1], dict(list(grid.items())[:3]), 2  # what is imported or built once is not timed
    run_engine(pair, *small, args.batch_size)
    run_published(pair, *small, [0])

    table, engine = [], {}
    for name, (some, run) in contenders.items():
        tokens, cost = timed(lambda some=some, run=run: run(list(some)), device)
        engine = engine or tokens
        different = [where for where, found in tokens.items() if engine[where] != found]
        pairs = len(some) * (len(grid) - 2)
        row = {"contender": name, "prompts": len(some), "cells": len(grid) - 2, **cost}
        row |= {"pairs_per_s": pairs / row["seconds"], "ms_per_pair": 1e3 * row["seconds"] / pairs}
        row["cpu_ms_per_pair"] = 1e3 * row["cpu_seconds"] / pairs
        table.append(row)
        row["time_vs_engine"] = row["ms_per_pair"] / table[0]["ms_per_pair"]
        row["cpu_vs_engine"] = row["cpu_ms_per_pair"] / table[0]["cpu_ms_per_pair"]
        row["same_tokens"] = f"{len(tokens) - len(different)} of {len(tokens)}"
        print(COLUMNS.format(**row), flush=True)
        if different:
            sys.exit(f"{name} and the engine give other tokens at (prompt, cell): {different[:5]}")
    changed = sum(engine[i, cell] != engine[i, "clean"] for i, cell in engine if "|" in cell)
    vectors = torch.stack([apply(cell, h)[0] for cell in grid.values()], 1)  # (prompt, cell, d)
    distinct = sum(len(of_prompt.unique(dim=0)) for of_prompt in vectors)
    print(
        f"{sum(map(len, engine.values())):,} tokens; {distinct} of {len(engine)} vectors are "
        f"distinct; {changed / (len(ids) * (len(grid) - 2)):.0%} of the cells change the answer"
    )
    if args.json:
        content = {"torch": torch.__version__, "processor": processor, "crosscoder": origin}
        content |= {"max_new_tokens": length, "distinct_vectors": distinct, "rows": table}
        args.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
