"""A rehearsal of an own pair: its profile, what is said before anything runs, and the report."""

import json
import re
from dataclasses import asdict, replace

import pytest

from dfc_lib import paths, profiles
from dfc_lib.data import corpora
from tests.test_corpora import REPLY, fineweb_rows, toolrl_rows, write
from tests.test_qwen_path import model_like_qwen, tokenizer_like_qwen
from tools import budget, rehearse, runner
from tools.freshness import CompendiumError

OWN = {
    "like": "qwen",
    "model_a": "tuned",
    "model_b": "base",
    "records": "prompts.jsonl",
    "neutral": "neutral.jsonl",
    "layer": 1,
    "seeds": [3, 1, 2],
    "n_bootstrap": 100,
    "max_new_tokens": 12,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("own")
    for seed, name in enumerate(("base", "tuned")):
        model_like_qwen(seed).save_pretrained(root / name)
        tokenizer_like_qwen().save_pretrained(root / name)
    model_like_qwen(0, width=32).save_pretrained(root / "narrow")
    write(root / "prompts.jsonl", toolrl_rows(120))
    write(root / "neutral.jsonl", fineweb_rows(300))
    return root


@pytest.fixture
def own(folder, tmp_path, monkeypatch):
    """Writes a profile file with some fields changed; gives its path."""
    monkeypatch.setenv("DFC_BUILD", str(tmp_path / "build"))

    def make(**changes) -> str:
        (folder / "mine.json").write_text(json.dumps(OWN | changes))
        return str(folder / "mine.json")

    return make


def test_only_sizes_differ_and_none_grows(own):
    """Same models, texts, site and arithmetic: else a rehearsal would not be of that pair."""
    profile = profiles.get(own())
    small, smoke = asdict(rehearse.write_profile(profile)), profiles.get("smoke")
    assert small["name"] == "mine_rehearsal"
    assert small["n_evaluation"] == smoke.n_evaluation
    assert small["dict_size"] == smoke.dict_size
    assert small["n_bootstrap"] == 100  # smaller than smoke's already
    assert small["seeds"] == (3, 1)
    counts = {name for name in small if name.startswith("n_")} | {*rehearse.COUNTS, "seeds"}
    own_fields = asdict(profile)
    changed = {name for name in small if small[name] != own_fields[name]}
    assert changed <= counts | {"name", "file"}
    assert all(small[name] <= own_fields[name] for name in counts - {"seeds"})


@pytest.mark.parametrize("name", ["toy", "smoke"])
def test_the_embedded_pair_has_its_rehearsal(own, name, capsys):
    assert rehearse.main([name]) == 1
    assert "make rehearse PROFILE=mine.json" in capsys.readouterr().err


def test_a_device_that_is_not_here_is_replaced_and_named(own, monkeypatch):
    """A rehearsal on a laptop, before a GPU is paid for."""
    monkeypatch.setattr("dfc_lib.data.pair.device_is_here", lambda device: device == "cpu")
    profile = profiles.get(own(device="cuda"))
    small = rehearse.write_profile(profile)
    assert (small.device, small.dtype) == ("cpu", "float32")
    page = rehearse.report(profile, small, [], {"00_model_pair": ""})
    assert "device 'cuda' is not here" in page


def test_models_that_do_not_fit_are_named_before_anything_runs(own, monkeypatch, capsys):
    monkeypatch.setattr(runner, "run", lambda *_, **__: pytest.fail("nothing may run"))
    assert rehearse.main([own(model_b="narrow")]) == 1
    assert "differ in width (base 32, A 64)" in capsys.readouterr().out
    assert rehearse.main([own(layer=9)]) == 1
    assert "layer is 9, but layers are counted from 0 to 3" in capsys.readouterr().out
    assert rehearse.main([own(model_a="nowhere")]) == 1
    assert "A: nowhere: no such folder" in capsys.readouterr().out


def test_too_few_texts_are_counted(own):
    """The notebooks take what there is; who is surprised later has waited for nothing."""
    profile = profiles.get(own(n_selection=1))
    problems = "\n".join(rehearse.check_texts(profile))
    assert "n_evaluation asks for 500, but there are " in problems
    assert "n_steering asks for 200, but there are " in problems
    assert "n_selection" not in problems
    fits = dict.fromkeys((n for n in asdict(profile) if n.startswith("n_")), 1)
    assert rehearse.check_texts(replace(profile, **fits)) == []


def test_prompts_of_one_kind_are_named(own, folder):
    rows = [row | {"output": REPLY} for row in toolrl_rows(120)]
    write(folder / "replies.jsonl", rows)
    problems = "\n".join(rehearse.check_texts(profiles.get(own(records="replies.jsonl"))))
    assert "no prompt of the ranking split has a gold with a call" in problems
    problems = rehearse.check_texts(profiles.get(own(records="nowhere.jsonl")))
    assert len(problems) == 1
    assert "nowhere.jsonl: no such file" in problems[0]


def test_one_failure_hides_no_other_notebook(own, monkeypatch, capsys):
    """What needs a failed notebook is left out; the rest runs, and the report says why."""
    ran = []

    def run(project, wanted, jobs=0):
        if ran:  # a rehearsal that is stopped leaves what it has found
            report = paths.build("mine_rehearsal", "rehearsal.md").read_text(encoding="utf-8")
            assert f"- {ran[-1]}: " in report
        else:
            assert "before the full run: n_evaluation asks for" in capsys.readouterr().out
        ran.extend(wanted)
        if wanted == ["05_steering"]:
            raise CompendiumError("05 failed\n\nValueError: too short\n\nAll until there is in x")

    monkeypatch.setattr(runner, "run", run)
    assert rehearse.main([own()]) == 1
    shown = capsys.readouterr().out
    assert "- 05_steering: FAILED: ValueError: too short" in shown
    assert "- 06_spillover: ran" in shown
    assert "- 09_rl_vs_sft: left out: the pair comes without checkpoints" in shown
    assert "needs 05_steering, 09_rl_vs_sft" in shown
    assert "06_spillover" in ran
    assert "09_rl_vs_sft" not in ran
    assert "quickstart" not in ran
    assert "ESTIMATES" in shown
    assert paths.build("mine_rehearsal", "rehearsal.md").read_text() in shown


def test_hours_grow_with_the_work_and_fall_with_the_card():
    """An estimate that ignores a budget would send somebody to rent the wrong card."""
    qwen, slow, fast = profiles.get("qwen"), budget.GPUS["L4"], budget.GPUS["H100 80 GB"]

    def total(profile, gpu=slow) -> float:
        return sum(budget.hours(profile, gpu).values())

    assert total(qwen) > total(qwen, fast)
    fields = {"n_steering": "answers", "max_new_tokens": "answers"}
    fields |= {"steps": "crosscoders", "dict_size": "crosscoders"}
    for field, part in fields.items():
        twice = budget.hours(replace(qwen, **{field: 2 * getattr(qwen, field)}), slow)
        assert twice[part] > 1.6 * budget.hours(qwen, slow)[part], field
    needed = budget.on_card(qwen)
    assert needed > 3 * 2 * budget.parameters(budget.config_of("Qwen/Qwen2.5-3B"))
    rows = budget.gpu_page(qwen).splitlines()
    assert "ESTIMATES" in rows[0]
    for name, gpu in budget.GPUS.items():
        row = next(line for line in rows if line.startswith(name))
        assert (" yes " in row) == (needed < 0.9e9 * gpu.memory)


def test_the_samples_of_the_readme_are_read():
    """Somebody will copy them, and change the words."""
    readme = (paths.ROOT / "README.md").read_text(encoding="utf-8")
    (prompts,) = re.findall(r"```json\n(\{\"tools\".*?)```", readme, flags=re.DOTALL)
    records = [corpora.record_of(json.loads(line)) for line in prompts.splitlines()]
    assert [record.kind for record in records] == ["call", "response"]
    (neutral,) = re.findall(r"```json\n(\{\"text\".*?)```", readme, flags=re.DOTALL)
    low, high = corpora.NEUTRAL_CHARACTERS
    assert low <= len(json.loads(neutral)["text"]) <= high
