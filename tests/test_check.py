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
from dfc_lib.reading import autointerp, geometry, specificity
from dfc_lib.reading.groundtruth import PlantedConfig
from dfc_lib.reading.windows import Example, Examples
from dfc_lib.results import claims
from dfc_lib.results.readings import Reading
from dfc_lib.steering.interventions import Codec, Steer, apply
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


def crosscoder(mean: float = 0.0) -> Crosscoder:
    torch.manual_seed(0)
    normaliser = Normaliser(torch.full((2, 6), mean), torch.ones(2))
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
SAID, WEIGHT = torch.tensor([0.6, 0.8]), torch.tensor([1.0, 3.0])
W_U = torch.tensor([[1.0, 0.0], [2.0, 1.0], [0.0, -1.0], [4.0, 4.0]])
GAP, ALONG = torch.tensor([1.0, 3.0]), torch.tensor([0.0, 1.0])
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


EXPLAINED = pd.DataFrame(
    {
        "kind": ["structural", "structural", "content", "mixed"],
        "detection": [0.9, 0.8, 0.6, 0.8],
        "fuzzing": [0.7, 0.7, 0.65, 0.8],
    }
)


class Explainer(autointerp.PredicateExplainer):
    """Says of an example what its first token says."""

    def __init__(self) -> None:
        pass

    def explain(self, examples):
        return None

    def judge(self, explanation, examples):
        return [e.tokens == ("yes",) for e in examples]


def example(said: bool, active: bool, kind: str = "top") -> Example:
    return Example(0, 1, 0, ("yes",) if said else ("no",), (1.0 * active,), active, kind)


SEEN = [example(True, True), example(False, False, "hard")]  # 1
ASKED = [example(True, True), example(False, True)]  # one of two
ASKED += [example(said, False, "hard") for said in (True, True, False, False, False)]  # 0.6
ASKED += [example(said, False, "easy") for said in (True, False, False, False, False)]  # 0.8
FRESH = (0.5 + 0.7) / 2  # balanced
EXAMPLES = {("DFC", 0, "shared", 1): Examples(SEEN, ASKED, [])}
EXAMPLES[("plain", 0, "shared", 1)] = Examples(ASKED, SEEN, [])
OF_CASES = (Explainer(), EXAMPLES, ("DFC", 0))

WIDE = pd.DataFrame(
    {
        ("called", "clean"): [0, 0, 0, 1, 0],
        ("called", "feature"): [1, 1, 1, 1, 0],
        ("called", "random 1"): [1, 1, 0, 0, 0],
        ("strict", "clean"): [0, 0, 0, 1, 0],
        ("strict", "feature"): [1, 1, 1, 0, 0],
        ("strict", "random 1"): [1, 0, 0, 0, 0],
    }
)
VECTORS = torch.randn(12, 2, 6, generator=torch.Generator().manual_seed(2))


def tied_crosscoder() -> Crosscoder:
    """With features that are surely on: a row of the block for each side of an axis."""
    found = crosscoder()
    for block in (slice(0, 4), slice(4, 8)):
        found.W_enc[..., block] *= 3
    return found


def scaled(features: tuple[int, ...] = (0, 1, 2, 3), shift: float = 1.0, whole: bool = False):
    """A function of alpha: what scaling A-exclusive features changes in A."""

    def change(alpha: float) -> torch.Tensor:
        codec = Codec(tied_crosscoder())
        new = apply(Steer(codec, features, alpha + 1.0 - shift), VECTORS)[0]
        return new if whole else new - VECTORS[:, 0]

    return change


RNG = np.random.default_rng(3)
SETS = pd.DataFrame(
    RNG.normal(size=(8, 100)),
    index=pd.MultiIndex.from_tuples(
        [
            (dose, what, n, "last tied", 0)
            for dose in (0.1, 0.2)
            for what in ("union", "own")
            for n in (1, 2)
        ],
        names=["dose", "what", "n", "variant", "seed"],
    ),
)
UNION = SETS.xs("union", level="what").to_numpy()


def best_cell(on: str = "these", elsewhere: str = "others", turned: bool = False):
    """The gains of a cell, chosen on some prompts or on all, there and elsewhere."""

    def gains(picked: np.ndarray) -> tuple[float, float]:
        others = np.setdiff1d(np.arange(100), picked)
        best = UNION[:, picked if on == "these" else slice(None)].mean(1).argmax()
        over = others if elsewhere == "others" else slice(None)
        pair = UNION[best, picked].mean(), UNION[best, over].mean()
        return pair[::-1] if turned else pair

    return gains


FIRST_TOKEN = pd.DataFrame(
    [
        (recipe, read, number, prompt, delta + 0.02 * number)
        for recipe, read, delta in [
            ("last untied", "joint", 0.3), ("last untied", "own stream", 0.5),
            ("last tied", "joint", 0.4), ("published", "joint", 0.9),
        ]
        for number in (0, 1)
        for prompt in (0, 1)
    ],
    columns=["recipe", "read", "number", "prompt", "delta"],
)  # fmt: skip


def noisy(models: tuple[int, ...] = (0,)) -> torch.Tensor:
    found = VECTORS.clone()
    for m in models:
        found[:, m] = torch.randn(12, 6, generator=torch.Generator().manual_seed(m))
    return found


def n_silent() -> int:
    code = crosscoder().encode(VECTORS)[:, :4]
    return int((code == 0).all(1).sum())


ROWS = geometry.Rows(
    np.random.default_rng(4).normal(2.0, size=(60, 8)),
    np.repeat([0, 1, 2], [10, 10, 40]),
    ("A", "B", "C"),
)


def silhouettes(features=slice(4, None)) -> tuple[float, float]:
    """Of raw rows and of rows of length one."""
    from sklearn.metrics import silhouette_score

    raw = crosscoder().W_dec.flatten(1).numpy()
    unit = raw / np.linalg.norm(raw, axis=1, keepdims=True)
    blocks = np.repeat([0, 1, 2], [4, 4, 12])
    return tuple(float(silhouette_score(x[features], blocks[features])) for x in (raw, unit))


RAW, UNIT = silhouettes()


def permuted_scores() -> tuple[float, float]:
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    found, rng = geometry.cluster(ROWS.vectors, "k-means", 3), np.random.default_rng(0)
    labels = [rng.permutation(ROWS.labels) for _ in range(200)]
    scores = (adjusted_rand_score, normalized_mutual_info_score)
    return tuple(float(np.mean([s(each, found) for each in labels])) for s in scores)


def blanked(*counts: int) -> list[float]:
    from sklearn.metrics import adjusted_rand_score

    found = []
    for n in counts:
        rows = geometry.masked(ROWS, {"A_exclusive": n, "B_exclusive": n, "shared": 60 - 2 * n})
        guessed = geometry.cluster(rows.vectors, "k-means", 3)
        found.append(float(adjusted_rand_score(rows.labels, guessed)))
    return found


CONTROLS = pd.DataFrame(
    [("A", "clean", None, None, prompt, 0.5) for prompt in (0, 1)]
    + [
        ("A", "random", ratio, draw, prompt, 0.5 + gain)
        for ratio in (0.2, 0.4)
        for draw, gains in enumerate([(0.2, -0.1), (0.2, 0.1), (0.1, 0.1), (-0.3, -0.1)])
        for prompt, gain in enumerate(gains)
    ],
    columns=["target", "condition", "ratio", "draw", "prompt", "propensity"],
)
DESIGN = pd.DataFrame({"exclusive_coef": [0.0, 1e-3, 1e-3], "exclusive": [5, 10, 40]})
SHRINK = 1e-3 * 128 * 2 / (2 * 2 * 10)
RUN_GAINS = pd.Series(np.random.default_rng(5).normal(size=36) / 100)


def best_of_twelve() -> float:
    rng = np.random.default_rng(6)
    draws = [rng.choice(100 * RUN_GAINS, 12, replace=False).max() for _ in range(4_000)]
    return float(np.mean(draws))


TWELVE, BEST = best_of_twelve(), 100 * RUN_GAINS.max()
BASE = torch.randn(4_000, 16, generator=torch.Generator().manual_seed(7))
TUNED = BASE + torch.randn(4_000, 16, generator=torch.Generator().manual_seed(8)) / 4  # size 1
FAMILY_GAIN = torch.tensor([[1.0, 0.5, 0.0, 0.3], [1.0, 0.0, 0.6, 0.3]])
FAMILIES = (FAMILY_GAIN, np.array(["x", "y"]), 0.4)  # {0, 1} and {0, 2}, at a fifth {0, 3} in both


def own_rows(rows_of: int | None = None, encoding: str = "own", alpha: float = 3.0) -> Steer:
    return Steer(Codec(crosscoder(0.1), encoding=encoding), tuple(range(8, 20)), alpha, rows_of)


def reading(effect: float, low: float, high: float, positive: float = 0.0, **further):
    """Numbers of a reading of an effect that was claimed, or of a zero."""
    row = Reading(claim="", id="x", what="", effect=effect, low=low, high=high, n=9)
    moved = dict.fromkeys(("positive_effect", "positive_low", "positive_high"), positive)
    return vars(replace(row, positive_control="patch", **moved)) | further


def scored() -> pd.DataFrame:
    """Readings with their verdicts."""
    kinds = {kind: next(c for c in claims.CLAIMS if c.kind == kind) for kind in ("effect", "zero")}
    size = abs(kinds["effect"].expected)
    sign = 1 if kinds["effect"].expected >= 0 else -1

    def effect(middle: float, half: float, works: bool, primary: bool = True) -> dict:
        low, high = sorted((sign * (middle - half) * size, sign * (middle + half) * size))
        positive = 2 * sign * size * works
        row = reading(sign * middle * size, low, high, positive, primary=primary)
        return row | {"claim": kinds["effect"].id}

    rows = [
        effect(1.0, 0.1, True),  # holds
        effect(1.0, 0.1, False),  # certain, untestable
        effect(1.0, 0.2, False),
        effect(0.3, 0.1, True),  # certain, too small
        effect(-0.3, 0.1, True),  # the other way
        effect(-0.6, 0.1, True),
        effect(0.3, 0.9, False),  # neither
        effect(0.0, 0.0, True, primary=False),  # untestable whatever is believed
        effect(0.0, 0.0, False),
        effect(0.0, 0.0, False, primary=False),
        reading(0.0, 0.0, 0.0, 0.0, claim=kinds["zero"].id, primary=True),
    ]
    by_id = {claim.id: claim for claim in claims.CLAIMS}
    found = pd.DataFrame(rows)
    found["kind"] = [by_id[name].kind for name in found.claim]
    found["expected"] = [by_id[name].expected for name in found.claim]
    found["verdict"] = [claims.judge(by_id[r.claim], r)[0] for r in found.itertuples(index=False)]
    return found


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
    "ex04_1": (
        (EXPLAINED,),
        0.25,
        (-0.25, "content minus structure"),
        (0.05, "take detection"),
        (0.15, "mixed are neither"),
        (0.85, "subtract the other"),
    ),
    "ex04_2": (OF_CASES, 1 - FRESH, (FRESH - 1, "held-out minus seen"), (1, "what was seen")),
    "ex04_3": (
        OF_CASES,
        (0.6, 0.8),
        ((0.4, 0.2), "false alarms"),
        ((0.8, 0.6), "the other order"),
        ((0.6, 0.7), "easy: 0.7 is too small"),
        ([0.6], "1 numbers were given"),
    ),
    "ex05_1": (
        (WIDE,),
        0.75,
        (0.6, "divide by the calls"),
        (0.8, "which of it is right"),
        (1.0, "without the feature"),
        (0.5, "random directions"),
    ),
    "ex05_2": (
        (Codec(tied_crosscoder()), VECTORS),
        scaled(),
        (scaled(whole=True), "subtract what it was"),
        (scaled(shift=0.0), "the change goes with alpha - 1"),
        (scaled((0,)), "that of the whole block is"),
        (lambda alpha: min(alpha - 1, 1) * scaled()(2.0), "four times"),
        (lambda alpha: scaled()(alpha)[0], "the shape (6,)"),
    ),
    "ex05_3": (
        (SETS, ("last tied", 0)),
        best_cell(),
        (best_cell(on="all"), "choose it on these"),
        (best_cell(elsewhere="all"), "leaves out the prompts"),
        (best_cell(turned=True), "the other order"),
        (lambda picked: best_cell()(picked)[0], "gives 1 numbers"),
    ),
    "ex06_1": (
        (FIRST_TOKEN,),
        0.31,
        (0.30, "first seed"),
        (0.91, "`published`"),
        (0.51, "own stream"),
    ),
    "ex06_2": (
        (crosscoder(0.1), VECTORS),
        noisy(),
        (noisy((0, 1)), "base's activations changed"),
        (VECTORS, "as they were"),
        (VECTORS[:, 0], "the shape (12, 6)"),
    ),
    "ex06_3": (
        (Codec(crosscoder()), VECTORS),
        n_silent(),
        (12 - n_silent(), "not zero"),
        (n_silent() / 12, "count the prompts"),
    ),
    "ex07_1": (
        (crosscoder(), np.arange(4, 20)),
        UNIT - RAW,
        (RAW - UNIT, "raw minus"),
        (UNIT, "subtract that of the raw"),
        (silhouettes(slice(None))[1] - silhouettes(slice(None))[0], "take the live ones"),
    ),
    "ex07_2": (
        (ROWS,),
        permuted_scores(),
        (permuted_scores()[::-1], "the other order"),
        ((0.5, 0.5), "ARI: 0.5 is too large"),
    ),
    "ex07_3": (
        (ROWS,),
        blanked(15, 6, 2),
        (blanked(2, 6, 15), "a quarter first"),
        (blanked(15, 6), "2 numbers were given"),
    ),
    "ex08_1": (
        (CONTROLS, 0.4),
        3,
        (1, "it falls"),
        (3 / 4, "count the draws"),
        (6, "all lengths"),
    ),
    "ex08_2": (
        (DESIGN, 128),
        SHRINK,
        (2 * SHRINK, "both exclusive blocks"),
        (SHRINK / 2, "m = 2"),
        (SHRINK / 4, "the smallest one moves most"),
    ),
    "ex08_3": (
        (RUN_GAINS,),
        BEST - TWELVE,
        (TWELVE - BEST, "minus the best of all"),
        (TWELVE, "subtract it"),
        (BEST - 100 * RUN_GAINS.mean(), "the best of each 12"),
    ),
    "ex09_1": (
        (BASE, TUNED, 0.05),
        specificity.plant(BASE, 1.0, 4, 0.05),
        (specificity.plant(BASE, 1.0, 1, 0.05), "has 1 directions"),
        (specificity.plant(BASE, 2.0, 4, 0.05), "all together"),
        (specificity.plant(BASE, 0.5, 4, 0.05), "that of the change is"),
        (specificity.plant(BASE, 1.0, 4, 0.2), "a share of"),
        (BASE[:9], "the shape (9, 16)"),
    ),
    "ex09_2": (FAMILIES, 1, (3, "all of them keep"), (2, "at a share of a fifth")),
    "ex09_3": (
        (crosscoder(0.1), tuple(range(8, 20)), 3.0, VECTORS),
        own_rows(),
        (own_rows(rows_of=1), "RL's rows"),
        (own_rows(encoding="joint"), "from both models"),
        (own_rows(alpha=2.0), "that by the base's rows"),
        (own_rows(alpha=1.0), "nothing changes"),
    ),
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
    "ex11_1": (
        (128,),
        0.0705,
        (0.0, "its absolute value"),
        (128**-0.5, "root mean square"),
        (0.2, "too large"),
    ),
    "ex11_2": (
        (GAP, 2 * ALONG),
        torch.tensor([1.0, 0.0]),
        (torch.tensor([0.0, 3.0]), "give the rest"),
        (torch.tensor([1.0, -9.0]), "not of unit length"),
        (torch.tensor([1.0, -3.0]), "squared length"),
        (torch.tensor([1.0, 0.0, 0.0]), "has the shape"),
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
        (SAID, WEIGHT, W_U, 2.0),
        W_U @ (WEIGHT * SAID) / 2,
        (W_U @ (WEIGHT * SAID), "divisor is left out"),
        (W_U @ SAID / 2, "weight is left out"),
        (W_U @ SAID, "weight and divisor"),
        (torch.zeros(3), "the shape (3,)"),
    ),
    "ex13_1": ((GAIN, SD), RATIO, (0.1**0.5, "the part of the runs stays"), (RATIO**2, "square")),
    "ex13_2": ((), 1.0, (0.0, "every one does")),
    "ex14_1": (
        (scored(),),
        4,
        (7, "untestable now"),
        (3, "no longer"),
        (2, "the primary readings"),
    ),
    "ex14_2": (
        (scored(),),
        3,
        (5, "against the claim"),
        (4, "some of these hold"),
        (1, "that hold"),
    ),
}

EXERCISE = r"(?m)^\*\*(\d)\.\*\* \((?:easy|medium|hard), \d+ min\)"


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
    ours = inspect.getmembers(check, lambda f: getattr(f, "__module__", "") == "check")
    named = {name for name, f in ours if hasattr(f, "__wrapped__")}
    assert named == set(CASES)


def test_where_nothing_refuses_there_is_no_share(says):
    assert "raise N_PROMPTS" in says("quickstart_1", 0.5, by_prompt("cc"))


def test_every_exercise_has_an_empty_answer_before_its_solution():
    """And each check is the one of its own exercise."""
    used = set()
    for name, notebook in load_notebooks(paths.ROOT).items():
        cells = notebook.content["cells"]
        asked = [n for c in cells for n in re.findall(EXERCISE, "".join(c["source"]))]
        empty = [c for c in cells if "exercise" in c["metadata"].get("tags", [])]
        assert len(empty) == len(asked), name
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


def test_a_block_that_is_silent_cannot_decide(check, capsys):
    """Where nothing fires, every function that changes nothing would be right."""
    silent = tied_crosscoder()
    silent.W_dec[silent.partition.slice("A_exclusive")] = 0.0
    check.ex05_2(lambda alpha: torch.zeros_like(VECTORS[:, 0]), Codec(silent), VECTORS)
    assert "no feature of the block fires" in capsys.readouterr().out
