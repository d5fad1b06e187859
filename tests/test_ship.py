"""The shipped crosscoder is whole, belongs to the shipped pair, and is chosen by the rule."""

import json
from dataclasses import replace

import huggingface_hub
import pandas as pd
import pytest
import torch

from dfc_lib import profiles
from dfc_lib.crosscoder.checkpoint import load
from dfc_lib.crosscoder.fidelity import fidelity
from dfc_lib.crosscoder.model import Crosscoder
from dfc_lib.crosscoder.partition import Normaliser, Partition
from dfc_lib.data import activations
from dfc_lib.data.pair import PairError, verify
from dfc_lib.reading import switches
from dfc_lib.steering.interventions import Clean, Codec, Steer
from dfc_lib.study import Study
from tools import ship

TOY = profiles.get("toy")
PROFILE = replace(
    profiles.get("smoke"), dict_size=40, k=8, steps=3, batch_size=16, n_steering=4, many_seeds=3,
    exclusive_share=0.2, batch_generation=4, threads=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study in a build folder of its own with the two caches that shipping needs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DFC_BUILD", str(tmp_path_factory.mktemp("build")))
        study = Study(PROFILE)
        ids = study.ids(study.records("ranking")[:24])
        meta = pd.DataFrame({"source": ["tool"] * 12 + ["neutral"] * 12})
        for name in ("train_last", "ranking_last"):
            activations.cache(study.pair, ids, study.build / "activations" / name, meta=meta)
        yield study


@pytest.fixture(scope="module")
def crosscoders(study):
    found = study.crosscoders([switches.RECIPE], range(PROFILE.many_seeds), progress=False)
    return {seed: crosscoder for (_, seed), crosscoder in found.items()}


@pytest.fixture(scope="module")
def table(study, crosscoders):
    return switches.ablations(study, crosscoders)


def test_every_live_feature_that_writes_to_a_is_ablated_on_selection_prompts(
    study, crosscoders, table
):
    assert set(table.seed) == {0, 1, 2}  # else the next lines see too little
    assert set(table.block) == {"A_exclusive", "shared"}
    seen = study.cache("ranking_last")
    streams = seen.gather(seen.where(source="tool"))
    for seed, crosscoder in crosscoders.items():
        fires = (crosscoder.encode(streams) > 0).float().mean(0).tolist()
        live = {i for i, share in enumerate(fires) if share >= switches.LIVE}
        mine = table[table.seed == seed].set_index("feature")
        assert set(mine.index) == live - set(range(8, 16))  # the B-exclusive block
        assert mine.fires.to_dict() == pytest.approx({i: fires[i] for i in mine.index})
        assert set(mine.index[mine.block == "A_exclusive"]) == live & set(range(8))
    row = table.iloc[0]
    cell = Steer(Codec(crosscoders[int(row.seed)]), (int(row.feature),), 0.0)
    records = study.calls("selection", PROFILE.n_steering)
    again = study.run({"clean": Clean(), "off": cell}, records, out_dir=None, progress=False)
    means = again.groupby("cell").propensity.mean()
    assert row.clean == pytest.approx(means["clean"], abs=1e-6)
    assert row.ablated == pytest.approx(means["off"], abs=1e-6)
    assert row.change == pytest.approx(means["off"] - means["clean"], abs=1e-6)


def test_what_lowers_most_comes_first(table):
    assert table.change.is_monotonic_increasing
    assert table.change.nunique() > 1


def test_a_dead_block_gives_an_empty_table_and_is_not_shipped(
    study, crosscoders, monkeypatch, tmp_path
):
    for crosscoder in crosscoders.values():
        monkeypatch.setattr(crosscoder, "encode", lambda x: torch.zeros(len(x), 40))
    assert switches.ablations(study, crosscoders).empty
    found = {(switches.RECIPE, seed): crosscoder for seed, crosscoder in crosscoders.items()}
    monkeypatch.setattr(Study, "crosscoders", lambda *_: found)
    with pytest.raises(ValueError, match="no feature of 3 crosscoders"):
        ship.ship(study, tmp_path / "dfc")
    assert not (tmp_path / "dfc").exists()


def test_the_chosen_one_is_shipped_with_what_is_needed_to_use_it(
    study, crosscoders, table, tmp_path, capsys
):
    folder = ship.ship(study, tmp_path / "shipped" / "dfc")
    found, best = load(folder), table.iloc[0]
    assert f"seed {best.seed:.0f}, feature {best.feature:.0f}" in capsys.readouterr().out
    about = found.cfg.metadata
    assert (about.seed, about.block, about.feature) == (best.seed, best.block, best.feature)
    state = crosscoders[int(best.seed)].state_dict()
    assert all(torch.equal(weight, state[name]) for name, weight in found.state_dict().items())
    assert about.layer == PROFILE.layer
    assert about.models["B"] == "data/pairs/0/base"
    verify(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    ship.ship(study, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (folder / "sae_weights.safetensors").write_bytes(b"x")
    with pytest.raises(PairError, match="altered"):
        verify(folder)


def test_the_card_states_the_numbers(study, tmp_path):
    folder = ship.ship(study, tmp_path / "shipped" / "dfc")
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert card.data.license == "mit"
    assert card.data.base_model == [f"{PROFILE.pair}/{PROFILE.model_a}", f"{PROFILE.pair}/base"]
    assert "dfc_crosscoder" in card.data.tags
    rows = fidelity(load(folder), study.cache("ranking_last").to_tensor()).set_index("name")
    for model in "AB":
        assert f"| {model} | {rows.fve[model]:.4f} |" in card.text
    for block, models in {"A_exclusive": "A", "B_exclusive": "B", "shared": "A, B"}.items():
        row = rows.loc[block]
        numbers = f"{row.n_features:.0f} | {row.l0:.2f} | {row.dead_share:.1%}"
        assert f"| {block} | {models} | {numbers} |" in card.text
    assert '"steps": 3' in card.text
    assert "last prompt token" in card.text


@pytest.fixture
def crosscoder():
    torch.manual_seed(0)
    normaliser = Normaliser(torch.randn(2, 8), torch.tensor([1.5, 0.5]))
    return Crosscoder.create(8, Partition.dedicated(40, 0.1), 3, normaliser)


def test_another_folder_is_refused(crosscoder, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(FileExistsError, match=r"README\.md, not a crosscoder"):
        ship.write(crosscoder, tmp_path, "card")
    assert (tmp_path / "README.md").read_text() == "mine"
    ship.write(crosscoder, tmp_path / "dfc", "card")
    (tmp_path / "dfc" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        ship.write(crosscoder, tmp_path / "dfc", "card")


def test_its_own_folder_is_replaced_whole_or_not_at_all(crosscoder, tmp_path, monkeypatch):
    folder = tmp_path / "dfc"
    ship.write(crosscoder, folder, "one")
    ship.write(crosscoder, folder, "another")
    assert (folder / "README.md").read_text() == "another"
    assert (load(folder).normaliser.mean == crosscoder.normaliser.mean).all()

    def fail(*_arguments):
        raise RuntimeError("no weights")

    monkeypatch.setattr(Crosscoder, "save", fail)
    with pytest.raises(RuntimeError, match="no weights"):
        ship.write(crosscoder, folder, "a third")
    assert (folder / "README.md").read_text() == "another"
    assert [path.name for path in tmp_path.iterdir()] == ["dfc"]


def test_the_shipped_one_is_whole_and_of_this_pair():
    """A pair that was made anew needs `make crosscoder`: features belong to one pair."""
    verify(switches.SHIPPED)
    about = load(switches.SHIPPED).cfg.metadata
    models = {"A": f"{TOY.pair}/{TOY.model_a}", "B": f"{TOY.pair}/{TOY.model_b}"}
    assert about.models == models
    assert about.layer == TOY.layer
    assert about.weights == ship.checksums(TOY)


def test_the_shipped_one_is_of_the_published_profile():
    crosscoder = load(switches.SHIPPED)
    about = crosscoder.cfg.metadata
    assert (crosscoder.d_dict, crosscoder.cfg.k) == (TOY.dict_size, TOY.k)
    assert about.recipe == switches.RECIPE
    assert about.seed in range(TOY.many_seeds)
    assert about.feature in range(crosscoder.d_dict)[crosscoder.partition.slice(about.block)]
    size = sum(path.stat().st_size for path in switches.SHIPPED.iterdir())
    assert size < 3_000_000
    training = json.loads((switches.SHIPPED / "cfg.json").read_text())["metadata"]["training"]
    assert training["steps"] == TOY.steps
