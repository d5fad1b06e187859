"""What the dial needs of a crosscoder, and what was measured with it, into ``data/dial``.

The crosscoder and the feature are those that are shipped, by the rule that notebook 02 shows: of
all seeds of one recipe, the feature whose ablation lowers A's propensity most on the selection
prompts. Every direction on the page has that feature's length, so a turn of the dial is,
for a direction of unit vector u::

    h + (alpha - 1) f s ||W_dec|| u

with the feature's code f on this prompt and the scale s of the model that is steered. For the
feature itself this is ``Steer``, for anything else ``RandomDirection`` with ``Steer`` as its like.
"""

import json
from dataclasses import replace
from typing import NamedTuple

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from dfc_lib import paths, profiles, store
from dfc_lib.crosscoder.model import Crosscoder
from dfc_lib.data import prompts
from dfc_lib.data.prompts import Record
from dfc_lib.reading import ranking, switches
from dfc_lib.steering import evaluation
from dfc_lib.steering.interventions import (
    Clean,
    Codec,
    Intervention,
    RandomDirection,
    Steer,
    random_directions,
)
from dfc_lib.study import Study
from tools import ship

PROFILE = profiles.get("toy")
DATA = paths.DATA / "dial"
TENSORS, FACTS = "directions.safetensors", "dial.json"
CHOICES = (1.5, 2.0, 3.0, 4.0, 8.0)  # the strengths among which notebook 05 chooses
ALPHAS = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)  # of the measured curve
N_RANDOM = 5
SEED = 0  # of the random directions
OFFERED = {"flips": 12, "calls anyway": 4, "stays": 4, "needs no call": 6}  # prompts on the page


class Switch(NamedTuple):
    """The crosscoder and the feature on the dial."""

    seed: int
    codec: Codec
    feature: int
    strength: float  # at which it gained most on the selection prompts
    orders: dict[str, list[int]]  # block -> its features, most discriminative first


class Direction(NamedTuple):
    """What the dial can turn; ``unit`` has length one."""

    id: str
    name: str
    unit: Float[Tensor, " d_model"]
    feature: int | None = None


# ---------------------------------------------------------------------------------------------
# which feature, which directions


def orders(study: Study, crosscoder: Crosscoder) -> dict[str, list[int]]:
    """The features of every block by Cohen's d, tool prompts against prose."""
    seen = study.cache("ranking_last")
    f = crosscoder.encode(seen.to_tensor())
    separation = ranking.discriminability(
        f[seen.where(source="tool")], f[seen.where(source="neutral")]
    )
    table = ranking.rank_within_blocks(separation, crosscoder.partition.slices)
    blocks = table.sort_values("rank").groupby("block", sort=False).feature
    return {block: features.tolist() for block, features in blocks}


def find_switch(study: Study) -> Switch:
    """The shipped feature, by its rule, and the strength that gains most on selection prompts.

    Raises:
        ValueError: no feature that writes to A is live on tool prompts.
    """
    crosscoder, best = ship.choose(study)
    seed, feature = int(best.seed), int(best.feature)
    codec = Codec(crosscoder)
    cells = {(alpha,): Steer(codec, (feature,), alpha) for alpha in CHOICES}
    choose_on = study.calls("selection", study.profile.n_steering // 2)
    frame = study.run(cells, choose_on, levels=("alpha",), out_dir=None)
    strength = float(frame.groupby("alpha").lenient.mean().idxmax())
    return Switch(seed, codec, feature, strength, orders(study, crosscoder))


def directions(study: Study, switch: Switch) -> list[Direction]:
    """The feature first, then others of its crosscoder, the mean difference, random ones.

    Of a block the other that tells tool prompts from prose best, though it may never fire.
    """
    crosscoder = switch.codec.crosscoder

    def of_feature(id: str, name: str, feature: int, model: int = 0) -> Direction:
        row = crosscoder.W_dec[feature, model].detach()
        return Direction(id, f"{name} (feature {feature})", row / row.norm(), feature)

    tops = {
        block: next(feature for feature in order if feature != switch.feature)
        for block, order in switch.orders.items()
    }
    found = [
        of_feature("switch", "the switching feature", switch.feature),
        of_feature("own", "the top of A's own features", tops["A_exclusive"]),
        of_feature("shared", "the top shared feature", tops["shared"]),
        of_feature("base", "the top of the base's own features", tops["B_exclusive"], model=1),
    ]
    seen = study.cache("ranking_last")
    mean_a, mean_b = seen.gather(seen.where(source="tool")).mean(0)
    difference = (mean_a - mean_b) / (mean_a - mean_b).norm()
    found.append(Direction("mean", "the mean difference A − B", difference))
    like = Steer(switch.codec, (switch.feature,), switch.strength)
    for i, draw in enumerate(random_directions(like, N_RANDOM, crosscoder.d_model, SEED), 1):
        found.append(Direction(f"random{i}", f"random direction {i}", draw.direction))
    return found


def turned(switch: Switch, direction: Direction, alpha: float) -> Intervention:
    """The dial at ``alpha``, in the library's words."""
    if alpha == 1.0:
        return Clean()
    steer = Steer(switch.codec, (switch.feature,), alpha, rows_of="A")
    if direction.id == "switch":
        return steer
    return RandomDirection(steer, direction.unit if alpha > 1.0 else -direction.unit)


# ---------------------------------------------------------------------------------------------
# what is measured


def measure_curve(
    study: Study, switch: Switch, dial: list[Direction], records: list[Record]
) -> pd.DataFrame:
    """Both models at every direction and strength, a line per prompt."""
    cells = {(d.id, alpha): turned(switch, d, alpha) for d in dial for alpha in ALPHAS}
    levels = ("direction", "alpha")
    parts = [
        study.run(cells, records, model, levels=levels, out_dir=None).assign(model=model)
        for model in ("A", "B")
    ]
    frame = pd.concat(parts, ignore_index=True)
    return frame.assign(propensity=torch.sigmoid(torch.tensor(frame.margin.values)).numpy())


def curve(frame: pd.DataFrame) -> dict[str, dict[str, dict[str, list[float]]]]:
    """model -> direction -> means over prompts at ``ALPHAS``."""
    means = frame.groupby(["model", "direction", "alpha"])[["propensity", "called", "lenient"]]
    table = means.mean().round(4)
    return {
        model: {
            direction: {column: part[column].tolist() for column in part}
            for direction, part in of_model.groupby("direction", sort=False)
        }
        for model, of_model in table.groupby("model")
    }


def offered(switch: Switch, frame: pd.DataFrame, records: list[Record]) -> list[dict[str, str]]:
    """Prompts for the page, in the order of the data; ``what`` says what A does on each.

    A prompt *flips* where A alone calls nothing, the feature at its strength makes the call right
    in every argument, and the base, left alone, calls nothing but does at some strength.
    """
    of_feature = frame[frame.direction == "switch"]
    of_a = of_feature[of_feature.model == "A"].pivot(index="prompt", columns="alpha")
    of_base = of_feature[of_feature.model == "B"].pivot(index="prompt", columns="alpha")
    clean, on = 1.0, switch.strength
    found, left = [], dict(OFFERED)
    for i, record in enumerate(records):
        called, strict = of_a.loc[i, "called"], of_a.loc[i, "strict"]
        base = of_base.loc[i, "called"]
        if record.kind != "call":
            what = "needs no call"
        elif called[clean]:
            what = "calls anyway"
        elif strict[on] and not base[clean] and base.max():
            what = "flips"
        elif not called[on]:
            what = "stays"
        else:
            continue
        if left[what]:
            left[what] -= 1
            found.append({"id": record.id, "what": what})
    return found


def laid_out(tokenizer) -> str:
    """The fixed prompt's text, with {tools} and {query} where a prompt fills it."""
    style = replace(prompts.STYLES[prompts.FIXED_STYLE], listing=lambda _: "{tools}")
    messages = style.messages((), "{query}")
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def measure() -> None:
    """Write ``directions.safetensors`` and ``dial.json`` into ``data/dial``.

    Raises:
        ValueError: no prompt flips, or as :func:`find_switch`.
    """
    sums, study = ship.checksums(PROFILE), Study(PROFILE)
    switch = find_switch(study)
    crosscoder = switch.codec.crosscoder
    print(f"alpha = {switch.strength:g}")
    dial = directions(study, switch)
    calls = study.calls("evaluation", PROFILE.n_steering)
    frame = measure_curve(study, switch, dial, calls)
    others = study.no_calls("evaluation", OFFERED["needs no call"])
    beside = measure_curve(study, switch, dial[:1], others)
    beside["prompt"] += len(calls)
    shown = offered(switch, pd.concat([frame, beside]), [*calls, *others])
    if not any(prompt["what"] == "flips" for prompt in shown):
        raise ValueError("no evaluation prompt flips under the feature; there is nothing to show")

    model, tokenizer = study.pair.models["A"], study.pair.tokenizer
    ceiling = study.evaluate("A", calls, prompts.TRAINING_STYLES[0]).called.mean()
    facts = {
        "profile": PROFILE.name,
        "weights": sums,
        "layer": PROFILE.layer,
        "recipe": switches.RECIPE,
        "seed": switch.seed,
        "k": crosscoder.cfg.k,
        "partition": crosscoder.cfg.partition,
        "feature": switch.feature,
        "block": next(b for b, order in switch.orders.items() if switch.feature in order),
        "strength": switch.strength,
        "directions": [{"id": d.id, "name": d.name, "feature": d.feature} for d in dial],
        "template": laid_out(tokenizer),
        "openers": evaluation.opener_ids(tokenizer),
        "ends": evaluation.end_tokens(model, tokenizer),
        "max_new_tokens": PROFILE.max_new_tokens,
        "n_prompts": len(calls),
        "called_under_training_prompt": round(float(ceiling), 4),
        "alphas": list(ALPHAS),
        "curve": curve(frame),
        "prompts": shown,
    }
    tensors = {
        "encoder": crosscoder.encoder,
        "b_enc": crosscoder.b_enc,
        "normaliser_mean": crosscoder.normaliser_mean,
        "normaliser_scale": crosscoder.normaliser_scale,
        "row": crosscoder.W_dec[switch.feature, 0],
        "directions": torch.stack([d.unit for d in dial]),
    }
    store.save_tensors({k: v.float() for k, v in tensors.items()}, DATA / TENSORS)
    store.write_atomically(DATA / FACTS, json.dumps(facts, indent=1) + "\n")
    print(f"wrote {DATA / TENSORS} and {FACTS}")
