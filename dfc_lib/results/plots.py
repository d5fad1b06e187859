"""Marks that several figures share."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from numpy.typing import ArrayLike


def whiskers(part: pd.DataFrame, middle: str = "gain") -> np.ndarray:
    """(2, n) lengths below and above ``middle`` of the intervals ``low``, ``high``."""
    # A bound can pass its own estimate by a rounding error, which errorbar refuses.
    below, above = part[middle] - part["low"], part["high"] - part[middle]
    return np.clip(np.array([below, above], dtype=float), 0, None)


def points(
    ax: Axes, x: ArrayLike, part: pd.DataFrame, middle: str = "gain", **options: Any
) -> None:
    """Estimates with their intervals along ``x``: dots (``fmt="o-"``: joined) and whiskers."""
    ax.errorbar(
        x, part[middle], whiskers(part, middle), **({"fmt": "o", "ms": 4, "lw": 1} | options)
    )


def bars(ax: Axes, y: ArrayLike, part: pd.DataFrame, middle: str = "gain", **options: Any) -> None:
    """As :func:`points`, lying down: one line per row, ``y`` says where."""
    options = {"fmt": "o", "ms": 4, "lw": 1.3} | options
    ax.errorbar(part[middle], y, xerr=whiskers(part, middle), **options)


def level(ax: Axes, value: float = 0.0, *, upright: bool = False, **options: Any) -> None:
    """A thin line across all of a panel at what the marks are compared with: dotted, grey.

    Args:
        upright: on the x axis, for a panel of :func:`bars`.
    """
    line = ax.axvline if upright else ax.axhline
    line(value, **({"color": "0.4", "ls": ":", "lw": 1} | options))
