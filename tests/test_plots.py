"""Shared marks: intervals are drawn where the table says."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from dfc_lib.results import plots


@pytest.fixture
def ax():
    fig, axes = plt.subplots()
    yield axes
    plt.close(fig)


TABLE = pd.DataFrame({"gain": [0.2, 0.5], "low": [0.1, 0.5], "high": [0.4, 0.9]})


def ends(ax: plt.Axes) -> np.ndarray:
    """(mark, end, coordinate) of the whiskers in a panel."""
    return np.array(ax.collections[0].get_segments())


def test_points_stand_and_bars_lie(ax):
    plots.points(ax, [3, 4], TABLE)
    plots.bars(ax, [3, 4], TABLE)
    upright, lying = (np.array(c.get_segments()) for c in ax.collections)
    assert np.allclose(upright[..., 0], [[3, 3], [4, 4]])
    assert np.allclose(upright[..., 1], TABLE[["low", "high"]])
    assert np.allclose(lying, upright[..., ::-1])


def test_options_override_and_another_column_can_be_the_middle(ax):
    plots.points(ax, [0, 1], TABLE.rename(columns={"gain": "rate"}), "rate", fmt="o-", color="C3")
    (line, *_), segments = ax.lines, ends(ax)
    assert (line.get_linestyle(), line.get_color()) == ("-", "C3")
    assert np.allclose(line.get_ydata(), TABLE.gain)
    assert np.allclose(segments[..., 1], TABLE[["low", "high"]])


def test_a_bound_that_passes_its_estimate_by_rounding_is_drawn_as_none():
    table = pd.DataFrame({"gain": [0.3], "low": [0.3 + 1e-16], "high": [0.3 - 1e-16]})
    assert (plots.whiskers(table) == 0).all()


def test_a_level_crosses_the_panel_whichever_way_marks_lie(ax):
    plots.level(ax, 0.5)
    plots.level(ax, 0.25, upright=True, ls="--")
    across, upright = ax.lines
    assert set(across.get_ydata()) == {0.5}
    assert set(upright.get_xdata()) == {0.25}
    assert (across.get_linestyle(), upright.get_linestyle()) == (":", "--")
