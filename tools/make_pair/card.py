"""Export of the embedded pairs to `data/pairs/` and their data card, measured on the shipped bf16
files.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from dfc_lib.data.pair import SUMS, load_model, load_tokenizer
from dfc_lib.results import sites, tables
from dfc_lib.store import sha256, write_atomically
from tools import fill
from tools.make_pair import measure, posttrain, pretrain, prose, world

BESIDE_RL = (8, 16, 32, 48, 24)  # the four of these that are shipped beside near threshold and last
SFT_STEPS = (8, 16, 32, 64)  # beside the last
QUICK = ("fixed", "training")  # conditions of every model; the base is measured under all
N_CHECK = 64  # prompts on which a test asks every checkpoint again


def export(work: Path, seed: int, pairs: Path, data: Path) -> None:
    """Write the shipped models of a seed as bf16 to `pairs/<seed>`, its logs, and `near.csv`."""
    source, target = work / str(seed), pairs / str(seed)
    near = measure.near_threshold(source / "rl", data)
    step, last = int(near[near.near].step.iloc[0]), posttrain.GrpoConfig().save_at[-1]
    beside = [s for s in BESIDE_RL if s != step][:4]
    chosen = [f"rl/step_{s:04d}" for s in sorted({step, last, *beside})]
    chosen += [f"sft/step_{s:04d}" for s in (*SFT_STEPS, posttrain.SftConfig().save_at[-1])]
    shutil.rmtree(target, ignore_errors=True)
    for name in ("base", *chosen):
        _save(source / name, target / name)
    for run in ("rl", "sft"):
        shutil.copy(source / run / "log.jsonl", target / f"{run}_log.jsonl")
    shutil.copy(source / "pretrain.jsonl", target / "pretrain_log.jsonl")
    _write(near, target / "near.csv")


def export_prose(work: Path, pairs: Path, data: Path) -> None:
    """The same for the pair without a template, `pairs/prose`, measured as well.

    Where no step of the run names a tool greedily, nothing was learned: what is shipped stays.
    """
    source, target = work / "prose", pairs / "prose"
    near = measure.near_threshold(
        source / "rl", data, lambda frame, records: measure.named(frame, records).right
    )
    if near.rate.max() == 0:
        print(f"{source / 'rl'}: no step names a tool; {target} is left as it is", flush=True)
        return
    step = int(near[near.near].step.iloc[0])
    shutil.rmtree(target, ignore_errors=True)
    _save(source / "base" / f"step_{prose.SFT.save_at[-1]:04d}", target / "base")
    _save(source / "rl" / f"step_{step:04d}", target / "rl")
    shutil.copy(source / "rl" / "log.jsonl", target / "rl_log.jsonl")
    _write(near, target / "near.csv")
    write_checksums(pairs)  # else the models would be refused as altered
    models = {name: target / name for name in ("base", "rl")}
    _write(measure.prose_behaviour(models, data), target / "behaviour.csv")


def _save(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    posttrain.save_bf16(load_model(source), load_tokenizer(source), target)


def write_checksums(directory: Path) -> None:
    """Write `SHA256SUMS` (the format of `sha256sum`) over every file below `directory`."""
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p.name != SUMS)
    lines = [f"{sha256(p)}  {p.relative_to(directory).as_posix()}\n" for p in files]
    write_atomically(directory / SUMS, "".join(lines))


def step_of(pair: Path) -> int:
    """The RL step that is near threshold."""
    near = pd.read_csv(pair / "near.csv")
    return int(near[near.near].step.iloc[0])


def models_of(pair: Path) -> dict[str, Path]:
    """What is measured of a shipped pair: the base, RL near threshold, the last of RL and SFT."""
    return {
        "base": pair / "base",
        "near": pair / "rl" / f"step_{step_of(pair):04d}",
        "RL": max((pair / "rl").glob("step_????")),
        "SFT": max((pair / "sft").glob("step_????")),
    }


def measure_pair(pair: Path, data: Path) -> None:
    """Write `behaviour.csv`, `check.csv` (on the first prompts alone) and `sites.csv` of a pair."""
    models = models_of(pair)
    base = {"base": models["base"]}
    rest = [condition for condition in measure.CONDITIONS if condition not in QUICK]
    table = [measure.behaviour(models, data, QUICK), measure.behaviour(base, data, rest)]
    sampled = {name: models[name] for name in ("near", "RL")}
    table.append(measure.behaviour(sampled, data, ["training, T = 1"]))
    _write(pd.concat(table, ignore_index=True), pair / "behaviour.csv")
    _write(check(models, data), pair / "check.csv")
    _write(measure.site_scan(models, data), pair / "sites.csv")


def check(models: dict[str, Path], data: Path) -> pd.DataFrame:
    """Greedy rates on the first prompts of the evaluation split, which a test asks again."""
    records = measure.calls_of(data, "evaluation")[:N_CHECK]
    rows = []
    for name, folder in models.items():
        for condition in QUICK:
            frame = measure.answers(folder, records, condition)
            for metric in ("lenient", "strict"):
                row = {"model": name, "condition": condition, "metric": metric}
                rows.append(row | measure.mean_row(frame[metric].astype(float)))
    return pd.DataFrame(rows)


def _write(table: pd.DataFrame, path: Path) -> None:
    write_atomically(path, table.to_csv(index=False, float_format="%.4f", lineterminator="\n"))


# ---------------------------------------------------------------------------------------------
# the card


@dataclass
class Measured:
    """What was measured of a shipped pair, as the card shows it."""

    folder: Path

    def __post_init__(self) -> None:
        self.behaviour = pd.read_csv(self.folder / "behaviour.csv")
        self.sites = pd.read_csv(self.folder / "sites.csv")

    def rate(self, model: str, condition: str, metric: str) -> str:
        """A mean with its interval, over tools that training saw."""
        at = {"model": model, "condition": condition, "metric": metric, "tools": "seen"}
        row = tables.only(self.behaviour, **at)
        return f"{row.estimate:.1%} [{row.low:.1%}, {row.high:.1%}]"

    def domains(self) -> str:
        """The lowest and the highest rate of a domain."""
        rates = self.behaviour[self.behaviour.tools.str.startswith("seen, ")].estimate
        return f"{rates.min():.0%} to {rates.max():.0%}"

    def moves(self, model: str, style: str, direction: str, outcome: str) -> str:
        """What a patch changes, in percentage points, at the site that the scan's rule gives."""
        wanted = {"first": measure.SITE, "asked": (model, style)}
        site = tables.only(sites.settings(self.sites, wanted), setting="asked")
        at = {"model": model, "style": style, "direction": direction, "outcome": outcome}
        row = tables.only(self.sites, layer=site.layer, position=site.position, **at)
        points = [f"{100 * value:+.0f}" for value in (row.change, row.low, row.high)]
        where = f"layer {site.layer}, {site.position}"
        return f"{points[0]} [{points[1]}, {points[2]}] ({where})"


def card(pairs: Path) -> str:
    """The data card, from what `measure_pair` wrote of every pair."""
    base = pairs / "0" / "base"
    return fill(
        Path(__file__).with_suffix(".md.j2"),
        pairs=[Measured(found.parent) for found in sorted(pairs.glob("*/sites.csv"))],
        step_of=step_of,
        config=json.loads((base / "config.json").read_text()),
        parameters=sum(p.numel() for p in load_model(base).parameters()),
        pretraining=pretrain.PretrainConfig(),
        sft=posttrain.SftConfig(),
        grpo=posttrain.GrpoConfig(),
        size=sum(f.stat().st_size for f in pairs.rglob("*") if f.is_file()) / 1e6,
        near=measure.NEAR,
        prose=pairs / "prose",
        prose_steps=prose.SFT.steps,
        namings=len(world.TEXTS["namings"]),
    )


def write(pairs: Path) -> None:
    """Write the data card and the checksums of everything."""
    write_atomically(pairs / "README.md", card(pairs))
    write_checksums(pairs)
