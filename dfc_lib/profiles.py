"""What a profile sets: how much of everything a run uses, and on which pair of models.

``smoke``  minutes for everything: tiny budgets through the same code; its numbers mean nothing
``toy``    the default and the published figures: the embedded pair on a two-core CPU
``qwen``   Qwen2.5-3B before and after ToolRL, from the Hugging Face hub, on one GPU

A notebook asks for ``profile = profiles.load(PROFILE)`` and passes fields on; code never compares
names. A profile of your own is a JSON file (see :func:`read`); its path goes wherever a profile's
name does: ``make figures PROFILE=mine.json``.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from dfc_lib import paths


@dataclass(frozen=True)
class Profile:
    """One run's settings."""

    name: str
    published: bool  # True for the one profile whose executed notebooks and figures are committed
    pair: str | None  # folder with both models, relative to the compendium; None: from the hub
    model_a: str  # the tuned model A: a folder inside `pair`, or a hub name
    model_b: str  # the base model B, likewise
    others: tuple[tuple[str, str], ...]  # further models of the family, by name
    records: str  # the prompts: a folder of splits, a file of rows, or a hub data set (`corpora`)
    neutral: str  # the neutral texts, likewise
    layer: int  # the site: the residual stream after this layer, counted from 0
    n_crosscoder_texts: int  # tool prompts, and as many neutral texts, it is trained on
    n_all_token_texts: int  # of these, how many of each are cached at every token
    n_neutral_texts: int  # neutral texts held against the tool prompts when features are ranked
    n_ranking: int  # prompts of the ranking split (features are ordered on these)
    n_selection: int  # prompts of the selection split (the best cell is chosen on these)
    n_evaluation: int  # prompts of the evaluation split that the models are measured on
    n_steering: int  # of these, with a gold call, how many a grid of interventions runs on
    dict_size: int  # crosscoder features D, all blocks together
    k: int  # features kept active per vector by TopK
    exclusive_share: float  # share of D given to each model's exclusive block
    steps: int  # optimiser steps of one crosscoder
    batch_size: int  # activation vectors (rows with all models' streams) per step
    learning_rate: float  # Adam's, at its peak
    seeds: tuple[int, ...]  # crosscoder seeds wherever a claim rests on one crosscoder
    many_seeds: int  # crosscoder seeds where the claim is in how many seeds something happens
    n_random_directions: int  # norm-matched random directions per control
    n_bootstrap: int  # bootstrap resamples per interval
    batch_generation: int  # prompts generated for at once
    max_new_tokens: int  # an answer is cut here
    dtype: str  # in which the models are run: a torch dtype by name
    device: str  # "cpu", "cuda" or "mps"
    threads: int  # of a notebook on a CPU, where small models leave cores to others; 0: all cores
    file: str = ""  # the file that it was read from, as an absolute path; empty: it is one of these

    @property
    def family(self) -> dict[str, str]:
        """Every model by name: ``base`` (B) first, ``A`` last."""
        return {"base": self.model_b, **dict(self.others), "A": self.model_a}

    @property
    def side_by_side(self) -> int:
        """How many small jobs, such as trainings, run at a time: one for each core they leave."""
        alone = self.device != "cpu" or not self.threads
        return 1 if alone else max(1, paths.cores() // self.threads)

    @property
    def handle(self) -> str:
        """What :func:`load` takes to give this profile again, in any folder."""
        return self.file or self.name

    @property
    def identity(self) -> str:
        """Its name, and for one read from a file a hash of what it sets: results depend on it."""
        if not self.file:
            return self.name
        settings = json.dumps(asdict(self) | {"file": ""})
        return f"{self.name} {hashlib.sha256(settings.encode()).hexdigest()[:12]}"

    def location(self, model: str) -> Path | str:
        """A model's folder, in `pair` or downloaded by hand; else its hub name."""
        return paths.ROOT / self.pair / model if self.pair else paths.downloaded(model) or model

    def checkpoints(self, run: str) -> dict[int, Path | str]:
        """Step -> checkpoint of a training run (``"rl"``, ``"sft"``); step 0 is the base."""
        found = sorted((paths.ROOT / self.pair / run).glob("step_*")) if self.pair else []
        return {0: self.location(self.model_b)} | {int(p.name[5:]): p for p in found}

    def log(self, run: str) -> list[dict[str, Any]]:
        """What a training run logged, one entry per step; empty where the pair comes without it."""
        path = paths.ROOT / self.pair / f"{run}_log.jsonl" if self.pair else None
        if path is None or not path.exists():
            return []
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def __post_init__(self) -> None:
        if not 0 <= self.exclusive_share < 0.5:
            raise ValueError(
                f"profile {self.name}: exclusive_share is {self.exclusive_share}; each of the two "
                "models gets this share of the dictionary: it must be at least 0 and below 0.5"
            )
        if not 0 < self.k <= self.dict_size:
            raise ValueError(
                f"profile {self.name}: k = {self.k} must lie in 1 .. dict_size = {self.dict_size}"
            )


_TOY = Profile(
    name="toy",
    published=True,
    pair="data/pair",
    model_a="rl/step_0018",
    model_b="base",
    others=(("SFT", "sft/step_0160"), ("RL", "rl/step_0064")),
    records="data/prompts",
    neutral="data/neutral",
    layer=2,
    n_crosscoder_texts=4_000,
    n_all_token_texts=1_000,
    n_neutral_texts=1_000,
    n_ranking=800,
    n_selection=400,
    n_evaluation=500,
    n_steering=200,
    dict_size=1_024,
    k=16,
    exclusive_share=0.10,
    steps=1_000,
    batch_size=256,
    learning_rate=1e-3,
    seeds=(0, 1, 2),
    many_seeds=10,
    n_random_directions=100,
    n_bootstrap=2_000,
    batch_generation=128,
    max_new_tokens=80,
    dtype="float32",
    device="cpu",
    threads=1,
)

PROFILES: dict[str, Profile] = {
    "smoke": replace(
        _TOY,
        name="smoke",
        published=False,
        n_crosscoder_texts=256,
        n_all_token_texts=64,
        n_neutral_texts=64,
        n_ranking=48,
        n_selection=24,
        n_evaluation=32,
        n_steering=16,
        dict_size=128,
        k=8,
        steps=60,
        batch_size=128,
        seeds=(0, 1),
        many_seeds=2,
        n_random_directions=4,
        n_bootstrap=200,
        batch_generation=32,
    ),
    "toy": _TOY,
    # From the first study's sweep (arXiv 2606.26474): D = 8192, k = 90, Adam 1e-4, 9000 steps.
    "qwen": replace(
        _TOY,
        name="qwen",
        published=False,
        pair=None,
        model_a="chengq9/ToolRL-Qwen2.5-3B",
        model_b="Qwen/Qwen2.5-3B",
        # ToolRL's own runs start from the Instruct model: beside the pair, notebook 00 shows how
        # much of the difference between A and B may be instruction tuning.
        others=(("Instruct", "Qwen/Qwen2.5-3B-Instruct"),),
        records="emrecanacikgoz/ToolRL",
        neutral="HuggingFaceFW/fineweb:sample-10BT",
        layer=13,
        n_crosscoder_texts=2_000,  # ToolRL has 4,000 prompts; half of them fall to this split
        n_all_token_texts=1_000,
        n_neutral_texts=600,
        n_ranking=600,
        dict_size=8_192,
        k=90,
        steps=9_000,
        batch_size=1_024,
        learning_rate=1e-4,
        many_seeds=3,
        batch_generation=32,
        max_new_tokens=256,
        dtype="bfloat16",
        device="cuda",
        threads=0,
    ),
}


def get(name: str) -> Profile:
    """The profile called ``name``, or the one in the JSON file of that path.

    Raises:
        ValueError: no profile has that name (the message lists them); or as :func:`read`.
    """
    if name.endswith(".json"):
        return read(name)
    if name not in PROFILES:
        raise ValueError(
            f"unknown profile {name!r}; choose one of: {', '.join(PROFILES)}, or give the path of "
            "a profile file, mine.json (it is set by PROFILE in the notebook, PROFILE= of make, or "
            "the environment variable DFC_PROFILE)"
        )
    return PROFILES[name]


def read(path: str | Path) -> Profile:
    """A profile from a JSON file; it is called as the file is.

    The file holds the fields that differ from another profile, which ``"like"`` names::

        {"like": "qwen", "model_a": "models/tuned", "model_b": "models/base", "others": {},
         "records": "prompts.jsonl", "neutral": "HuggingFaceFW/fineweb:sample-10BT",
         "layer": 13, "device": "cuda"}

    Paths in it are relative to the file. Its results go to ``build/<name>/``.

    Raises:
        ValueError: the file is missing or no JSON, or names an unknown field or a value of another
            type; or its name is a built-in profile's.
    """
    path = Path(path).expanduser().resolve()
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"profile file {path}: cannot be read ({error})") from error
    if not isinstance(given, dict) or given.get("like") not in PROFILES:
        raise ValueError(
            f'profile file {path}: needs an object with "like", the profile that it starts from: '
            f"{', '.join(PROFILES)}"
        )
    if path.stem in PROFILES:
        raise ValueError(f"profile file {path}: a profile is called {path.stem}; rename the file")
    like = PROFILES[given.pop("like")]
    if "model_a" in given or "model_b" in given:  # what is of the other pair does not belong here
        given = {"pair": None, "others": {}} | given
    fixed = {"name": path.stem, "published": False, "file": str(path)}
    known = {field.name for field in fields(Profile)} - set(fixed)
    if unknown := set(given) - known:
        raise ValueError(
            f"profile file {path}: unknown field {sorted(unknown)[0]!r}; there are: "
            f"{', '.join(sorted(known))}"
        )
    values = {name: _value(path, name, value, getattr(like, name)) for name, value in given.items()}
    return replace(like, **values, **fixed)


def _value(path: Path, name: str, value: Any, example: Any) -> Any:
    """A field's value as the dataclass has it, paths made absolute."""

    def absolute(text: str) -> str:
        found = path.parent / text.partition(":")[0]
        return str(found) if found.exists() else text

    if name == "others" and isinstance(value, Mapping):
        return tuple((model, absolute(source)) for model, source in value.items())
    if name == "pair" and isinstance(value, str | None):
        return absolute(value) if value else None
    if isinstance(example, tuple) and isinstance(value, list):
        return tuple(value)
    if isinstance(example, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(example):
        raise ValueError(f"profile file {path}: {name} is {value!r}; it should be like {example!r}")
    is_path = name in ("model_a", "model_b", "records", "neutral")
    return absolute(value) if is_path else value


def load(name: str) -> Profile:
    """As :func:`get`, unless the environment variable ``DFC_PROFILE`` names another profile.

    The variable wins because a notebook names its profile in a literal and is executed at several.
    """
    return get(os.environ.get("DFC_PROFILE") or name)
