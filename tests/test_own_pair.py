"""The notebooks on a pair of one's own: two model folders, prompts with gold calls, one file."""

import json

import pytest

from dfc_lib import paths, profiles
from tests.test_corpora import fineweb_rows, toolrl_rows, write
from tests.test_qwen_path import model_like_qwen, tokenizer_like_qwen
from tools import runner

SETTINGS = {
    "like": "qwen",
    "model_a": "tuned",
    "model_b": "base",
    "records": "prompts.jsonl",
    "neutral": "fineweb",
    "layer": 1,
    "n_crosscoder_texts": 60,
    "n_all_token_texts": 12,
    "n_neutral_texts": 20,
    "n_ranking": 24,
    "n_selection": 12,
    "n_evaluation": 16,
    "n_steering": 8,
    "dict_size": 128,
    "k": 8,
    "steps": 40,
    "batch_size": 64,
    "seeds": [0, 1],
    "many_seeds": 2,
    "n_random_directions": 4,
    "n_bootstrap": 100,
    "batch_generation": 8,
    "max_new_tokens": 12,
    "device": "cpu",
}


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.setenv("DFC_BUILD", str(tmp_path / "build"))
    for seed, name in enumerate(("base", "tuned")):
        model_like_qwen(seed).save_pretrained(tmp_path / name)
        tokenizer_like_qwen().save_pretrained(tmp_path / name)
    write(tmp_path / "prompts.jsonl", toolrl_rows(120))
    write(tmp_path / "fineweb" / "000.parquet", fineweb_rows(600))
    (tmp_path / "mine.json").write_text(json.dumps(SETTINGS))
    return tmp_path / "mine.json"


def test_the_first_notebooks_run_on_it(settings, tmp_path):
    """Nothing in 00 to 03 may assume the embedded pair; a changed file must make them stale."""
    project = runner.Project(paths.ROOT, profiles.get(str(settings)))
    ran = runner.run(project, ["00", "02", "03"])
    assert sorted(name[:2] for name in ran) == ["00", "01", "02", "03"]
    figures = tmp_path / "build" / "mine" / "figures"
    assert (figures / "00_propensity.csv").exists()
    assert (figures / "03_discriminability.png").exists()
    assert runner.run(runner.Project(paths.ROOT, profiles.get(str(settings))), ["00", "03"]) == []
    settings.write_text(json.dumps(SETTINGS | {"n_bootstrap": 101}))
    changed = runner.Project(paths.ROOT, profiles.get(str(settings)))
    assert changed.why_stale("00_model_pair").startswith("changed: profile")
