"""Figures that can be checked: the picture, the numbers behind it, and what made both.

``save_figure`` writes four things, in deterministic bytes and never half written::

    figures/05_saturation.png   what the notebook and the README show (150 dpi, under 1 MB)
    figures/05_saturation.pdf   the same for print, fonts embedded as TrueType
    figures/05_saturation.csv   the tidy data behind it, floats with 6 significant digits
    figures/manifest.json       its row: notebook, parameters, profile, code_hash (null unless the
                                runner ran it), arithmetic, data_sha256, caption and alt text

Only the published profile writes to ``figures/``, the others to ``build/<profile>/figures/``. The
CSVs are the interface between notebooks: ``load_data`` reads them and checks their sha256.
"""

import hashlib
import io
import json
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfc_lib import paths, provenance, store
from dfc_lib.profiles import Profile

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike

MAX_PNG_BYTES = 1_000_000

# Colours of M. Okabe and K. Ito, "Color Universal Design" (2008). What belongs to the tuned model A
# is vermillion and what belongs to the base model B is blue, in every figure.
PALETTE: dict[str, str] = {
    "A": "#D55E00",
    "rl": "#D55E00",
    "A_exclusive": "#D55E00",
    "B": "#0072B2",
    "base": "#0072B2",
    "B_exclusive": "#0072B2",
    "sft": "#E69F00",
    "shared": "#009E73",
    "plain": "#CC79A7",
    "neutral": "#56B4E9",
    "control": "#999999",
}


def use_style() -> None:
    """Apply ``dfc.mplstyle`` to every figure made from here on."""
    import matplotlib.style

    matplotlib.style.use(Path(__file__).with_name("dfc.mplstyle"))


def folder(profile: Profile) -> Path:
    """Where this profile's figures are; ``DFC_FIGURES`` (set by the runner) overrides."""
    return _places(profile, "DFC_FIGURES")[0]


def save_figure(
    fig: "Figure",
    id: str,
    data: "pd.DataFrame",
    caption: str,
    alt: str,
    *,
    profile: Profile,
    parameters: Mapping[str, Any] | None = None,
) -> None:
    """Write a figure as PNG and PDF, the data behind it as CSV, and its row in the manifest.

    Args:
        fig: the figure; it is left open, so the notebook shows it too.
        id: ``<number of the notebook>_<name>`` in lower case, for example ``05_saturation``; of
            the notebook without a number, ``quickstart_<name>``.
        data: tidy data (one observation per row), everything that the figure shows. NaN is allowed.
        caption: what is seen, with n, the seeds and how the intervals were made.
        alt: the figure in words, for those who do not see it.
        parameters: what was set in this run and matters to a reader, as JSON values.

    Raises:
        ValueError: an empty or malformed id, caption, alt or data, or a PNG over 1 MB.
    """
    import matplotlib as mpl

    if not alt.strip():
        raise ValueError(f"figure {id}: alt is empty; say in words what the figure shows")
    png, pdf = io.BytesIO(), io.BytesIO()
    with mpl.rc_context({"pdf.fonttype": 42}):
        # Without these entries neither file carries a date or a version of its writer.
        fig.savefig(png, format="png", metadata={"Software": None})
        undated = {"CreationDate": None, "Creator": None, "Producer": None}
        fig.savefig(pdf, format="pdf", metadata=undated)
    if png.tell() > MAX_PNG_BYTES:
        raise ValueError(
            f"figure {id}: the PNG has {png.tell() / 1e6:.1f} MB, the limit is 1 MB; make "
            "the figure smaller, with fewer panels or fewer points"
        )
    pictures = {f"{id}.png": png.getvalue(), f"{id}.pdf": pdf.getvalue()}
    given = {"parameters": parameters, "alt": alt.strip(), "pictures": pictures}
    save_table(id, data, caption, profile=profile, **given)


def save_table(
    id: str,
    data: "pd.DataFrame",
    caption: str,
    *,
    profile: Profile,
    parameters: Mapping[str, Any] | None = None,
    alt: str | None = None,
    pictures: Mapping[str, bytes] | None = None,
) -> None:
    """As :func:`save_figure`, for results without a picture: the CSV and its row in the manifest.

    Args:
        alt, pictures: what :func:`save_figure` adds; the pictures by file name.

    Raises:
        ValueError: an empty or malformed id, caption or data.
    """
    if not caption.strip():
        raise ValueError(
            f"{id}: caption is empty; state n, the seeds and how the intervals were made"
        )
    csv = _csv(id, data)
    files = {**(pictures or {}), f"{id}.csv": csv}
    row = {
        "id": id,
        "notebook": _notebook(id),
        "profile": profile.name,
        "parameters": json.loads(json.dumps(dict(parameters or {}))),
        "code_hash": os.environ.get("DFC_CODE_HASH"),
        "arithmetic": provenance.arithmetic(),
        "data_sha256": hashlib.sha256(csv).hexdigest(),
        "files": sorted(files),
        "caption": caption.strip(),
        "alt": alt,
    }
    # Under the runner everything waits in a staging folder until the whole notebook has succeeded.
    place = _places(profile, "DFC_STAGING", "DFC_FIGURES")[0]
    for name, content in files.items():
        store.write_atomically(place / name, content)
    write_manifest(place, [*(old for old in read_manifest(place) if old["id"] != id), row])


def load_data(id: str, profile: Profile) -> "pd.DataFrame":
    """The data behind a figure or table, as some notebook saved it.

    Raises:
        FileNotFoundError: it has not been made at this profile; the message says how to make it.
        ValueError: the CSV is not the one that the manifest records.
    """
    import pandas as pd

    for place in _places(profile, "DFC_STAGING", "DFC_FIGURES"):
        path = place / f"{id}.csv"
        row = next((row for row in read_manifest(place) if row["id"] == id), None)
        if row is None or not path.exists():
            continue
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != row["data_sha256"]:
            raise ValueError(
                f"{path} is not what {row['notebook']} wrote (its sha256 differs from "
                f"manifest.json); remake it: {remedy(label(id), profile)}"
            )
        # Only NaN means missing: a text such as "None" or "null" is a value here.
        return pd.read_csv(io.BytesIO(content), keep_default_na=False, na_values=["NaN"])
    raise FileNotFoundError(
        f"no data for {id} in {_places(profile)[0]}; make it: {remedy(label(id), profile)}"
    )


def saved(profile: Profile) -> dict[str, str]:
    """What :func:`load_data` can load, in order of the ids: id -> the notebook that saved it."""
    places = _places(profile, "DFC_STAGING", "DFC_FIGURES")
    rows = [row for place in places for row in read_manifest(place)]
    return {row["id"]: row["notebook"] for row in sorted(rows, key=lambda row: row["id"])}


def label(name: str) -> str:
    """What a notebook and its figures are called by: its number, or ``quickstart``."""
    return name.partition("_")[0]


def remedy(numbers: str, profile: Profile) -> str:
    """The command that runs notebooks at a profile: ``05``, or several as in ``05 06``."""
    return f"make figures NB={shlex.quote(numbers)} PROFILE={profile.name}"


def read_manifest(place: Path) -> list[dict]:
    """The rows of ``place/manifest.json``, none where there is no such file.

    Raises:
        ValueError: the file is not valid JSON.
    """
    path = place / "manifest.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}); restore it with git or delete it"
        ) from error


def write_manifest(place: Path, rows: list[dict]) -> None:
    """Write the rows in one order and one layout."""
    rows = sorted(rows, key=lambda row: row["id"])
    text = json.dumps(rows, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    store.write_atomically(place / "manifest.json", text)


def ci_band(
    ax: "Axes", x: "ArrayLike", low: "ArrayLike", high: "ArrayLike", **options: Any
) -> None:
    """Shade the interval ``[low, high]`` along ``x`` (all of one length), behind the lines."""
    ax.fill_between(x, low, high, **{"alpha": 0.2, "linewidth": 0, "zorder": 1, **options})


def rate_points(
    ax: "Axes",
    x: "ArrayLike",
    rate: "ArrayLike",
    low: "ArrayLike",
    high: "ArrayLike",
    **options: Any,
) -> None:
    """Draw rates (0 to 1) with their intervals ``[low, high]``, all of one length."""
    import numpy as np

    rate, low, high = (np.asarray(values, dtype=float) for values in (rate, low, high))
    # A bound can pass its own estimate by a rounding error, which errorbar refuses.
    whiskers = np.clip([rate - low, high - rate], 0, None)
    ax.errorbar(x, rate, yerr=whiskers, **{"fmt": "o", **options})


def _places(profile: Profile, *overrides: str) -> list[Path]:
    """The folders that these environment variables name, as far as they are set, and its own."""
    own = paths.FIGURES if profile.published else paths.build(profile.name, "figures")
    return [*(Path(os.environ[name]) for name in overrides if os.environ.get(name)), own]


def _csv(id: str, data: "pd.DataFrame") -> bytes:
    import pandas as pd

    if not re.fullmatch(r"(\d\d|quickstart)_[a-z0-9_]+", id):
        raise ValueError(
            f"id {id!r} should be the notebook's number and a name, for example 05_saturation"
        )
    if not isinstance(data, pd.DataFrame) or data.empty:
        raise ValueError(f"{id}: data must be a DataFrame with at least one row and column")
    if any(name is not None for name in data.index.names):
        data = data.reset_index()
    names = list(data.columns)
    if not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
        raise ValueError(
            f"{id}: the columns of data need different, non-empty names of type str: {names}"
        )
    data = data.infer_objects()
    floats = data.select_dtypes("floating").columns
    # + 0.0 turns a negative zero into zero: its sign would be noise in the file.
    data[floats] = data[floats] + 0.0
    text = data.to_csv(index=False, float_format="%.6g", na_rep="NaN", lineterminator="\n")
    return text.encode("utf-8")


def _notebook(id: str) -> str:
    """The notebook that a figure belongs to: the one being run, else that with the id's number."""
    running = os.environ.get("DFC_NOTEBOOK")
    if running:
        if label(running) != label(id):
            raise ValueError(
                f"id {id!r} is saved by notebook {running}; it should start with {label(running)}_"
            )
        return running
    stems = (path.stem for path in paths.NOTEBOOKS.glob(f"{label(id)}*.ipynb"))
    found = sorted(stem for stem in stems if label(stem) == label(id))
    if len(found) != 1:
        raise ValueError(
            f"id {id!r}: there are {len(found)} notebooks called {label(id)}_* in {paths.NOTEBOOKS}"
        )
    return found[0]
