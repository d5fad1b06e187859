"""The sweep: its design, its task against the engine, rows that survive kills and lost nodes."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import pandas as pd
import pytest
import torch

from dfc_lib import paths, profiles
from dfc_lib.crosscoder import recipes
from dfc_lib.crosscoder.model import Crosscoder
from dfc_lib.crosscoder.partition import Normaliser, Partition
from dfc_lib.data import activations, corpora, prompts
from dfc_lib.data.pair import load_pair
from dfc_lib.steering import evaluation, interventions, sweep
from dfc_lib.study import Study
from tools import sweep as command

PROFILE = replace(
    profiles.get("smoke"),
    n_crosscoder_texts=24,
    n_evaluation=7,
    steps=20,
    batch_size=16,
    batch_generation=4,
)
# ||delta|| / ||h|| = 0.5
HALF = sweep.Stretched(interventions.Patch(torch.zeros(128)), 0.5)
RUNS = [run for run in sweep.grid() if run.width == 4 and run.k == 45][1:4]
TIMEOUT = 600


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    """A cache of last-token vectors, as notebook 01 leaves it."""
    p = PROFILE
    sources = {"A": p.location(p.model_a), "B": p.location(p.model_b)}
    pair = load_pair(sources, p.layer)
    records = prompts.read_records(paths.DATA / "prompts" / "crosscoder.jsonl")[:24]
    texts = [prompts.chat_text(pair.tokenizer, r, prompts.FIXED_STYLE) for r in records]
    texts += prompts.read_neutral(paths.DATA / "neutral" / "crosscoder.jsonl")[:24]
    meta = {"source": ["tool"] * 24 + ["neutral"] * 24}
    out = tmp_path_factory.mktemp("vectors")
    ids = prompts.encode(pair.tokenizer, texts)
    activations.cache(pair, ids, out, meta=meta, progress=False)
    return out


@pytest.fixture
def build(vectors, tmp_path, monkeypatch):
    """An empty build folder but for that cache."""
    monkeypatch.setenv("DFC_BUILD", str(tmp_path))
    shutil.copytree(vectors, tmp_path / PROFILE.name / "activations" / "train_last")
    return tmp_path


@pytest.fixture(scope="module")
def expected(vectors, tmp_path_factory):
    """Rows and outcomes of an uninterrupted sweep in process."""
    folder = tmp_path_factory.mktemp("expected")
    shutil.copytree(vectors, folder / PROFILE.name / "activations" / "train_last")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DFC_BUILD", str(folder))
        return sweep.sweep(RUNS, Study(PROFILE), progress=False)


def test_the_grid_is_the_published_one():
    runs = sweep.grid()
    assert len(runs) == len(set(runs)) == len({run.name for run in runs}) == 48
    assert Counter((run.width, run.k) for run in runs) == {
        (width, k): 8 for width in (4, 8) for k in (45, 90, 160)
    }
    assert Counter(run.regime for run in runs) == {
        "plain": 6,
        "plain, L1": 6,
        "DFC, free": 18,
        "DFC, penalised": 18,
    }
    assert Counter(run.share for run in runs) == {0.0: 12, 0.03: 12, 0.05: 12, 0.1: 12}
    assert {run.shared_coef for run in runs if run.regime != "plain"} == {1e-3}
    assert {run.exclusive_coef for run in runs} == {0.0, 1e-3}


def test_what_the_setting_final_gets_has_a_plain_partner_for_every_dfc():
    runs = sweep.grid_in_final()
    assert len(runs) == len({run.name for run in runs}) == 24
    plain = {(r.width, r.k) for r in runs if r.regime == "plain, L1"}
    assert Counter((r.width, r.k) for r in runs if r.share) == dict.fromkeys(plain, 3)
    assert {r for r in runs if not r.tie_shared} < set(sweep.grid())
    assert {(r.share, r.regime) for r in runs if r.tie_shared} == {(0.10, "DFC, free")}


def test_an_anchored_run_differs_by_its_recipe_alone():
    run = next(r for r in sweep.grid() if r.regime == "DFC, penalised")
    anchored = replace(run, anchored=True)
    assert anchored.name == f"{run.name}-anchored"
    ours, theirs = (sweep.train_config(r, PROFILE, 64).to_dict() for r in (anchored, run))
    changed = {name for name in ours if ours[name] != theirs[name]}
    assert changed == set(recipes.anchored(1))
    assert ours["exclusive_coef"] == theirs["exclusive_coef"] == 1e-3


def test_every_setting_has_its_study(monkeypatch):
    asked = []
    monkeypatch.setattr(Study, "at", lambda self, setting: asked.append(setting) or self)
    assert command.open_study(PROFILE, "threshold").setting == "threshold"
    assert asked == []
    command.open_study(PROFILE, "final")
    assert asked == ["final"]


def test_at_full_size_the_runs_are_the_published_ones():
    profile = profiles.get("qwen")
    rows = pd.DataFrame([sweep.design(run, profile, 2_048) for run in sweep.grid()])
    assert set(rows.D) == {8_192, 16_384}
    for name in ("D", "k", "exclusive"):
        assert (rows[name] == rows[f"{name}_published"]).all()
    assert {(s, b) for s, b in zip(rows.steps, rows.batch, strict=True)} == {(9_000, 1_024)}
    assert sweep.train_config(sweep.grid()[0], profile, 2_048).lr == 1e-4


@pytest.mark.parametrize("name", ["smoke", "toy"])
def test_every_scaled_run_can_be_trained_and_differs(name):
    profile = profiles.get(name)
    configs = [sweep.train_config(run, profile, 128) for run in sweep.grid()]
    assert len(set(configs)) == 48
    assert {c.partition.dict_size for c in configs} == {512, 1_024}
    assert len({c.k for c in configs}) == 3


def test_the_prompts_are_the_profiles_own(build, monkeypatch):
    """With another pair, its prompts and not those of the embedded one."""
    calls = [r for r in corpora.records(PROFILE, "evaluation") if r.kind == "call"]
    own = [replace(calls[3], held_out=False, query="mine?")]
    monkeypatch.setattr(corpora, "records", lambda profile, split: own)
    assert sweep.records(Study(PROFILE)) == own


def test_measuring_equals_generating(build):
    """Prompts kept between calls, and the first token alone, change nothing."""
    study = Study(PROFILE)
    cells = {"clean": interventions.Clean(), "other": interventions.OtherModel(1)}
    cells["push"] = interventions.random_directions(HALF, 1, 128)[0]
    got = sweep.measure(study, "A", cells)
    want = evaluation.intervene(study.pair, "A", sweep.records(study), cells, progress=False)
    want = want.sort_values(["cell", "prompt"])
    got = got.sort_values(["condition", "prompt"])
    for name in sweep.OUTCOMES:
        assert got[name].tolist() == pytest.approx(want[name].tolist(), abs=1e-4)
    assert got[got.condition == "push"].delta.tolist() == pytest.approx([0.5] * 7, abs=1e-5)
    again = sweep.measure(study, "A", cells).sort_values(["condition", "prompt"])
    pd.testing.assert_frame_equal(again, got)


def test_a_stretched_change_has_the_same_direction(build):
    h = sweep.prefix_cache(Study(PROFILE)).h
    push = interventions.random_directions(HALF, 1, 128)[0]
    new, length = interventions.apply(sweep.Stretched(push, 3.0), h)
    once = interventions.apply(push, h)[0]
    assert length.tolist() == pytest.approx([1.5] * 7, abs=1e-5)
    torch.testing.assert_close(new - h[:, 0], 3 * (once - h[:, 0]), atol=1e-4, rtol=1e-4)


def test_a_row_says_what_was_measured(expected):
    rows, outcomes = expected
    assert rows.run.tolist() == [run.name for run in RUNS]
    assert not [name for name in rows if "second" in name or "time" in name]
    for (run, target, condition), part in outcomes.groupby(["run", "target", "condition"]):
        row = rows[rows.run == run].iloc[0]
        for name in sweep.OUTCOMES:
            assert row[f"{target}_{condition}_{name}"] == pytest.approx(part[name].mean())
    shape = outcomes.groupby(["target", "condition"]).prompt.nunique().to_dict()
    wanted = [(t, c) for t, conditions in sweep.CONDITIONS.items() for c in conditions]
    assert shape == dict.fromkeys(wanted, 7)
    dfc = rows[rows.share > 0]
    assert dfc.dead_A_exclusive.between(0, 1).all()
    assert rows[rows.share == 0].dead_A_exclusive.isna().all()


def test_a_row_says_how_well_and_by_which_blocks(build, expected):
    """Errors in normalised units; active features per block add up to k."""
    study, (rows, _) = Study(PROFILE), expected
    run, row = RUNS[1], rows.iloc[1]
    crosscoder = study.train({run: sweep.job(run, study)}, progress=False)[run]
    x, h = sweep.vectors(study).to_tensor(), sweep.prefix_cache(study).h
    with torch.no_grad():
        z, z_hat = (crosscoder.normaliser.apply(v) for v in (x, crosscoder.reconstruct(x)))
        active = (crosscoder.encode(h) > 0).sum(1).float().mean()
    assert row.mse == pytest.approx(float((z - z_hat).square().mean()), rel=1e-4)
    blocks = [f"prompt_l0_{name}" for name in crosscoder.partition.names]
    assert row[blocks].sum() == pytest.approx(float(active), rel=1e-5)
    assert row.prompt_mse_A > 0
    assert not row.tied


def test_raw_and_calibrated_differ_by_the_normaliser_alone(build):
    """With the identity in its place, both conditions are the same."""
    study = Study(PROFILE)
    h = sweep.prefix_cache(study).h
    crosscoder = Crosscoder.create(128, Partition.dedicated(64, 0.1), 8)
    crosscoder.requires_grad_(False)
    cells = sweep.reconstructions(crosscoder, "A")
    raw, calibrated = (interventions.apply(cells[c], h)[0] for c in ("raw", "calibrated"))
    assert torch.equal(raw, calibrated)
    crosscoder.normaliser = Normaliser.fit(sweep.vectors(study).to_tensor())
    changed = interventions.apply(sweep.reconstructions(crosscoder, "A")["calibrated"], h)[0]
    assert not torch.allclose(raw, changed)


def test_baselines_are_made_once(build, monkeypatch):
    study = Study(PROFILE)
    monkeypatch.setattr(sweep, "RATIOS", (0.1,))
    monkeypatch.setattr(sweep, "N_DRAWS", 2)
    first = sweep.baselines(study)
    others = {"clean", "other model", "tool mean", "neutral mean"}
    names = first[["condition", "ratio", "draw"]].drop_duplicates().fillna(-1).to_numpy().tolist()
    assert len(names) == len(others) + 2
    assert {tuple(name) for name in names} == {
        *((condition, -1, -1) for condition in others),
        ("random", 0.1, 0),
        ("random", 0.1, 1),
    }
    assert (first[first.condition == "clean"].delta == 0).all()
    assert first[first.condition == "random"].delta.to_numpy() == pytest.approx(0.1, abs=1e-5)
    monkeypatch.setattr(sweep, "measure", None)
    pd.testing.assert_frame_equal(sweep.baselines(study), first)


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from dfc_lib.steering import sweep
from dfc_lib.study import Study
from test_sweep import PROFILE, RUNS
sweep.sweep(RUNS, Study(PROFILE), progress=False)
"""


def test_a_killed_sweep_loses_the_run_in_flight_and_no_other(build, expected):
    tests = os.path.dirname(__file__)
    child = subprocess.Popen([sys.executable, "-c", SCRIPT.format(tests=tests)])
    try:
        end = time.monotonic() + TIMEOUT
        while not (finished := list(build.glob("*/sweep/*/*.json"))):
            assert child.poll() is None, "it ended before it had finished a run"
            assert time.monotonic() < end
            time.sleep(0.01)
    finally:
        child.kill()
        child.wait()
    finished = list(build.glob("*/sweep/*/*.json"))
    assert 1 <= len(finished) < len(RUNS)
    before = {path: path.stat().st_mtime_ns for path in finished}
    made = []

    def counting(runs, study):
        for run, result in sweep.in_process(runs, study):
            made.append(run)
            yield run, result

    rows, outcomes = sweep.sweep(RUNS, Study(PROFILE), counting, progress=False)
    assert len(made) == len(RUNS) - len(finished)
    assert {path: path.stat().st_mtime_ns for path in finished} == before
    pd.testing.assert_frame_equal(rows, expected[0], check_exact=True)
    pd.testing.assert_frame_equal(outcomes, expected[1], check_exact=True)


def test_a_changed_budget_is_another_sweep(build):
    path = sweep.result_path(RUNS[0], Study(PROFILE))
    for change in ({"steps": 40}, {"n_evaluation": 6}):
        assert sweep.result_path(RUNS[0], Study(replace(PROFILE, **change))) != path


def test_changed_code_is_another_sweep(build, monkeypatch):
    path = sweep.result_path(RUNS[0], Study(PROFILE))
    monkeypatch.setattr(sweep.provenance, "code_hash", lambda *modules: "another")
    assert sweep.result_path(RUNS[0], Study(PROFILE)).parent != path.parent


def test_missing_vectors_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DFC_BUILD", str(tmp_path))
    assert command.main(["--profile", "smoke"]) == 1
    assert "train_last" in capsys.readouterr().err


def test_a_lost_node_costs_no_row(build, expected):
    """Two nodes of Ray's, one killed mid-sweep: the rows of the sweep in process."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)
    study, came = Study(PROFILE), []

    def losing_a_node(runs, study):
        for run, result in command.on_ray(runs, study):
            if not came:
                cluster.remove_node(nodes[1], allow_graceful=False)
            came.append(run)
            yield run, result

    try:
        rows, outcomes = sweep.sweep(RUNS, study, losing_a_node, progress=False)
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert Counter(came) == Counter(RUNS)
    pd.testing.assert_frame_equal(rows, expected[0], check_exact=True)
    pd.testing.assert_frame_equal(outcomes, expected[1], check_exact=True)
    finished = list(sweep.folder(study).glob("*.json"))
    assert len(finished) == len(RUNS)
    assert all(json.loads(path.read_text())["run"] for path in finished)
