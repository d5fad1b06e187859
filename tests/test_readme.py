"""The numbers on README's first screen are those of the committed figures."""

import re
import subprocess
from collections import Counter

import pandas as pd
import pytest

from dfc_lib import paths

WORDS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
WORDS += ["eleven", "twelve"]


@pytest.fixture(scope="module")
def readme() -> str:
    """README as one line; skipped where figures were made anew, which may change last digits."""
    asked = ["git", "-C", paths.ROOT, "diff", "--quiet", "HEAD", "--", "figures"]
    if subprocess.run(asked, capture_output=True).returncode:
        pytest.skip("figures/ is not as committed")
    return " ".join((paths.ROOT / "README.md").read_text(encoding="utf-8").split())


def data(name: str) -> pd.DataFrame:
    return pd.read_csv(paths.ROOT / "figures" / f"{name}.csv")


def test_verdicts(readme):
    verdicts = Counter(data("14_scorecard").verdict)
    said = re.search(r"(\w+) claims? holds?, (\w+) fail, (\w+) are undecided and (\w+) is", readme)
    names = ("holds", "fails", "undecided", "untestable")
    found = {
        name: WORDS.index(word.lower()) for name, word in zip(names, said.groups(), strict=True)
    }
    assert found == {name: verdicts[name] for name in names}


def test_rates_of_the_first_figure(readme):
    rates = data("05_switch").set_index("cell")

    def rate(cell: str) -> str:
        line = rates.loc[cell]
        return "{:.0f} % [{:.0f}, {:.0f}]".format(*(100 * line[["called", "low", "high"]]))

    clean, feature, ablated = map(rate, ("clean", "feature", "ablated"))
    assert f"from {clean} to {feature} of {rates.n.iloc[0]} prompts" in readme
    assert f"it leaves {ablated}" in readme


def test_gains_on_all_pairs(readme):
    gains = data("05_pairs").pivot(index="what", columns="pair", values="gain")

    def listed(what: str) -> str:
        return "{}, {} and {}".format(*(f"{gain:.2f}".lstrip("0") for gain in gains.loc[what]))

    assert f"the propensity by {listed('best random direction')} where" in readme
    assert f"the feature raises it by {listed('feature')}" in readme
    assert f"({100 * gains.loc['feature'].mean():.0f} points more propensity)" in readme


def test_seeds_with_the_switch(readme):
    found = data("02_anchored").query("recipe == 'last anchored'")
    assert f"{found.half.sum()} of {len(found)} seeds on three pairs" in readme
    least = found.share[found.half].min()
    assert "at least three quarters" in readme
    assert 0.75 <= least < 0.8


def test_spillover_over_three_pairs(readme):
    line = data("14_scorecard").set_index("claim").loc["C2"]
    said = f"the base: [{100 * line.low:+.0f}, {100 * line.high:+.0f}] points of propensity"
    assert said in readme
    assert line.verdict == "undecided"


def test_what_disabling_and_amplifying_the_set_does(readme):
    table = data("09_pairs").pivot(index=["claim", "kind"], columns="pair", values="estimate")
    lost = [f"{100 * loss:.0f}" for loss in table.loc["D3", "set"]]
    assert "({}, {} and {} points of propensity)".format(*lost) in readme
    share = table.loc["D4", "set"] / table.loc["D4", "ceiling"]
    assert share[0] > 0.9
    assert share[[1, 2]].between(0.2, 0.4).all()
    assert (table.loc["D4", "length"] > table.loc["D4", "set"] / 2)[[1, 2]].all()


def test_raw_gains_beside_the_best_random_push(readme):
    line = data("08_summary").set_index(["target", "condition"]).loc["A", "raw"]
    assert f"by {100 * line.gain:.0f} points over the [48 crosscoders]" in readme
    assert f"(the best of 8: {100 * line.random_best:.0f} points)" in readme
