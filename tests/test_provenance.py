"""What a thing was made with: the code behind it, and the order of its sums."""

import os
import platform
from pathlib import Path

import pytest

from dfc_lib import provenance
from dfc_lib.provenance import Library, code_text


@pytest.fixture
def root(tmp_path) -> Path:
    """A library of three modules, of which beta imports gamma, and gamma names a data file."""
    library = tmp_path / "dfc_lib"
    (library / "deep").mkdir(parents=True)
    files = {
        "__init__.py": "",
        "alpha.py": '"""Doubles."""\n\n\ndef double(x):\n    return 2 * x\n',
        "beta.py": "from . import gamma\n\n\ndef triple(x):\n    return 3 * x\n",
        "gamma.py": 'TABLE = "gamma.toml"\n',
        "gamma.toml": "x = 1\n",
        "deep/__init__.py": "",
        "deep/delta.py": "def lazy():\n    from dfc_lib.alpha import double\n",
    }
    for name, text in files.items():
        (library / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import dfc_lib.beta as b", {"beta", "gamma"}),
        ("from dfc_lib.beta import triple", {"beta", "gamma"}),
        ("from dfc_lib import alpha, beta", {"alpha", "beta", "gamma"}),
        ("import importlib\nimportlib.import_module('dfc_lib.gamma')", {"gamma"}),
        ("print('see dfc_lib.alpha for more')", set()),
        ("import dfc_lib", set()),
        ("from dfc_lib.deep import delta", {"alpha", "deep", "deep.delta"}),  # a lazy import
    ],
)
def test_imports_of_every_form_are_found(root, source, expected):
    """A missed import means old results after an edit."""
    found = Library(root).closure([source])
    assert {name.removeprefix("dfc_lib.") for name in found} - {"dfc_lib"} == expected


def test_code_text_drops_what_cannot_matter_and_nothing_else():
    """Dropping too much would miss a change; keeping too much would rerun everything for a typo."""
    source = '"""Doc."""\nx = "# no comment"  # one\n\n\ndef f():\n    """Doc\n    two."""\n'
    source += '    s = """a\n\n    # b"""\n    return s\n'
    assert (
        code_text(source) == 'x = "# no comment"\ndef f():\n    s = """a\n    # b"""\n    return s'
    )
    assert '"""Doc."""' in code_text(source, docstrings=True)
    assert code_text("def f(): 'doc'; return 1") == "def f(): 'doc'; return 1"
    assert code_text("x = (") == "x = ("
    assert code_text("a\r\nb") == code_text("a\nb")


def test_a_module_that_is_not_python_is_named(root):
    (root / "dfc_lib/gamma.py").write_text("x = 1\ndef f(:\n")
    with pytest.raises(SyntaxError, match=r"gamma\.py, line 2"):
        Library(root).closure(["import dfc_lib.beta"])


@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        ("alpha.py", "2 * x", "x + x", {"alpha"}),
        ("alpha.py", "Doubles.", "Doubles its argument.", set()),
        ("gamma.toml", "x = 1", "x = 2", {"gamma"}),
    ],
)
def test_a_fingerprint_changes_with_code_and_named_data_only(root, file, old, new, expected):
    """What it misses would be served from an old cache."""
    names = ["alpha", "beta", "gamma"]
    before = [Library(root).fingerprint(f"dfc_lib.{name}") for name in names]
    path = root / "dfc_lib" / file
    path.write_text(path.read_text().replace(old, new))
    after = [Library(root).fingerprint(f"dfc_lib.{name}") for name in names]
    assert {n for n, a, b in zip(names, before, after, strict=True) if a != b} == expected


def test_code_hash_is_of_the_library_and_refuses_what_it_lacks():
    """A misspelt module would be a key that no change of code ever alters."""
    store, paths = (provenance.code_hash(f"dfc_lib.{name}") for name in ("store", "paths"))
    assert len(store) == 16
    assert store != paths
    assert provenance.code_hash("dfc_lib.study") != provenance.code_hash("dfc_lib.profiles")
    with pytest.raises(KeyError, match=r"dfc_lib\.trainig"):
        provenance.code_hash("dfc_lib.trainig")


@pytest.mark.parametrize(
    ("machine", "wish", "expected"),
    [
        ("x86_64", None, "avx2"),
        ("AMD64", "fixed", "avx2"),
        ("x86_64", "native", "default"),
        ("arm64", None, "default"),
    ],
)
def test_one_arithmetic_on_every_machine_that_can(monkeypatch, machine, wish, expected):
    """Another order of sums is other last bits, other tokens near a tie, and other figures."""
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(os, "environ", {"ATEN_CPU_CAPABILITY": "default"})
    if wish:
        os.environ["DFC_ARITHMETIC"] = wish
    provenance.fix_arithmetic()
    assert provenance.arithmetic()["ATEN_CPU_CAPABILITY"] == expected
    assert list(provenance.arithmetic()) == [
        "ATEN_CPU_CAPABILITY",
        "ONEDNN_MAX_CPU_ISA",
        "MKL_CBWR",
    ]
    assert (provenance.arithmetic()["MKL_CBWR"] == "AVX2") == (expected == "avx2")


@pytest.mark.skipif(None in provenance.arithmetic().values(), reason="not x86-64, or native")
def test_torch_computes_as_it_was_told():
    """The variables count only if they are there before torch is loaded."""
    import torch

    assert torch.backends.cpu.get_cpu_capability() == "AVX2"
