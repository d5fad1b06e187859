"""Readings: what a notebook found for a claim, one row each, judged elsewhere (``claims``)."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import nan
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from dfc_lib import paths
from dfc_lib.profiles import Profile
from dfc_lib.results import figures, tables


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One number for one claim, in the claim's own unit.

    Attributes:
        claim: the claim's id, ``C4``.
        id: names the reading, unique within the claim; short words.
        what: what was done and measured, for a reader.
        setting: pair, prompt and site.
        outcome: ``lenient``, ``strict``, ``margin``, ...
        effect, low, high: the number and its interval; NaN where it could not be measured.
        interval: the interval's kind, in words (``95 % bootstrap over prompts``).
        df, over_df: degrees of freedom of the intervals of effect and margin where they are
            Student's t; NaN: many.
        unit: the unit of replication: what ``n`` counts (``prompts``, ``crosscoder seeds``).
        control: the strongest control, by name; empty where there is none.
        control_effect: its number.
        over, over_low, over_high: effect minus control, paired where it can be. Where it cannot,
            the interval is that of both ends, conservatively: ``low`` minus the control's high end
            to ``high`` minus its low end.
        positive_control: what shows that the test could have come out otherwise, and its number.
        note: what a reader should know beside it.
    """

    claim: str
    id: str
    what: str
    setting: str = ""
    outcome: str = "lenient"
    effect: float
    low: float
    high: float
    interval: str = "95 % bootstrap over prompts"
    unit: str = "prompts"
    n: int
    control: str = ""
    control_effect: float = nan
    over: float = nan
    over_low: float = nan
    over_high: float = nan
    positive_control: str = ""
    positive_effect: float = nan
    positive_low: float = nan
    positive_high: float = nan
    df: float = nan
    over_df: float = nan
    note: str = ""


def over_runs(
    claim: str,
    id: str,
    what: str,
    values: ArrayLike,
    positive: tuple[str, ArrayLike],
    control: tuple[str, ArrayLike] | None = None,
    *,
    unit: str = "pairs",
    seed: int = 0,
    n_bootstrap: int = 10_000,
    **more: Any,
) -> Reading:
    """The reading of a change that several runs show on the same prompts.

    The effect, the margin over the control and the positive control are means with t intervals
    over both runs and prompts (``tables.over_runs_and_prompts``); where there is one run, with
    bootstrap intervals over prompts alone.

    Args:
        values: (runs, prompts). Empty, or zero throughout: nothing was changed, so the effect and
            the margin are NaN.
        positive: the positive control's name and its (runs, prompts).
        control: the strongest control's name and its (runs, prompts), paired with ``values``.
        unit: what a run is, in words, plural.
        more: further fields of the reading.
    """

    def ends(names: str, runs: ArrayLike) -> dict[str, float]:
        row = tables.over_runs_and_prompts(np.atleast_2d(runs), seed, n_bootstrap)
        found = (row[key] for key in ("estimate", "low", "high", "df"))
        return dict(zip(names.split(), found, strict=False))  # three names: without df

    n = len(values) if np.any(values) else 0
    fields = {"effect": nan, "low": nan, "high": nan}
    if n:
        fields |= ends("effect low high df", values)
    if n and control:
        fields |= {"control": control[0], "control_effect": float(np.mean(control[1]))}
        fields |= ends("over over_low over_high over_df", np.subtract(values, control[1]))
    fields |= {"positive_control": positive[0]}
    fields |= ends("positive_effect positive_low positive_high", positive[1])
    many = f"t over {unit} and prompts" if n != 1 else f"bootstrap over prompts (one of {unit})"
    fields |= {"unit": unit, "n": n, "interval": f"95 % {many}"}
    return Reading(claim=claim, id=id, what=what, **fields | more)


def save_readings(number: str, readings: Sequence[Reading], profile: Profile) -> pd.DataFrame:
    """Write ``<number>_readings``, one row per reading; returns the table.

    Raises:
        ValueError: two readings of a claim have the same id.
    """
    names = [(one.claim, one.id) for one in readings]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{number}_readings: these ids stand twice: {twice}")
    table = pd.DataFrame([asdict(one) for one in readings])
    claims = ", ".join(sorted({one.claim for one in readings}))
    caption = f"What this notebook found for the claims {claims}: effects with their intervals."
    figures.save_table(f"{number}_readings", table, caption, profile=profile)
    return table


def load_readings(profile: Profile) -> pd.DataFrame:
    """The readings of our own pairs: the columns of :class:`Reading`, and ``notebook``.

    A notebook with ``"dfc": {"readings": "records"}`` in its metadata reads what others recorded,
    its claims by their plain ids; it is left out.

    Raises:
        FileNotFoundError: a notebook that writes readings has not been run at this profile; the
            message says how.
    """
    sources = {path.stem: path.read_text("utf-8") for path in paths.NOTEBOOKS.glob("*.ipynb")}
    ours = {name for name, source in sources.items() if '"readings": "records"' not in source}
    saved = {
        id: name
        for id, name in figures.saved(profile).items()
        if id.endswith("_readings") and name in ours
    }
    writers = sorted(name for name in ours if "save_readings(" in sources[name])
    if missing := [name for name in writers if name not in saved.values()]:
        remedy = figures.remedy(" ".join(name[:2] for name in missing), profile)
        raise FileNotFoundError(
            f"no readings of {', '.join(missing)} at {profile.name}; make them: {remedy}"
        )
    loaded = [figures.load_data(id, profile).assign(notebook=name) for id, name in saved.items()]
    return pd.concat(loaded, ignore_index=True)
