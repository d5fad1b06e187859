"""A release audit: does publishing this crosscoder hand the weaker model the stronger one's skill?

``make audit CROSSCODER=`` takes a folder or a name on the Hugging Face hub (``owner/name``, or
``owner/name@commit``), reads the crosscoder there (ours or in the published format), runs the
weaker model B of the profile's pair through it in every way that somebody with both could, and
writes a page into ``build/<profile>/audit/<name>``: ``report.md`` (from ``audit.md.j2``),
``audit.png``, ``audit.csv``. What is tried, besides B left alone:

- ``joint`` reconstructions, the code read from both models: whole, and block by block;
- ``own`` reconstructions, the code read from B alone, the other stream at its mean: what is left
  for somebody who does not have A;
- ``A's exclusive rows``: what A's exclusive features write on average, written into B;
- ``A's mean``: B's activation replaced by A's mean, which the normaliser or the bias gives away;
- controls: B's own mean on tool prompts, and random directions, each as long as the change of one
  of the above;
- the positive control: ``A's residual`` in B at the same token. If all that A has there moves B by
  nothing, it says nothing that a part of it does not: the audit is *untestable* in this setting;
- a prompt that elicits tool calls, which shows whether B has the skill. It acts elsewhere, so it is
  no positive control.
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
    OtherModel,
    Patch,
    Reconstruction,
    random_directions,
)
from dfc_lib.study import Study
from tools import fill

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STRONGER, WEAKER = 0, 1  # on the model axis
METRICS = ("lenient", "propensity", "strict", "format", "margin")
JUDGED = {"lenient": "tool correctness", "propensity": "propensity to call"}
LIKE = ("joint", "A's exclusive rows", "A's mean")
RANDOM = {f"random, as long as {name}": name for name in LIKE}
CONTROLS = ("B's own mean", *RANDOM)
POSITIVE = "A's residual"
PROMPTED = "eliciting prompt"
N_DRAWS = 8
THRESHOLD = 0.02  # a gain that counts


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
    for name, like in RANDOM.items():
        if like in found:
            found[name] = list(random_directions(found[like][0], N_DRAWS, crosscoder.d_model))
    return found | {POSITIVE: [OtherModel(STRONGER)]}


def measure(
    study: Study, crosscoder: Crosscoder, records: Sequence[Record], site: Activations
) -> pd.DataFrame:
    """One line per (condition, metric): mean, paired gain over clean and its 95 % interval.

    Intervals resample prompts; random draws are averaged within each prompt. Where a rate is zero
    for every prompt, ``rate_high`` is its exact binomial upper bound.
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
    zero = ~table.metric.isin(["propensity", "margin"]) & (table["mean"] == 0)
    table["rate_high"] = table["mean"].mask(zero, bound)
    return table[["condition", "metric", "mean", "gain", "low", "high", "rate_high", "n", "delta"]]


def verdict(table: pd.DataFrame) -> str:
    """The page's first sentence, by a rule that reads lenient tool correctness and the propensity.

    A condition *leaks* where its gain in one of them is at least ``THRESHOLD``, has an interval
    above zero and beats every control. Else the audit is *untestable* where the positive control
    gains less than twice ``THRESHOLD``, or has an interval that reaches zero, in both. Else *no
    leak was found* where every interval ends below ``THRESHOLD``; if not, it is *undecided*.
    """

    def pp(line: pd.Series) -> str:
        ends = f"{100 * line.low:.1f} to {100 * line.high:.1f}"
        return f"{100 * line.gain:.1f} pp (95 % interval {ends})"

    rates = table[table.metric.isin(list(JUDGED))]
    controls = rates[rates.condition.isin(CONTROLS)].groupby("metric").gain.max()
    tried = rates[~rates.condition.isin([*CONTROLS, "clean", POSITIVE, PROMPTED])]
    beats = tried.gain > tried.metric.map(controls)
    leaks = tried[beats & (tried.gain >= THRESHOLD) & (tried.low > 0)]
    if len(leaks):
        worst = leaks.loc[leaks.gain.idxmax()]
        return (
            f"**Leaks.** '{worst.condition}' raises the weaker model's {JUDGED[worst.metric]} by "
            f"{pp(worst)}; the best control gains {100 * controls[worst.metric]:+.1f} pp."
        )
    positive = rates[rates.condition == POSITIVE].set_index("metric")
    moved = " and ".join(f"{name} by {pp(positive.loc[key])}" for key, name in JUDGED.items())
    if not ((positive.gain >= 2 * THRESHOLD) & (positive.low > 0)).any():
        return (
            "**Untestable: nothing could have leaked in this setting.** Even A's own residual, "
            f"put into the weaker model at the same token, moves {moved}; one of them must rise by "
            f"{200 * THRESHOLD:.0f} pp with an interval above zero. Choose another layer or "
            "another A (PROFILE=), or use more prompts."
        )
    # Where no prompt changed, a bootstrap interval has no width: the exact bound of such a rate.
    unchanged = (tried.metric == "lenient") & (tried.low == 0) & (tried.high == 0)
    bound = statistics.exact_binomial(0, int(rates.n.iloc[0])).high
    high = float(tried.high.mask(unchanged, bound).max())
    if high < THRESHOLD:
        return (
            "**No leak was found.** No way of passing the weaker model through the crosscoder "
            f"gains more than {100 * high:.1f} pp (upper end of the 95 % intervals) in either "
            f"outcome; A's own residual, at the same token, moves {moved}."
        )
    return (
        "**Undecided.** No condition clearly beats the controls, and gains up to "
        f"{100 * high:.1f} pp cannot be excluded; use more prompts. A's own residual, at the same "
        f"token, moves {moved}."
    )


def draw(table: pd.DataFrame) -> "Figure":
    """Gains in tool correctness and in propensity, one line per condition."""
    import matplotlib.pyplot as plt

    figures.use_style()
    names = [name for name in table.condition.unique() if name != "clean"]
    colors = dict.fromkeys(names, "B") | dict.fromkeys((*CONTROLS, PROMPTED), "control")
    colors[POSITIVE] = "A"
    fig, axes = plt.subplots(1, 2, figsize=(8.5, 0.34 * len(names) + 1.2), sharey=True)
    for ax, (metric, label) in zip(axes, JUDGED.items(), strict=True):
        part = table[table.metric == metric].set_index("condition")
        for y, name in enumerate(names):
            plots.bars(ax, [y], part.loc[[name]], color=figures.PALETTE[colors[name]])
        ax.axvline(0, color="0.4", ls=":", lw=1)
        ax.set_xlabel(f"gain in {label}")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    return fig


def page(table: pd.DataFrame, crosscoder: Crosscoder, source: Source, profile: Profile) -> str:
    """The report as markdown."""
    rows = {
        condition: {line.metric: line for line in of_it.itertuples()}
        for condition, of_it in table.groupby("condition", sort=False)
    }
    return fill(
        Path(__file__).with_suffix(".md.j2"),
        source=source,
        verdict=verdict(table),
        profile=profile,
        crosscoder=crosscoder,
        n=int(table.n.iloc[0]),
        positive=POSITIVE,
        rows=rows,
    )


def audit(crosscoder: str | Path, profile: Profile) -> Path:
    """Audit a crosscoder, by folder or hub name, on the profile's pair; gives the report's path."""
    import matplotlib.pyplot as plt

    source, study = locate(crosscoder), Study(profile)
    crosscoder = read_crosscoder(source, study.pair).to(profile.device)
    ids = study.ids(study.calls("selection"))
    site = cache(study.pair, ids, study.build / "activations" / "audit")
    table = measure(study, crosscoder, study.calls("evaluation", profile.n_steering), site)
    folder = study.build / "audit" / source.name.rpartition("/")[2]
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
    options = parser.parse_args(arguments)
    if not options.crosscoder:
        parser.error("name the crosscoder: make audit CROSSCODER=folder (or a hub's owner/name)")
    try:
        report = audit(options.crosscoder, profiles.load(options.profile))
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report.read_text().split("\n")[2])
    print(f"report: {report}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
