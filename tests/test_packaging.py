"""pyproject.toml, requirements.lock, environment.yml and the code must tell one story."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from dfc_lib import __version__, paths

PROJECT = tomllib.loads((paths.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DIRECT = [
    Requirement(text)
    for text in [
        *PROJECT["dependencies"],
        *(line for extra in ("test", "book") for line in PROJECT["optional-dependencies"][extra]),
    ]
]
PINS = {
    canonicalize_name(pin.name): pin
    for line in (paths.ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
    for pin in [Requirement(line)]
}
# What a module is called where that is not the distribution's own name.
MODULES = {"sklearn": "scikit-learn", "umap": "umap-learn", "yaml": "pyyaml"}
# Part of every Python installation, or of what a direct dependency always brings.
BROUGHT_ALONG = {
    "packaging": "pytest",
    "yaml": "transformers",
    "nbformat": "papermill",
    "nbclient": "papermill",
    "nbconvert": "jupyterlab",
    "huggingface_hub": "transformers",
    "IPython": "jupyterlab",
}


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def pinned(name: str) -> Version:
    (specifier,) = PINS[canonicalize_name(name)].specifier
    return Version(specifier.version)


def test_every_pin_is_exact_and_portable():
    """A local version (+cpu) or an address would tie the lock to one platform or machine."""
    for pin in PINS.values():
        assert [s.operator for s in pin.specifier] == ["=="], pin
        assert pinned(pin.name).local is None, pin
        assert pin.url is None, pin
    assert "dfc-compendium" not in PINS
    assert "pip" not in PINS


@pytest.mark.parametrize("requirement", DIRECT, ids=lambda requirement: requirement.name)
def test_every_direct_dependency_is_ranged_and_pinned_inside_its_range(requirement):
    """A range that excludes the lock would make `pip install .` fight the figures' environment."""
    operators = {specifier.operator for specifier in requirement.specifier}
    assert ">=" in operators
    assert "<" in operators
    assert requirement.specifier.contains(pinned(requirement.name))


def test_the_lock_is_closed():
    """A missing transitive pin would let two installations differ."""
    todo = {(canonicalize_name(r.name), extra) for r in DIRECT for extra in ["", *r.extras]}
    seen = set()
    while todo:
        name, extra = todo.pop()
        seen.add((name, extra))
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            pytest.fail(f"{name} is not installed here")
        for requirement in map(Requirement, requires):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                child = canonicalize_name(requirement.name)
                # A CUDA build of torch pins its own companions exactly.
                if name == "torch" and child.startswith(("nvidia", "cuda", "triton")):
                    continue
                assert child in PINS, f"{name} needs {requirement}"
                todo |= {(child, e) for e in ["", *requirement.extras]} - seen


def test_what_is_installed_is_what_is_locked():
    """Results made with other versions than the locked ones could not be reproduced."""
    here = [n for n, pin in PINS.items() if pin.marker is None or pin.marker.evaluate()]
    installed = {name: Version(importlib.metadata.version(name)).public for name in here}
    assert installed == {name: str(pinned(name)) for name in here}


def test_conda_environment_is_python_pip_and_the_lock():
    """A version stated twice would drift apart."""
    text = (paths.ROOT / "environment.yml").read_text(encoding="utf-8")
    dependencies = yaml.safe_load(text)["dependencies"]
    assert dependencies == ["python=3.11", "pip", {"pip": ["-r requirements.lock"]}]
    assert Version("3.11") in Requirement(f"python{PROJECT['requires-python']}").specifier


def test_the_code_imports_only_what_is_declared():
    """An undeclared import works only where something else happens to bring the package."""
    cluster = map(Requirement, PROJECT["optional-dependencies"]["cluster"])  # not in the lock
    declared = {canonicalize_name(r.name).replace("-", "_") for r in [*DIRECT, *cluster]}
    code = [*(paths.ROOT / "dfc_lib").rglob("*.py"), *(paths.ROOT / "tools").rglob("*.py")]
    for path in sorted(code):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for top in {name.split(".")[0] for name in names}:
                known = top in {*sys.stdlib_module_names, *BROUGHT_ALONG, "dfc_lib", "tools"}
                distribution = MODULES.get(top, top).replace("-", "_").lower()
                assert known or distribution in declared, f"{path.name} imports {top}"


def test_package_metadata_names_what_exists():
    """A package or data file left out of the build is missing only after installation."""
    tool = tomllib.loads((paths.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    packages = tool["setuptools"]["packages"]
    found = {p.parent for p in (paths.ROOT / "dfc_lib").rglob("__init__.py")}
    assert {paths.ROOT / name.replace(".", "/") for name in packages} == found
    covered = tool["setuptools"]["package-data"]
    for path in (paths.ROOT / "dfc_lib").rglob("*.*"):
        if path.is_file() and path.suffix not in (".py", ".pyc"):
            package = ".".join(path.parent.relative_to(paths.ROOT).parts)
            assert any(path.match(pattern) for pattern in covered.get(package, [])), path


def test_importing_the_package_is_quick_and_light():
    """Every kernel of a run pays for `import dfc_lib`, and `make` for the runner."""
    heavy = (
        "torch transformers sae_lens transformer_lens pandas numpy matplotlib papermill nbformat"
    )
    code = (
        "import sys, dfc_lib, dfc_lib.study, tools.runner, dfc_lib.results.figures;"
        f"print(*set({heavy.split()}) & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=paths.ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == []


def test_versions_agree():
    """The citation, the package and its metadata carry one version."""
    citation = yaml.safe_load((paths.ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__
    assert citation["cff-version"] == "1.2.0"
    assert citation["license"] == PROJECT["license"] == "MIT"
    assert "MIT License" in (paths.ROOT / "LICENSE").read_text(encoding="utf-8")


def test_ci_runs_what_make_test_runs():
    """A continuous integration that is not `make test` would pass what readers see fail."""
    script = paths.ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = script.read_text(encoding="utf-8").splitlines()
    assert "set -euo pipefail" in lines
    assert lines[-1] == "make test"


def test_workflows_run_what_is_run_here_and_may_do_no_more_than_they_must():
    """A step of their own would fail, or pass, where nobody can try it."""
    jobs = {}
    for path in sorted((paths.ROOT / ".github" / "workflows").glob("*.yml")):
        workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert workflow["permissions"] == {"contents": "read"}, path.name
        jobs |= workflow["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert sorted(commands) == [".ci/run", "make book"]
    asked = {name: job["permissions"] for name, job in jobs.items() if "permissions" in job}
    assert asked == {"publish": {"pages": "write", "id-token": "write"}}
    for job in jobs.values():
        assert job["timeout-minutes"] <= 90
        for step in job["steps"]:
            assert re.fullmatch(r"actions/[\w-]+@v\d+", step.get("uses", "actions/none@v0"))


@needs_make
def test_make_help_lists_every_target():
    """An undocumented target is not found by those who need it."""
    makefile = (paths.ROOT / "Makefile").read_text(encoding="utf-8")
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, flags=re.M)
    shown = subprocess.run(
        ["make", "help"], cwd=paths.ROOT, capture_output=True, text=True, check=True
    ).stdout
    for target in set(phony.split()) - {"environment"}:
        assert re.search(rf"^  make {target} +\S", shown, flags=re.M), target
    for variable in ("PROFILE", "NB", "VENV", "PYTHON", "TORCH_INDEX"):
        assert f"  {variable}=" in shown, variable


@needs_make
def test_make_refuses_an_environment_that_is_no_python():
    """A wrong VENV must be told from a failing notebook."""
    result = subprocess.run(
        ["make", "figures", "VENV=/nowhere"], cwd=paths.ROOT, capture_output=True, text=True
    )
    assert result.returncode != 0
    assert "should be Python 3.11 or newer" in result.stderr


def bootstrap(folder, *variables: str, driver: bool = False) -> str:
    """What `make setup` says where pip cannot work: a Python that fails as soon as it is used."""
    tools = folder / "bin"
    tools.mkdir(parents=True)
    # The test of the version succeeds, and nothing else that this Python is asked to do.
    stubs = {"fake-python": 'test "$1" = -c', "uname": "echo Linux"}
    for name, does in (stubs | ({"nvidia-smi": "true"} if driver else {})).items():
        (tools / name).write_text(f"#!/bin/sh\n{does}\n")
        (tools / name).chmod(0o755)
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(paths.ROOT / name, folder / name)
    python = f"PYTHON={tools / 'fake-python'}"
    path = os.pathsep.join([str(tools), os.environ["PATH"]])
    result = subprocess.run(
        ["make", "--no-print-directory", "setup", python, *variables],
        cwd=folder,
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "VENV"} | {"PATH": path},
    )
    assert result.returncode != 0
    return result.stdout


@needs_make
@pytest.mark.skipif(
    shutil.which("nvidia-smi") is not None
    or os.path.exists("/proc/driver/nvidia/version")
    or os.path.exists("/usr/lib/wsl/lib/nvidia-smi"),
    reason="this machine has an NVIDIA driver",
)
def test_without_a_driver_make_tells_of_the_cpu_build_before_it_installs(tmp_path):
    """Gigabytes of CUDA on a laptop without a card are noticed when it is too late."""
    address = "https://download.pytorch.org/whl/cpu"
    said = bootstrap(tmp_path / "bare").splitlines()
    assert f"make setup TORCH_INDEX={address}" in said[0]
    assert "GB" in said[0]
    assert said[1].startswith("making .venv")
    assert "TORCH_INDEX" not in bootstrap(tmp_path / "chosen", f"TORCH_INDEX={address}")
    assert "TORCH_INDEX" not in bootstrap(tmp_path / "card", driver=True)
