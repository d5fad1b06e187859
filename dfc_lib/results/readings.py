"""Readings: what a notebook found for a claim, one row each, judged elsewhere (``claims``)."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import nan
from typing import TYPE_CHECKING

from dfc_lib import paths
from dfc_lib.results import figures

if TYPE_CHECKING:
    import pandas as pd

    from dfc_lib.profiles import Profile


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
    note: str = ""


def save_readings(number: str, readings: Sequence[Reading], profile: "Profile") -> "pd.DataFrame":
    """Write ``<number>_readings``, one row per reading; returns the table.

    Raises:
        ValueError: two readings of a claim have the same id.
    """
    import pandas as pd

    names = [(one.claim, one.id) for one in readings]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{number}_readings: these ids stand twice: {twice}")
    table = pd.DataFrame([asdict(one) for one in readings])
    claims = ", ".join(sorted({one.claim for one in readings}))
    caption = f"What this notebook found for the claims {claims}: effects with their intervals."
    figures.save_table(f"{number}_readings", table, caption, profile=profile)
    return table


def load_readings(profile: "Profile") -> "pd.DataFrame":
    """The readings of our own pairs: the columns of :class:`Reading`, and ``notebook``.

    A notebook with ``"dfc": {"readings": "records"}`` in its metadata reads what others recorded,
    its claims by their plain ids; it is left out.

    Raises:
        FileNotFoundError: a notebook that writes readings has not been run at this profile; the
            message says how.
    """
    import pandas as pd

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
    tables = [figures.load_data(id, profile).assign(notebook=name) for id, name in saved.items()]
    return pd.concat(tables, ignore_index=True)
