"""Checks of a reader's own answers to the exercises: ``check.ex02_1(answer_1, ...)``.

Every check says "Not answered yet" to ``...``, "Right" to an answer that is, and else what to look
at again; it never stops a notebook. It works the answer out anew from what it is given, so it
fits any profile. It stands beside the notebooks and not in the library: no result depends on it.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from math import comb, exp, isnan, lgamma, pi
from typing import Any

import numpy as np
import pandas as pd
import torch

from dfc_lib.crosscoder.loop import TrainConfig
from dfc_lib.crosscoder.model import Crosscoder
from dfc_lib.reading import autointerp, evolution, geometry, groundtruth
from dfc_lib.reading.windows import Examples
from dfc_lib.results import claims
from dfc_lib.steering import sweep
from dfc_lib.steering.interventions import Codec, Intervention, Reconstruction, apply

STOPPED = (TypeError, ValueError, LookupError, AttributeError, NameError)
STOPPED += (RuntimeError, ArithmeticError)  # as of tensors whose shapes do not fit


def exercise(judge: Callable[..., str | None]) -> Callable[..., None]:
    """A check from a function that says what is wrong with an answer, None where nothing is."""

    @functools.wraps(judge)
    def check(answer: Any, *given: Any) -> None:
        if answer is ...:
            print("Not answered yet: replace the ... above and run the cell again.")
            return
        try:
            wrong = judge(answer, *given)
        except STOPPED as error:
            wrong = f"this could not be read as an answer ({type(error).__name__}: {error})"
        print("Right." if wrong is None else f"Not yet: {wrong}.")

    return check


def number(answer: Any, right: float, tolerance: float, slips: dict[float, str]) -> str | None:
    """Whether a number is right; ``slips``: what led to other numbers, by these."""
    found = float(answer)
    if isnan(found) and isnan(right):
        return None
    if isnan(right):
        return "here it is a mean over nothing, which is NaN"
    if isnan(found):
        return "NaN is no number; is it a mean over nothing"
    if abs(found - right) <= tolerance:
        return None
    for value, why in slips.items():
        if abs(found - value) <= tolerance:
            return why
    if abs(found) > 1 and abs(found / 100 - right) <= tolerance:
        return "give a share from 0 to 1, not a percentage"
    return f"{found:.4g} is too {'large' if found > right else 'small'}"


def numbers(
    answer: Sequence[float],
    right: dict[str, float],
    tolerance: float | dict[str, float],
    slips: dict[tuple[float, ...], str],
) -> str | None:
    """Whether several numbers are right, by their names, in this order; else as ``number``."""
    found = [float(value) for value in answer]
    if len(found) != len(right):
        return f"{len(found)} numbers were given; {len(right)} are asked for"
    allowed = tolerance if isinstance(tolerance, dict) else dict.fromkeys(right, tolerance)

    def near(values: Sequence[float]) -> bool:
        return bool((np.abs(np.subtract(found, values)) <= list(allowed.values())).all())

    wrong = {
        name: why
        for (name, value), one in zip(right.items(), found, strict=True)
        if (why := number(one, value, allowed[name], {}))
    }
    if not wrong:
        return None
    said = "; ".join(f"{name}: {why}" for name, why in wrong.items())
    return next((why for values, why in slips.items() if near(values)), said)


@exercise
def quickstart_1(answer: float, by_prompt: pd.DataFrame) -> str | None:
    """The share of A's refusals that become calls with the feature turned up."""
    refuses, calls = by_prompt.alone == "refuses", by_prompt.up == "calls"
    if not refuses.any():
        return "A refuses nowhere here, so there is no share to give; raise N_PROMPTS"
    of_all = "you divided by all prompts; divide by those on which A refuses"
    up = "this counts calls on all prompts; take those on which A refuses as it is"
    slips = {(refuses & calls).mean(): of_all, calls.mean(): up}
    return number(answer, (refuses & calls).sum() / refuses.sum(), 0.005, slips)


# ---------------------------------------------------------------------------------------------
# 00 · The model pair


@exercise
def ex00_1(answer: float, alone: pd.DataFrame, prefilled: pd.DataFrame) -> str | None:
    """The share of prompts on which the base is able, but not inclined."""
    able, inclined = prefilled.strict.to_numpy() == 1, alone.called.to_numpy() == 1
    slips = {
        able.mean(): "these are all that it can do; leave out those that it does by itself",
        (~inclined).mean(): "these are all that it leaves undone; keep those that it can do",
        (able & ~inclined).sum() / max(1, able.sum()): "divide by all prompts",
    }
    return number(answer, (able & ~inclined).mean(), 0.005, slips)


@exercise
def ex00_2(answer: float, of_a: pd.DataFrame, openers: Sequence[str]) -> str | None:
    """The share of prompts on which the margin's sign and the greedy first token agree."""
    opened, positive = of_a.response.str.startswith(tuple(openers)), of_a.margin > 0
    slips = {
        1 - (positive == opened).mean(): "this is the share on which they disagree",
        (positive & opened).mean(): "both may also say no, and agree then as well",
    }
    return number(answer, (positive == opened).mean(), 0.005, slips)


# ---------------------------------------------------------------------------------------------
# 01 · Activations


@exercise
def ex01_1(answer: int) -> str | None:
    """Which token of the shorter text the public code reads: lengths 5 and 8, padded left."""
    slips = {
        4: "this is its last token, which the code would read were the padding on the right",
        4 - 8: "this counts from the end; count from the text's first token, which is 0",
        2: "count the tokens of the text from 0, as Python does",
        7: "the code takes index length - 1 with the length of the shorter text",
    }
    return number(answer, 1, 0.1, slips)


@exercise
def ex01_2(answer: float, h: torch.Tensor) -> str | None:
    """The mean norm of A's vectors over that of B's; h: (text, model, d_model)."""
    norms, of_mean = h.norm(dim=-1).mean(0), h.mean(0).norm(dim=-1)
    slips = {
        float(norms[1] / norms[0]): "this is B over A; give A over B",
        float(of_mean[0] / of_mean[1]): "this is the norm of the mean; take the mean of the norms",
    }
    return number(answer, float(norms[0] / norms[1]), 5e-4, slips)


# ---------------------------------------------------------------------------------------------
# 02 · Training


@exercise
def ex02_1(answer: torch.Tensor, dfc: Crosscoder) -> str | None:
    """A code of B-exclusive features alone, which moves B's decoding and not A's."""
    code, block = torch.as_tensor(answer, dtype=torch.float32), dfc.partition.slice("B_exclusive")
    if tuple(code.shape) != (1, dfc.d_dict):
        return f"the code has the shape {tuple(code.shape)}; it should be (1, {dfc.d_dict})"
    outside = code.clone()
    outside[:, block] = 0
    if bool(outside.any()):
        return f"{int((outside != 0).sum())} features outside the B-exclusive block are not zero"
    if not bool((code > 0).any()):
        return "no feature is active, so nothing could move"
    moved = (dfc.decode(code) - dfc.decode(torch.zeros_like(code))).norm(dim=-1)[0]
    print(f"A's decoding moves by {moved[0]:.3g}, B's by {moved[1]:.3g}.")
    return None


@exercise
def ex02_2(answer: float, dfc: Crosscoder) -> str | None:
    """The share of its squared length that an average shared row puts into model A."""
    norms = dfc.W_dec.norm(dim=-1)
    shared = norms[dfc.partition.slice("shared")]

    def share(of: torch.Tensor) -> float:
        return float((of[:, 0] / of.sum(-1)).mean())

    slips = {
        share(norms**2): "these are all features; take the shared block",
        share(shared): "this takes lengths; square them",
        1 - share(shared**2): "this is the share of model B",
    }
    return number(answer, share(shared**2), 5e-5, slips)


@exercise
def ex02_3(answer: tuple[float, float]) -> str | None:
    """Factors for activations and decoder rows that cheapen the penalty and change nothing."""
    activations, rows = map(float, answer)
    if activations <= 0 or rows <= 0:
        return "both factors must be positive: a feature that is silent or turned round is another"
    if abs(activations * rows - 1) > 1e-6:
        return f"the output would be multiplied by {activations * rows:.3g}; it must stay the same"
    if activations >= 1:
        return "the penalty counts activations, and these do not become smaller"
    return None


# ---------------------------------------------------------------------------------------------
# 03 · Ranking


@exercise
def ex03_1(answer: int, tables: pd.DataFrame, seed: int) -> str | None:
    """A-exclusive features of `last tied` that fire on at least half of the tool prompts."""
    mine = tables[(tables.variant == "last tied") & (tables.seed == seed)]
    template = mine[mine.contrast == "template"]
    own = template[template.block == "A_exclusive"].fire_rate_positive
    slips = {
        (template.fire_rate_positive >= 0.5).sum(): "these are of all blocks",
        (own > 0).sum(): "these fire on some tool prompt; ask for half of them",
        (mine[mine.block == "A_exclusive"].fire_rate_positive >= 0.5).sum(): (
            "the table has every feature twice, once for each contrast"
        ),
    }
    return number(answer, (own >= 0.5).sum(), 0.1, slips)


@exercise
def ex03_2(answer: int, tables: pd.DataFrame, seed: int) -> str | None:
    """Features of `last tied` that are silent on both sides of the template contrast."""
    mine = tables[(tables.variant == "last tied") & (tables.seed == seed)]
    one = mine[mine.contrast == "template"]
    on_tool, on_prose = one.fire_rate_positive > 0, one.fire_rate_negative > 0
    slips = {
        (~on_tool).sum(): "these are silent on tool prompts; some of them fire on prose",
        (~on_prose).sum(): "these are silent on prose; some of them fire on tool prompts",
        (on_tool | on_prose).sum(): "these are the features that do fire",
    }
    return number(answer, (~on_tool & ~on_prose).sum(), 0.1, slips)


# ---------------------------------------------------------------------------------------------
# 04 · Explanations


@exercise
def ex04_1(answer: float, explained: pd.DataFrame) -> str | None:
    """Mean detection of structural explanations minus that of explanations by content."""
    structural, content = (explained[explained.kind == k] for k in ("structural", "content"))
    right = structural.detection.mean() - content.detection.mean()
    rest = explained[explained.kind != "structural"].detection.mean()
    slips = {
        -right: "this is content minus structure",
        structural.fuzzing.mean() - content.fuzzing.mean(): "this is fuzzing; take detection",
        structural.detection.mean()
        - rest: "explanations that are mixed are neither; leave them out",
        structural.detection.mean(): "this is the mean of the structural ones; subtract the other",
    }
    return number(answer, right, 0.0011, slips)  # of two means with three digits each


@exercise
def ex04_2(
    answer: float,
    explainer: autointerp.PredicateExplainer,
    cases: Mapping[tuple, Examples],
    crosscoder: tuple,
) -> str | None:
    """By how much an explanation scores better on the examples that it was made from."""
    scores = []
    for examples in of_crosscoder(cases, crosscoder):
        rule = explainer.explain(examples.explain)
        scores.append([score(explainer, rule, e) for e in (examples.explain, examples.detection)])
    seen, fresh = np.mean(scores, axis=0)
    slips = {
        fresh - seen: "this is held-out minus seen",
        seen: "this is the score on what was seen; subtract the held-out one",
        fresh: "this is the held-out score; subtract it from the one on what was seen",
    }
    return number(answer, seen - fresh, 0.0011, slips)


@exercise
def ex04_3(
    answer: Sequence[float],
    explainer: autointerp.PredicateExplainer,
    cases: Mapping[tuple, Examples],
    crosscoder: tuple,
) -> str | None:
    """Accuracy on hard and on easy negatives of detection, over all features of a crosscoder."""
    right: dict[str, list[bool]] = {"hard": [], "easy": []}
    for examples in of_crosscoder(cases, crosscoder):
        said = explainer.judge(explainer.explain(examples.explain), examples.detection)
        for example, held in zip(examples.detection, said, strict=True):
            if not example.active:
                right[example.kind].append(not held)
    rates = {kind: float(np.mean(each)) if each else np.nan for kind, each in right.items()}
    hard, easy = rates.values()
    slips = {
        (1 - hard, 1 - easy): "these are the false alarms; give the shares that are right",
        (easy, hard): "these two are in the other order: hard first",
    }
    return numbers(answer, rates, 0.0011, slips)


def of_crosscoder(cases: Mapping[tuple, Examples], crosscoder: tuple) -> list[Examples]:
    """The examples of the features of one crosscoder, (name, seed)."""
    return [examples for key, examples in cases.items() if key[:2] == crosscoder]


def score(explainer: Any, rule: Any, examples: Sequence) -> float:
    """Balanced accuracy of an explanation."""
    truth, said = [e.active for e in examples], explainer.judge(rule, examples)
    return autointerp.balanced_accuracy(truth, said).score


# ---------------------------------------------------------------------------------------------
# 05 · Steering


@exercise
def ex05_1(answer: float, wide: pd.DataFrame) -> str | None:
    """The share of the calls under the feature that are right."""
    called, strict = (wide[name].astype(float) for name in ("called", "strict"))
    right = strict.sum() / called.sum()  # by cell
    chance = [cell for cell in right.index if cell.startswith("random")]
    slips = {
        strict["feature"].mean(): "this divides by all prompts; divide by the calls",
        called["feature"].mean(): "this is how often a tool is called; which of it is right?",
        right["clean"]: "these are the calls without the feature",
        right[chance].mean(): "these are the calls under the random directions",
    }
    return number(answer, right["feature"], 0.005, slips)


@exercise
def ex05_2(answer: Callable[[float], torch.Tensor], codec: Codec, h: torch.Tensor) -> str | None:
    """How the change of A depends on the number that its exclusive block is scaled by."""
    moved = {alpha: torch.as_tensor(answer(alpha)).float() for alpha in (1.0, 2.0, 5.0)}
    crosscoder, of_a = codec.crosscoder, h[:, 0].float()
    block = crosscoder.partition.slice("A_exclusive")
    rows = crosscoder.W_dec[block, 0] * crosscoder.normaliser.scale[0]
    once = crosscoder.encode(h)[:, block] @ rows  # the block's part of A, written once more

    def same(a: torch.Tensor, b: torch.Tensor) -> bool:
        return torch.allclose(a, b.to(a), rtol=1e-3, atol=1e-3)

    if not once.any():
        return "no feature of the block fires on these vectors: take a crosscoder whose block lives"
    if moved[1.0].shape != of_a.shape:
        return (
            f"the change has the shape {tuple(moved[1.0].shape)}, A's vectors {tuple(of_a.shape)}"
        )
    if same(moved[1.0], of_a):
        return "this is what A becomes; subtract what it was"
    if not same(moved[1.0], torch.zeros_like(of_a)):
        return "at alpha = 1 it is not zero: the change goes with alpha - 1"
    if not same(moved[2.0], once):
        found, right = (float(x.norm(dim=-1).mean()) for x in (moved[2.0], once))
        return f"at alpha = 2 its length is {found:.3g}; that of the whole block is {right:.3g}"
    if not same(moved[5.0], 4 * once):
        return "at alpha = 5 it is not four times what it is at alpha = 2"
    print(f"its mean length at alpha = 1, 2, 5: {[round(length(m), 3) for m in moved.values()]}")
    return None


def length(vectors: torch.Tensor) -> float:
    """The mean norm of some vectors."""
    return float(vectors.norm(dim=-1).mean())


@exercise
def ex05_3(
    answer: Callable[[np.ndarray], tuple[float, float]], sets_shown: pd.DataFrame, of: tuple
) -> str | None:
    """The best cell on some prompts: its gain on these, and on the others."""
    grid = sets_shown.xs("union", level="what").xs(of, level=["variant", "seed"]).to_numpy()
    rng, n = np.random.default_rng(0), grid.shape[1]
    overall, means = grid.mean(1).argmax(), []

    def same(found: Sequence[float], wanted: Sequence[float]) -> bool:
        return np.allclose(found, wanted, atol=1e-6)

    for _ in range(200):
        picked = rng.permutation(n)[: min(40, n // 2)]
        rest = np.setdiff1d(np.arange(n), picked)
        on_picked, on_rest = grid[:, picked].mean(1), grid[:, rest].mean(1)
        best = on_picked.argmax()
        right = np.array([on_picked[best], on_rest[best]])
        found = np.array(answer(picked), dtype=float)
        if found.shape != (2,):
            return f"it gives {found.size} numbers; give the gain on these prompts and elsewhere"
        as_good = np.isclose(on_picked, on_picked[best], atol=1e-9)  # equal cells are all the best
        if not any(same(found, (right[0], elsewhere)) for elsewhere in on_rest[as_good]):
            of_all = on_picked[overall], on_rest[overall]
            slips = {
                "this is in the other order: where it was chosen first": right[::-1],
                "this cell is the best on all prompts; choose it on these": of_all,
                "elsewhere the same cell counts, not the best one": (right[0], on_rest.max()),
                "elsewhere leaves out the prompts of the choice": (right[0], grid[best].mean()),
            }
            shown = f"{found[0]:.3f} and {found[1]:.3f} should be {right[0]:.3f} and {right[1]:.3f}"
            return next((why for why, slip in slips.items() if same(found, slip)), shown)
        means.append(right)
    here, elsewhere = np.mean(means, axis=0)
    print(f"over 200 sets: {here:+.3f} where the cell was chosen, {elsewhere:+.3f} elsewhere")
    return None


# ---------------------------------------------------------------------------------------------
# 06 · Spillover


@exercise
def ex06_1(answer: float, first_token: pd.DataFrame) -> str | None:
    """How much of the stream the joint reconstruction of `last untied` changes."""

    def of(recipe: str, read: str) -> pd.DataFrame:
        return first_token[(first_token.recipe == recipe) & (first_token.read == read)]

    mine = of("last untied", "joint")
    first = mine[mine.number == mine.number.iloc[0]]
    slips = {
        first.delta.mean(): "this is the first seed, as long as the random directions; take all",
        of("published", "joint").delta.mean(): "this is the recipe `published`",
        of("last tied", "joint").delta.mean(): "this is the recipe `last tied`",
        of("last untied", "own stream").delta.mean(): "this is read from A's own stream",
        first_token.delta.mean(): "this is the mean over all patches",
    }
    return number(answer, mine.delta.mean(), 5e-4, slips)


@exercise
def ex06_2(answer: torch.Tensor, dfc: Crosscoder, h: torch.Tensor) -> str | None:
    """Noise in A's place: it moves the base's reconstruction by the joint code alone."""
    noisy = torch.as_tensor(answer, dtype=h.dtype, device=h.device)
    if noisy.shape != h.shape:
        return f"it has the shape {tuple(noisy.shape)}; h has {tuple(h.shape)}"
    if not torch.equal(noisy[:, 1], h[:, 1]):
        return "the base's activations changed too, so that its own code moves as well"
    if torch.equal(noisy[:, 0], h[:, 0]):
        return "A's activations are as they were"
    moved = {}
    for encoding in ("joint", "own"):
        patch = Reconstruction(Codec(dfc, encoding=encoding))
        moved[encoding] = length(apply(patch, noisy, 1)[0] - apply(patch, h, 1)[0])
    if moved["joint"] == 0:
        return "the joint code is the same; make the noise as large as A's activations"
    print(
        f"the base's reconstruction moves by {moved['joint']:.3g} (joint), {moved['own']:g} (own)"
    )
    return None


@exercise
def ex06_3(answer: int, codec: Codec, h: torch.Tensor) -> str | None:
    """The prompts on which no A-exclusive feature fires, so that scaling them does nothing."""
    fires = codec.used.encode(h)[:, codec.crosscoder.partition.slice("A_exclusive")] > 0
    silent = int((~fires.any(1)).sum())
    slips = {
        len(h) - silent: "on these it is not zero",
        int((~fires.any(0)).sum()): "these are features that never fire; count prompts",
        silent / len(h): "this is a share; count the prompts",
    }
    return number(answer, silent, 1e-6, slips)


# ---------------------------------------------------------------------------------------------
# 07 · Geometry


@exercise
def ex07_1(answer: float, dfc: Crosscoder, alive: np.ndarray) -> str | None:
    """By how much scaling rows to length one raises the silhouette of the blocks."""
    from sklearn.metrics import silhouette_score

    raw = dfc.W_dec.detach().flatten(1).cpu().numpy()
    unit = raw / np.maximum(np.linalg.norm(raw, axis=1, keepdims=True), 1e-12)
    blocks = np.repeat(range(3), [block.size for block in dfc.partition.blocks])

    def silhouette(rows: np.ndarray, features: Any) -> float:
        return float(silhouette_score(rows[features], blocks[features]))

    of_raw, of_unit = silhouette(raw, alive), silhouette(unit, alive)
    every = slice(None)
    slips = {
        of_raw - of_unit: "this is raw minus unit length",
        of_unit: "this is the silhouette at length one; subtract that of the raw rows",
        of_raw: "this is the silhouette of the raw rows; subtract it from that at length one",
        silhouette(unit, every) - silhouette(raw, every): "these are all rows; take the live ones",
    }
    return number(answer, of_unit - of_raw, 1e-3, slips)


@exercise
def ex07_2(answer: Sequence[float], rows: geometry.Rows) -> str | None:
    """Mean agreement of k-means with permuted labels: ARI, NMI."""
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    scores = {"ARI": adjusted_rand_score, "NMI": normalized_mutual_info_score}
    found, rng = geometry.cluster(rows.vectors, "k-means", 3), np.random.default_rng(1)
    labels = [rng.permutation(rows.labels) for _ in range(200)]
    drawn = {name: [s(each, found) for each in labels] for name, s in scores.items()}
    means = {name: float(np.mean(each)) for name, each in drawn.items()}
    allowed = {name: 1e-3 + 4 * np.std(each) / 50**0.5 for name, each in drawn.items()}
    slips = {
        (means["NMI"], means["ARI"]): "these two are in the other order: the ARI first",
        tuple(s(rows.labels, found) for s in scores.values()): "permute the labels first",
    }
    return numbers(answer, means, allowed, slips)


@exercise
def ex07_3(answer: Sequence[float], plain: geometry.Rows) -> str | None:
    """k-means' ARI where a quarter, a tenth and a twenty-fifth of the rows are blanked."""
    n = len(plain.labels)

    def recovered(blanked: int) -> float:
        from sklearn.metrics import adjusted_rand_score

        sizes = {"A_exclusive": blanked, "B_exclusive": blanked, "shared": n - 2 * blanked}
        rows = geometry.masked(plain, sizes)
        found = geometry.cluster(rows.vectors, "k-means", 3)
        return float(adjusted_rand_score(rows.labels, found))

    right = {f"of 1 in {d}": recovered(n // d) for d in (4, 10, 25)}
    slips = {
        tuple(reversed(right.values())): "these are in the other order: a quarter first",
        tuple(recovered(n // d // 2) for d in (4, 10, 25)): "blank as many for each model",
    }
    return numbers(answer, right, 0.05, slips)


# ---------------------------------------------------------------------------------------------
# 08 · The sweep


@exercise
def ex08_1(answer: int, controls: pd.DataFrame, ratio: float) -> str | None:
    """The random patches of one length that raise A's propensity."""
    of_a = controls[controls.target == "A"]
    clean = of_a[of_a.condition == "clean"].set_index("prompt").propensity
    drawn = of_a[of_a.condition == "random"]
    gain = drawn.propensity - drawn.prompt.map(clean)
    means = gain.groupby([drawn.ratio, drawn.draw]).mean()
    mine = gain[np.isclose(drawn.ratio, ratio)]
    means_here = means[np.isclose(means.index.get_level_values("ratio"), ratio)]
    up = int((means_here > 0).sum())
    slips = {
        int((means_here < 0).sum()): "on these it falls",
        up / len(means_here): "this is a share; count the draws",
        int((means > 0).sum()): "these are the draws of all lengths",
        int((mine > 0).sum()): "this counts prompts; a draw rises or falls by its mean over them",
    }
    return number(answer, up, 1e-6, slips)


@exercise
def ex08_2(answer: float, design: pd.DataFrame, d_model: int) -> str | None:
    """The most by which the published penalty shortens an exclusive feature in this sweep."""
    sizes = design[design.exclusive_coef > 0].exclusive
    most, least = (sweep.COEF * d_model * 2 / (2 * 2 * n) for n in (sizes.min(), sizes.max()))
    slips = {
        2 * most: "n counts the features of both exclusive blocks, or the 2 below is missing",
        most / 2: "the error is over both models: m = 2",
        least: "this is the largest block; the smallest one moves most",
    }
    return number(answer, most, 0.02 * most, slips)


@exercise
def ex08_3(answer: float, gain: pd.Series) -> str | None:
    """By how many percentage points the best of all runs exceeds the best of 12 of them."""
    values, n = np.sort(100 * gain.to_numpy()), len(gain)
    chance = np.array([comb(i, 11) for i in range(n)]) / comb(n, 12)  # i is the highest of twelve
    expected = float(chance @ values)
    spread = float(chance @ (values - expected) ** 2) ** 0.5
    right = float(values[-1]) - expected
    slips = {
        -right: "this is the best of 12 minus the best of all",
        right / 100: "this is in propensity; give percentage points",
        expected: "this is the best of 12 by itself; subtract it from the best of all",
        values[-1] - values.mean(): "this is above the mean run; take the best of each 12",
    }
    return number(answer, right, 1e-3 + 4 * spread / 500**0.5, slips)


# ---------------------------------------------------------------------------------------------
# 09 · RL against SFT


@exercise
def ex09_1(
    answer: torch.Tensor, base: torch.Tensor, tuned: torch.Tensor, share: float
) -> str | None:
    """The base with four planted features, as large together as what the tuned model changed."""
    copy, base = torch.as_tensor(answer, dtype=torch.float64), base.double()
    if copy.shape != base.shape:
        return f"it has the shape {tuple(copy.shape)}; the base's vectors have {tuple(base.shape)}"
    added, change = copy - base, tuned.double() - base
    axes = torch.linalg.eigvalsh(added.T @ added)
    n_axes = int((axes > 1e-6 * axes.max()).sum()) if axes.max() > 0 else 0
    if n_axes != 4:
        return f"what was added has {n_axes} directions, and four were asked for"
    size, right = (float(x.square().sum(1).mean().sqrt()) for x in (added, change))
    if abs(size / right - 2) < 0.3:
        return "each of the four is as large as the change; all together they should be"
    if abs(size / right - 1) > 0.15:
        return f"its root mean square norm is {size:.3g}, that of the change is {right:.3g}"
    touched, expected = float((added != 0).any(1).double().mean()), 1 - (1 - share) ** 4
    if not 0.7 < touched / expected < 1.4:
        return f"it touches a share of {touched:.2f} of the vectors, not about {expected:.2f}"
    print(f"four directions, root mean square norm {size:.3g}, on {touched:.0%} of the vectors")
    return None


@exercise
def ex09_2(answer: int, gain: torch.Tensor, families: np.ndarray, share: float) -> str | None:
    """How many features all families keep at another share of the maximum."""
    sets, common = evolution.select_by_family(gain, families, share)
    union = set().union(*(kept.tolist() for kept in sets.values()))
    slips = {
        len(union): "some family keeps these; count what all of them keep",
        len(evolution.select(gain.mean(0), share)): "this is chosen on all samples at once",
        len(evolution.select_by_family(gain, families)[1]): "this is at a share of a fifth",
    }
    return number(answer, len(common), 1e-6, slips)


@exercise
def ex09_3(
    answer: Intervention,
    crosscoder: Crosscoder,
    chosen: Sequence[int],
    alpha: float,
    h: torch.Tensor,
) -> str | None:
    """The set amplified in the base by the base's own rows, read from the base alone."""
    features = list(chosen)
    rows = crosscoder.W_dec[features] * crosscoder.normaliser.scale[:, None]
    code = evolution.own_code(crosscoder, h[:, 0], 0)[:, features]
    moved = apply(answer, h, 0)[0] - h[:, 0]
    by_own, by_tuned = ((alpha - 1) * code @ rows[:, m] for m in (0, 1))
    joint = (alpha - 1) * crosscoder.encode(h)[:, features] @ rows[:, 0]

    def same(other: torch.Tensor) -> bool:
        return torch.allclose(moved, other.to(moved), rtol=1e-3, atol=1e-3)

    if not same(by_own):
        slips = {
            "these are RL's rows": by_tuned,
            "this reads the code from both models; read it from the base alone": joint,
            "nothing changes": torch.zeros_like(moved),
        }
        found, right = length(moved), length(by_own)
        said = f"its change has a mean length of {found:.3g}, that by the base's rows {right:.3g}"
        return next((why for why, slip in slips.items() if same(slip)), said)
    cosine = torch.cosine_similarity(by_own, by_tuned)[by_own.norm(dim=-1) > 0]
    near = f"{cosine.mean():.2f}" if len(cosine) else "not defined, the set is silent here"
    print(f"length {length(by_own):.3g}; cosine with the change by RL's rows: {near}")
    return None


# ---------------------------------------------------------------------------------------------
# 10 · Planted truth


@exercise
def ex10_1(
    answer: TrainConfig, given: TrainConfig, config: groundtruth.PlantedConfig
) -> str | None:
    """The configuration of a run whose blocks are as large as what was planted."""
    for name in ("A_exclusive", "B_exclusive"):
        size = len(range(answer.partition.dict_size)[answer.partition.slice(name)])
        if size != config.n_exclusive:
            return f"its block {name} has {size} features, and {config.n_exclusive} were planted"
    ours, theirs = answer.to_dict(), given.to_dict()
    sizes = answer.partition.dict_size, given.partition.dict_size
    if sizes[0] != sizes[1]:
        return f"the dictionary has {sizes[0]} features; only its blocks should change"
    if other := [k for k in ours if k != "partition" and ours[k] != theirs[k]]:
        return f"{', '.join(other)} changed as well, so a difference would have two causes"
    return None


@exercise
def ex10_2(answer: groundtruth.PlantedConfig, config: groundtruth.PlantedConfig) -> str | None:
    """Planted data whose shared features point elsewhere in the two streams."""
    if answer.shared_cosine >= config.shared_cosine:
        return f"shared features still agree with a cosine of {answer.shared_cosine:g}"
    ours, theirs = asdict(answer), asdict(config)
    if other := [k for k in ours if k != "shared_cosine" and ours[k] != theirs[k]]:
        return f"{', '.join(other)} changed as well, so a difference would have two causes"
    return None


@exercise
def ex10_3(answer: Crosscoder, look: torch.Tensor) -> str | None:
    """A crosscoder with a mirror: one direction in both exclusive blocks, firing together."""
    if largest := max(answer.integrity().values()):
        return f"a forbidden weight is {largest:.3g}; restore the zeros with zero_forbidden_"
    pairs = groundtruth.mirrors(answer, look)
    if not len(pairs):
        return "no exclusive pair has one direction and fires; was the encoder copied as well"
    if not (pairs.overlap > 0.5).any():
        return f"the two fire together on a share of {pairs.overlap.max():.2f} only"
    return None


# ---------------------------------------------------------------------------------------------
# 11 · Other ways


@exercise
def ex11_1(answer: float, d_model: int) -> str | None:
    """The mean absolute cosine of two random directions."""
    right = exp(lgamma(d_model / 2) - lgamma((d_model + 1) / 2)) / pi**0.5
    slips = {
        0.0: "that is the mean of the cosine; stability takes its absolute value",
        d_model**-0.5: "that is the root mean square; take the mean of the absolute value",
        1 / d_model: "that is the mean square; take the mean of the absolute value",
    }
    return number(answer, right, 0.02 * right, slips)


@exercise
def ex11_2(answer: torch.Tensor, mean_gap: torch.Tensor, u: torch.Tensor) -> str | None:
    """What is left of the mean difference without its part along a vector of any length."""
    found = torch.as_tensor(answer, dtype=torch.float32)
    if found.shape != mean_gap.shape:
        return f"the answer has the shape {tuple(found.shape)}; it should be {tuple(u.shape)}"
    along = (mean_gap @ u) / (u @ u) * u
    right = mean_gap - along
    slips = {
        "this is the part along u; give the rest": along,
        "u is not of unit length: divide by u @ u": mean_gap - (mean_gap @ u) * u,
        "divide by u @ u, the squared length": mean_gap - (mean_gap @ u) / u.norm() * u,
        "leave the rest as long as it is": right / right.norm(),
    }
    size = {"rtol": 1e-3, "atol": 1e-4 * float(mean_gap.norm())}
    if torch.allclose(found, right, **size):
        return None
    near = (why for why, slip in slips.items() if torch.allclose(found, slip, **size))
    return next(near, "subtract the projection of mean_gap on u")


# ---------------------------------------------------------------------------------------------
# 12 · The circuit


@exercise
def ex12_1(answer: float, parts: pd.DataFrame) -> str | None:
    """The share of the gap that all MLPs write; parts: A - B by prompt and part."""
    means = parts.mean()
    kind, whole = means.index.str.split().str[0], means.sum()
    mlps = means[kind == "MLP"]
    slips = {
        mlps.sum(): "this is what they write; divide by the whole gap",
        mlps.max() / whole: "this is one MLP; take those of all blocks",
        means[kind == "head"].sum() / whole: "these are the heads",
        1 - means[kind == "head"].sum() / whole: "the embedding is no MLP",
    }
    return number(answer, mlps.sum() / whole, 0.005, slips)


@exercise
def ex12_2(
    answer: torch.Tensor,
    unit: torch.Tensor,
    norm_weight: torch.Tensor,
    W_U: torch.Tensor,
    scale: float,
) -> str | None:
    """What one unit of a direction adds to the logits while the final norm's divisor is held."""
    found = torch.as_tensor(answer, dtype=torch.float32)
    right = W_U @ (norm_weight * unit) / scale
    if found.shape != right.shape:
        return f"the answer has the shape {tuple(found.shape)}; it should be {tuple(right.shape)}"
    slips = {
        "the divisor is left out": right * scale,
        "the norm's weight is left out": W_U @ unit / scale,
        "the norm's weight and divisor are left out": W_U @ unit,
        "logits are not centred here": right - right.mean(),
    }
    if torch.allclose(found, right, rtol=1e-3, atol=1e-5):
        return None
    near = (why for why, slip in slips.items() if torch.allclose(found, slip, rtol=1e-3, atol=1e-5))
    return next(near, "multiply the direction by the norm's weight, divide, then apply W_U")


# ---------------------------------------------------------------------------------------------
# 13 · Public records


@exercise
def ex13_1(answer: float, gain: pd.Series, sd_prompts: float) -> str | None:
    """The width of C1's interval with 1,000 prompts over that with 100."""
    of_runs = gain.var() / len(gain)
    both = {n: of_runs + sd_prompts**2 / n for n in (100, 1000)}
    right = np.sqrt(both[1000] / both[100])
    slips = {
        np.sqrt(0.1): "this is the part of the prompts alone; the part of the runs stays",
        both[1000] / both[100]: "this compares variances; a width is a square root",
        1 - right: "this is by how much it shrinks; give the new width over the old one",
        1 / right: "this is the old width over the new one",
    }
    return number(answer, right, 0.005, slips)


@exercise
def ex13_2(answer: float) -> str | None:
    """The p of the maximum statistic over cells in which nothing changes."""
    slips = {
        0.0: "p counts the permutations that reach the observed maximum; here every one does",
        0.05: "p is computed, not a limit: how many permutations reach a maximum of zero",
    }
    return number(answer, 1.0, 1e-9, slips)


# ---------------------------------------------------------------------------------------------
# 14 · Scorecard


@exercise
def ex14_1(answer: int, details: pd.DataFrame) -> str | None:
    """The readings that stay untestable even if their positive control is believed."""
    by_id = {claim.id: claim for claim in claims.CLAIMS}

    def believed(row: Any) -> bool:
        names = ("positive_effect", "positive_low", "positive_high")
        moved = dict.fromkeys(names, 2 * row.expected or 1.0)
        trusting = row._replace(positive_control="supposed", **moved)
        return claims.judge(by_id[row.claim], trusting)[0] == "untestable"

    still = np.array([believed(row) for row in details.itertuples(index=False)])
    now = (details.verdict == "untestable").to_numpy()
    slips = {
        now.sum(): "so many are untestable now; judge again, the positive control believed",
        (now & ~still).sum(): "these would no longer be untestable",
        (still & details.primary.to_numpy(bool)).sum(): "these are the primary readings; count all",
    }
    return number(answer, still.sum(), 0.1, slips)


@exercise
def ex14_2(answer: int, details: pd.DataFrame) -> str | None:
    """Readings of an effect that surely has the claimed sign and does not hold."""
    effects = details[details.kind == "effect"]
    up = effects.expected >= 0
    certain = np.where(up, effects.low > 0, effects.high < 0)
    either, holds = (effects.low > 0) | (effects.high < 0), effects.verdict == "holds"
    slips = {
        (either & ~holds).sum(): "some of these point against the claim",
        certain.sum(): "some of these hold",
        (certain & holds).sum(): "these are the ones that hold",
    }
    return number(answer, (certain & ~holds).sum(), 0.1, slips)
