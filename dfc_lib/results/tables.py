"""From outcomes (one line per prompt and cell) to the lines of a figure's table."""

from collections.abc import Hashable, Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.stats import t as student

from dfc_lib.results import statistics


def where(table: pd.DataFrame, **values: Hashable) -> pd.DataFrame:
    """The lines whose columns hold these values.

    Raises:
        ValueError: there are none; the message says what the columns hold.
    """
    found = table
    for column, value in values.items():
        found = found[found[column] == value]
    if found.empty:
        held = "; ".join(
            f"{column}: {sorted(map(str, table[column].unique()))}" for column in values
        )
        raise ValueError(f"no line with {values}; the table holds {held}")
    return found


def only(table: pd.DataFrame, **values: Hashable) -> pd.Series:
    """The one line whose columns hold these values.

    Raises:
        ValueError: there is none, or there are more.
    """
    found = where(table, **values)
    if len(found) > 1:
        raise ValueError(f"{len(found)} lines with {values}, expected one")
    return found.iloc[0]


def paired_table(
    frame: pd.DataFrame,
    levels: str | Sequence[str],
    metrics: Sequence[str] = ("lenient",),
    *,
    before: str = "clean",
    means: Sequence[str] = (),
    runs: str | None = None,
    seed: int = 0,
    n_bootstrap: int = 10_000,
) -> pd.DataFrame:
    """What every cell changes, prompt by prompt.

    Where a combination of levels holds several lines per prompt (seeds, random draws), they are
    averaged within each prompt first; the interval resamples prompts, unless ``runs`` is given.

    Args:
        frame: outcomes, from :meth:`dfc_lib.study.Study.run`.
        levels: the columns that name a line of the result, the first one being where ``before``
            stands. Missing values count as values.
        metrics: outcomes, such as ``lenient`` or ``margin``.
        before: what is compared with.
        means: columns whose plain means are added, such as ``delta``.
        runs: the column that tells the lines of a prompt apart. The interval is then over these
            runs and prompts (:func:`over_runs_and_prompts`), and ``runs`` says how many there are.

    Returns:
        ``levels``, ``metric``, ``mean``, ``gain`` (mean difference from ``before``) with its
        95 % interval ``low``, ``high``, ``n`` prompts, of these ``rescued`` (higher than
        before) and ``broken`` (lower), and ``means``; in the order of ``frame``, metrics outermost.

    Raises:
        ValueError: no line of ``frame`` is called ``before``.
    """
    levels = [levels] if isinstance(levels, str) else list(levels)
    alone = where(frame, **{levels[0]: before}).groupby("prompt")
    cells = frame.groupby(levels, sort=False, dropna=False)
    added = cells[list(means)].mean().to_dict("records")
    rows = []
    for metric in metrics:
        start = alone[metric].mean()
        for (name, part), sizes in zip(cells, added, strict=True):
            if name[0] == before:
                continue
            end = part.groupby("prompt")[metric].mean().loc[start.index]
            resamples = 2 if runs else n_bootstrap  # with runs the interval is another
            d = statistics.paired_difference(start, end, seed=seed, n_bootstrap=resamples)
            row = dict(zip(levels, name, strict=True)) | {"metric": metric, "mean": end.mean()}
            row |= {"gain": d.mean, "low": d.bootstrap_low, "high": d.bootstrap_high, "n": d.n}
            row |= {"rescued": d.n_rescued, "broken": d.n_broken} | sizes
            if runs:
                change = part.pivot(index=runs, columns="prompt", values=metric) - start
                over = over_runs_and_prompts(change, seed, n_bootstrap)
                row |= {"low": over["low"], "high": over["high"], "runs": over["n"]}
            rows.append(row)
    return pd.DataFrame(rows)


def changes(
    frame: pd.DataFrame, levels: Sequence[str], before: Hashable, outcome: str = "propensity"
) -> pd.DataFrame:
    """What every cell changes on every prompt: one row per cell, one column per prompt.

    Args:
        frame: outcomes, from :meth:`dfc_lib.study.Study.propensity`.
        before: the cell that is compared with, one value a level.

    Raises:
        KeyError: ``frame`` has no such cell.
    """
    outcomes = frame.pivot(index=list(levels), columns="prompt", values=outcome)
    return outcomes - outcomes.loc[before]


def over_seeds(values: ArrayLike, confidence: float = 0.95) -> dict[str, float]:
    """``estimate``, the mean over runs, with its t interval ``low``, ``high``; ``n`` runs."""
    values = np.asarray(values, dtype=float)
    d = statistics.paired_difference(
        np.zeros(len(values)), values, n_bootstrap=2, confidence=confidence
    )
    return {"estimate": d.mean, "low": d.t_low, "high": d.t_high, "n": d.n}


def over_runs_and_prompts(
    values: ArrayLike, seed: int = 0, n_bootstrap: int = 10_000, confidence: float = 0.95
) -> dict[str, float]:
    """``estimate``, the mean of (runs, prompts) that all runs share, with its interval ``low``,
    ``high`` over both; ``n`` runs; ``df``, the interval's degrees of freedom.

    Runs and prompts are crossed random effects: the variance of the mean is that of the runs'
    means plus that of the prompts', less what both hold of the rest, and the interval is Student's
    t with Satterthwaite's degrees of freedom. A bootstrap of three runs could not leave their
    range. With one run there is no spread of runs: a percentile bootstrap over prompts, df NaN.

    Raises:
        ValueError: ``values`` is not two-dimensional, or empty.
    """
    values = np.asarray(values, dtype=float)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"values has shape {values.shape}; it must be (runs, prompts), not empty")
    (runs, prompts), mean = values.shape, float(values.mean())
    if min(runs, prompts) == 1:
        one = statistics.bootstrap_mean(values.ravel(), seed, n_bootstrap, confidence)
        return {"estimate": mean, "low": one.low, "high": one.high, "n": runs, "df": np.nan}
    of_run, of_prompt = values.mean(1), values.mean(0)
    rest = values - of_run[:, None] - of_prompt + mean
    squares = np.array(  # mean squares of the two-way layout without replication
        [prompts * of_run.var(ddof=1), runs * of_prompt.var(ddof=1), 0.0]
    )
    degrees = np.array([runs - 1, prompts - 1, (runs - 1) * (prompts - 1)])
    squares[2] = (rest**2).sum() / degrees[2]
    total = max(squares[0] + squares[1] - squares[2], squares.max())
    df = total**2 / (squares**2 / degrees).sum() if total else np.nan
    half = student.ppf((1 + confidence) / 2, df) * np.sqrt(total / values.size) if total else 0.0
    return {"estimate": mean, "low": mean - half, "high": mean + half, "n": runs, "df": df}


def rate_row(outcomes: ArrayLike, exact: bool = False) -> dict[str, float]:
    """``estimate``, the share of trues, with its interval ``low``, ``high``; ``n`` of them.

    Args:
        outcomes: 0/1 or bools.
        exact: the exact binomial interval (Clopper and Pearson), else Wilson's.
    """
    outcomes = np.asarray(outcomes, dtype=float)
    interval = (statistics.exact_binomial if exact else statistics.wilson)(
        int(outcomes.sum()), len(outcomes)
    )
    return interval._asdict() | {"n": len(outcomes)}
