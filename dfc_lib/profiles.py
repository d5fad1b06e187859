"""What a profile sets: how much of everything a run uses, and on which pair of models.

``smoke``  minutes for everything: tiny budgets through the same code; its numbers mean nothing
``toy``    the default and the published figures: the embedded pair on a two-core CPU
``qwen``   Qwen2.5-3B before and after ToolRL, from the Hugging Face hub, on one GPU

Their values are in ``profiles.toml``. A notebook asks for ``profile = profiles.load(PROFILE)`` and
passes fields on; code never compares names. A profile of your own is a JSON file (see
:func:`get`); its path goes wherever a profile's name does: ``make figures PROFILE=mine.json``.
"""

import hashlib
import json
import os
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from dfc_lib import paths

DEVICES = ("cpu", "cuda", "mps")


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
    device: str  # one of `DEVICES`
    threads: int  # of a notebook on a CPU, where small models leave cores to others; 0: all cores
    file: str = ""  # the file that it was read from, as an absolute path; empty: it is one of these

    @property
    def family(self) -> dict[str, str]:
        """Every model by name: ``base`` (B) first, ``A`` last."""
        return {"base": self.model_b, **dict(self.others), "A": self.model_a}

    @property
    def final(self) -> str:
        """The model with which RL ended: ``RL`` of :attr:`others`; model A where it has none."""
        return dict(self.others).get("RL", self.model_a)

    @property
    def side_by_side(self) -> int:
        """How many small jobs, such as trainings, run at a time: one for each core they leave."""
        beside = self.device == "cpu" and self.threads
        return max(1, paths.cores() // self.threads) if beside else 1

    @property
    def batch_reading(self) -> int:
        """How many texts are read at once: fewer than are generated for, because few fill a
        machine, and more leave a processor's cache (a third of the time at the toy's size).
        """
        return max(1, self.batch_generation // 4)

    @property
    def handle(self) -> str:
        """What :func:`load` takes to give this profile again, in any folder."""
        return self.file or self.name

    @property
    def identity(self) -> str:
        """Its name and a hash of what it sets, on which results depend."""
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
        if self.device.partition(":")[0] not in DEVICES:
            raise ValueError(
                f"profile {self.name}: device is {self.device!r}; it may be {', '.join(DEVICES)} "
                "or one of several, such as 'cuda:1'"
            )
        if not 0 <= self.exclusive_share < 0.5:
            raise ValueError(
                f"profile {self.name}: exclusive_share is {self.exclusive_share}; each of the two "
                "models gets this share of the dictionary: it must be at least 0 and below 0.5"
            )
        if not 0 < self.k <= self.dict_size:
            raise ValueError(
                f"profile {self.name}: k = {self.k} must lie in 1 .. dict_size = {self.dict_size}"
            )


def get(name: str) -> Profile:
    """The profile called ``name``, or the one in the JSON file of that path, called as the file is.

    The file holds the fields that differ from another profile, which ``"like"`` names::

        {"like": "qwen", "model_a": "models/tuned", "model_b": "models/base", "others": {},
         "records": "prompts.jsonl", "neutral": "HuggingFaceFW/fineweb:sample-10BT",
         "layer": 13, "device": "cuda"}

    Paths in it are relative to the file. Its results go to ``build/<name>/``.

    Raises:
        ValueError: no profile has that name (the message lists them); the file is missing or no
            JSON, or names an unknown field or a value of another type; or its name is a built-in
            profile's.
    """
    if name in PROFILES:
        return PROFILES[name]
    if not name.endswith(".json"):
        raise ValueError(
            f"unknown profile {name!r}; choose one of: {', '.join(PROFILES)}, or give the path of "
            "a profile file, mine.json (it is set by PROFILE in the notebook, PROFILE= of make, or "
            "the environment variable DFC_PROFILE)"
        )
    path = Path(name).expanduser().resolve()
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
    return _profile(path, given, like, name=path.stem, file=str(path), published=False)


def _profile(path: Path, given: dict, like: Profile | None, **fixed: Any) -> Profile:
    """A profile from what a file says of it: all fields, or those that differ from another's."""
    if like:
        given = {"published": False} | given if "published" not in fixed else given
        if "model_a" in given or "model_b" in given:  # what is of the other pair has no place here
            given = {"pair": None, "others": {}} | given
    possible = {field.name for field in fields(Profile)} - {"file", *fixed}
    if unknown := set(given) - possible:
        raise ValueError(
            f"profile file {path}: unknown field {sorted(unknown)[0]!r}; there are: "
            f"{', '.join(sorted(possible))}"
        )
    folder = path.parent if "file" in fixed else None
    values = {
        name: _value(path, name, value, getattr(like, name, value), folder)
        for name, value in given.items()
    }
    return replace(like, **values, **fixed) if like else Profile(**values, **fixed)


def _value(path: Path, name: str, value: Any, example: Any, folder: Path | None) -> Any:
    """A field's value as the dataclass has it, paths made absolute if they are in ``folder``."""

    def absolute(text: str) -> str:
        found = folder and folder / text.partition(":")[0]
        return str(found) if found and found.exists() else text

    if name == "others" and isinstance(value, Mapping):
        return tuple((model, absolute(source)) for model, source in value.items())
    if name == "pair" and isinstance(value, str | None):
        return absolute(value) if value else None
    if isinstance(value, list) and isinstance(example, tuple | list):
        return tuple(value)
    if type(example) is float and type(value) is int:
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


def _built_in() -> dict[str, Profile]:
    # No string names the file, so it is not part of this module's code (`provenance`): a profile
    # counts by what it sets, and one more makes nothing stale.
    path = Path(__file__).with_suffix(".toml")
    found: dict[str, Profile] = {}
    for name, given in tomllib.loads(path.read_text(encoding="utf-8")).items():
        found[name] = _profile(path, given, found.get(given.pop("like", "")), name=name)
    return found


PROFILES = _built_in()  # by name
