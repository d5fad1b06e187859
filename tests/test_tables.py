"""Tables: prompts are paired, seeds averaged within them, and what is missing is said."""

import numpy as np
import pandas as pd
import pytest

from dfc_lib.results import statistics, tables

N = 12


def outcomes() -> pd.DataFrame:
    """Clean, two seeds of a patch in two variants, and a control that has no seed."""
    rng = np.random.default_rng(0)
    names = [("clean", None, None), ("control", None, None)]
    names += [("patch", variant, seed) for variant in ("tied", "untied") for seed in (0, 1)]
    rows = [
        {"prompt": i, "cell": cell, "variant": variant, "seed": seed}
        for i in range(N)
        for cell, variant, seed in names
    ]
    frame = pd.DataFrame(rows)
    rate, margin = rng.integers(0, 2, len(frame)).astype(float), rng.normal(size=len(frame))
    return frame.assign(lenient=rate, margin=margin, delta=rng.random(len(frame)))


def test_seeds_are_averaged_within_each_prompt_before_the_interval():
    frame = outcomes()
    table = tables.paired_table(frame, ["cell", "variant"], ["lenient"], n_bootstrap=200, seed=3)
    row = tables.only(table, cell="patch", variant="tied")
    patched = frame[(frame.variant == "tied")].groupby("prompt").lenient.mean()
    clean = frame[frame.cell == "clean"].set_index("prompt").lenient
    d = statistics.paired_difference(clean, patched, seed=3, n_bootstrap=200)
    assert (row["mean"], row.gain, row.n) == (patched.mean(), d.mean, N)
    assert (row.low, row.high) == (d.bootstrap_low, d.bootstrap_high)
    assert (row.rescued, row.broken) == ((patched > clean).sum(), (patched < clean).sum())


def test_lines_keep_the_order_of_cells_with_metrics_outermost():
    table = tables.paired_table(
        outcomes(), ("cell", "variant", "seed"), ("margin", "lenient"), n_bootstrap=2
    )
    cells = ["control", "patch", "patch", "patch", "patch"]
    assert table.cell.tolist() == 2 * cells
    assert table.metric.tolist() == 5 * ["margin"] + 5 * ["lenient"]
    assert table.seed.isna().tolist() == 2 * [True, False, False, False, False]
    assert list(table)[:5] == ["cell", "variant", "seed", "metric", "mean"]


def test_plain_means_are_added_of_the_lines_of_a_cell():
    frame = outcomes()
    table = tables.paired_table(frame, "cell", means=["delta", "margin"], n_bootstrap=2)
    for row in table.itertuples():
        own = frame[frame.cell == row.cell]
        assert row.delta == pytest.approx(own.delta.mean())
        assert row.margin == pytest.approx(own.margin.mean())
    assert list(table)[-2:] == ["delta", "margin"]


def test_with_runs_the_interval_is_over_runs_and_prompts():
    frame = outcomes()
    part = frame[(frame.variant == "tied") | (frame.cell == "clean")]
    row = tables.only(tables.paired_table(part, "cell", runs="seed"), cell="patch")
    clean = frame[frame.cell == "clean"].set_index("prompt").lenient
    seeds = part[part.cell == "patch"].pivot(index="seed", columns="prompt", values="lenient")
    over = tables.over_runs_and_prompts(seeds - clean)
    assert (row.low, row.high, row.runs) == (over["low"], over["high"], len(seeds))
    assert row.gain == pytest.approx(over["estimate"])


def test_order_of_prompts_does_not_matter():
    frame = outcomes()
    shuffled = frame.sample(frac=1, random_state=1).sort_values("cell", kind="stable")
    first, second = (
        tables.paired_table(f, ["cell", "variant"], n_bootstrap=100).set_index(["cell", "variant"])
        for f in (frame, shuffled)
    )
    numbers = ["mean", "gain", "low", "high", "rescued", "broken"]
    assert np.allclose(first[numbers], second.loc[first.index, numbers])


def test_another_cell_can_be_what_is_compared_with():
    frame = outcomes()
    table = tables.paired_table(frame, "cell", before="control", n_bootstrap=2)
    means = frame.groupby("cell").lenient.mean()
    assert table.cell.tolist() == ["clean", "patch"]
    assert table.gain.tolist() == pytest.approx([means[c] - means["control"] for c in table.cell])


def test_a_cell_to_compare_with_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"'cell': 'as it was'.*clean.*control.*patch"):
        tables.paired_table(outcomes(), "cell", before="as it was")


def test_lines_are_found_by_the_values_of_columns():
    frame = outcomes()
    assert len(tables.where(frame, cell="patch", seed=1)) == 2 * N
    assert tables.only(frame, cell="patch", variant="tied", seed=1, prompt=4).prompt == 4
    with pytest.raises(ValueError, match=r"no line with .*'seed': 7"):
        tables.where(frame, cell="patch", seed=7)
    with pytest.raises(ValueError, match=r"12 lines with .*'clean'.*expected one"):
        tables.only(frame, cell="clean")


def test_the_interval_over_seeds_is_students():
    found = tables.over_seeds([0.1, 0.3, 0.2])
    half = 4.302653 * 0.1 / np.sqrt(3)  # t(2) at 97.5 %, sd 0.1
    assert found == pytest.approx({"estimate": 0.2, "low": 0.2 - half, "high": 0.2 + half, "n": 3})


def test_a_rate_has_wilsons_interval_or_the_exact_one():
    outcomes_of = [True] * 3 + [False] * 7
    wilson, exact = tables.rate_row(outcomes_of), tables.rate_row(np.array(outcomes_of), exact=True)
    assert wilson["estimate"] == exact["estimate"] == 0.3
    assert (wilson["low"], wilson["high"]) == pytest.approx((0.10779, 0.60322), abs=1e-5)
    assert (exact["low"], exact["high"]) == pytest.approx((0.06674, 0.65245), abs=1e-5)
    assert wilson["n"] == exact["n"] == 10


def test_an_interval_over_runs_and_prompts_knows_both():
    """Runs that differ widen it, and so do prompts; with one run it is the prompts' own."""
    rng = np.random.default_rng(1)
    runs, prompts = rng.normal(size=(6, 1)), rng.normal(size=(1, 40))
    width = {}
    for name, values in (
        ("runs", runs + 0 * prompts),
        ("prompts", 0 * runs + prompts),
        ("both", runs + prompts),
        ("one run", prompts),
    ):
        row = tables.over_runs_and_prompts(values, seed=2, n_bootstrap=4000)
        assert row["low"] < row["estimate"] < row["high"]
        assert row["estimate"] == pytest.approx(values.mean())
        assert row["n"] == len(values)
        width[name] = row["high"] - row["low"]
    assert width["both"] > max(width["runs"], width["prompts"])
    own = statistics.bootstrap_mean(prompts[0], seed=3, n_bootstrap=4000)
    assert width["one run"] == pytest.approx(own.high - own.low, rel=0.1)
    t = statistics.paired_difference(np.zeros(6), runs[:, 0])
    assert width["runs"] == pytest.approx(t.t_high - t.t_low)
    expected = 2 * 2.023 * prompts.std(ddof=1) / np.sqrt(40)
    assert width["prompts"] == pytest.approx(expected, rel=1e-3)
    with pytest.raises(ValueError, match=r"shape \(40,\)"):
        tables.over_runs_and_prompts(prompts[0])


def test_an_interval_over_three_runs_covers_as_often_as_it_says():
    """Nearly; a percentile bootstrap of three runs would in three of four cases."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(500):
        runs, prompts = rng.normal(size=(3, 1)), rng.normal(size=(1, 30))
        row = tables.over_runs_and_prompts(runs + prompts + rng.normal(size=(3, 30)))
        hits += row["low"] < 0 < row["high"]
    assert 0.91 <= hits / 500 <= 0.99


def test_changes_are_from_one_cell_prompt_by_prompt():
    frame = outcomes().fillna({"variant": "none", "seed": 0})
    levels = ["cell", "variant", "seed"]
    shuffled = frame.sample(frac=1, random_state=0)
    found = tables.changes(shuffled, levels, ("clean", "none", 0), "margin")
    assert found.shape == (6, N)
    assert not found.loc[("clean", "none", 0)].any()
    margin = frame.set_index(["prompt", *levels]).margin
    expected = margin[3, "patch", "tied", 1] - margin[3, "clean", "none", 0]
    assert found.loc[("patch", "tied", 1), 3] == expected
    with pytest.raises(KeyError):
        tables.changes(frame, levels, ("gone", "none", 0), "margin")
