"""The first study's records: downloaded once, checked file by file, read into tidy tables."""

import hashlib
import json
import zipfile
from pathlib import Path

import pandas as pd
import pytest
import requests

from dfc_lib.data import public_records
from dfc_lib.data.public_records import RecordsError, RecordsUnavailable

SWEEP, GRIDS = "31a4d3ee" + "0" * 32, "d2470641" + "0" * 32
TEXT = "Available tools: a prompt that must not reach a table"


def settings(share: float, penalised: bool, l1: bool = True) -> dict:
    return {
        "dict_size": 64,
        "k": 4,
        "model_a_exclusive_pct": share,
        "sparsity_coef": 1e-3 if l1 else 0,
        "exclusive_sparsity_coef": 1e-3 if penalised else 0,
    }


def stand_in() -> dict[tuple[str, str], str]:
    """A few lines of every kind of file, by (commit, path)."""
    score = {"format_accuracy": False, "tool_correctness": False, "overall_score": -1}
    right = {**score, "tool_correctness": True}
    runs, scaled = [], []
    for name, share, gain in (("antebe1/dfc-a", 0.1, 30.0), ("antebe1/cc-b", 0.0, 25.0)):
        rates = {
            f"{what}_{model}_{when}": gain * (when == "post") * (what == "tool_correctness")
            for what in ("tool_correctness", "format_accuracy")
            for model in "AB"
            for when in ("pre", "post")
        }
        about = {"name": name, "hyperparameters": settings(share, bool(share))}
        runs.append(about | rates | {"n_evaluated": 100})
        scaled.append(about | {"scale_factor": 2.0, "tool_correctness_B_steered": 4.0})
    cell = {
        "prompt_index": 3,
        "prompt": TEXT,
        "subset_indices": [136],
        "subset_size": 1,
        "alpha": 32.0,
        "clean_score": score,
        "recon_score": score,
        "steered_score": right,
    }
    feature = {
        "feat_idx": 7,
        "partition": "a_excl",
        "top_texts": [TEXT],
        "explanation": "calls",
        "detection_n_correct": 18,
        "detection_n_total": 20,
        "error": "",
    }
    silent = feature | {"feat_idx": 8, "detection_n_correct": -1, "detection_n_total": -1}
    results = "results/targeted_steering/dfc-a"
    return {
        (SWEEP, "results_full.jsonl"): "\n".join(map(json.dumps, runs)),
        (SWEEP, "results_steer.jsonl"): "\n".join(map(json.dumps, scaled)),
        (GRIDS, "results/wandb_export_1.csv"): "Name,train/mse\n"
        "dfc-a-sp0.001-esp0.001,0.02\ncc-b-sp0.001-esp0.0,0.03\n",
        (GRIDS, f"{results}/k04_a32.jsonl"): json.dumps(cell) + "\n",
        (GRIDS, "data/rankings/dfc-a.csv"): "rank,feature_idx\n0,136\n",
        (GRIDS, "results/autointerp/toolrl/0000000/feat_7.json"): json.dumps(feature),
        (GRIDS, "results/autointerp_local/dfc-a/feat_8.json"): json.dumps(silent),
        (GRIDS, "models.jsonl"): "\n".join(
            json.dumps({"name": name, "hyperparameters": {"layer": layer}})
            for name, layer in (("antebe1/dfc-a", 13), ("sbhokare/dfc-a-l20", 20))
        ),
        (GRIDS, "results/clusters/aexcl_assignments.csv"): "feature_idx,cluster_id\n0,1\n",
    }


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The stand-in's files, and a manifest that names them."""
    monkeypatch.delenv("DFC_PUBLIC_RECORDS", raising=False)
    rows = []
    for (commit, path), text in stand_in().items():
        file = tmp_path / "records" / commit[:7] / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text.encode())
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        rows.append({"commit": commit, "path": path, "bytes": len(text), "sha256": sha256})
    pd.DataFrame(rows).to_csv(tmp_path / "manifest.csv", index=False)
    monkeypatch.setattr(public_records, "MANIFEST", tmp_path / "manifest.csv")
    monkeypatch.setattr(public_records.paths, "DOWNLOADS", tmp_path / "downloads")
    return tmp_path / "records"


@pytest.fixture
def github(folder, monkeypatch) -> list[str]:
    """A stand-in of GitHub: one archive a commit; the addresses that were asked for."""
    asked = []

    def retrieve(url, known_hash, fname, path, progressbar):
        asked.append(url)
        commit, archive = url.rpartition("/")[2].removesuffix(".zip"), Path(path) / fname
        with zipfile.ZipFile(archive, "w") as packed:
            packed.writestr("repository-1/", "")
            packed.writestr("repository-1/not_listed.txt", "x")
            for file in (folder / commit[:7]).rglob("*"):
                if file.is_file():
                    inside = file.relative_to(folder / commit[:7]).as_posix()
                    packed.write(file, f"repository-1/{inside}")
        return str(archive)

    monkeypatch.setattr("pooch.retrieve", retrieve)
    return asked


def test_a_named_folder_is_read_and_nothing_is_downloaded(folder, github, monkeypatch):
    monkeypatch.setenv("DFC_PUBLIC_RECORDS", str(folder))
    assert public_records.fetch() == folder
    assert not github


def test_one_archive_a_commit_is_downloaded_once(folder, github, tmp_path):
    place = public_records.fetch()
    assert place == tmp_path / "downloads" / "public_records"
    assert [url.rpartition("/")[2] for url in github] == [f"{SWEEP}.zip", f"{GRIDS}.zip"]
    assert all("github.com/Antebe/model_diffing_crosscoders/archive/" in url for url in github)
    assert not list(place.rglob("not_listed.txt"))
    assert not list(place.glob("*.zip"))
    public_records.fetch()
    assert len(github) == 2


def test_a_lost_file_of_the_download_is_fetched_again(folder, github):
    place = public_records.fetch()
    (place / SWEEP[:7] / "results_steer.jsonl").unlink()
    public_records.fetch()
    assert len(github) == 3


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "truncated"),
        (lambda path: path.write_bytes(b"X" + path.read_bytes()[1:]), "altered"),
        (lambda path: path.unlink(), "missing"),
    ],
)
def test_a_damaged_file_is_named(folder, monkeypatch, damage, said):
    monkeypatch.setenv("DFC_PUBLIC_RECORDS", str(folder))
    path = folder / GRIDS[:7] / "data/rankings/dfc-a.csv"
    damage(path)
    with pytest.raises(RecordsError, match=said) as error:
        public_records.fetch()
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "error", [requests.ConnectionError("no route"), requests.Timeout(), OSError("no space")]
)
def test_no_network_is_said_with_a_way_out(folder, monkeypatch, error):
    def refuse(*_arguments, **_options):
        raise error

    monkeypatch.setattr("pooch.retrieve", refuse)
    with pytest.raises(RecordsUnavailable, match="DFC_PUBLIC_RECORDS"):
        public_records.fetch()


def test_a_damaged_archive_is_named(folder, monkeypatch):
    def broken(url, known_hash, fname, path, progressbar):
        (Path(path) / fname).write_bytes(b"no zip")
        return str(Path(path) / fname)

    monkeypatch.setattr("pooch.retrieve", broken)
    with pytest.raises(RecordsError, match=rf"{SWEEP}\.zip gave is damaged"):
        public_records.fetch()


def test_tables_are_tidy_and_hold_no_prompt(folder):
    runs = public_records.runs(folder).set_index("name")
    assert runs.kind.to_dict() == {"dfc-a": "DFC", "cc-b": "plain"}
    assert runs.mse.to_dict() == {"dfc-a": 0.02, "cc-b": 0.03}
    assert runs.loc["dfc-a", ["A_clean", "A_reconstructed", "A_format_reconstructed"]].tolist() == [
        0.0,
        30.0,
        0.0,
    ]
    assert runs.penalised.to_dict() == {"dfc-a": True, "cc-b": False}
    (cell,) = public_records.steered(folder).to_dict("records")
    assert (cell["crosscoder"], cell["cell"], cell["features"]) == ("dfc-a", "k04_a32", (136,))
    assert (cell["clean"], cell["reconstructed"], cell["steered"]) == (0.0, 0.0, 1.0)
    explained = public_records.explanations(folder).set_index("feature")
    assert explained.failed.to_dict() == {7: False, 8: True}
    assert explained.source.to_dict() == {7: "autointerp/toolrl", 8: "autointerp_local/dfc-a"}
    assert public_records.uniform_scaling(folder).scale_factor.tolist() == [2.0, 2.0]
    assert public_records.rankings(folder).crosscoder.tolist() == ["dfc-a"]
    for read in ("runs", "steered", "explanations", "uniform_scaling", "rankings"):
        assert TEXT not in getattr(public_records, read)(folder).to_csv()


def test_the_shipped_manifest_names_whole_checksums():
    files = pd.read_csv(public_records.MANIFEST)
    assert len(files) == 641
    assert files.commit.nunique() == 2
    assert files.sha256.str.fullmatch("[0-9a-f]{64}").all()
    assert not files.duplicated(["commit", "path"]).any()


def test_published_crosscoders_are_named_by_layer(folder):
    assert public_records.names(folder) == ["antebe1/dfc-a"]
    assert public_records.names(folder, layer=20) == ["sbhokare/dfc-a-l20"]


def test_figures_repeat_no_prompt():
    """What is committed of these records are counts: no text longer than a caption's."""
    tables = sorted((Path(__file__).parents[1] / "figures").glob("13_*.csv"))
    assert len(tables) > 5
    for path in tables:
        for name, column in pd.read_csv(path, dtype=str, keep_default_na=False).items():
            assert column.str.len().max() < 300, f"{path.name}: {name}"
