"""What the studies claim, what was found here, and a verdict by the same rules for all.

A *finding* is one number with its interval, read from the CSVs behind the figures; nothing here is
typed in. The rules:

- an **effect** *holds* if its interval lies above zero in the claimed direction and it exceeds the
  strongest control by a margin whose interval lies above zero too; it *fails* if its interval
  excludes half of the published effect, or if the control does at least as well; otherwise it is
  *undecided*;
- a **zero** (nothing happens, no difference) *holds* if the interval lies within +-``margin``,
  *fails* if it excludes zero and reaches beyond the margin, and is *undecided* otherwise.

Where a control's outcomes are not paired with the effect's, its margin is judged by the two
intervals: the effect's lower end against the control's upper end, which is conservative.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import isnan, nan
from typing import TYPE_CHECKING, Literal, NamedTuple

from dfc_lib.profiles import Profile
from dfc_lib.results import figures

if TYPE_CHECKING:
    import pandas as pd

Verdict = Literal["holds", "fails", "undecided"]


class Finding(NamedTuple):
    """One number for one claim, in the claim's own unit."""

    protocol: str  # published, calibrated, or what else it was measured under
    effect: float
    low: float
    high: float
    n: int  # prompts, features, runs: what the interval is over
    control: str = ""  # the strongest one, by name
    control_effect: float = nan
    over: float = nan  # effect - control
    over_low: float = nan
    over_high: float = nan
    note: str = ""


@dataclass(frozen=True)
class Claim:
    """A published claim and how it is answered."""

    id: str
    statement: str
    published: str  # the published figure, as published
    kind: Literal["effect", "zero"]
    expected: float  # the published effect in the unit below; for a zero, the margin
    unit: str
    figure: str  # where to look
    find: "Callable[[Load], list[Finding]]"


Load = "Callable[[str], pd.DataFrame]"


def judge(claim: Claim, finding: Finding) -> Verdict:
    """The verdict on one finding, by the rules above."""
    low, high = finding.low, finding.high
    if isnan(finding.effect):
        return "undecided"
    if claim.kind == "zero":
        margin = claim.expected
        if -margin <= low and high <= margin:
            return "holds"
        outside = (low > 0 and high > margin) or (high < 0 and low < -margin)
        return "fails" if outside else "undecided"
    effect, control = finding.effect, finding.control_effect
    over_low = finding.over_low
    if claim.expected < 0:
        low, high, effect, control = -high, -low, -effect, -control
        over_low = -finding.over_high
    if high < abs(claim.expected) / 2 or (finding.control and control >= effect):
        return "fails"
    if low > 0 and (not finding.control or over_low > 0):
        return "holds"
    return "undecided"


def scorecard(profile: Profile) -> "pd.DataFrame":
    """One line per claim and finding: the published figure, ours with its interval, the verdict.

    Raises:
        FileNotFoundError: a notebook's result is missing; the message says how to make it.
    """
    import pandas as pd

    def load(id: str) -> "pd.DataFrame":
        return figures.load_data(id, profile)

    rows = []
    for claim in CLAIMS:
        for finding in claim.find(load):
            row = {"claim": claim.id, "statement": claim.statement, "published": claim.published}
            row |= {"unit": claim.unit, "kind": claim.kind, "expected": claim.expected}
            row |= finding._asdict() | {"verdict": judge(claim, finding), "figure": claim.figure}
            rows.append(row)
    return pd.DataFrame(rows)


# -------------------------------------------------------------------------------------------------
# How each claim is read from the results


def _unpaired(finding: Finding, control: str, effect: float, low: float, high: float) -> Finding:
    """A control measured apart: the margin's interval from the two intervals, conservatively."""
    return finding._replace(
        control=control,
        control_effect=effect,
        over=finding.effect - effect,
        over_low=finding.low - high,
        over_high=finding.high - low,
    )


def _reconstruction(target: str) -> "Callable[[Load], list[Finding]]":
    def find(load: Load) -> list[Finding]:
        effects, controls = load("06_reconstruction"), load("06_controls")
        chosen = {"published": ("published", "lenient"), "joint": ("calibrated", "strict")}
        chosen |= {"joint, last tied": ("calibrated, last tied", "strict")}
        if target == "B":
            chosen |= {"own stream": ("calibrated, base alone", "strict")}
        found = []
        for condition, (protocol, metric) in chosen.items():
            of = {"target": target, "condition": condition, "metric": metric}
            own = _one(effects, **of)
            against = _where(controls, **of)
            means = _where(effects, target=target, metric=metric).set_index("condition")["gain"]
            control = max(against.control, key=lambda name: means[name])
            margin = _one(against, control=control)
            found.append(
                Finding(
                    protocol,
                    own.gain,
                    own.low,
                    own.high,
                    int(own.n),
                    control,
                    means[control],
                    margin.gain,
                    margin.low,
                    margin.high,
                    note=metric,
                )
            )
        return found

    return find


def _format(load: Load) -> list[Finding]:
    table = load("06_format")
    names = {"published": "published", "joint": "calibrated", "own stream": "base alone"}
    found = []
    for condition, protocol in names.items():
        own = _one(table, target="B", condition=condition, part="format")
        tool = _one(table, target="B", condition=condition, part="lenient")
        note = f"tool correctness there {tool.estimate:.3f}"
        found.append(Finding(protocol, own.estimate, own.low, own.high, int(own.n), note=note))
    return found


def _single_feature(load: Load) -> list[Finding]:
    alphas, grid = load("05_alpha"), load("05_grid")
    best = _where(alphas, variant="published").sort_values("gain").iloc[-1]
    found = [Finding("published", best.gain, best.low, best.high, int(best.n))]
    own = _one(grid, prompts="report", features=1, alpha=_chosen_alpha(load))
    finding = Finding("calibrated", own.gain, own.low, own.high, int(own.n))
    random = load("05_random_directions")
    random = random[random.direction.isin(["isotropic", "covariance"])].gain
    means = _where(load("05_saturation"), source="A - B").gain
    best_of = f"best of {len(random)} random directions"
    for against, protocol, name, gain in (
        ("best random direction", "calibrated", best_of, random.max()),
        ("mean of A - B", "calibrated, against a mean", "mean of A - B", means.max()),
    ):
        beyond = _one(load("05_paired"), what="one feature", against=against)
        found.append(
            finding._replace(
                protocol=protocol,
                control=name,
                control_effect=gain,
                over=beyond.difference,
                over_low=beyond.low,
                over_high=beyond.high,
                note=f"margin paired on {int(beyond.n)} prompts",
            )
        )
    return found


def _saturation(load: Load) -> list[Finding]:
    """What more than one feature adds: for the DFC it should be nothing, for the plain one much."""
    table = load("05_paired")
    found = []
    for source, protocol in (("A_exclusive", "DFC"), ("plain", "plain crosscoder")):
        own = _one(table, what=source, against="its first feature")
        note = f"rate with one {own.rate_against:.3f}, with {int(own.features)}: {own.rate:.3f}"
        numbers = (own.difference, own.low, own.high, int(own.n))
        found.append(Finding(protocol, *numbers, note=note))
    return found


def _b_exclusive(load: Load) -> list[Finding]:
    part = _where(load("05_saturation"), source="B_exclusive")
    worst = part.loc[part.gain.abs().idxmax()]
    note = f"B's rows written into A, change {worst.delta:.3f} of the stream"
    own = Finding("calibrated", worst.gain, worst.low, worst.high, int(worst.n), note=note)
    return [own]


def _union(load: Load) -> list[Finding]:
    table = _where(load("05_paired"), what="A and shared")
    own = table[table.against != "its first feature"].iloc[0]
    note = f"{int(own.features)} features of each, against {own.against}"
    return [Finding("calibrated", own.difference, own.low, own.high, int(own.n), note=note)]


def _uniform_scaling(load: Load) -> list[Finding]:
    """Share of prompts whose answer changes, at the strongest scaling of the whole block."""
    from dfc_lib.results import statistics

    table = load("06_scaling")
    found = []
    for target, name in (("B", "base"), ("A", "A")):
        for variant in ("published", "all untied", "last tied"):
            part = _where(table, target=target, variant=variant, metric="lenient")
            strongest = _where(part, **{"top-k": "after"}).sort_values("alpha").iloc[-1]
            n = int(strongest.n)
            changed = round((1 - strongest["same answer"]) * n)
            interval = statistics.exact_binomial(changed, n)
            note = f"alpha {strongest.alpha:g}"
            found.append(Finding(f"{name}, {variant}", *interval[:3], n, note=note))
    return found


def _case(load: Load) -> list[Finding]:
    answers = load("05_case").set_index("cell").response
    hedged, called = "<tool_call>" not in answers["clean"], "<tool_call>" in answers["steered"]
    own = _one(load("05_grid"), prompts="report", features=1, alpha=_chosen_alpha(load))
    note = "the share of prompts gained by the same feature; a case exists"
    if not (hedged and called):
        note = "no prompt goes from a hedge to a call"
    return [Finding("calibrated", own.gain, own.low, own.high, int(own.n), note=note)]


def _chosen_alpha(load: Load) -> float:
    grid = _where(load("05_grid"), prompts="choose", features=1)
    return float(grid.sort_values("gain").iloc[-1].alpha)


def _sweep(target: str) -> "Callable[[Load], list[Finding]]":
    def find(load: Load) -> list[Finding]:
        table = load("08_summary")
        found = []
        for condition in table[table.target == target].condition.unique():
            own = _one(table, target=target, condition=condition, metric="lenient")
            name = min(("random", "tool_mean"), key=lambda c: own[f"beyond_{c}"])
            beyond = own[f"beyond_{name}"]
            found.append(
                Finding(
                    f"48 runs, {condition}",
                    own.gain,
                    own.low,
                    own.high,
                    int(own.prompts),
                    {"random": "random patch as long", "tool_mean": "tool mean"}[name],
                    own.gain - beyond,
                    beyond,
                    own[f"beyond_{name}_low"],
                    own[f"beyond_{name}_high"],
                    note=f"positive in {int(own.positive)} of {int(own.runs)} runs",
                )
            )
        return found

    return find


def _sweep_format(load: Load) -> list[Finding]:
    table = load("08_format")
    found = []
    for condition in table.condition.unique():
        own = _one(table, condition=condition, metric="format")
        tool = _one(table, condition=condition, metric="lenient")
        note = (
            f"worst of {int(own.runs)} runs; tool correctness there at most {tool.largest_rate:.3f}"
        )
        rate, high = own.largest_rate, own.its_upper_bound
        low = 0.0 if rate == 0 else max(0.0, 2 * rate - high)
        found.append(Finding(f"48 runs, {condition}", rate, low, high, int(own.n), note=note))
    return found


def _error(load: Load) -> list[Finding]:
    table = load("08_error")
    found = []
    for condition in ("calibrated", "raw"):
        own = _one(
            table, target="A", condition=condition, error=f"A_{condition}_delta", metric="lenient"
        )
        note = f"over prompts [{own.prompts_low:.2f}, {own.prompts_high:.2f}]"
        runs = int(own.runs)
        found.append(Finding(condition, own.r, own.fisher_low, own.fisher_high, runs, note=note))
    return found


def _filter(share: str) -> "Callable[[Load], list[Finding]]":
    def find(load: Load) -> list[Finding]:
        table = load("08_filter")
        found = []
        for condition in ("calibrated", "raw"):
            own = _one(table, target="A", condition=condition, metric="lenient", share=share)
            note = f"sd over {int(own.pairs)} pairs {own.sd_pairs:.3f}"
            numbers = (own.difference, own.low, own.high, int(own.prompts))
            found.append(Finding(condition, *numbers, note=note))
        return found

    return find


def _architecture(load: Load) -> list[Finding]:
    """The interval is TOST's, 90 %."""
    table = load("08_architecture")
    found = []
    for target, name in (("A", "A"), ("B", "base")):
        for condition in ("calibrated", "raw"):
            own = _one(table, target=target, condition=condition, metric="lenient")
            note = f"power for 3 pp {own.power_3pp:.2f}" if own.power_3pp == own.power_3pp else ""
            n = int(own.n_dfc + own.n_plain)
            numbers = (own.difference, own.tost_low, own.tost_high, n)
            found.append(Finding(f"{name}, {condition}", *numbers, note=note))
    return found


def _over_seeds(values: "pd.Series") -> tuple[float, float, float, int]:
    """Mean over crosscoder seeds with its t interval."""
    from dfc_lib.results import statistics

    zeros = [0.0] * len(values)
    d = statistics.paired_difference(zeros, values.to_numpy(), n_bootstrap=100)
    return d.mean, d.t_low, d.t_high, d.n


def _islands(load: Load) -> list[Finding]:
    table = load("07_recovery")
    table = table[table.method == "k-means"]
    found = []
    for variant, control in (
        ("DFC", "plain, halves blanked"),
        ("DFC, A half", "plain, random blocks, A half"),
    ):
        for space in ("plane", "original"):
            part = table[table.space == space]
            if variant not in set(part.variant):  # a block with fewer than two features alive
                continue
            own = Finding(f"{variant}, {space}", *_over_seeds(_where(part, variant=variant).ari))
            mean, low, high, _ = _over_seeds(_where(part, variant=control).ari)
            found.append(_unpaired(own, control, mean, low, high))
    return found


def _matched(load: Load) -> list[Finding]:
    table = load("07_recovery")
    table = table[(table.method == "k-means") & (table.space == "plane")]
    # Not the random blocks: those are at chance by construction.
    variants = ("plain, norm-ratio blocks", "plain, norm-ratio blocks, A half")
    return [Finding(v, *_over_seeds(_where(table, variant=v).ari)) for v in variants]


def _structural(load: Load) -> list[Finding]:
    table = _where(load("04_structural"), measure="structural")
    found = []
    for order in ("last token", "all tokens"):
        part = table[table.order == order].set_index("block")
        if "A_exclusive" not in part.index:
            continue
        own = part.loc["A_exclusive"]
        others = part.drop(index=["A_exclusive", "B_exclusive"], errors="ignore")
        finding = Finding(f"top by {order}", own.share, own.low, own.high, int(own.n))
        if len(others):
            best = others.share.idxmax()
            rival = others.loc[best]
            name = f"{best} features"
            finding = _unpaired(finding, name, rival.share, rival.low, rival.high)
        found.append(finding)
    return found


def _second_study(claim: str) -> "Callable[[Load], list[Finding]]":
    def find(load: Load) -> list[Finding]:
        found = []
        for own in _where(load("09_readings"), claim=claim).itertuples():
            finding = Finding(own.what, own.estimate, own.low, own.high, int(own.n))
            if isinstance(own.control, str) and own.control:
                finding = finding._replace(
                    control=own.control,
                    control_effect=own.estimate - own.beyond,
                    over=own.beyond,
                    over_low=own.beyond_low,
                    over_high=own.beyond_high,
                )
            found.append(finding)
        return found

    return find


def _both(*finds: "Callable[[Load], list[Finding]]") -> "Callable[[Load], list[Finding]]":
    return lambda load: [finding for find in finds for finding in find(load)]


def _where(table: "pd.DataFrame", **conditions: object) -> "pd.DataFrame":
    for column, value in conditions.items():
        table = table[table[column] == value]
    if table.empty:
        raise ValueError(f"no row with {conditions}; the notebook that wrote the table has changed")
    return table


def _one(table: "pd.DataFrame", **conditions: object) -> "pd.Series":
    found = _where(table, **conditions)
    if len(found) > 1:
        raise ValueError(f"{len(found)} rows with {conditions}, expected one")
    return found.iloc[0]


CLAIMS = (
    Claim(
        "C1",
        "encode-decode reconstruction raises A's tool correctness",
        "+31.1 pp over 48 runs, every run positive",
        "effect",
        0.311,
        "rate",
        "06_reconstruction",
        _both(_reconstruction("A"), _sweep("A")),
    ),
    Claim(
        "C2",
        "passing the base through the crosscoder transfers tool use (spillover)",
        "+6.8 pp from 0 %",
        "effect",
        0.068,
        "rate",
        "06_reconstruction",
        _both(_reconstruction("B"), _sweep("B")),
    ),
    Claim(
        "C3",
        "format never spills",
        "exactly 0 pp in all runs",
        "zero",
        0.03,
        "rate",
        "06_format",
        _both(_format, _sweep_format),
    ),
    Claim(
        "C4",
        "one A-exclusive feature, steered, switches tool use on",
        "+65.0 pp [47.9, 82.1], n = 40",
        "effect",
        0.65,
        "rate",
        "05_grid",
        _single_feature,
    ),
    Claim(
        "C5 (DFC)",
        "the DFC saturates at one feature",
        "flat from 1 to 7 features",
        "zero",
        0.10,
        "rate added by more features",
        "05_saturation",
        lambda load: _saturation(load)[:1],
    ),
    Claim(
        "C5 (plain)",
        "the plain crosscoder needs many features",
        "+70 pp at 33 features",
        "effect",
        0.70,
        "rate added by more features",
        "05_saturation",
        lambda load: _saturation(load)[1:],
    ),
    Claim(
        "C6",
        "steering the B-exclusive block does nothing to A",
        "exactly 0",
        "zero",
        0.05,
        "rate",
        "05_saturation",
        _b_exclusive,
    ),
    Claim(
        "C7",
        "A-exclusive and shared features together do worse than either alone",
        "+52.5 vs +65.0 / +62.5 pp",
        "effect",
        -0.10,
        "rate, against the better alone",
        "05_saturation",
        _union,
    ),
    Claim(
        "C8",
        "reconstruction error does not predict the gain",
        "r = +0.08",
        "zero",
        0.30,
        "Pearson's r over runs",
        "08_error",
        _error,
    ),
    Claim(
        "C9 (5 %)",
        "penalising the exclusive block hurts A, exclusive share 5 %",
        "34.8 -> 25.8 pp",
        "effect",
        0.090,
        "rate, free minus penalised",
        "08_filter",
        _filter("5%"),
    ),
    Claim(
        "C9 (10 %)",
        "penalising the exclusive block hurts A, exclusive share 10 %",
        "35.2 -> 33.0 pp",
        "effect",
        0.022,
        "rate, free minus penalised",
        "08_filter",
        _filter("10%"),
    ),
    Claim(
        "C10",
        "DFC and plain crosscoder do not differ",
        "spillover +5.9 vs +8.9 pp, Welch p = 0.12",
        "zero",
        0.05,
        "rate, DFC minus plain",
        "08_architecture",
        _architecture,
    ),
    Claim(
        "C11 (islands)",
        "the DFC's blocks are islands of the decoder geometry",
        "three islands on a UMAP",
        "effect",
        1.0,
        "adjusted Rand index",
        "07_recovery",
        _islands,
    ),
    Claim(
        "C11 (matched)",
        "a matched-size partition of the plain crosscoder is recovered at chance",
        "cluster recovery at chance",
        "zero",
        0.05,
        "adjusted Rand index",
        "07_recovery",
        _matched,
    ),
    Claim(
        "C12",
        "the most discriminative exclusive features detect structural template tokens",
        "auto-interpretation",
        "effect",
        1.0,
        "share of top features",
        "04_structural",
        _structural,
    ),
    Claim(
        "C13",
        "scaling the whole exclusive block uniformly changes nothing",
        "identical outcomes at alpha 2, 5, 10",
        "zero",
        0.05,
        "share of prompts with another answer",
        "06_scaling",
        _uniform_scaling,
    ),
    Claim(
        "C14",
        "the same prompt goes from a hedge to a correct call",
        "one example, one feature",
        "effect",
        0.01,
        "rate",
        "05_grid",
        _case,
    ),
    Claim(
        "D1",
        "SFT adds specialised features early that stay; RL preserves the base",
        "norm-ratio histograms, overlap of the top 50",
        "effect",
        0.0,
        "SFT minus RL",
        "09_overlap",
        _second_study("D1"),
    ),
    Claim(
        "D2",
        "a compact task-agnostic set mediates RL's generalisation",
        "50 and 16 features, > 80 % overlap across tasks",
        "effect",
        0.80,
        "overlap of sets",
        "09_set",
        _second_study("D2"),
    ),
    Claim(
        "D3",
        "disabling the set degrades RL",
        "-14 to -46 pp",
        "effect",
        0.14,
        "rate lost",
        "09_interventions",
        _second_study("D3"),
    ),
    Claim(
        "D4",
        "amplifying the set lifts the base",
        "+12 to +56 pp",
        "effect",
        0.12,
        "rate gained",
        "09_interventions",
        _second_study("D4"),
    ),
)
