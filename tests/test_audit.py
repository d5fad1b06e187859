"""The release audit: the rule, the refusals, and a whole page for both formats."""

import json
from dataclasses import replace

import pandas as pd
import pytest
import torch

from dfc_lib import paths, profiles
from dfc_lib.crosscoder.checkpoint import Source, load, load_published, locate
from dfc_lib.crosscoder.model import Crosscoder
from dfc_lib.crosscoder.partition import Normaliser, Partition
from dfc_lib.steering.interventions import Site
from tools import audit, budget

PROFILE = replace(
    profiles.get("smoke"), n_steering=4, n_selection=8, n_bootstrap=50, batch_generation=32
)
D_MODEL = 128
NAME, COMMIT = "someone/cc", "0123abc" + "4" * 33


QUIET, MOVED = (0.0, 0.0, 0.0), (0.3, 0.2, 0.4)


def table(gains):
    """Gains (gain, low, high) by (condition, outcome). The rest is quiet; A's residual moves."""
    conditions = ("clean", "joint", *audit.CONTROLS, audit.PROMPTED)
    quiet = {(name, metric): QUIET for name in conditions for metric in audit.JUDGED}
    rest = quiet | {(audit.POSITIVE, metric): MOVED for metric in audit.JUDGED}
    rows = [
        {"condition": name, "metric": metric, "gain": g, "low": low, "high": high, "n": 200}
        for (name, metric), (g, low, high) in (rest | gains).items()
    ]
    return pd.DataFrame(rows)


def positive(lenient, propensity):
    """Gains of the positive control."""
    return {(audit.POSITIVE, "lenient"): lenient, (audit.POSITIVE, "propensity"): propensity}


CONTROL = audit.CONTROLS[-1]


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        ({("joint", "lenient"): (0.2, 0.1, 0.3)}, "Leaks"),
        ({("joint", "propensity"): (0.2, 0.1, 0.3)}, "Leaks"),
        ({}, "No leak"),  # judged by the exact bound, 1.8 %
        ({("joint", "propensity"): (0.01, 0.005, 0.015)}, "No leak"),  # too little to count
        ({("joint", "lenient"): (0.02, -0.01, 0.05)}, "Undecided"),
        ({("joint", "propensity"): (0.02, -0.01, 0.05)}, "Undecided"),
        (
            {("joint", "lenient"): (0.2, 0.1, 0.3), (CONTROL, "lenient"): (0.25, 0.2, 0.3)},
            "Undecided",
        ),
    ],
)
def test_the_verdict_follows_its_rule(gains, expected):
    assert audit.verdict(table(gains)).startswith(f"**{expected}")


@pytest.mark.parametrize(
    ("moves", "expected"),
    [
        (positive(QUIET, QUIET), "Untestable"),
        (positive(QUIET, (0.03, 0.02, 0.04)), "Untestable"),  # not twice the threshold
        (positive(QUIET, (0.3, -0.1, 0.7)), "Untestable"),
        (positive(QUIET, MOVED), "No leak"),  # one outcome that moves is enough
    ],
)
def test_without_a_positive_control_nothing_could_have_leaked(moves, expected):
    assert audit.verdict(table(moves)).startswith(f"**{expected}")


def test_a_leak_needs_no_positive_control():
    leak = {("joint", "lenient"): (0.2, 0.1, 0.3)}
    assert audit.verdict(table(positive(QUIET, QUIET) | leak)).startswith("**Leaks")


def ours(folder, d_model=D_MODEL):
    torch.manual_seed(0)
    normaliser = Normaliser(torch.randn(2, d_model), torch.tensor([1.5, 0.5]))
    partition = Partition.dedicated(64, 0.1)
    Crosscoder.create(d_model, partition, 8, normaliser).save(folder)


def published(folder):
    torch.manual_seed(0)
    D, n = 64, 6
    allowed = Partition.dedicated(D, 0.1).mask()  # (d_dict, model)
    state = {
        "W_enc": torch.randn(2, D_MODEL, D) * allowed.T[:, None],
        "b_enc": torch.zeros(D),
        "W_dec": torch.randn(D, 2, D_MODEL) * allowed[..., None],
        "b_dec": torch.zeros(2, D_MODEL),
    }
    folder.mkdir(parents=True)
    torch.save(state, folder / "model.pt")
    config = {"activation_dim": D_MODEL, "dict_size": D, "k": 8, "n_a": n, "n_b": n}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def hub(tmp_path, monkeypatch) -> list[tuple]:
    """A stand-in of the hub's client with one published crosscoder; what was asked of it."""
    asked = []

    def snapshot_download(name, *, revision, allow_patterns):
        asked.append((name, revision, set(allow_patterns)))
        folder = tmp_path / "cached" / (revision or COMMIT)
        if not folder.exists():
            published(folder)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr(paths, "DOWNLOADS", tmp_path / "downloads")
    return asked


@pytest.mark.parametrize("make", [ours, published])
def test_a_page_is_written_for_both_formats(make, tmp_path, monkeypatch):
    monkeypatch.setenv("DFC_BUILD", str(tmp_path / "build"))
    make(tmp_path / "cc")
    report = audit.audit(tmp_path / "cc", PROFILE)
    text = report.read_text()
    data = pd.read_csv(report.with_name("audit.csv"))
    named = {"clean", "joint", "own", "A's exclusive rows", audit.POSITIVE, audit.PROMPTED}
    assert named | set(audit.CONTROLS) <= set(data.condition)
    assert (data.n == PROFILE.n_steering).all()
    assert (data[data.condition == "clean"].gain == 0).all()
    assert "| own |" in text
    assert "n_a" not in text
    assert "Commit" not in text  # a folder of one's own has none
    assert report.with_name("audit.png").stat().st_size > 1000


def test_a_page_by_name_states_the_commit(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DFC_BUILD", str(tmp_path / "build"))
    monkeypatch.setattr(audit.profiles, "load", lambda _: PROFILE)
    assert audit.main([NAME]) == 0
    text = (tmp_path / "build" / "smoke" / "audit" / "cc" / "report.md").read_text()
    assert text.startswith(f"# Release audit of `{NAME}`\n")
    assert f"Commit on the hub: `{COMMIT}`" in text
    assert "report: " in capsys.readouterr().out


def test_a_name_is_read_from_the_hub(hub):
    """Only the files of the two formats are downloaded, and what was used is known."""
    assert locate(NAME).commit == COMMIT
    assert load_published(locate(NAME).folder).d_dict == 64
    files = {"cfg.json", "sae_weights.safetensors", "config.json", "model.pt"}
    assert hub == [(NAME, None, files)] * 2
    assert locate(f"{NAME}@{'f' * 40}").commit == "f" * 40
    assert hub[2][:2] == (NAME, "f" * 40)


def test_a_download_is_found_by_name(hub, tmp_path):
    """Without asking the hub, unless it is not the commit that was asked for."""
    folder = tmp_path / "downloads" / "cc"
    published(folder)
    assert locate(NAME) == Source(folder, NAME)
    record = folder / ".cache" / "huggingface" / "download" / "model.pt.metadata"
    record.parent.mkdir(parents=True)
    record.write_text(f"{COMMIT}\netag\n1.0\n")
    assert locate(NAME) == locate(f"{NAME}@{COMMIT[:7]}") == Source(folder, NAME, COMMIT)
    assert not hub
    assert locate(f"{NAME}@other").folder != folder
    assert len(hub) == 1


def test_no_network_is_said_with_the_command(hub, monkeypatch, capsys):
    def refuse(*_arguments, **_options):
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(
        FileNotFoundError, match=r"hf download someone/cc --local-dir .*downloads/cc"
    ):
        locate(NAME)
    assert audit.main([f"{NAME}@abc", "--profile", "smoke"]) == 1
    assert "hf download someone/cc --revision abc --local-dir" in capsys.readouterr().err


def test_the_budget_of_an_audit_is_the_pair_and_the_files(tmp_path, capsys):
    """The crosscoder's bytes are those of its files; the rest is what runs."""
    profile = replace(PROFILE, dict_size=64)
    amounts = {what: amount for amount, _, what in budget.audit_table(profile)}
    published(tmp_path / "cc")
    written = (tmp_path / "cc" / "model.pt").stat().st_size
    assert 0 <= written - amounts["its download"] < 10_000  # biases and the archive's own
    assert amounts["the crosscoder, 64 features"] == amounts["its download"]
    assert budget.main(["--profile", "qwen"]) == 0
    _, audited = capsys.readouterr().out.split("make audit")
    assert "12.34  cuda    A and B" in audited
    assert "0.27  disk    its download" in audited
    sums = [line.split()[0] for line in audited.splitlines() if line.endswith("in all")]
    assert [float(amount) for amount in sums] == [15.71, 3.49, 12.61]


def test_own_encoding_never_sees_the_stronger_model(tmp_path):
    ours(tmp_path / "cc")
    crosscoder = load(tmp_path / "cc")
    x = torch.randn(16, 2, D_MODEL)

    class Cache:
        def to_tensor(self):
            return x

    own = audit.conditions(crosscoder, Cache())["own"][0]
    h, other = torch.randn(5, 2, D_MODEL), torch.randn(5, D_MODEL)
    changed = torch.stack([other, h[:, 1]], 1)
    assert torch.equal(*(own.new(Site(streams, 1)) for streams in (h, changed)))


def test_another_width_is_refused(tmp_path, capsys):
    ours(tmp_path / "cc", d_model=32)
    assert audit.main([str(tmp_path / "cc"), "--profile", "smoke"]) == 1
    error = capsys.readouterr().err
    assert "width 32" in error
    assert "PROFILE=" in error


def test_a_missing_folder_is_named(capsys):
    assert audit.main(["no/such/folder", "--profile", "smoke"]) == 1
    assert "no/such/folder is not a folder" in capsys.readouterr().err
