"""What a profile needs of memory, disk and, on a GPU, hours, before anything is downloaded.

    python -m tools.budget --profile qwen

From the models' ``config.json`` alone; decoders of Qwen2's and Llama's kind. Standard library only,
unless the configuration has to come from the hub.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dfc_lib import profiles
from dfc_lib.profiles import Profile

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
TOKENS = 400, 450  # of a tool prompt in the fixed style, of a neutral text: about, for an estimate
# The published configuration, so that the table can be printed offline.
KNOWN = {
    "Qwen/Qwen2.5-3B": {
        "hidden_size": 2_048,
        "intermediate_size": 11_008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
        "model_type": "qwen2",
    }
}


class GPU(NamedTuple):
    """A card by its data sheet: 10^9 bytes, 10^9 bytes a second, 10^12 operations a second."""

    memory: float
    bandwidth: float
    half: float  # dense, 16 bit: the models
    single: float  # 32 bit without tensor cores: the crosscoders


GPUS = {
    "L4": GPU(24, 300, 121, 30),
    "RTX 4090": GPU(24, 1_008, 165, 82),
    "A100 80 GB": GPU(80, 2_039, 312, 19.5),
    "H100 80 GB": GPU(80, 3_350, 989, 67),
}
REACHED = 0.4  # share of the data sheet's operations that is reached, about
LAUNCH = 7e-4  # seconds in which Python starts the work of one decoder block for one token


def config_of(source: Path | str) -> Mapping[str, Any]:
    """The configuration of a model folder or hub model.

    Raises:
        ValueError: it cannot be had; says which file.
    """
    if source in KNOWN:
        return KNOWN[source]
    try:
        path = Path(source) / "config.json"
        if not path.is_file():
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(str(source), "config.json"))
        return json.loads(path.read_text(encoding="utf-8"))
    except Exception as error:  # the hub's client has many kinds of its own
        raise ValueError(
            f"{source} is no folder with a config.json, and the hub gave none of that name "
            f"({type(error).__name__}: {error}). Correct the path, download the model, or see why "
            "the hub cannot be reached"
        ) from error


def parameters(config: Mapping[str, Any]) -> int:
    """Number of parameters of a decoder of Qwen2's or Llama's kind."""
    d, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or d // heads
    q, kv = heads * head, 2 * config.get("num_key_value_heads", heads) * head
    biases = q + kv if config.get("model_type") == "qwen2" else 0
    block = d * (2 * q + kv) + biases + 3 * d * config["intermediate_size"] + 2 * d
    embeddings = config["vocab_size"] * d * (1 if config.get("tie_word_embeddings") else 2)
    return config["num_hidden_layers"] * block + embeddings + d


def table(profile: Profile) -> list[tuple[float, str, str]]:
    """(bytes, where, what) of everything large that a profile puts somewhere.

    All its models are taken to be of model B's size. Counts of tokens are estimates.
    """
    config = config_of(profile.location(profile.model_b))
    size, d, device = BYTES[profile.dtype], config["hidden_size"], profile.device
    weights, models, seeds = parameters(config) * size, len(profile.family), len(profile.seeds)
    answers, answered = 4 * profile.batch_generation, _answered(profile, config)
    evaluated = 2 * profile.n_evaluation * TOKENS[0] * _per_token(profile, config)
    dictionary = 2 * profile.dict_size * 2 * d * 4
    trained = 4 * dictionary + 3 * profile.batch_size * profile.dict_size * 4
    everywhere = sum(TOKENS) * profile.n_all_token_texts * 2 * d * size
    last = 2 * (profile.n_crosscoder_texts + profile.n_ranking) * 2 * d * size
    return [
        (weights, device, "one model's weights"),
        (2 * weights, device, "A and B together (all but notebook 00)"),
        (models * weights, device, f"the family of {models} (notebook 00)"),
        (answered, device, f"keys and values of {answers} answers at once"),
        (evaluated, "memory", "keys and values of the evaluation prompts, A and B (notebook 08)"),
        (trained, device, "a crosscoder in training: weights, gradients, Adam, codes"),
        (everywhere, "disk", "activations at every token (train_all)"),
        (last, "disk", "activations at last tokens (train_last, ranking_last)"),
        (5 * seeds * dictionary, "disk", f"{5 * seeds} crosscoders of five variants"),
        (models * parameters(config) * 2, "disk", f"downloads of {models} models"),
    ]


def audit_table(profile: Profile) -> list[tuple[float, str, str]]:
    """As :func:`table`, for ``make audit`` of one crosscoder of the profile's size."""
    config, device = config_of(profile.location(profile.model_b)), profile.device
    size, features = BYTES[profile.dtype], profile.dict_size
    crosscoder = 2 * features * 2 * config["hidden_size"] * 4
    prompts = profile.n_steering * TOKENS[0] * _per_token(profile, config)
    return [
        (2 * parameters(config) * size, device, "A and B"),
        (crosscoder, device, f"the crosscoder, {features:,} features"),
        (_answered(profile, config), device, "keys and values of the answers at once"),
        (prompts, "memory", f"keys and values of {profile.n_steering} prompts, B alone"),
        (2 * crosscoder, "memory", "its weights while they are read"),
        (crosscoder, "disk", "its download"),
        (2 * parameters(config) * 2, "disk", "downloads of A and B"),
    ]


def answers(profile: Profile) -> int:
    """How many answers all notebooks let the models write, about.

    The cells that the notebooks ask for, times their prompts: most are of 06, for 05, 08 and 09
    read the first token alone wherever they can. Counted for 06; the others' are taken as many.
    """
    cells = 2 * (29 * len(profile.seeds) + 28)
    alone = 5 * len(profile.family) * profile.n_evaluation
    return round(cells * profile.n_steering + alone)


def crosscoders(profile: Profile) -> int:
    """How many crosscoders of the profile's size all notebooks train on one pair, about.

    72 are 08's, and of each seed 5 are 02's and 4 are 11's; tied, untied and anchored ones have
    many seeds.
    """
    return 9 * len(profile.seeds) + 3 * profile.many_seeds + 72 + 16


def hours(profile: Profile, gpu: GPU) -> dict[str, float]:
    """Estimated hours of all notebooks on a card, by what takes them.

    A step of generation reads all weights, and its blocks have to be started one by one; a
    crosscoder's step and a forward pass are counted in operations. What share of a data sheet is
    reached (``REACHED``, ``LAUNCH``) is assumed and was not timed; every answer is taken to be as
    long as it may be.
    """
    config = config_of(profile.location(profile.model_b))
    n, d, size = parameters(config), config["hidden_size"], BYTES[profile.dtype]
    at_once, depth = 4 * profile.batch_generation, config["num_hidden_layers"]
    # The batch's keys and values are read at every step too.
    read = n * size + _answered(profile, config)
    step = max(read / (gpu.bandwidth * 1e9), depth * LAUNCH)
    batches = answers(profile) / at_once
    products = (
        2 * 3 * 2 * profile.batch_size * profile.dict_size * 2 * d
    )  # encode, decode; and back
    training = crosscoders(profile) * profile.steps * products / (REACHED * gpu.single * 1e12)
    texts = profile.n_crosscoder_texts + profile.n_ranking + profile.n_evaluation
    forward = 2 * n * sum(TOKENS) * texts * len(profile.family)
    seconds = {
        "answers": batches * profile.max_new_tokens * step,
        "crosscoders": training,
        "reading": forward / (REACHED * gpu.half * 1e12),
    }
    return {what: amount / 3600 for what, amount in seconds.items()}


def on_card(profile: Profile) -> float:
    """Bytes that a card must hold at the worst moment: the family, or a training beside a pair."""
    amounts = {what: amount for amount, _, what in table(profile)}
    family = next(a for what, a in amounts.items() if what.startswith("the family"))
    pair = next(a for what, a in amounts.items() if what.startswith("A and B"))
    answered = next(a for what, a in amounts.items() if "answers at once" in what)
    trained = next(a for what, a in amounts.items() if what.startswith("a crosscoder in training"))
    return max(family, pair + trained) + answered


def gpu_page(profile: Profile) -> str:
    """Hours of all notebooks and whether it fits, for every named card."""
    needed = on_card(profile) / 1e9
    lines = [
        f"ESTIMATES from data sheets, not timed on a card: all notebooks, {answers(profile):,} "
        f"answers and {crosscoders(profile)} crosscoders,",
        f"on a card that must hold about {needed:.1f} GB; the hours may be off by a factor of two",
        "",
        f"{'card':12}{'GB':>4}  {'fits':5}{'hours':>7}   of them {'answers':>8}{'crosscoders':>13}",
    ]
    for name, gpu in GPUS.items():
        parts = hours(profile, gpu)
        fits = "yes" if needed < 0.9 * gpu.memory else "no"
        lines.append(
            f"{name:12}{gpu.memory:>4}  {fits:5}{sum(parts.values()):>7.1f}   "
            f"{'':7} {parts['answers']:>8.1f}{parts['crosscoders']:>13.1f}"
        )
    return "\n".join(lines)


def _per_token(profile: Profile, config: Mapping[str, Any]) -> int:
    """Bytes of one token's keys and values."""
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    heads = config["num_key_value_heads"]
    return 2 * config["num_hidden_layers"] * heads * head * BYTES[profile.dtype]


def _answered(profile: Profile, config: Mapping[str, Any]) -> int:
    """Bytes of the keys and values of all answers that are generated at once."""
    tokens = TOKENS[0] + profile.max_new_tokens
    return 4 * profile.batch_generation * tokens * _per_token(profile, config)


def page(profile: Profile) -> str:
    """Both tables as text; the second one ends in its sums."""
    audit = audit_table(profile)
    audit += [
        (sum(amount for amount, where, _ in audit if where == place), place, "in all")
        for place in dict.fromkeys(where for _, where, _ in audit)
    ]
    lines = []
    for what, rows in {
        f"what profile {profile.name} needs, about": table(profile),
        "what `make audit` of one crosscoder needs": audit,
    }.items():
        lines += ["", f"{'GB':>8}  {'where':6}  {what}"]
        lines += [f"{amount / 1e9:8.2f}  {where:6}  {text}" for amount, where, text in rows]
    return "\n".join(lines[1:])


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.budget", description=__doc__)
    parser.add_argument("--profile", default="toy")
    try:
        profile = profiles.load(parser.parse_args(arguments).profile)
        print(page(profile))
        if profile.device != "cpu":
            print(f"\n{gpu_page(profile)}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
