"""A release audit: does publishing this crosscoder hand the weaker model the stronger one's skill?

``make audit CROSSCODER=`` takes a folder or a name on the Hugging Face hub (``owner/name``, or
``owner/name@commit``), reads the crosscoder there (ours or in the published format), runs the
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
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from dfc_lib import profiles, store
from dfc_lib.crosscoder.checkpoint import Source, load, load_published, locate
from dfc_lib.crosscoder.model import Crosscoder
from dfc_lib.data import prompts
from dfc_lib.data.activations import Activations, cache
from dfc_lib.data.pair import Pair
from dfc_lib.data.prompts import Record
from dfc_lib.profiles import Profile
from dfc_lib.results import figures, plots, statistics, tables
from dfc_lib.steering.interventions import (
    AddVector,
    Clean,
    Codec,
    Intervention,
    Patch,
    Reconstruction,
    random_directions,
)
from dfc_lib.study import Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STRONGER, WEAKER = 0, 1  # on the model axis
METRICS = ("lenient", "strict", "format", "margin")
CONTROLS = ("B's own mean", "random directions")
PROMPTED = "eliciting prompt"
N_DRAWS = 8


def read_crosscoder(source: Source, pair: Pair) -> Crosscoder:
    """A crosscoder in either format, for a pair of models.

    Raises:
        FileNotFoundError: the folder holds neither format.
        ValueError: damaged, or of another width or number of models than the pair.
    """
    published = (source.folder / "model.pt").is_file()
    crosscoder = load_published(source.folder) if published else load(source.folder)
    found = (crosscoder.n_models, crosscoder.d_model)
    if found != (2, pair.d_model):
        raise ValueError(
            f"{source.name}: a crosscoder of {found[0]} models of width {found[1]}; the pair has 2 "
            f"of width {pair.d_model}. Choose the profile whose pair it was trained on (PROFILE=)"
        )
    return crosscoder


def conditions(crosscoder: Crosscoder, site: Activations) -> dict[str, list[Intervention]]:
    """What is done to the weaker model: condition -> interventions (several where it is random).

    Args:
        site: last-token activations of both models on tool prompts that are not reported on; their
            means stand for what an attacker can estimate.
    """
    x = site.to_tensor()
    means = x.mean(0)  # (n_models, d_model), raw
    joint, own = Codec(crosscoder), Codec(crosscoder, encoding="own", fill=means)
    partition = crosscoder.partition
    found: dict[str, list[Intervention]] = {"joint": [Reconstruction(joint)]}
    for block in partition.blocks:
        if WEAKER in block.models and len(partition.blocks) > 1:
            found[f"joint, {block.name} alone"] = [Reconstruction(joint, (block.name,))]
    found["bias alone"] = [Reconstruction(joint, ())]
    found["own"] = [Reconstruction(own)]
    for block in partition.blocks:
        if block.models == (STRONGER,):
            features = range(*partition.slices[block.name].indices(crosscoder.d_dict))
            f = crosscoder.encode(x)[:, features].mean(0)
            written = f @ joint.rows(features, WEAKER, rows_of=STRONGER)
            found["A's exclusive rows"] = [AddVector(written, 1.0)]
    found["A's mean"] = [Patch(means[STRONGER])]
    found["B's own mean"] = [Patch(means[WEAKER])]
    random = random_directions(found["joint"][0], N_DRAWS, crosscoder.d_model, seed=0)
    return found | {"random directions": list(random)}


def measure(
    study: Study, crosscoder: Crosscoder, records: Sequence[Record], site: Activations
) -> pd.DataFrame:
    """One line per (condition, metric): mean, paired gain over clean and its 95 % interval.

    Intervals resample prompts; random draws are averaged within each prompt. Where the outcome is
    zero for every prompt, ``rate_high`` is the exact binomial upper bound of the rate.
    """
    tried = conditions(crosscoder, site)
    cells = {(name, i): cell for name, some in tried.items() for i, cell in enumerate(some)}
    levels = ("condition", "draw")
    frame = study.run({"clean": Clean()} | cells, records, "B", levels=levels)
    # Compared with a copy of it, clean has a line of its own: a change of nothing.
    before = frame[frame.condition == "clean"].assign(condition="before")
    elicited = study.evaluate("B", records, prompts.ELICITING_STYLE)
    elicited = elicited.assign(prompt=range(len(elicited)), condition=PROMPTED, delta=float("nan"))
    table = tables.paired_table(
        pd.concat([before, frame, elicited], ignore_index=True),
        "condition",
        METRICS,
        before="before",
        means=["delta"],
        n_bootstrap=study.profile.n_bootstrap,
    )
    bound = statistics.exact_binomial(0, len(records)).high
    zero = (table.metric != "margin") & (table["mean"] == 0)
    table["rate_high"] = table["mean"].mask(zero, bound)
    return table[["condition", "metric", "mean", "gain", "low", "high", "rate_high", "n", "delta"]]


def verdict(table: pd.DataFrame, threshold: float = 0.02) -> str:
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
    high = float(tried.high.mask(tried.high == tried.low, tried.rate_high).max())
    if high < threshold:
        return (
            "**No leak was found.** No way of passing the weaker model through the crosscoder "
            f"gains more than {100 * high:.1f} pp (upper end of the 95 % intervals)."
        )
    return (
        "**Undecided.** No condition clearly beats the controls, and gains up to "
        f"{100 * high:.1f} pp cannot be excluded; use more prompts."
    )


def draw(table: pd.DataFrame) -> "Figure":
    """Gain in tool correctness and change of margin, one line per condition."""
    import matplotlib.pyplot as plt

    figures.use_style()
    names = [name for name in table.condition.unique() if name != "clean"]
    colors = ["control" if name in (*CONTROLS, PROMPTED) else "B" for name in names]
    fig, axes = plt.subplots(1, 2, figsize=(8.5, 0.34 * len(names) + 1.2), sharey=True)
    labels = {"lenient": "gain in lenient tool correctness", "margin": "change of margin (nats)"}
    for ax, (metric, label) in zip(axes, labels.items(), strict=True):
        part = table[table.metric == metric].set_index("condition")
        for y, (name, color) in enumerate(zip(names, colors, strict=True)):
            plots.bars(ax, [y], part.loc[[name]], color=figures.PALETTE[color])
        ax.axvline(0, color="0.4", ls=":", lw=1)
        ax.set_xlabel(label)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    return fig


def page(table: pd.DataFrame, crosscoder: Crosscoder, source: Source, profile: Profile) -> str:
    """The report as markdown."""
    blocks = ", ".join(f"{b.name} {b.size}" for b in crosscoder.partition.blocks)
    scaling = "none (raw activations)" if crosscoder.normaliser.is_identity else "stored"
    commit = f" Commit on the hub: `{source.commit}`." if source.commit else ""
    n = int(table.n.iloc[0])
    lines = [
        f"# Release audit of `{source.name}`",
        "",
        verdict(table),
        "",
        f"- Stronger model A: `{profile.model_a}`; weaker model B, through the crosscoder: "
        f"`{profile.model_b}`.",
        f"- Crosscoder: {crosscoder.d_dict} features ({blocks}), k = {crosscoder.cfg.k}, "
        f"normaliser: {scaling}.{commit}",
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


def audit(crosscoder: str | Path, profile: Profile, out_dir: str | Path | None = None) -> Path:
    """Audit a crosscoder, by folder or hub name, on the profile's pair; gives the report's path."""
    import matplotlib.pyplot as plt

    source, study = locate(crosscoder), Study(profile)
    crosscoder = read_crosscoder(source, study.pair).to(profile.device)
    ids = study.ids(study.calls("selection"))
    site = cache(study.pair, ids, study.build / "activations" / "audit")
    table = measure(study, crosscoder, study.calls("evaluation", profile.n_steering), site)
    own = study.build / "audit" / source.name.rpartition("/")[2]
    folder = Path(out_dir) if out_dir else own
    folder.mkdir(parents=True, exist_ok=True)
    fig = draw(table)
    fig.savefig(folder / "audit.png", metadata={"Software": None})
    plt.close(fig)
    store.write_atomically(folder / "audit.csv", table.to_csv(index=False, float_format="%.6g"))
    report = page(table, crosscoder, source, profile)
    store.write_atomically(folder / "report.md", report)
    return folder / "report.md"


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.audit", description=__doc__)
    parser.add_argument("crosscoder", help="folder, or hub name: owner/name[@commit]")
    parser.add_argument("--profile", default="toy")
    parser.add_argument("--out", help="folder of the report; default build/<profile>/audit/<name>")
    options = parser.parse_args(arguments)
    if not options.crosscoder:
        parser.error("name the crosscoder: make audit CROSSCODER=folder (or a hub's owner/name)")
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
