"""Export of the embedded pair to `data/pair/` and its data card, measured on the shipped bf16
files.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from dfc_lib import profiles
from dfc_lib.data import prompts
from dfc_lib.data.pair import SUMS, load_model, load_tokenizer, sha256
from dfc_lib.data.prompts import Record
from dfc_lib.data.scoring import names_tool
from dfc_lib.results import statistics
from dfc_lib.steering import evaluation
from dfc_lib.store import write_atomically
from tools.make_pair import posttrain, pretrain, prose, world

# Prompt conditions: name -> (style, prefill, temperature)
FOR_EVERY_SEED = ("fixed", "training")
CONDITIONS = {
    "fixed": (prompts.FIXED_STYLE, "", 0.0),
    "fixed, T = 1": (prompts.FIXED_STYLE, "", 1.0),
    "training": (prompts.TRAINING_STYLES[0], "", 0.0),
    "eliciting": (prompts.ELICITING_STYLE, "", 0.0),
    "prefilled": (prompts.FIXED_STYLE, "<think>\n", 0.0),
}


def export(work: Path, tokenizer, pair: Path) -> None:
    """Write every shipped model as bf16: base, SFT and RL checkpoints, the last step of the further
    RL seeds.
    """
    folders = {"base": work / "base"}
    for name, source in (("sft", work / "sft"), ("rl", work / "rl_seed0")):
        folders |= {f"{name}/{p.name}": p for p in sorted(source.glob("step_????"))}
    others = [p for p in sorted(work.glob("rl_seed?")) if p.name != "rl_seed0"]
    folders |= {p.name: max(p.glob("step_????")) for p in others}
    folders |= {f"prose/{name}": work / "prose" / source for name, source in prose.SHIPPED.items()}
    for name, source in tqdm(folders.items(), desc="export"):
        posttrain.save_bf16(load_model(source), tokenizer, pair / name)
    for name in ("sft", "rl_seed0", *(p.name for p in others)):
        shutil.copy(work / name / "log.jsonl", pair / f"{name.replace('rl_seed0', 'rl')}_log.jsonl")
    shutil.copy(work / "pretrain.jsonl", pair / "pretrain_log.jsonl")
    shutil.copy(work / "prose" / "rl" / "log.jsonl", pair / "prose_rl_log.jsonl")


def write_checksums(directory: Path) -> None:
    """Write `SHA256SUMS` (the format of `sha256sum`) over every file below `directory`."""
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p.name != SUMS)
    lines = [f"{sha256(p)}  {p.relative_to(directory).as_posix()}\n" for p in files]
    write_atomically(directory / SUMS, "".join(lines))


def model_folders(pair: Path) -> dict[str, Path]:
    """Shipped model folders by name, in order of training."""
    found = sorted(p.parent for p in pair.rglob("config.json"))
    return {str(p.relative_to(pair)): p for p in found}


def rates(outcomes: dict[str, pd.Series], held_out: pd.Series) -> list[dict]:
    """Rates of 0/1 outcomes by metric, over seen and over held-out tools, with Wilson intervals."""
    rows = []
    for group, keep in (("seen", ~held_out), ("held out", held_out)):
        for metric, values in outcomes.items():
            chosen = values[keep.loc[values.index]]
            if len(chosen):
                k, n = int(chosen.sum()), len(chosen)
                interval = statistics.wilson(k, n)
                rows.append(
                    {"tools": group, "metric": metric, "k": k, "n": n, "rate": k / n}
                    | {"low": interval.low, "high": interval.high}
                )
    return rows


def measured_models(pair: Path) -> dict[str, Path]:
    """What the card measures: the base, model A, and the last checkpoint of every run."""
    folders = {n: f for n, f in model_folders(pair).items() if not n.startswith("prose/")}
    last = {name.split("/")[0]: name for name in folders}  # sorted: the last step wins
    chosen = {"base", profiles.get("toy").model_a, *last.values()}
    return {name: folder for name, folder in folders.items() if name in chosen}


def answers(
    folder: Path, records: Sequence[Record], conditions: Iterable[str]
) -> Iterator[tuple[str, pd.DataFrame]]:
    """What the model in a folder answers under each of these prompt conditions."""
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    for condition in conditions:
        style, prefill, temperature = CONDITIONS[condition]
        options = {"prefill": prefill, "temperature": temperature}
        yield condition, evaluation.evaluate(model, tokenizer, records, style, **options)


def measure(pair: Path, data: Path) -> pd.DataFrame:
    """Behaviour of `measured_models` on the evaluation split: under every prompt condition, the
    further RL seeds under those of `FOR_EVERY_SEED`. Rubrics where the gold has a call,
    irrelevance elsewhere.
    """
    records = prompts.read_records(data / "prompts" / "evaluation.jsonl")
    rows = []
    for name, folder in tqdm(measured_models(pair).items(), desc="measuring"):
        conditions = FOR_EVERY_SEED if name.startswith("rl_seed") else CONDITIONS
        for condition, frame in answers(folder, records, conditions):
            call = frame.kind == "call"
            rubrics = ("called", "lenient", "strict", "strict_normalised")
            outcomes = {metric: frame[call][metric] for metric in rubrics}
            outcomes["irrelevance"] = 1 - frame[~call].called
            found = rates(outcomes, frame.held_out)
            rows += [{"model": name, "condition": condition} | row for row in found]
    return pd.DataFrame(rows)


def measure_prose(pair: Path, data: Path) -> pd.DataFrame:
    """The second pair on the same split: the right tool named in prose where the gold has a call,
    any named where it has none.
    """
    records = prompts.read_records(data / "prompts" / "evaluation.jsonl")
    rows = []
    for name in prose.SHIPPED:
        conditions = ("fixed", "fixed, T = 1", "training")
        for condition, frame in answers(pair / "prose" / name, records, conditions):
            named = pd.DataFrame(
                names_tool(text, record.gold, record.tool_names)
                for text, record in zip(frame.response, records, strict=True)
            )
            call = frame.kind == "call"
            outcomes = {"named": named.right[call], "irrelevance": ~named.wrong[~call]}
            found = rates(outcomes, frame.held_out)
            rows += [{"model": f"prose/{name}", "condition": condition} | row for row in found]
    return pd.DataFrame(rows)


def write(pair: Path, data: Path) -> None:
    """Measure and write `behaviour.csv` and `README.md` into the pair's folder."""
    table = pd.concat([measure(pair, data), measure_prose(pair, data)], ignore_index=True)
    table.to_csv(pair / "behaviour.csv", index=False, float_format="%.4f", lineterminator="\n")
    (pair / "README.md").write_text(text(pair, table), encoding="utf-8")


def _lines(table: pd.DataFrame) -> str:
    chosen = table[table.metric.isin(["lenient", "strict", "irrelevance", "named"])]
    lines = [
        "| model | prompt | tools | metric | rate | 95 % CI (Wilson) | n |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.model} | {r.condition} | {r.tools} | {r.metric} | {r.rate:.1%} "
        f"| {r.low:.1%} to {r.high:.1%} | {r.n} |"
        for r in chosen.itertuples()
    ]
    return "\n".join(lines)


def text(pair: Path, table: pd.DataFrame) -> str:
    """The data card."""
    folders = model_folders(pair)
    base = folders["base"]
    config = json.loads((base / "config.json").read_text())
    parameters = sum(p.numel() for p in load_model(base).parameters())
    size = sum(f.stat().st_size for f in pair.rglob("*") if f.is_file()) / 1e6
    weights = {n: f / "model.safetensors" for n, f in folders.items()}
    models = "\n".join(
        f"| `{n}` | {w.stat().st_size / 1e6:.1f} | `{sha256(w)[:16]}` |" for n, w in weights.items()
    )
    p, s, g = pretrain.PretrainConfig(), posttrain.SftConfig(), posttrain.GrpoConfig()
    model_a, n_namings = profiles.get("toy").model_a, len(world.TEXTS["namings"])
    return f"""# Data card: the embedded model pair

One base model and what SFT and GRPO made of it, in Hugging Face layout (Qwen2 architecture, bf16
safetensors). Made by `make pair` from generated text alone, no data from outside, in about \
two hours
on two CPU cores. Licence: as the repository.

| | |
|---|---|
| parameters | {parameters:,} |
| layers, width | {config["num_hidden_layers"]}, {config["hidden_size"]} |
| heads, key/value heads | {config["num_attention_heads"]}, {config["num_key_value_heads"]} |
| vocabulary | {config["vocab_size"]:,} byte-level BPE tokens |
| pretraining | {p.steps:,} steps of {p.batch_size} x {p.row_length} tokens, Muon and AdamW |
| SFT | TRL, {s.steps} steps of {s.batch_size}, learning rate {s.learning_rate:g} |
| GRPO | TRL, {g.steps} steps of {g.n_prompts} prompts x {g.group_size} samples, temperature 1 |
| | learning rate {g.learning_rate:g}, no KL term, ToolRL reward, three seeds |
| size | {size:.0f} MB |

`SHA256SUMS` covers every file. Model A of the notebooks is `{model_a}`, model B is `base`; the
fixed prompt is the style `{prompts.FIXED_STYLE}`. Both were chosen on the selection split.

`prose/base` and `prose/rl` are a second pair, whose rewarded behaviour has no fixed surface
template: naming the right tool in plain prose. `prose/base` is `base` after {prose.SFT.steps} steps
of SFT on hedges and a few replies that name the tool in one of {n_namings} wordings,
`prose/rl` is that after {prose.SHIPPED["rl"][-2:]} steps of GRPO with the name alone as reward. The
metric `named`: the right tool's name, and no other, in a reply without tags.

## Measured behaviour

On the evaluation split, on the files shipped here. `lenient`, `strict`: prompts whose gold has a
call; `irrelevance`: no call where the gold has none. `behaviour.csv` has every metric.

{_lines(table)}

## Files

| folder | MB | sha256 of the weights (first 16 digits) |
|---|---|---|
{models}
"""
