"""The checks of the exercises: the solution is right, a usual slip is named, nothing stops."""

import importlib
import inspect
import itertools
import re
from dataclasses import replace
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
import torch

from dfc_lib import paths
from dfc_lib.crosscoder.loop import TrainConfig
from dfc_lib.crosscoder.model import Crosscoder
from dfc_lib.crosscoder.partition import Normaliser, Partition
from dfc_lib.reading.groundtruth import PlantedConfig
from tools.freshness import load_notebooks

PARTITION = Partition.dedicated(20, 0.2)  # A-exclusive 0 to 3, B-exclusive 4 to 7, shared from 8


@pytest.fixture(scope="module")
def check() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(paths.NOTEBOOKS)
        yield importlib.import_module("check")


@pytest.fixture
def says(check, capsys):
    """What a check prints last."""

    def says(name: str, *arguments) -> str:
        capsys.readouterr()
        assert getattr(check, name)(*arguments) is None
        return capsys.readouterr().out.splitlines()[-1]

    return says


def crosscoder() -> Crosscoder:
    torch.manual_seed(0)
    normaliser = Normaliser(torch.zeros(2, 6), torch.ones(2))
    found = Crosscoder.create(6, PARTITION, 4, normaliser).eval().requires_grad_(False)
    found.W_dec[8:, 0] *= 3  # shared rows that are longer in A
    return found


def mirrored(encoder: bool = True) -> Crosscoder:
    """The first shared feature copied into both exclusive blocks."""
    found = crosscoder()
    for weights in [found.W_dec, *([found.W_enc.permute(2, 0, 1)] if encoder else [])]:
        weights[[0, 4]] = weights[8] * 3
        PARTITION.zero_forbidden_(weights)
    return found


def by_prompt(*rows: str) -> pd.DataFrame:
    """A letter for what the model does alone, and one with the feature turned up."""
    return pd.DataFrame([list(row) for row in rows], columns=["alone", "up"]).replace(
        {"r": "refuses", "c": "calls"}
    )


PROMPTS = by_prompt("rc", "rc", "rr", "cc", "cr")
ALONE = pd.DataFrame({"called": [0, 0, 1, 0, 0]})
PREFILLED = pd.DataFrame({"strict": [1, 1, 1, 0, 0]})
OF_A = pd.DataFrame({"response": ["<t>", "<t>", "<t>", "no"], "margin": [1.0, 2.0, -1.0, -2.0]})
TABLES = pd.DataFrame(
    [
        ("last tied", 0, contrast, block, on_tool, on_prose)
        for contrast in ("template", "decision")
        for block, on_tool, on_prose in [
            ("A_exclusive", 0.9, 0.0), ("A_exclusive", 0.1, 0.0), ("A_exclusive", 0.1, 0.0),
            ("A_exclusive", 0.0, 0.0), ("shared", 1.0, 1.0), ("shared", 0.8, 0.0),
            ("shared", 0.7, 0.0), ("shared", 0.0, 0.5), ("shared", 0.0, 0.0), ("shared", 0.0, 0.0),
        ]
    ],
    columns=["variant", "seed", "contrast", "block", "fire_rate_positive", "fire_rate_negative"],
)  # fmt: skip
H = torch.tensor([[[3.0, 0.0], [1.0, 0.0]], [[0.0, 3.0], [1.0, 0.0]]])
PARTS = pd.DataFrame({"embedding": [1.0], "head 0.0": [4.0], "MLP 0": [3.0], "MLP 1": [2.0]})
UNIT, WEIGHT = torch.tensor([0.6, 0.8]), torch.tensor([1.0, 3.0])
W_U = torch.tensor([[1.0, 0.0], [2.0, 1.0], [0.0, -1.0], [4.0, 4.0]])
GAIN, SD = pd.Series([20.0, 30.0, 25.0, 25.0]), 40.0
OF_RUNS = GAIN.var() / 4
RATIO = float(np.sqrt((OF_RUNS + SD**2 / 1000) / (OF_RUNS + SD**2 / 100)))
PLANTED = PlantedConfig(n_per_rate=1)  # four exclusive features
RUN = TrainConfig(Partition.dedicated(80, 0.1), k=4, steps=3, batch_size=8)
FITTING = replace(RUN, partition=Partition.dedicated(80, 0.05))


def b_code(first: int = 4) -> torch.Tensor:
    code = torch.zeros(1, 20)
    code[:, first:8] = 5.0
    return code


def share() -> float:
    squared = crosscoder().W_dec[8:].norm(dim=-1) ** 2
    return float((squared[:, 0] / squared.sum(-1)).mean())


CASES = {  # name: (what it is given, the solution, a wrong answer and what is said of it, ...)
    "quickstart_1": ((PROMPTS,), 2 / 3, (2 / 5, "divided by all prompts"), (66.67, "percentage")),
    "ex00_1": ((ALONE, PREFILLED), 2 / 5, (3 / 5, "does by itself"), (2 / 3, "all prompts")),
    "ex00_2": ((OF_A, ["<t>"]), 3 / 4, (1 / 4, "disagree")),
    "ex01_1": ((), 1, (4, "padding on the right"), (-4, "from the end"), (2, "from 0")),
    "ex01_2": ((H,), 3.0, (1 / 3, "B over A"), (4.5**0.5, "norm of the mean")),
    "ex02_1": (
        (crosscoder(),),
        b_code(),
        (b_code(3), "1 features outside"),
        (torch.zeros(1, 20), "no feature is active"),
        (torch.ones(20), "the shape (20,)"),
    ),
    "ex02_2": ((crosscoder(),), share(), (1 - share(), "model B")),
    "ex02_3": (
        (),
        (1 / 2, 2),
        (((2, 1 / 2)), "do not become smaller"),
        ((1 / 2, 1), "multiplied by 0.5"),
        ((0, 2), "must be positive"),
    ),
    "ex03_1": ((TABLES, 0), 1, (4, "of all blocks"), (3, "half of"), (2, "twice")),
    "ex03_2": ((TABLES, 0), 3, (4, "fire on prose"), (8, "silent on prose"), (7, "do fire")),
    "ex10_1": (
        (RUN, PLANTED),
        FITTING,
        (RUN, "8 features, and 4 were planted"),
        (replace(FITTING, k=5), "k changed as well"),
        (replace(RUN, partition=Partition.dedicated(40, 0.1)), "has 40 features"),
    ),
    "ex10_2": (
        (PLANTED,),
        replace(PLANTED, shared_cosine=0.7),
        (PLANTED, "a cosine of 1"),
        (replace(PLANTED, shared_cosine=0.7, noise=0.1), "noise changed"),
    ),
    "ex10_3": (
        (torch.randn(200, 1, 6, generator=torch.Generator().manual_seed(1)).expand(-1, 2, -1),),
        mirrored(),
        (crosscoder(), "no exclusive pair"),
        (mirrored(encoder=False), "together on a share"),
    ),
    "ex12_1": (
        (PARTS,),
        0.5,
        (5.0, "divide by the whole gap"),
        (0.3, "one MLP"),
        (0.4, "the heads"),
        (0.6, "embedding"),
    ),
    "ex12_2": (
        (UNIT, WEIGHT, W_U, 2.0),
        W_U @ (WEIGHT * UNIT) / 2,
        (W_U @ (WEIGHT * UNIT), "divisor is left out"),
        (W_U @ UNIT / 2, "weight is left out"),
        (W_U @ UNIT, "weight and divisor"),
        (torch.zeros(3), "the shape (3,)"),
    ),
    "ex13_1": ((GAIN, SD), RATIO, (0.1**0.5, "the part of the runs stays"), (RATIO**2, "square")),
    "ex13_2": ((), 1.0, (0.0, "every one does")),
}


@pytest.mark.parametrize("name", CASES)
def test_the_solution_is_right_and_slips_are_named(says, name):
    given, solution, *slips = CASES[name]
    assert says(name, solution, *given) == "Right."
    assert says(name, ..., *given).startswith("Not answered yet")
    for slip, message in slips:
        said = says(name, slip, *given)
        assert said.startswith("Not yet: ")
        assert message in said
    assert says(name, object(), *given).startswith("Not yet: this could not be read")


def test_every_check_has_a_case(check):
    named = {name for name, f in inspect.getmembers(check) if hasattr(f, "__wrapped__")}
    assert named == set(CASES)


def test_where_nothing_refuses_there_is_no_share(says):
    assert "raise N_PROMPTS" in says("quickstart_1", 0.5, by_prompt("cc"))


def test_every_exercise_that_is_checked_has_an_empty_answer_before_its_solution():
    """And each check is the one of its own exercise."""
    used = set()
    for name, notebook in load_notebooks(paths.ROOT).items():
        cells = notebook.content["cells"]
        for cell, after in itertools.pairwise(cells):
            if "exercise" not in cell["metadata"].get("tags", []):
                continue
            ask, solve = ("".join(c["source"]) for c in (cell, after))
            called = re.findall(r"^check\.(\w+)\(", f"{ask}\n{solve}", flags=re.M)
            assert len(called) == 2, name
            assert called[0] == called[1]
            number = called[0].rpartition("_")[2]
            assert re.search(rf"^answer_{number} = \.\.\.  # \S", ask, flags=re.M)
            assert solve.startswith(f"# Solution {number}\n")
            assert called[0].removeprefix("ex").startswith(name.partition("_")[0])
            used.add(called[0])
    assert used == set(CASES)
