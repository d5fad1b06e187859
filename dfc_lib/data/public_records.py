"""The first study's own outcomes, from its public repository (arXiv 2606.26474), read and checked.

``fetch`` gives a folder in which every file of ``data/public_records/manifest.csv`` lies whole, at
``<first seven digits of the commit>/<path>``: the folder that ``DFC_PUBLIC_RECORDS`` names, else
``downloads/public_records``, filled from GitHub (one archive a commit) where files are missing. The
other functions read tables from it. Prompts are left out: they are not ours to repeat.
"""

import json
import os
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
from dfc_lib import paths, store


REPOSITORY = "Antebe/model_diffing_crosscoders"
MANIFEST = paths.DATA / "public_records" / "manifest.csv"


class RecordsError(ValueError):
    """A file is missing or damaged; the message names it and says what to do."""


class RecordsUnavailable(ConnectionError):
    """The records are not here and cannot be downloaded; says why."""


def fetch() -> Path:
    """The folder of the records, downloaded if need be and checked file by file.

    From the folder that ``DFC_PUBLIC_RECORDS`` names, if it is set, nothing is downloaded.

    Raises:
        RecordsError: a file is missing (in a folder that was named), truncated or altered.
        RecordsUnavailable: a download is needed, and there is no network.
    """
    files = pd.read_csv(MANIFEST)
    named = os.environ.get("DFC_PUBLIC_RECORDS")
    place = Path(named or paths.DOWNLOADS / "public_records").expanduser().resolve()
    for commit, group in files.groupby("commit", sort=False):
        here = all((place / commit[:7] / path).is_file() for path in group.path)
        if not here and not named:
            _download(commit, group.path, place)
    for file in files.itertuples():
        path = place / file.commit[:7] / file.path
        if why := store.damage(path, file.sha256):
            remedy = "Restore it" if named else "Delete it and run this again"
            raise RecordsError(f"{path}: {why}. {remedy} ({REPOSITORY} at {file.commit}).")
    return place


def _download(commit: str, wanted: Iterable[str], place: Path) -> None:
    """Take one commit's files out of its archive on GitHub."""
    import pooch

    pooch.get_logger().setLevel("WARNING")  # it would print where the archive lies for a moment
    url = f"https://github.com/{REPOSITORY}/archive/{commit}.zip"
    with tempfile.TemporaryDirectory() as folder:
        try:
            # GitHub packs an archive anew at times, so its hash says nothing; each file's does.
            archive = pooch.retrieve(url, None, "records.zip", folder, progressbar=True)
        except OSError as error:
            raise RecordsUnavailable(
                f"the study's records cannot be downloaded from {url} ({type(error).__name__}). "
                "Set DFC_PUBLIC_RECORDS to a folder that holds them, or try again with a network"
            ) from error
        try:
            with zipfile.ZipFile(archive) as packed:
                top = packed.namelist()[0].partition("/")[0]
                for path in wanted:
                    store.write_atomically(place / commit[:7] / path, packed.read(f"{top}/{path}"))
        except (zipfile.BadZipFile, KeyError, IndexError) as error:
            raise RecordsError(f"what {url} gave is damaged ({error}); run this again") from error


# -------------------------------------------------------------------------------------------------
# Tables


def runs(folder: Path) -> pd.DataFrame:
    """The sweep: one row per recorded run (47 of 48), rates in per cent over 100 prompts.

    Returns:
        ``name``, ``kind`` (``DFC`` or ``plain``), ``D``, ``k``, ``share`` (of the dictionary, for
        each model alone), ``penalised`` (the exclusive block), ``l1`` (on the shared features),
        ``<model>_clean``, ``<model>_reconstructed`` and, of the latter, the format's
        ``<model>_format_reconstructed`` for the models A and B; ``mse`` of training.
    """
    rows = []
    for run in _lines(folder / "31a4d3e/results_full.jsonl"):
        settings = run["hyperparameters"]
        share = settings["model_a_exclusive_pct"]
        row = {
            "name": run["name"].rpartition("/")[2],
            "kind": "DFC" if share else "plain",
            "D": settings["dict_size"],
            "k": settings["k"],
            "share": share,
            "l1": bool(settings["sparsity_coef"]),
            "penalised": bool(settings["exclusive_sparsity_coef"]),
        }
        for model in "AB":
            row[f"{model}_clean"] = run[f"tool_correctness_{model}_pre"]
            row[f"{model}_reconstructed"] = run[f"tool_correctness_{model}_post"]
            row[f"{model}_format_reconstructed"] = run[f"format_accuracy_{model}_post"]
        rows.append(row)
    (export,) = sorted((folder / "d247064" / "results").glob("wandb_export_*.csv"))
    trained = pd.read_csv(export)
    trained["name"] = trained.Name.str.replace(r"-sp[\d.]+-esp[\d.]+$", "", regex=True)
    return pd.DataFrame(rows).merge(
        trained[["name", "train/mse"]].rename(columns={"train/mse": "mse"}), on="name", how="left"
    )


def uniform_scaling(folder: Path) -> pd.DataFrame:
    """The whole exclusive block scaled in the base: one row per DFC and factor; ``name``,
    ``scale_factor`` and ``tool_correctness_B_steered``, as recorded."""
    table = pd.DataFrame(_lines(folder / "31a4d3e/results_steer.jsonl"))
    table["name"] = table.name.str.rpartition("/")[2]
    return table[["name", "scale_factor", "tool_correctness_B_steered"]]


def steered(folder: Path) -> pd.DataFrame:
    """The steering grids: one row per crosscoder, cell and prompt.

    Returns:
        ``crosscoder`` (the folder's name), ``cell`` (the file's), ``alpha``, ``features`` (tuple of
        indices), ``size``, ``prompt`` (index), and tool correctness as 0/1: ``clean``,
        ``reconstructed``, ``steered``.
    """
    rows = []
    for path in sorted((folder / "d247064/results/targeted_steering").glob("*/*.jsonl")):
        for record in _lines(path):
            row = {
                "crosscoder": path.parent.name,
                "cell": path.stem,
                "alpha": record["alpha"],
                "features": tuple(record["subset_indices"]),
                "size": record["subset_size"],
                "prompt": record["prompt_index"],
            }
            for name, key in (("clean", "clean"), ("reconstructed", "recon"), ("steered",) * 2):
                row[name] = float(record[f"{key}_score"]["tool_correctness"])
            rows.append(row)
    return pd.DataFrame(rows)


def rankings(folder: Path) -> pd.DataFrame:
    """Ranked features of 13 crosscoders: ``crosscoder`` and the columns as recorded."""
    found = sorted((folder / "d247064/data/rankings").glob("*.csv"))
    tables = {path.stem: pd.read_csv(path) for path in found}
    return pd.concat(tables, names=["crosscoder"]).reset_index(level=0).reset_index(drop=True)


def explanations(folder: Path) -> pd.DataFrame:
    """Auto-interpretation: one row per feature, without texts.

    Returns:
        ``source`` (the folder), ``feature``, ``block``, ``correct`` of ``total`` detections (-1
        where none was scored), ``failed`` (an error was recorded, or nothing was scored).
    """
    rows = []
    root = folder / "d247064" / "results"
    for path in sorted(root.glob("autointerp*/**/feat_*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        source = path.relative_to(root).parent
        source = source.parent if source.name.isdigit() else source
        total = record["detection_n_total"]
        rows.append(
            {
                "source": source.as_posix(),
                "feature": record["feat_idx"],
                "block": record["partition"],
                "correct": record["detection_n_correct"],
                "total": total,
                "failed": bool(record["error"]) or total < 1,
            }
        )
    return pd.DataFrame(rows)


def names(folder: Path, layer: int = 13) -> list[str]:
    """The hub names of the published crosscoders of one layer; at 13 the 48 of the sweep."""
    listed = _lines(folder / "d247064/models.jsonl")
    return [one["name"] for one in listed if one["hyperparameters"]["layer"] == layer]


def _lines(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines() if line.strip()]
