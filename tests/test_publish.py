"""A published folder: what it holds can be loaded again, and its card states the numbers."""

from dataclasses import replace

import huggingface_hub
import pandas as pd
import pytest
import torch

from dfc_lib.crosscoder.checkpoint import load
from dfc_lib.crosscoder.fidelity import fidelity
from dfc_lib.crosscoder.model import Crosscoder
from dfc_lib.crosscoder.partition import Normaliser, Partition
from tools import publish as publishing
from tools.publish import Provenance, publish

MADE = Provenance(
    models={"A": "someone/tuned", "B": "someone/base"},
    site="after block 2, last prompt token",
    config={"steps": 1234, "lr": 0.001},
    data_key="d4t4k3y",
    code_hash="c0d3",
)


@pytest.fixture(scope="module")
def crosscoder() -> Crosscoder:
    torch.manual_seed(0)
    normaliser = Normaliser(torch.randn(2, 8), torch.tensor([1.5, 0.5]))
    return Crosscoder.create(8, Partition.dedicated(40, 0.1), 3, normaliser)


@pytest.fixture(scope="module")
def table(crosscoder) -> pd.DataFrame:
    return fidelity(crosscoder, torch.randn(64, 2, 8))


@pytest.fixture
def report(tmp_path):
    """What an audit leaves."""
    folder = tmp_path / "audit"
    folder.mkdir()
    (folder / "audit.png").write_bytes(b"png")
    (folder / "audit.csv").write_text("condition,gain\njoint,0.2\n")
    (folder / "report.md").write_text("# Release audit of `x`\n\n**Leaks.** 20.0 pp.\n")
    return folder / "report.md"


def test_the_weights_and_the_normaliser_come_back(crosscoder, table, tmp_path):
    folder = publish(crosscoder, tmp_path / "dfc", fidelity=table, provenance=MADE)
    back, state = load(folder).state_dict(), crosscoder.state_dict()
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    assert not back["normaliser_mean"].eq(0).any()
    assert {path.name for path in folder.iterdir()} == {
        "cfg.json",
        "sae_weights.safetensors",
        "README.md",
    }


def test_the_card_states_the_numbers(crosscoder, table, tmp_path, report):
    folder = publish(crosscoder, tmp_path / "dfc", fidelity=table, audit=report, provenance=MADE)
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert card.data.license == "mit"
    assert card.data.base_model == ["someone/tuned", "someone/base"]
    assert "dfc_crosscoder" in card.data.tags
    rows = table.set_index("name")
    for model in "AB":
        assert f"| {model} | {rows.fve[model]:.4f} |" in card.text
    for block, models, size in (
        ("A_exclusive", "A", 4),
        ("B_exclusive", "B", 4),
        ("shared", "A, B", 32),
    ):
        l0, dead = rows.l0[block], rows.dead_share[block]
        assert f"| {block} | {models} | {size} | {l0:.2f} | {dead:.1%} |" in card.text
    for said in (
        '"steps": 1234',
        "`d4t4k3y`",
        "`c0d3`",
        "last prompt token",
        "**Leaks.** 20.0 pp.",
    ):
        assert said in card.text
    assert (
        card.text.count("\n# ") + card.text.startswith("# ") == 1
    )  # the report's own title is out
    assert (folder / "audit.png").read_bytes() == b"png"
    assert "joint" in (folder / "audit.csv").read_text()


def test_without_an_audit_the_card_says_so(crosscoder, table, tmp_path):
    folder = publish(crosscoder, tmp_path / "dfc", fidelity=table, provenance=MADE)
    assert "It was not audited." in (folder / "README.md").read_text()


def test_its_own_folder_is_replaced_whole(crosscoder, table, tmp_path, report):
    folder = tmp_path / "dfc"
    publish(crosscoder, folder, fidelity=table, audit=report, provenance=MADE)
    publish(crosscoder, folder, fidelity=table, provenance=replace(MADE, data_key="another"))
    assert "`another`" in (folder / "README.md").read_text()
    assert not (folder / "audit.png").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"audit", "dfc"}


def test_another_folder_is_refused(crosscoder, table, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(FileExistsError, match=r"README\.md, not a crosscoder"):
        publish(crosscoder, tmp_path, fidelity=table, provenance=MADE)
    assert (tmp_path / "README.md").read_text() == "mine"
    folder = publish(crosscoder, tmp_path / "dfc", fidelity=table, provenance=MADE)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        publish(crosscoder, folder, fidelity=table, provenance=MADE)


def test_a_failure_leaves_what_was_there(crosscoder, table, tmp_path, monkeypatch):
    folder = publish(crosscoder, tmp_path / "dfc", fidelity=table, provenance=MADE)
    before = (folder / "README.md").read_text()

    def fail(*_arguments):
        raise RuntimeError("no card")

    monkeypatch.setattr(publishing, "card", fail)
    with pytest.raises(RuntimeError, match="no card"):
        publish(crosscoder, folder, fidelity=table, provenance=MADE)
    assert (folder / "README.md").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["dfc"]


def test_models_that_are_not_the_crosscoders_are_refused(crosscoder, table, tmp_path):
    swapped = replace(MADE, models={"B": "someone/base", "A": "someone/tuned"})
    with pytest.raises(ValueError, match=r"\['B', 'A'\], not \['A', 'B'\]"):
        publish(crosscoder, tmp_path / "dfc", fidelity=table, provenance=swapped)
    assert not (tmp_path / "dfc").exists()
