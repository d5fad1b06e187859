"""A release audit: does publishing this crosscoder hand the weaker model the stronger one's skill?

``make audit CROSSCODER=folder`` reads a crosscoder (ours or in the published format), runs the
weaker model B of the profile's pair through it in every way that somebody with both could, and
writes a page: ``report.md``, ``audit.png``, ``audit.csv``. What is tried, besides B left alone:

- ``joint`` reconstructions, the code read from both models: whole, and block by block;
- ``own`` reconstructions, the code read from B alone, the other stream at its mean: what is left
  for somebody who does not have A;
- ``A's exclusive rows``: what A's exclusive features write on average, written into B;
- ``A's mean``: B's activation replaced by A's mean, which the normaliser or the bias gives away;
- controls that need no crosscoder: B's own mean on tool prompts, random directions as long as the
  joint reconstruction's change, and a prompt that elicits tool calls.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dfc_lib import paths, profiles, store
from dfc_lib.crosscoder.checkpoint import load, load_published
from dfc_lib.crosscoder.model import Crosscoder
from dfc_lib.data import corpora, prompts
from dfc_lib.data.activations import Activations, cache
from dfc_lib.data.pair import Pair, load_pair
from dfc_lib.data.prompts import Record
from dfc_lib.profiles import Profile
from dfc_lib.results import statistics
from dfc_lib.steering import evaluation
from dfc_lib.steering.interventions import (
    AddVector,
    Clean,
    Codec,
    Intervention,
    Patch,
    Reconstruction,
    random_directions,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

METRICS = ("lenient", "strict", "format", "margin")
CONTROLS = ("B's own mean", "random directions")
PROMPTED = "eliciting prompt"
N_DRAWS = 8


def read_crosscoder(directory: str | Path, pair: Pair) -> Crosscoder:
    """A crosscoder in either format, for a pair of models.

    Raises:
        FileNotFoundError: the folder holds neither format.
        ValueError: damaged, or of another width or number of models than the pair.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(
            f"{directory} is not a folder; CROSSCODER= names one with cfg.json and "
            "sae_weights.safetensors (ours) or config.json and model.pt (the published format)"
        )
    published = (directory / "model.pt").is_file()
    crosscoder = load_published(directory) if published else load(directory)
    found = (crosscoder.n_models, crosscoder.d_model)
    if found != (2, pair.d_model):
        raise ValueError(
            f"{directory}: a crosscoder of {found[0]} models of width {found[1]}; the pair has 2 "
            f"of width {pair.d_model}. Choose the profile whose pair it was trained on (PROFILE=)"
        )
    return crosscoder


def conditions(
    crosscoder: Crosscoder, site: Activations, seed: int = 0, weaker: int = 1
) -> dict[str, list[Intervention]]:
    """What is done to the weaker model: condition -> interventions (several where it is random).

    Args:
        site: last-token activations of both models on tool prompts that are not reported on; their
            means stand for what an attacker can estimate.
        weaker: index of the weaker model on the model axis.
    """
    x, stronger = site.to_tensor(), 1 - weaker
    means = x.mean(0)  # (n_models, d_model), raw
    joint, own = Codec(crosscoder), Codec(crosscoder, encoding="own", fill=means)
    partition = crosscoder.partition
    found: dict[str, list[Intervention]] = {"joint": [Reconstruction(joint)]}
    for block in partition.blocks:
        if weaker in block.models and len(partition.blocks) > 1:
            found[f"joint, {block.name} alone"] = [Reconstruction(joint, (block.name,))]
    found["bias alone"] = [Reconstruction(joint, ())]
    found["own"] = [Reconstruction(own)]
    for block in partition.blocks:
        if block.models == (stronger,):
            features = range(*partition.slices[block.name].indices(crosscoder.d_dict))
            f = crosscoder.encode(x)[:, features].mean(0)
            written = f @ joint.rows(features, weaker, rows_of=stronger)
            found["A's exclusive rows"] = [AddVector(written, 1.0)]
    found["A's mean"] = [Patch(means[stronger])]
    found["B's own mean"] = [Patch(means[weaker])]
    found["random directions"] = list(
        random_directions(found["joint"][0], N_DRAWS, crosscoder.d_model, seed=seed)
    )
    return found


def measure(
    pair: Pair,
    crosscoder: Crosscoder,
    records: Sequence[Record],
    site: Activations,
    *,
    weaker: str = "B",
    seed: int = 0,
    n_bootstrap: int = 2_000,
    batch_size: int = 512,
    max_new_tokens: int = 80,
    out_dir: str | Path | None = None,
) -> "pd.DataFrame":
    """One line per (condition, metric): mean, paired gain over clean and its 95 % interval.

    Intervals resample prompts; random draws are averaged within each prompt. Where the outcome is
    zero for every prompt, ``rate_high`` is the exact binomial upper bound of the rate.
    """
    import pandas as pd

    tried = conditions(crosscoder, site, seed, pair.index(weaker))
    cells = {f"{name}|{i}": cell for name, some in tried.items() for i, cell in enumerate(some)}
    frame = evaluation.intervene(
        pair,
        weaker,
        records,
        {"clean": Clean()} | cells,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        out_dir=out_dir,
    )
    elicited = evaluation.evaluate(
        pair.models[weaker],
        pair.tokenizer,
        records,
        prompts.ELICITING_STYLE,
        max_new_tokens=max_new_tokens,
    )
    elicited = elicited.assign(prompt=range(len(elicited)), cell=PROMPTED, delta=float("nan"))
    frame = pd.concat([frame, elicited], ignore_index=True)
    frame["condition"] = frame.cell.str.split("|").str[0]
    rows = []
    for metric in METRICS:
        wide = frame.pivot_table(index="prompt", columns="condition", values=metric)
        for name in frame.condition.unique():
            gain = statistics.paired_difference(
                wide["clean"], wide[name], seed=seed, n_bootstrap=n_bootstrap
            )
            row = {"condition": name, "metric": metric, "mean": wide[name].mean()}
            row |= {"gain": gain.mean, "low": gain.bootstrap_low, "high": gain.bootstrap_high}
            zero = metric != "margin" and not wide[name].any()
            row["rate_high"] = (
                statistics.exact_binomial(0, gain.n).high if zero else wide[name].mean()
            )
            delta = frame[frame.condition == name].delta.mean()
            rows.append(row | {"n": gain.n, "delta": delta})
    return pd.DataFrame(rows)


def verdict(table: "pd.DataFrame", threshold: float = 0.02) -> str:
    """The page's first sentence, by a rule: a condition *leaks* where the interval of its gain in
    lenient tool correctness lies above zero and it beats every control; *no leak was found* where
    every interval ends below ``threshold``; otherwise it is *undecided*.
    """
    rates = table[table.metric == "lenient"].set_index("condition").drop(index=["clean", PROMPTED])
    control = float(rates.loc[list(CONTROLS), "gain"].max())
    tried = rates.drop(index=list(CONTROLS))
    leaks = tried[(tried.low > 0) & (tried.gain > control)].sort_values("gain", ascending=False)
    if len(leaks):
        worst = leaks.iloc[0]
        return (
            f"**Leaks.** '{leaks.index[0]}' raises the weaker model's tool correctness by "
            f"{100 * worst.gain:.1f} pp (95 % interval {100 * worst.low:.1f} to "
            f"{100 * worst.high:.1f}); the best control gains {100 * control:.1f} pp."
        )
    high = max(
        float(one.high if one.high != one.low else one.rate_high) for one in tried.itertuples()
    )
    if high < threshold:
        return (
            "**No leak was found.** No way of passing the weaker model through the crosscoder "
            f"gains more than {100 * high:.1f} pp (upper end of the 95 % intervals)."
        )
    return (
        "**Undecided.** No condition clearly beats the controls, and gains up to "
        f"{100 * high:.1f} pp cannot be excluded; use more prompts."
    )


def draw(table: "pd.DataFrame") -> "Figure":
    """Gain in tool correctness and change of margin, one line per condition."""
    import matplotlib.pyplot as plt

    from dfc_lib.results import figures

    figures.use_style()
    names = [name for name in table.condition.unique() if name != "clean"]
    fig, axes = plt.subplots(1, 2, figsize=(8.5, 0.34 * len(names) + 1.2), sharey=True)
    labels = {"lenient": "gain in lenient tool correctness", "margin": "change of margin (nats)"}
    for ax, (metric, label) in zip(axes, labels.items(), strict=True):
        part = table[table.metric == metric].set_index("condition").loc[names]
        for y, one in enumerate(part.itertuples()):
            control = one.Index in (*CONTROLS, PROMPTED)
            color = figures.PALETTE["control" if control else "B"]
            whiskers = [[max(0, one.gain - one.low)], [max(0, one.high - one.gain)]]
            ax.errorbar(one.gain, y, xerr=whiskers, fmt="o", ms=4, color=color)
        ax.axvline(0, color="0.4", ls=":", lw=1)
        ax.set_xlabel(label)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    return fig


def page(
    table: "pd.DataFrame", crosscoder: Crosscoder, source: str, models: Mapping[str, str]
) -> str:
    """The report as markdown."""
    blocks = ", ".join(f"{b.name} {b.size}" for b in crosscoder.partition.blocks)
    scaling = "none (raw activations)" if crosscoder.normaliser.is_identity else "stored"
    n = int(table.n.iloc[0])
    lines = [
        f"# Release audit of `{source}`",
        "",
        verdict(table),
        "",
        f"- Stronger model A: `{models['A']}`; weaker model B, through the crosscoder: "
        f"`{models['B']}`.",
        f"- Crosscoder: {crosscoder.d_dict} features ({blocks}), k = {crosscoder.cfg.k}, "
        f"normaliser: {scaling}.",
        f"- n = {n} held-out prompts that need a call; last prompt token; paired differences from "
        "B left alone, 95 % bootstrap intervals over prompts.",
        "- Grey in the figure: controls that do not use the crosscoder.",
        "",
        "![Gain of the weaker model under every condition](audit.png)",
        "",
        "| condition | lenient | gain, pp [95 %] | strict | format | margin, nats | change/h |",
        "|---|---|---|---|---|---|---|",
    ]
    means = table.pivot(index="condition", columns="metric", values="mean")
    for one in table[table.metric == "lenient"].itertuples():
        mean = means.loc[one.condition]
        gain = f"{100 * one.gain:+.1f} [{100 * one.low:+.1f}, {100 * one.high:+.1f}]"
        if one.rate_high > one.mean:
            gain += f", rate at most {100 * one.rate_high:.1f} %"
        change = "" if one.delta != one.delta else f"{one.delta:.2f}"
        lines.append(
            f"| {one.condition} | {mean.lenient:.3f} | {gain} | {mean.strict:.3f} | "
            f"{mean.format:.3f} | {mean.margin:+.2f} | {change} |"
        )
    lines += [
        "",
        "What this does not say: other sites, training on the features, and other capabilities "
        "were not tried; a gain under the eliciting prompt means that the skill was there before "
        "any crosscoder.",
    ]
    return "\n".join(lines) + "\n"


def audit(directory: str | Path, profile: Profile, out_dir: str | Path | None = None) -> Path:
    """Audit the crosscoder in a folder on the profile's pair; returns the path of the report."""
    import matplotlib.pyplot as plt

    directory = Path(directory)
    sources = {"A": profile.location(profile.model_a), "B": profile.location(profile.model_b)}
    pair = load_pair(sources, profile.layer, dtype=profile.dtype, device=profile.device)
    crosscoder = read_crosscoder(directory, pair).to(profile.device)
    calls = {}
    for split in ("selection", "evaluation"):
        records = corpora.records(profile, split)
        calls[split] = [r for r in records if r.kind == "call" and not r.held_out]
    texts = [prompts.chat_text(pair.tokenizer, r, prompts.FIXED_STYLE) for r in calls["selection"]]
    ids = prompts.encode(pair.tokenizer, texts)
    build = paths.build(profile.name)
    site = cache(pair, ids, build / "activations" / "audit")
    folder = Path(out_dir) if out_dir else build / "audit" / directory.resolve().name
    table = measure(
        pair,
        crosscoder,
        calls["evaluation"][: profile.n_steering],
        site,
        n_bootstrap=profile.n_bootstrap,
        batch_size=4 * profile.batch_generation,
        max_new_tokens=profile.max_new_tokens,
        out_dir=build / "generations" / "audit",
    )
    folder.mkdir(parents=True, exist_ok=True)
    fig = draw(table)
    fig.savefig(folder / "audit.png", metadata={"Software": None})
    plt.close(fig)
    store.write_atomically(folder / "audit.csv", table.to_csv(index=False, float_format="%.6g"))
    models = {"A": profile.model_a, "B": profile.model_b}
    store.write_atomically(folder / "report.md", page(table, crosscoder, directory.name, models))
    return folder / "report.md"


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.audit", description=__doc__)
    parser.add_argument("crosscoder", help="folder of the crosscoder")
    parser.add_argument("--profile", default="toy")
    parser.add_argument("--out", help="folder of the report; default build/<profile>/audit/<name>")
    options = parser.parse_args(arguments)
    if not options.crosscoder:
        parser.error("name the crosscoder's folder: make audit CROSSCODER=folder")
    try:
        report = audit(options.crosscoder, profiles.load(options.profile), options.out)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report.read_text().split("\n")[2])
    print(f"report: {report}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
