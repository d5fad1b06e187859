"""What a notebook opens first: the right prompts, models and crosscoders, each made once."""

import os
import subprocess
import sys
from dataclasses import replace

import pandas as pd
import pytest
import torch

from dfc_lib import paths, profiles
from dfc_lib.crosscoder import loop
from dfc_lib.data import activations, corpora, prompts
from dfc_lib.data.pair import load_model
from dfc_lib.steering import evaluation
from dfc_lib.steering.interventions import Clean, Codec, Patch, Steer
from dfc_lib.study import Study

PROFILE = replace(
    profiles.get("smoke"), dict_size=32, k=4, steps=3, batch_size=16, max_new_tokens=6,
    batch_generation=2, threads=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study in a build folder of its own that holds the caches, as notebooks find it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DFC_BUILD", str(tmp_path_factory.mktemp("build")))
        study = Study(PROFILE)
        ids = study.ids(study.records("crosscoder")[:12])
        meta = pd.DataFrame({"source": ["tool"] * 6 + ["neutral"] * 6})
        for positions in ("all", "last"):
            folder = study.build / "activations" / f"train_{positions}"
            activations.cache(study.pair, ids, folder, positions=positions, meta=meta)
        yield study


def test_it_opens_by_name_and_the_environment_overrides(monkeypatch):
    monkeypatch.delenv("DFC_PROFILE", raising=False)
    assert Study.open("toy").profile is profiles.get("toy")
    monkeypatch.setenv("DFC_PROFILE", "smoke")
    assert Study.open("toy").profile is profiles.get("smoke")
    monkeypatch.setenv("DFC_PROFILE", "toys")
    with pytest.raises(ValueError, match="choose one of"):
        Study.open("toy")


def test_importing_it_loads_nothing_heavy():
    code = (
        "import sys, dfc_lib.study; print(*{'torch', 'pandas', 'transformers'} & set(sys.modules))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=paths.ROOT, capture_output=True, text=True, check=True
    )
    assert ran.stdout.split() == []


def test_the_pair_is_the_profiles_at_its_layer_and_is_loaded_once(study):
    assert list(study.pair.models) == ["A", "B"]
    assert study.pair.layer == PROFILE.layer
    assert study.pair is study.pair
    base = load_model(PROFILE.location(PROFILE.model_b))
    assert all(map(torch.equal, study.pair.models["B"].parameters(), base.parameters()))


def test_another_pair_of_the_family_is_another_study():
    sources = {"tuned": PROFILE.location("rl/step_0064"), "base": PROFILE.location("base")}
    other = Study(PROFILE, sources, layer=0)
    assert list(other.pair.models) == ["tuned", "base"]
    assert other.pair.layer == 0


def test_prompts_are_those_of_the_split_by_kind(study):
    everything = corpora.records(PROFILE, "evaluation")
    assert study.records("evaluation") == everything
    calls, held_out = study.calls("evaluation"), study.calls("evaluation", held_out=True)
    no_calls = study.no_calls("evaluation")
    assert all(r.kind == "call" and not r.held_out for r in calls)
    assert all(r.kind == "call" and r.held_out for r in held_out)
    assert all(r.kind != "call" and not r.held_out for r in no_calls)
    rest = [r for r in everything if r.kind != "call" and r.held_out]
    parts = [*calls, *held_out, *no_calls, *rest]
    assert sorted(r.id for r in parts) == sorted(r.id for r in everything)
    assert min(len(calls), len(held_out), len(no_calls)) > 3
    assert study.calls("evaluation", 3) == calls[:3]
    assert study.no_calls("evaluation", 2) == no_calls[:2]
    assert study.neutral("evaluation", 2) == corpora.neutral(PROFILE, "evaluation")[:2]


def test_ids_are_the_prompt_in_its_style(study):
    record = study.calls("evaluation", 1)[0]
    for style in (prompts.FIXED_STYLE, prompts.TRAINING_STYLES[0]):
        text = prompts.chat_text(study.pair.tokenizer, record, style)
        assert study.ids([record], style) == prompts.encode(study.pair.tokenizer, [text])
    assert study.ids([record]) == study.ids([record], prompts.FIXED_STYLE)
    assert study.ids([record]) != study.ids([record], prompts.TRAINING_STYLES[0])


def test_texts_are_prompts_in_the_studys_style_and_as_much_prose(study):
    texts = study.texts("crosscoder", 5)
    assert texts.source.tolist() == ["tool"] * 5 + ["neutral"] * 5
    assert texts.kind.tolist() == [r.kind for r in study.records("crosscoder")[:5]] + ["prose"] * 5
    assert set(texts.split) == {"crosscoder"}
    assert prompts.encode(study.pair.tokenizer, texts.text[:5]) == study.ids(
        study.records("crosscoder")[:5]
    )
    styled = replace(study, style=prompts.TRAINING_STYLES[0]).texts("crosscoder", 5)
    assert not set(styled.text[:5]) & set(texts.text[:5])
    assert styled.text[5:].tolist() == texts.text[5:].tolist()


def test_replicates_are_the_other_pairs_near_their_own_threshold(study, monkeypatch, tmp_path):
    monkeypatch.setenv("DFC_BUILD", str(tmp_path))
    small = replace(PROFILE, n_crosscoder_texts=6, n_ranking=4)
    own, card = Study(small, style=prompts.FIXED_STYLE), paths.ROOT / small.pair
    found = own.replicates()
    assert sorted([*found, card.name]) == sorted(
        folder.name for folder in card.parent.iterdir() if folder.name.isdigit()
    )
    for name, other in found.items():
        near = pd.read_csv(card.parent / name / "near.csv").set_index("step").near
        assert other.sources["A"].name == f"step_{near.idxmax():04d}"
        assert other.sources["A"].parents[1] == other.sources["B"].parent == card.parent / name
        assert (other.layer, other.style, other.position) == (own.layer, own.style, own.position)
    name, other = next(iter(found.items()))
    other.make_last_caches()
    made = {n: other.cache(n) for n in ("train_last", "ranking_last")}
    assert [made[n].n for n in made] == [12, 8]
    assert {cache.directory.parent.name for cache in made.values()} == {f"pair_{name}_threshold"}
    of_a = activations.residual(
        other.pair.models["A"],
        other.pair.layer,
        torch.tensor([other.ids(other.records("ranking")[:1])[0]]),
    )
    assert torch.allclose(made["ranking_last"].gather([0])[0, 0], of_a[0, -1], atol=1e-4)
    dfc = other.crosscoders(["last anchored"], [0])["last anchored", 0]
    assert dfc.cfg.tie_bias
    pairs = own.pairs()  # this one first; the others ready for crosscoders
    assert (next(iter(pairs)), pairs[card.name]) == (card.name, own)
    assert sorted(pairs) == sorted([*found, card.name])
    assert all(pairs[name].cache("train_last").n == 12 for name in found)


def test_a_pair_without_a_card_stands_alone(study):
    profile = replace(PROFILE, pair="data/pairs/mine")  # its folder has no near.csv
    assert Study(profile).replicates() == {}
    assert list(Study(profile).pairs()) == ["mine"]
    hub = replace(PROFILE, pair=None)
    assert list(Study(hub).pairs()) == [hub.name]


def test_crosscoders_come_by_recipe_and_seed_and_are_trained_once(study, monkeypatch):
    found = study.crosscoders(["last tied", "published"], seeds=[0, 3], progress=False)
    assert list(found) == [(r, s) for r in ("last tied", "published") for s in (0, 3)]
    assert found["last tied", 0].cfg.tie_shared
    assert found["published", 3].normaliser.is_identity
    assert not torch.equal(found["last tied", 0].decoder, found["last tied", 3].decoder)

    monkeypatch.setattr(loop, "run", lambda *_: pytest.fail("trained again"))
    again = study.crosscoders({"mine": study.recipes["last tied"]}, seeds=[3], progress=False)
    assert list(again) == [("mine", 3)]
    assert torch.equal(again["mine", 3].decoder, found["last tied", 3].decoder)
    same = study.train({"x": study.recipes["published"].job(0)}, progress=False)
    assert torch.equal(same["x"].decoder, found["published", 0].decoder)


def test_all_recipes_and_the_profiles_seeds_by_default(study):
    found = study.crosscoders(progress=False)
    assert set(found) == {(r, s) for r in study.recipes for s in PROFILE.seeds}


@pytest.mark.parametrize("names", [["last tide"], "last tied"])
def test_an_unknown_recipe_is_refused_with_those_there_are(study, names):
    with pytest.raises(KeyError, match=r"no recipe 'l.*there are: .*published"):
        study.crosscoders(names, progress=False)


def test_evaluate_is_the_evaluation_with_the_profiles_limits(study):
    records = study.calls("evaluation", 3)
    found = study.evaluate("B", records, prompts.FIXED_STYLE)
    model, tokenizer = study.pair.models["B"], study.pair.tokenizer
    expected = evaluation.evaluate(
        model, tokenizer, records, prompts.FIXED_STYLE, max_new_tokens=6, batch_size=2
    )
    pd.testing.assert_frame_equal(found, expected)
    short = study.evaluate(model, records, prompts.FIXED_STYLE, max_new_tokens=1)
    assert all(map(str.startswith, found.response, short.response))
    assert (short.response.str.len() < found.response.str.len()).all()
    with pytest.raises(KeyError, match=r"no model 'RL'; this study has: A, B"):
        study.evaluate("RL", records, prompts.FIXED_STYLE)


def test_run_names_cells_by_levels_and_keeps_what_was_generated(study):
    records = study.calls("evaluation", 2)
    dfc = study.crosscoders(["last tied"], [0], progress=False)["last tied", 0]
    cells = {("clean",): Clean(), "patched": Patch(torch.zeros(study.pair.d_model))} | {
        ("steered", alpha): Steer(Codec(dfc), (1, 2), alpha) for alpha in (0.0, 4.0)
    }
    frame = study.run(cells, records, levels=("cell", "alpha"), progress=False)
    assert len(frame) == 2 * len(cells)
    assert frame.cell.tolist() == ["clean", "patched", "steered", "steered"] * 2
    assert frame.alpha[frame.cell == "steered"].tolist() == [0.0, 4.0] * 2
    assert frame.alpha[frame.cell != "steered"].isna().all()
    assert (study.build / "generations").is_dir()

    alone = study.evaluate("A", records, prompts.FIXED_STYLE)
    clean = frame[frame.cell == "clean"]
    assert clean.response.tolist() == alone.response.tolist()
    base = study.run({"clean": Clean()}, records, target="B", progress=False, out_dir=None)
    alone = study.evaluate("B", records, prompts.FIXED_STYLE)
    assert base.response.tolist() == alone.response.tolist()

    files = {p: p.stat().st_mtime_ns for p in (study.build / "generations").rglob("*.*")}
    again = study.run(cells, records, levels=("cell", "alpha"), progress=False)
    pd.testing.assert_frame_equal(again, frame)
    assert {p: os.stat(p).st_mtime_ns for p in files} == files


def test_prompts_that_are_asked_about_often_are_read_once(study):
    records = study.calls("evaluation", 3)
    ask = study.asking(records, ("cell", "size"))
    zero = Patch(torch.zeros(study.pair.d_model))
    for target in ("A", "B"):
        frame = ask({("clean", 0): Clean(), ("zero", 1): zero}, target=target)
        cells = {("clean", 0): Clean(), ("zero", 1): zero}
        options = {"levels": ("cell", "size"), "out_dir": None, "progress": False}
        alone = study.propensity(cells, records, target, **options)
        pd.testing.assert_frame_equal(frame, alone, atol=1e-5, rtol=0)
        assert frame.propensity.between(0, 1).all()
