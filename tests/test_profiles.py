"""Profiles and paths: what every notebook asks for first."""

import ast
import dataclasses
import os
import re
from pathlib import Path

import pytest

from dfc_lib import paths, profiles


def test_load_takes_the_name_unless_the_environment_names_another(monkeypatch):
    """A notebook's literal must lose against DFC_PROFILE, which is how nbval and make choose."""
    monkeypatch.delenv("DFC_PROFILE", raising=False)
    assert profiles.load("toy").name == "toy"
    monkeypatch.setenv("DFC_PROFILE", "smoke")
    assert profiles.load("toy").name == "smoke"
    monkeypatch.setenv("DFC_PROFILE", "")
    assert profiles.load("toy").name == "toy"


@pytest.mark.parametrize("where", ["argument", "environment"])
def test_an_unknown_profile_is_refused_with_the_known_ones(monkeypatch, where):
    """A misspelt profile must not silently run another one."""
    monkeypatch.delenv("DFC_PROFILE", raising=False)
    if where == "environment":
        monkeypatch.setenv("DFC_PROFILE", "toi")
    with pytest.raises(ValueError, match=r"unknown profile 'toi'.*toy, smoke, qwen"):
        profiles.load("toy" if where == "environment" else "toi")


def test_profiles_are_consistent():
    """A profile under a wrong key, or two that publish, would overwrite committed figures."""
    assert all(profile.name == name for name, profile in profiles.PROFILES.items())
    assert [name for name, p in profiles.PROFILES.items() if p.published] == ["toy"]
    smoke, toy = profiles.PROFILES["smoke"], profiles.PROFILES["toy"]
    for field in dataclasses.fields(profiles.Profile):
        if field.name.startswith("n_") or field.name in ("steps", "dict_size", "batch_size"):
            assert 0 < getattr(smoke, field.name) < getattr(toy, field.name), field.name
    assert len(toy.seeds) >= 3
    assert toy.n_random_directions >= 100
    assert toy.n_evaluation >= 500


@pytest.mark.parametrize("change", [{"exclusive_share": 0.5}, {"k": 0}, {"k": 2_000}])
def test_an_impossible_profile_is_refused(change):
    """Blocks that overlap, or a TopK over more features than there are, must fail at once."""
    with pytest.raises(ValueError, match="profile toy"):
        dataclasses.replace(profiles.PROFILES["toy"], **change)


def test_every_field_has_a_comment():
    """The dataclass is the documentation of what a profile sets."""
    source = Path(profiles.__file__).read_text()
    node = next(n for n in ast.parse(source).body if isinstance(n, ast.ClassDef))
    lines = source.splitlines()
    fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
    assert len(fields) > 15
    assert [f.target.id for f in fields if "#" not in lines[f.lineno - 1]] == ["name"]


def test_a_profile_like_another_is_not_the_published_one():
    """A new one that took this over would write over the committed figures."""
    like = profiles._profile(Path("profiles.toml"), {"n_ranking": 7}, profiles.PROFILES["toy"])
    assert not like.published
    assert like.n_ranking == 7


@pytest.mark.parametrize("device", ["gpu", "cuda0"])
def test_a_device_that_is_none_is_refused_with_those_there_are(device):
    with pytest.raises(ValueError, match=rf"device is '{device}'; it may be cpu, cuda, mps"):
        dataclasses.replace(profiles.PROFILES["toy"], device=device)


def test_the_library_never_compares_a_profile_name():
    """What differs between profiles must be a field, or a new profile would fall through."""
    comparison = re.compile(r"""profile(\.name)?\s*(==|!=|in)\s*[\[("']|DFC_PROFILE.*==""")
    for path in Path(profiles.__file__).parent.rglob("*.py"):
        assert not comparison.search(path.read_text(encoding="utf-8")), path.name


def test_paths_are_absolute_and_meet_in_the_root():
    """A relative path would break as soon as a notebook runs elsewhere."""
    for path in (paths.NOTEBOOKS, paths.PAIR, paths.FIGURES, paths.BUILD):
        assert path.is_absolute()
        assert path.is_relative_to(paths.ROOT)
    assert (paths.ROOT / "dfc_lib" / "paths.py").exists()


def test_build_makes_the_profiles_folder_where_dfc_build_says(monkeypatch, tmp_path):
    """DFC_BUILD must move every generated file, also when set after the import."""
    monkeypatch.setenv("DFC_BUILD", str(tmp_path / "elsewhere"))
    path = paths.build("smoke", "activations", "a.safetensors")
    assert path == tmp_path / "elsewhere" / "smoke" / "activations" / "a.safetensors"
    assert path.parents[1].is_dir()


def test_an_unwritable_build_folder_is_named_with_the_remedy(monkeypatch, tmp_path):
    """A full traceback from deep in a cache run would not tell what to do."""
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DFC_BUILD", str(tmp_path / "file" / "build"))
    with pytest.raises(paths.BuildFolderError, match=r"file/build/smoke .*DFC_BUILD"):
        paths.build("smoke")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_a_read_only_build_folder_is_refused(monkeypatch, tmp_path):
    """No permission must be found out before hours of work, not at the first write."""
    (tmp_path / "smoke").mkdir(mode=0o555)
    monkeypatch.setenv("DFC_BUILD", str(tmp_path))
    with pytest.raises(paths.BuildFolderError, match="no write permission"):
        paths.build("smoke")
