"""From a site scan to the settings that interventions are run in."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from dfc_lib.results import statistics, tables


def changes(scanned: pd.DataFrame, seed: int = 0, n_bootstrap: int = 2_000) -> pd.DataFrame:
    """What the patches change, with bootstrap intervals over prompts.

    Returns:
        one line per (model, style, direction, layer, position, outcome): ``clean``, ``patched``,
        ``change`` with ``low`` and ``high``, ``n`` prompts.
    """
    levels = ["model", "style", "direction", "layer", "position"]
    rows = []
    for name, part in scanned.groupby(levels, sort=False):
        for outcome in ("propensity", "acts"):
            before, after = part[f"clean_{outcome}"], part[outcome]
            d = statistics.paired_difference(before, after, seed=seed, n_bootstrap=n_bootstrap)
            row = dict(zip(levels, name, strict=True)) | {"outcome": outcome}
            row |= {"clean": before.mean(), "patched": after.mean(), "change": d.mean}
            rows.append(row | {"low": d.bootstrap_low, "high": d.bootstrap_high, "n": d.n})
    return pd.DataFrame(rows)


def settings(
    table: pd.DataFrame, wanted: Mapping[str, tuple[str, str]], layer: int | None = None
) -> pd.DataFrame:
    """Where to intervene in each setting, by one rule.

    The layer is that of :func:`layer_of` at the last prompt token, where the crosscoders of the
    study learn; the position is the last prompt token if patching it there moves the propensity by
    half of the gap between the two models in both directions, else every position.

    Args:
        table: of :func:`changes`.
        wanted: setting -> (model, style), as they are called in the table. The layer is chosen in
            the first one and kept for all: a crosscoder knows one layer.
        layer: the layer to use in place of the rule's.

    Returns:
        one line per setting: ``setting``, ``model``, ``prompt`` (its style), ``layer``,
        ``position``, ``rule`` (the layer that the rule gives for this setting by itself), ``base``
        and ``tuned`` (propensities left alone), and at that site ``up``, what the tuned model's
        residual adds to the base's propensity, and ``down``, the other way round, with intervals.
    """
    own = {name: layer_of(table, *of, "last") for name, of in wanted.items()}
    layer = next(iter(own.values())) if layer is None else layer
    rows = []
    for name, (model, style) in wanted.items():
        at = {"model": model, "style": style, "layer": layer, "outcome": "propensity"}
        for position in ("last", "every"):
            up, down = (
                tables.only(table, direction=direction, position=position, **at)
                for direction in ("A->B", "B->A")
            )
            if min(up.change, -down.change) >= (down.clean - up.clean) / 2:
                break
        row = {"setting": name, "model": model, "prompt": style, "layer": layer}
        row |= {"position": position, "rule": own[name], "base": up.clean, "tuned": down.clean}
        for move, of in (("up", up), ("down", down)):
            row |= {move: of.change, f"{move}_low": of.low, f"{move}_high": of.high}
        rows.append(row | {"n": int(up.n)})
    return pd.DataFrame(rows)


def layer_of(table: pd.DataFrame, model: str, style: str, position: str) -> int:
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
