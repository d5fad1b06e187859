"""What a profile needs of memory and disk, before anything is downloaded.

    python -m tools.budget --profile qwen

From the models' ``config.json`` alone; decoders of Qwen2's and Llama's kind. Standard library only,
unless the configuration has to come from the hub.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
            f"{source}: no config.json ({type(error).__name__}: {error}). Download the model, or "
            "see why the hub cannot be reached"
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


def table(
    profile: Profile, config: Mapping[str, Any] | None = None
) -> list[tuple[str, str, float]]:
    """(what, where, GB) of everything large that a profile puts somewhere.

    ``config`` is model B's; the others are of its size. Counts of tokens are estimates.
    """
    config = config or config_of(profile.location(profile.model_b))
    size, d = BYTES[profile.dtype], config["hidden_size"]
    weights = parameters(config) * size
    head = config.get("head_dim") or d // config["num_attention_heads"]
    per_token = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head * size
    vector, everywhere = 2 * d * size, sum(TOKENS) * profile.n_all_token_texts
    last = 2 * (profile.n_crosscoder_texts + profile.n_ranking)
    weights_of = len(profile.family)
    dictionary = 2 * profile.dict_size * 2 * d * 4
    batch = profile.batch_size * profile.dict_size * 4
    rows = 4 * profile.batch_generation
    return [
        ("one model's weights", profile.device, weights / 1e9),
        ("A and B together (all but notebook 00)", profile.device, 2 * weights / 1e9),
        (f"the family of {weights_of} (notebook 00)", profile.device, weights_of * weights / 1e9),
        (
            f"keys and values of {rows} answers at once",
            profile.device,
            rows * (TOKENS[0] + profile.max_new_tokens) * per_token / 1e9,
        ),
        (
            "keys and values of the evaluation prompts, A and B (notebook 08)",
            "memory",
            2 * profile.n_evaluation * TOKENS[0] * per_token / 1e9,
        ),
        (
            "a crosscoder in training: weights, gradients, Adam, codes",
            profile.device,
            (4 * dictionary + 3 * batch) / 1e9,
        ),
        ("activations at every token (train_all)", "disk", everywhere * vector / 1e9),
        ("activations at last tokens (train_last, ranking_last)", "disk", last * vector / 1e9),
        (
            f"{5 * len(profile.seeds)} crosscoders of five variants",
            "disk",
            5 * len(profile.seeds) * dictionary / 1e9,
        ),
        (f"downloads of {weights_of} models", "disk", weights_of * parameters(config) * 2 / 1e9),
    ]


def page(profile: Profile) -> str:
    """The table as text."""
    lines = [f"{'GB':>8}  {'where':6}  what profile {profile.name} needs, about"]
    lines += [f"{amount:8.2f}  {where:6}  {what}" for what, where, amount in table(profile)]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.budget", description=__doc__)
    parser.add_argument("--profile", default="toy")
    try:
        print(page(profiles.load(parser.parse_args(arguments).profile)))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
