"""Checks of a reader's own answers to the exercises: ``check.ex02_1(answer_1, ...)``.

Every check says "Not answered yet" to ``...``, "Right" to an answer that is, and else what to look
at again; it never stops a notebook. It works the answer out anew from what it is given, so it
fits any profile. It stands beside the notebooks and not in the library: no result depends on it.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
import torch

from dfc_lib.crosscoder.loop import TrainConfig
from dfc_lib.crosscoder.model import Crosscoder
from dfc_lib.reading import groundtruth


def exercise(judge: Callable[..., str | None]) -> Callable[..., None]:
    """A check from a function that says what is wrong with an answer, None where nothing is."""

    @functools.wraps(judge)
    def check(answer: Any, *given: Any) -> None:
        if answer is ...:
            print("Not answered yet: replace the ... above and run the cell again.")
            return
        try:
            wrong = judge(answer, *given)
        except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            wrong = f"this could not be read as an answer ({type(error).__name__}: {error})"
        print("Right." if wrong is None else f"Not yet: {wrong}.")

    return check


def number(answer: Any, right: float, tolerance: float, slips: dict[float, str]) -> str | None:
    """Whether a number is right; ``slips``: what led to other numbers, by these."""
    found = float(answer)
    if abs(found - right) <= tolerance:
        return None
    for value, why in slips.items():
        if abs(found - value) <= tolerance:
            return why
    if abs(found / 100 - right) <= tolerance:
        return "give a share from 0 to 1, not a percentage"
    return f"{found:.4g} is too {'large' if found > right else 'small'}"


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
