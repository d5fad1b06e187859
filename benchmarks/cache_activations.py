"""How fast are activations cached? `dfc_lib.data.activations.cache` against the plain loop.

    python benchmarks/cache_activations.py               # scaled to a CPU: about a minute
    python benchmarks/cache_activations.py --size qwen   # Qwen2.5-3B's true size, on a GPU
    python benchmarks/cache_activations.py --quick       # fewer prompts

The model is a randomly initialised Qwen2 of 36 blocks whose residual stream is read after block 13,
as in the study (arXiv 2606.26474). Weights do not matter for speed. ``scaled`` has Qwen2.5-3B's
proportions at an eighth of its width, vocabulary and feed-forward size, so that each part of the
forward pass keeps its share of the work; float32 on a CPU, bfloat16 on a GPU. The prompts are those
of the embedded pair's ranking split, tool prompts then prose; on a GPU each is repeated four times
over (``--repeat``), which makes them as long as ToolRL's. The last token's vector is wanted.
Contenders, on the same model, prompts and process:

- ``cache``: what the notebooks call: stops at the layer, batches of like lengths, no attention
  mask, and writes shards and checksums to disk.
- ``plain loop``: the published code's way: batches of eight in the given order, padded, a full
  forward pass with ``output_hidden_states=True``, one layer's last token taken from it.
- ``stops``: the plain loop with the forward pass left after the layer, for what that alone gives.

Contenders take turns, in rounds over the same prompts, so that other work on the machine hits all
of them; the ratio is of total times, its range over the rounds. Vectors must agree within the
rounding of the dtype, else the program fails. Nothing is written unless ``--json`` asks for it.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import common
import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from dfc_lib import paths, profiles
from dfc_lib.data import activations, prompts
from dfc_lib.data.pair import Pair, load_tokenizer

LAYER, PLAIN_BATCH = 13, 8
SIZES = {"scaled": 8, "qwen": 1}  # by what Qwen2.5-3B's width, vocabulary and so on are divided
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # relative, per vector


def build(divisor: int, dtype: torch.dtype, device: str) -> Qwen2ForCausalLM:
    """A random Qwen2 with Qwen2.5-3B's proportions."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=151_936 // divisor,
        hidden_size=2_048 // divisor,
        intermediate_size=11_008 // divisor,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        max_position_embeddings=32_768,
        tie_word_embeddings=True,
        dtype=dtype,
    )
    with torch.device(device):
        return Qwen2ForCausalLM(config).to(dtype).eval().requires_grad_(False)


def texts(n: int, repeat: int, vocabulary: int) -> list[list[int]]:
    """n prompts as token ids, the first half tool prompts, the second half prose."""
    tokenizer = load_tokenizer(profiles.get("toy").location("base"))
    records = prompts.read_records(paths.DATA / "prompts" / "ranking.jsonl")[: n // 2]
    prose = prompts.read_neutral(paths.DATA / "neutral" / "ranking.jsonl")[: n - len(records)]
    tool = [prompts.chat_text(tokenizer, r, prompts.FIXED_STYLE) for r in records]
    ids = [one * repeat for one in prompts.encode(tokenizer, tool + prose)]
    assert max(map(max, ids)) < vocabulary
    return ids


# --------------------------------------------------------------------------------------------------
# Contenders: each returns the last token's vector of every prompt, (prompt, d_model) float32


def run_cache(model: nn.Module, ids: list[list[int]], batch_size: int) -> Tensor:
    with tempfile.TemporaryDirectory() as folder:
        pair = Pair({"A": model}, None, LAYER)
        found = activations.cache(pair, ids, folder, batch_size=batch_size, progress=False)
        return found.to_tensor()[:, 0].clone()


@torch.no_grad()
def run_plain(model: nn.Module, ids: list[list[int]], stop: bool = False) -> Tensor:
    device, out = next(model.parameters()).device, []
    for start in range(0, len(ids), PLAIN_BATCH):
        some = [torch.tensor(one) for one in ids[start : start + PLAIN_BATCH]]
        batch = nn.utils.rnn.pad_sequence(some, batch_first=True).to(device)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(one) for one in some], batch_first=True)
        last = mask.sum(1) - 1
        if stop:
            h = activations.residual(model, LAYER, batch, mask.to(device))
        else:
            h = model(batch, attention_mask=mask.to(device), output_hidden_states=True)
            h = h.hidden_states[LAYER + 1]
        out.append(h[torch.arange(len(some)), last.to(h.device)].float().cpu())
    return torch.cat(out)


def timed(run: Callable[[], Tensor], device: str) -> tuple[Tensor, float, float]:
    """What it returns, seconds of the wall clock and of this process's CPU time."""
    wall, cpu = time.perf_counter(), time.process_time()
    vectors = run()
    if device == "cuda":
        torch.cuda.synchronize()
    return vectors, time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="scaled")
    parser.add_argument("--prompts", type=int, help="default: 128 on a CPU, 1024 on a GPU")
    parser.add_argument("--repeat", type=int, help="times a text is repeated; default: 1, GPU 4")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch-size", type=int, help="of the cache; default: 8, on a GPU 32")
    parser.add_argument("--quick", action="store_true", help="64 prompts, one round")
    common.add_options(parser)
    args = parser.parse_args()
    device = common.set_up(args)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    n = args.prompts or (1_024 if device == "cuda" else 128)
    n, rounds = (64, 1) if args.quick else (n, args.rounds)

    model = build(SIZES[args.size], dtype, device)
    ids = texts(n, args.repeat or (4 if device == "cuda" else 1), model.config.vocab_size)
    lengths = sorted(map(len, ids))
    processor = f"CPU, {torch.get_num_threads()} thread(s)"
    if device == "cuda":
        processor = torch.cuda.get_device_name()
    parameters = sum(p.numel() for p in model.parameters())
    print(f"torch {torch.__version__}, {processor}, {str(dtype).removeprefix('torch.')}")
    print(
        f"{parameters / 1e6:,.0f} M parameters, 36 layers, vectors after layer {LAYER}; {len(ids)} "
        f"prompts of {lengths[0]} to {lengths[-1]} tokens, median {lengths[len(ids) // 2]}"
    )
    contenders: dict[str, Callable[[], Tensor]] = {
        "cache": lambda: run_cache(model, ids, args.batch_size or (32 if device == "cuda" else 8)),
        "stops": lambda: run_plain(model, ids, stop=True),
        "plain loop": lambda: run_plain(model, ids),
    }
    run_cache(model, ids[:2], 2)  # what is imported or compiled once is not timed
    run_plain(model, ids[:2])
    wall: dict[str, list[float]] = {name: [] for name in contenders}
    cpu: dict[str, list[float]] = {name: [] for name in contenders}
    vectors: dict[str, Tensor] = {}
    for _ in range(rounds):
        for name, run in contenders.items():
            vectors[name], seconds, of_cpu = timed(run, device)
            wall[name].append(seconds)
            cpu[name].append(of_cpu)

    print(" contender  prompts/s  seconds  plain / it  (over rounds)  plain / it, CPU time")
    rows = []
    for name in contenders:
        ratios = [p / mine for p, mine in zip(wall["plain loop"], wall[name], strict=True)]
        row = {"contender": name, "seconds": sum(wall[name]), "cpu_seconds": sum(cpu[name])}
        row |= {"prompts_per_s": rounds * len(ids) / sum(wall[name])}
        row |= {"ratio": sum(wall["plain loop"]) / sum(wall[name])}
        row |= {"ratio_median": statistics.median(ratios), "ratio_low": min(ratios)}
        row |= {"ratio_high": max(ratios), "cpu_ratio": sum(cpu["plain loop"]) / sum(cpu[name])}
        rows.append(row)
        print(
            "{contender:>10} {prompts_per_s:10.2f} {seconds:8.1f} {ratio:10.2f}x  "
            "({ratio_low:.2f} to {ratio_high:.2f}) {cpu_ratio:12.2f}x".format(**row)
        )
    error = max(
        float(((v - vectors["plain loop"]).norm(dim=1) / v.norm(dim=1)).max())
        for v in vectors.values()
    )
    print(f"largest relative difference between their vectors: {error:.1e}")
    if not error <= TOLERANCE[dtype]:
        sys.exit(f"the contenders' vectors differ by more than {TOLERANCE[dtype]:g}")
    if args.json:
        about = {"torch": torch.__version__, "processor": processor, "size": args.size}
        about |= {"prompts": len(ids), "rounds": rounds, "rows": rows, "largest_difference": error}
        args.json.write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main()
