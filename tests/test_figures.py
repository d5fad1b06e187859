"""Figures: deterministic bytes, a true manifest, and refusals that say what to do."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dfc_lib import paths, profiles, provenance
from dfc_lib.results import figures

SMOKE = profiles.PROFILES["smoke"]
TOY = profiles.PROFILES["toy"]
ABOUT = {"caption": "Rates; n = 3, seed 0, Wilson intervals.", "alt": "A line that rises."}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A compendium with notebook 05 and nothing else."""
    for name in ("DFC_FIGURES", "DFC_STAGING", "DFC_NOTEBOOK", "DFC_CODE_HASH", "DFC_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DFC_BUILD", str(tmp_path / "build"))
    for name in ("ROOT", "NOTEBOOKS", "FIGURES"):
        part = {"ROOT": "", "NOTEBOOKS": "notebooks", "FIGURES": "figures"}[name]
        monkeypatch.setattr(paths, name, tmp_path / part)
    (tmp_path / "notebooks").mkdir()
    code = {"cell_type": "code", "metadata": {}, "source": "x = 1", "outputs": [], "id": "a"}
    content = {"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [code]}
    (tmp_path / "notebooks" / "05_steering.ipynb").write_text(json.dumps(content))
    return tmp_path / "build" / "smoke" / "figures"


@pytest.fixture
def fig():
    figures.use_style()
    figure, ax = plt.subplots()
    x = [1, 2, 4]
    figures.ci_band(ax, x, [0.0, 0.2, 0.3], [0.2, 0.5, 0.6], color=figures.PALETTE["A"])
    figures.rate_points(ax, x, [0.1, 0.3, 0.5], [0, 0.2, 0.3], [0.2, 0.5, 0.6], color="k")
    yield figure
    plt.close(figure)
    mpl.rcdefaults()


def frame(**columns):
    return pd.DataFrame(columns or {"alpha": [1, 2, 4], "rate": [0.1, 0.30000001, 1 / 3]})


def test_a_figure_is_saved_with_its_data_and_its_row(fig, place, monkeypatch):
    """A reader must get from a picture to its numbers, its notebook and its code."""
    monkeypatch.setenv("MKL_CBWR", "AVX2")
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    figures.save_figure(
        fig, "05_saturation", frame(), **ABOUT, profile=SMOKE, parameters={"alpha": [1, 2]}
    )
    assert (place / "05_saturation.csv").read_bytes() == b"alpha,rate\n1,0.1\n2,0.3\n4,0.333333\n"
    assert (place / "05_saturation.png").read_bytes()[:4] == b"\x89PNG"
    pdf = (place / "05_saturation.pdf").read_bytes()
    assert pdf[:4] == b"%PDF"
    assert b"CreationDate" not in pdf
    (row,) = json.loads((place / "manifest.json").read_text())
    digest = hashlib.sha256((place / "05_saturation.csv").read_bytes()).hexdigest()
    assert row["data_sha256"] == digest
    assert row["notebook"] == "05_steering"
    assert row["profile"] == "smoke"
    assert row["parameters"] == {"alpha": [1, 2]}
    assert (row["caption"], row["alt"]) == (ABOUT["caption"], ABOUT["alt"])
    assert row["code_hash"] is None  # no notebook is being run
    assert row["arithmetic"] == provenance.arithmetic()
    assert (row["arithmetic"]["MKL_CBWR"], row["arithmetic"]["ATEN_CPU_CAPABILITY"]) == (
        "AVX2",
        None,
    )
    assert row["files"] == ["05_saturation.csv", "05_saturation.pdf", "05_saturation.png"]
    assert sorted(p.name for p in place.iterdir()) == [*row["files"], "manifest.json"]


def test_only_the_published_profile_writes_to_figures(fig, tmp_path):
    """A smoke run that replaced a committed figure would publish noise."""
    figures.save_figure(fig, "05_a", frame(), **ABOUT, profile=SMOKE)
    assert not (tmp_path / "figures").exists()
    figures.save_figure(fig, "05_a", frame(), **ABOUT, profile=TOY)
    assert (tmp_path / "figures" / "05_a.png").exists()


def test_bytes_are_the_same_in_another_process_and_on_another_day(tmp_path):
    """Two clean runs must give identical files, or every rerun would be a diff."""
    script = (
        "import sys, time, pandas as pd\n"
        "import matplotlib; matplotlib.use('agg')\n"
        "import matplotlib.pyplot as plt\n"
        "from dfc_lib import profiles\nfrom dfc_lib.results import figures\n"
        "figures.use_style()\n"
        "f, ax = plt.subplots(); ax.plot([1, 2], [3, 4], label='$\\\\alpha$'); ax.legend()\n"
        "d = pd.DataFrame({'x': [1, 2], 'y': [3.0, 4.5]})\n"
        "figures.save_figure(f, '05_a', d, 'c', 'a', profile=profiles.PROFILES['smoke'])\n"
    )
    seen = []
    for day in ("0", "86400000"):
        out = tmp_path / day
        names = {"DFC_FIGURES": str(out), "DFC_NOTEBOOK": "05_x", "DFC_CODE_HASH": "0" * 64}
        env = {**os.environ, **names, "PYTHONHASHSEED": day, "SOURCE_DATE_EPOCH": day}
        subprocess.run([sys.executable, "-c", script], env=env, check=True, cwd=os.getcwd())
        seen.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert len(seen[0]) == 4
    assert seen[0] == seen[1]


def test_a_second_save_replaces_its_row_and_the_manifest_stays_sorted(fig, place):
    """Rows that pile up or wander would make every run a diff."""
    figures.save_table("05_b", frame(), "First.", profile=SMOKE)
    figures.save_figure(fig, "05_a", frame(), **ABOUT, profile=SMOKE)
    figures.save_table("05_b", frame(), "Second.", profile=SMOKE)
    rows = figures.read_manifest(place)
    assert [row["id"] for row in rows] == ["05_a", "05_b"]
    assert rows[1]["caption"] == "Second."
    assert rows[1]["files"] == ["05_b.csv"]
    assert rows[1]["alt"] is None


def test_data_comes_back_as_it_was_saved():
    """Notebook 14 reads every verdict from these files."""
    data = frame(
        arm=["A", "None", ""], n=[1, 2, 3], rate=[0.5, np.nan, -np.inf], yes=[True, False, True]
    )
    figures.save_table("05_t", data, "Caption.", profile=SMOKE)
    pd.testing.assert_frame_equal(figures.load_data("05_t", SMOKE), data, check_dtype=False)
    figures.save_table("05_a", data, "Caption.", profile=SMOKE)
    assert figures.saved(SMOKE) == {"05_a": "05_steering", "05_t": "05_steering"}
    assert figures.saved(TOY) == {}


@pytest.mark.parametrize("folder", ["DFC_FIGURES", "DFC_STAGING"])
def test_what_is_saved_elsewhere_is_found_there(folder, tmp_path, monkeypatch):
    """A check has a folder of its own: what it lists must be what it can load."""
    monkeypatch.setenv(folder, str(tmp_path / "check"))
    figures.save_table("05_t", frame(), "Caption.", profile=SMOKE)
    assert figures.saved(SMOKE) == {"05_t": "05_steering"}
    assert len(figures.load_data("05_t", SMOKE)) == 3


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=8))
def test_any_float_survives_to_six_digits(values):
    """A format that lost magnitude, infinity or NaN would change results between notebooks."""
    text = figures._csv("05_x", pd.DataFrame({"v": values})).decode()
    back = [float(line) for line in text.splitlines()[1:]]
    np.testing.assert_allclose(back, values, rtol=5.1e-6, atol=1e-320)
    assert "\r" not in text
    assert "-0\n" not in text


def test_numbers_in_an_object_column_get_the_same_format():
    """Rows gathered as dicts often end up as objects, whose floats pandas prints in full."""
    data = pd.DataFrame({"v": pd.Series([1 / 3, 2.0], dtype=object)})
    assert figures._csv("05_x", data) == b"v\n0.333333\n2\n"


def test_altered_data_is_refused(place):
    """A CSV edited by hand must not flow into the scorecard."""
    figures.save_table("05_t", frame(), "Caption.", profile=SMOKE)
    (place / "05_t.csv").write_text("alpha,rate\n1,0.99\n")
    with pytest.raises(ValueError, match=r"05_t\.csv is not what 05_steering wrote.*NB=05"):
        figures.load_data("05_t", SMOKE)


def test_missing_data_names_the_command_that_makes_it():
    """A notebook run out of order must say which one to run first."""
    with pytest.raises(FileNotFoundError, match="make figures NB=03 PROFILE=smoke"):
        figures.load_data("03_ranking", SMOKE)


def test_a_damaged_manifest_is_named(place):
    """A merge conflict in the manifest must not look like an empty one."""
    place.mkdir(parents=True)
    (place / "manifest.json").write_text("<<<<<<< ours")
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        figures.save_table("05_t", frame(), "Caption.", profile=SMOKE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"caption": "  "}, "caption is empty"),
        ({"alt": ""}, "alt is empty"),
        ({"data": pd.DataFrame({"x": []})}, "at least one row"),
        ({"data": {"x": [1]}}, "must be a DataFrame"),
        ({"data": pd.DataFrame([[1, 2]], columns=["x", "x"])}, "different, non-empty names"),
        ({"data": pd.DataFrame([[1, 2]])}, "different, non-empty names"),
        ({"id": "saturation"}, "notebook's number"),
        ({"id": "05_Saturation"}, "notebook's number"),
        ({"id": "07_islands"}, "0 notebooks called 07_"),
    ],
)
def test_what_would_make_a_useless_figure_is_refused(fig, place, change, message):
    """Nothing may be written when something that a reader needs is missing."""
    wanted = {"id": "05_a", "data": frame(), **ABOUT, **change}
    with pytest.raises(ValueError, match=message):
        figures.save_figure(fig, profile=SMOKE, **wanted)
    assert not place.exists()


def test_a_notebook_cannot_save_under_anothers_number(monkeypatch):
    """Two notebooks writing one id would overwrite each other in turn."""
    monkeypatch.setenv("DFC_NOTEBOOK", "05_steering")
    with pytest.raises(ValueError, match="should start with 05_"):
        figures.save_table("03_t", frame(), "Caption.", profile=SMOKE)


def test_the_notebook_without_a_number_has_figures_of_its_own(place, monkeypatch):
    """The quickstart comes before 00; its id must not be taken for a number cut off."""
    (paths.NOTEBOOKS / "quickstart.ipynb").write_text("{}")
    (paths.NOTEBOOKS / "quickstart_my_copy.ipynb").write_text("{}")
    monkeypatch.setenv("DFC_NOTEBOOK", "quickstart")
    figures.save_table("quickstart_dial", frame(), "Caption.", profile=SMOKE)
    assert figures.saved(SMOKE) == {"quickstart_dial": "quickstart"}
    (place / "quickstart_dial.csv").unlink()
    with pytest.raises(FileNotFoundError, match="make figures NB=quickstart PROFILE=smoke"):
        figures.load_data("quickstart_dial", SMOKE)
    with pytest.raises(ValueError, match="should start with quickstart_"):
        figures.save_table("05_t", frame(), "Caption.", profile=SMOKE)


def test_a_picture_over_one_megabyte_is_refused(place):
    """A repository of large pictures cannot be cloned by a class."""
    noise = np.random.default_rng(0).random((1200, 1200))
    figure = plt.figure(figsize=(9, 9))
    figure.figimage(noise)
    with pytest.raises(ValueError, match="limit is 1 MB"):
        figures.save_figure(figure, "05_noise", frame(), **ABOUT, profile=SMOKE)
    plt.close(figure)
    assert not place.exists()


def test_staged_figures_stay_out_of_sight_but_can_be_read_back(tmp_path, monkeypatch, place):
    """A failing notebook must not leave half its figures in place."""
    figures.save_table("05_t", frame(v=[1]), "Old.", profile=SMOKE)
    monkeypatch.setenv("DFC_STAGING", str(tmp_path / "staging"))
    figures.save_table("05_t", frame(v=[2]), "New.", profile=SMOKE)
    assert figures.load_data("05_t", SMOKE)["v"].tolist() == [2]
    assert (place / "05_t.csv").read_text() == "v\n1\n"


def test_the_index_is_kept_when_it_has_a_name(place):
    """A groupby result carries its group in the index; dropping it loses the group."""
    data = frame(arm=["a", "b"], v=[1.0, 3.0]).groupby("arm").mean()
    figures.save_table("05_t", data, "Caption.", profile=SMOKE)
    assert (place / "05_t.csv").read_text() == "arm,v\na,1\nb,3\n"


def test_palette_tells_roles_apart():
    """A and B, the blocks, and the RL, SFT and base models must never share a colour."""
    colours = figures.PALETTE
    for group in (
        ["A", "B", "shared", "control", "neutral"],
        ["A_exclusive", "B_exclusive", "shared", "plain", "control"],
        ["base", "sft", "rl", "control"],
    ):
        assert len({colours[role] for role in group}) == len(group)
    assert all(mpl.colors.is_color_like(colour) for colour in colours.values())


def test_style_is_complete(fig):
    """A misspelt key in the style file is only a warning in matplotlib."""
    assert not fig.axes[0].spines["top"].get_visible()
    assert mpl.rcParams["pdf.fonttype"] == 42
    assert mpl.rcParams["savefig.dpi"] == 150


def test_intervals_that_miss_their_estimate_by_rounding_are_drawn():
    """errorbar refuses a negative length, which a bound at the estimate can produce."""
    figure, ax = plt.subplots()
    figures.rate_points(ax, [0], [1.0], [0.9], [1.0 - 1e-16], color="k", label="A")
    assert ax.get_legend_handles_labels()[1] == ["A"]
    plt.close(figure)


def test_profiles_folder_can_be_overridden(monkeypatch, tmp_path):
    """`make regress` must compare with the committed figures, not overwrite them."""
    monkeypatch.setenv("DFC_FIGURES", str(tmp_path / "check"))
    assert figures.folder(TOY) == tmp_path / "check"
    assert figures.folder(dataclasses.replace(SMOKE, name="other")) == tmp_path / "check"
