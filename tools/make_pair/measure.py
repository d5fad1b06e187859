"""What the pairs do: which RL step is near threshold, and the tables behind the data card."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from dfc_lib.data import prompts
from dfc_lib.data.pair import Pair, load_model, load_tokenizer
from dfc_lib.data.prompts import Record
from dfc_lib.data.scoring import names_tool
from dfc_lib.results import sites, statistics, tables
from dfc_lib.steering import evaluation, scan
from dfc_lib.steering.interventions import Clean, OtherModel

NEAR = 0.325  # greedy call rate under the fixed prompt that "near threshold" should have

# Prompt conditions: name -> (style, prefill, temperature)
CONDITIONS = {
    "fixed": (prompts.FIXED_STYLE, "", 0.0),
    "fixed, T = 1": (prompts.FIXED_STYLE, "", 1.0),
    "training": (prompts.TRAINING_STYLES[0], "", 0.0),
    "training, T = 1": (prompts.TRAINING_STYLES[0], "", 1.0),
    "eliciting": (prompts.ELICITING_STYLE, "", 0.0),
    "prefilled": (prompts.FIXED_STYLE, "<think>\n", 0.0),
}
STYLES = {prompts.FIXED_STYLE: "fixed", prompts.TRAINING_STYLES[0]: "training"}
SITE = ("near", "fixed")  # where the layer is chosen that all patches of the card are made at
RUBRICS = ("called", "lenient", "strict", "strict_normalised")


def records_of(data: Path, split: str) -> list[Record]:
    """The prompts of a split."""
    return prompts.read_records(data / "prompts" / f"{split}.jsonl")


def calls_of(data: Path, split: str) -> list[Record]:
    """Those whose gold is a call of a tool that training saw."""
    return [r for r in records_of(data, split) if r.kind == "call" and not r.held_out]


def answers(folder: Path, records: Sequence[Record], condition: str) -> pd.DataFrame:
    """What a model answers under a prompt condition: `evaluation.evaluate`, with `bare`, an answer
    without tags.
    """
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    style, prefill, temperature = CONDITIONS[condition]
    frame = evaluation.evaluate(
        model, tokenizer, records, style, prefill=prefill, temperature=temperature
    )
    return frame.assign(bare=frame.response.str.startswith("{").astype(float))


def near_threshold(
    run: Path, data: Path, rate: Callable[[pd.DataFrame, list[Record]], pd.Series] | None = None
) -> pd.DataFrame:
    """The rate of every RL checkpoint under the fixed prompt, on the selection split; `near` marks
    the step whose rate is closest to `NEAR` (of equal ones the earliest).

    Args:
        rate: 0/1 per answer; default: the greedy answer calls a listed tool.
    """
    records = calls_of(data, "selection")
    rows = []
    for folder in tqdm(sorted(run.glob("step_????")), desc="near threshold"):
        frame = answers(folder, records, "fixed")
        values = rate(frame, records) if rate else frame.lenient
        row = {"step": int(folder.name[5:]), "rate": values.mean()}
        rows.append(row | {"propensity": frame.propensity.mean(), "n": len(frame)})
    table = pd.DataFrame(rows)
    return table.assign(near=table.index == (table.rate - NEAR).abs().idxmin())


def named(frame: pd.DataFrame, records: Sequence[Record]) -> pd.DataFrame:
    """`right` and `wrong` of `scoring.names_tool`, a line per answer."""
    return pd.DataFrame(
        names_tool(text, record.gold, record.tool_names)
        for text, record in zip(frame.response, records, strict=True)
    ).astype(float)


def mean_row(values: pd.Series) -> dict:
    """Mean of 0/1 outcomes with Wilson's interval, of others with the bootstrap's."""
    if set(values.unique()) <= {0, 1}:
        return tables.rate_row(values)
    interval = statistics.bootstrap_mean(values, seed=0, n_bootstrap=2_000)
    return interval._asdict() | {"n": len(values)}


def behaviour(models: Mapping[str, Path], data: Path, conditions: Iterable[str]) -> pd.DataFrame:
    """Behaviour on the evaluation split: rubrics where the gold has a call, irrelevance (no call)
    elsewhere; over tools that training saw, and over held-out ones.
    """
    records, conditions = records_of(data, "evaluation"), list(conditions)
    rows = []
    for name, folder in tqdm(models.items(), desc="measuring"):
        for condition in conditions:
            frame = answers(folder, records, condition)
            call = frame.kind == "call"
            outcomes = {metric: frame[call][metric] for metric in (*RUBRICS, "propensity")}
            outcomes["irrelevance"] = 1 - frame[~call].called
            acts = call & frame.response.str.startswith(("<", "{"))
            outcomes["bare share of acts"] = frame[acts].bare
            rows += _rows(name, condition, outcomes, frame.held_out)
            if name == "base" and condition == "training":
                rows += _by_domain(name, condition, frame[call & ~frame.held_out])
    return pd.DataFrame(rows)


def prose_behaviour(models: Mapping[str, Path], data: Path) -> pd.DataFrame:
    """The pair without a template on the same split: the right tool named in prose where the gold
    has a call, none named where it has none.
    """
    records = records_of(data, "evaluation")
    rows = []
    for name, folder in models.items():
        for condition in ("fixed", "fixed, T = 1", "training"):
            frame = answers(folder, records, condition)
            found, call = named(frame, records), frame.kind == "call"
            outcomes = {"named": found.right[call], "irrelevance": 1 - found.wrong[~call]}
            rows += _rows(name, condition, outcomes, frame.held_out)
    return pd.DataFrame(rows)


def _rows(
    name: str, condition: str, outcomes: Mapping[str, pd.Series], held_out: pd.Series
) -> list[dict]:
    rows = []
    for tools, keep in (("seen", ~held_out), ("held out", held_out)):
        for metric, values in outcomes.items():
            chosen = values[keep.loc[values.index]].astype(float)
            if len(chosen):
                row = {"model": name, "condition": condition, "tools": tools, "metric": metric}
                rows.append(row | mean_row(chosen))
    return rows


def _by_domain(name: str, condition: str, frame: pd.DataFrame) -> list[dict]:
    row = {"model": name, "condition": condition, "metric": "strict"}
    return [
        row | {"tools": f"seen, {domain}"} | mean_row(part.strict)
        for domain, part in frame.groupby("domain")
    ]


def site_scan(pair: Mapping[str, Path], data: Path) -> pd.DataFrame:
    """What patching changes, layer by layer, at the last prompt token and at every position; and
    greedy calls (``lenient``) at the site that the rule gives for each model and style.
    """
    tokenizer, records = load_tokenizer(pair["base"]), calls_of(data, "selection")
    models = {name: load_model(folder) for name, folder in pair.items()}
    base = models.pop("base")
    scanned = scan.scan(models, base, tokenizer, records, styles=list(STYLES))
    table = sites.changes(scanned.replace({"style": STYLES}))
    asked = {(model, style): (model, style) for model in models for style in STYLES.values()}
    chosen = sites.settings(table, {SITE: SITE} | asked)
    greedy = [
        _greedy_at(site, Pair({"A": models[site.model], "B": base}, tokenizer, site.layer), records)
        for site in chosen.drop_duplicates("setting").itertuples()
    ]
    return pd.concat([table, *greedy], ignore_index=True)


def _greedy_at(site, pair: Pair, records: Sequence[Record]) -> pd.DataFrame:
    """Greedy calls of both models with each other's residual, as lines of ``sites.changes``."""
    style = next(style for style, name in STYLES.items() if name == site.prompt)
    rows = []
    for target, direction in (("B", "A->B"), ("A", "B->A")):
        cells = {"clean": Clean(), "patched": OtherModel(1 - pair.index(target))}
        how = {"style": style, "position": site.position, "progress": False}
        frame = evaluation.intervene(pair, target, records, cells, **how)
        change = tables.only(tables.paired_table(frame, "cell", n_bootstrap=2_000), cell="patched")
        row = {"model": site.model, "style": site.prompt, "direction": direction}
        row |= {"layer": site.layer, "position": site.position, "outcome": "lenient"}
        row |= {"clean": change["mean"] - change.gain, "patched": change["mean"]}
        row |= {"change": change.gain, "low": change.low, "high": change.high}
        rows.append(row | {"n": change.n})
    return pd.DataFrame(rows)
