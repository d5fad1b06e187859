"""From a site scan to the settings that interventions are run in."""

from typing import TYPE_CHECKING

import numpy as np

from dfc_lib.results import statistics, tables

if TYPE_CHECKING:
    import pandas as pd


def changes(scanned: "pd.DataFrame", seed: int = 0, n_bootstrap: int = 2_000) -> "pd.DataFrame":
    """What the patches change, with bootstrap intervals over prompts.

    Returns:
        one line per (model, style, direction, layer, position, outcome): ``clean``, ``patched``,
        ``change`` with ``low`` and ``high``, ``n`` prompts.
    """
    import pandas as pd

    levels = ["model", "style", "direction", "layer", "position"]
    rows = []
    for name, part in scanned.groupby(levels, sort=False):
        for outcome in ("propensity", "lenient"):
            before, after = part[f"clean_{outcome}"], part[outcome]
            d = statistics.paired_difference(before, after, seed=seed, n_bootstrap=n_bootstrap)
            row = dict(zip(levels, name, strict=True)) | {"outcome": outcome}
            row |= {"clean": before.mean(), "patched": after.mean(), "change": d.mean}
            rows.append(row | {"low": d.bootstrap_low, "high": d.bootstrap_high, "n": d.n})
    return pd.DataFrame(rows)


def layer_of(table: "pd.DataFrame", model: str, style: str, position: str) -> int:
    """The layer at which to intervene, by one rule.

    The first layer at which the propensity moves by at least half of the gap between the two models
    *in both directions*; if there is none, the one where the smaller of the two moves is largest.
    The last layer never counts: what is patched there has no computation left to act through.

    Args:
        table: of :func:`changes`.
    """
    at = {"model": model, "style": style, "position": position, "outcome": "propensity"}
    up, down = (
        tables.where(table, direction=direction, **at).set_index("layer")
        for direction in ("A->B", "B->A")
    )
    smaller = np.minimum(up.change, -down.change).iloc[:-1]
    enough = smaller[smaller >= (down.clean - up.clean).iloc[0] / 2]
    return int(enough.index[0] if len(enough) else smaller.idxmax())
