"""The page with its data: ``page/`` as it is, and ``data.js`` beside it.

A page that was opened from a disk may not fetch files, but it may load a script; so the data is one
script of Base64 texts, gzipped. It is loaded when the reader asks for it.
"""

import base64
import gzip
import json
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save

from dfc_lib import store
from dfc_lib.data import corpora, prompts
from dfc_lib.profiles import Profile
from tools.dial import measure

PAGE = Path(__file__).with_name("page")
HOW = "run `python -m tools.dial --measure` (with the same --profile)"


def facts_of(profile: Profile) -> dict:
    """What ``measure`` found.

    Raises:
        ValueError: it is missing, or it was measured with other models than the profile's; or these
            are not in a folder.
    """
    sums, folder = measure.checksums(profile), measure.folder_of(profile)
    path = folder / measure.FACTS
    if not path.is_file() or not (folder / measure.TENSORS).is_file():
        raise ValueError(f"{path} or {measure.TENSORS} is missing; {HOW}")
    facts = json.loads(path.read_text(encoding="utf-8"))
    if facts["weights"] != sums:
        raise ValueError(f"{path} was measured with other models than {profile.name}'s; {HOW}")
    return facts


def config_of(folder: Path) -> dict:
    """A model's configuration.

    Raises:
        ValueError: it is none that the page's forward pass can compute.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    needed = {"model_type": "qwen2", "tie_word_embeddings": True, "hidden_act": "silu"}
    needed |= {"use_sliding_window": False}
    wrong = {key: config.get(key) for key, value in needed.items() if config.get(key) != value}
    if wrong or config.get("rope_parameters", {}).get("rope_type") != "default":
        raise ValueError(
            f"{folder / 'config.json'}: the dial computes Qwen2 with tied embeddings, SiLU, full "
            f"attention and default rotary embeddings only; here: {wrong or 'another rope_type'}"
        )
    return config


def tokenizer_of(folder: Path) -> bytes:
    """A model's ``tokenizer.json``.

    Raises:
        ValueError: it is none that the page's tokenizer can follow.
    """
    path = folder / "tokenizer.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    before = (state.get("pre_tokenizer") or {}).get("pretokenizers", [])
    kinds = [step["type"] for step in before]
    plain = not any(t["lstrip"] or t["rstrip"] or t["single_word"] for t in state["added_tokens"])
    if state["model"]["type"] != "BPE" or kinds != ["Split", "ByteLevel"] or not plain:
        raise ValueError(f"{path}: the dial follows byte-level BPE with one split pattern only")
    if state.get("normalizer"):
        raise ValueError(f"{path}: the dial follows tokenizers without a normaliser only")
    return path.read_bytes()


def difference(base: bytes, other: bytes) -> bytes:
    """``other`` minus ``base`` in 16-bit words that wrap around: all low bytes, then all high ones.

    After a short training most weights moved by a few units in the last place, so the high bytes
    are nearly all equal and compress to nothing.

    Raises:
        ValueError: the two differ in length.
    """
    if len(base) != len(other) or len(base) % 2:
        raise ValueError("the models differ in shape; the dial packs A as a difference from B")
    words = np.frombuffer(other, "<u2") - np.frombuffer(base, "<u2")
    return words.view(np.uint8).reshape(-1, 2).T.tobytes()


def offered(profile: Profile, facts: dict) -> list[dict[str, str]]:
    """The prompts of the page, as the fixed style lays them out."""
    records = {record.id: record for record in corpora.records(profile, "evaluation")}
    listing = prompts.STYLES[prompts.FIXED_STYLE].listing
    found = []
    for prompt in facts["prompts"]:
        record = records[prompt["id"]]
        found.append(prompt | {"query": record.query, "tools": listing(record.tools)})
    return found


def packed(profile: Profile) -> dict:
    """What the engine opens. Raises as `facts_of`, `config_of` and `tokenizer_of` do."""
    facts = facts_of(profile)
    files = measure.weights_of(profile)
    # Saved anew, so that both files have the same header.
    a, base = (save(load_file(files[name])) for name in ("A", "B"))
    parts = {
        "base": base,
        "difference": difference(base, a),
        "directions": (measure.folder_of(profile) / measure.TENSORS).read_bytes(),
        "tokenizer": tokenizer_of(files["A"].parent),
    }
    facts = facts | {"prompts": offered(profile, facts)}
    texts = {
        name: base64.b64encode(gzip.compress(part, 9, mtime=0)).decode()
        for name, part in parts.items()
    }
    return texts | {"facts": facts, "config": config_of(files["A"].parent)}


def pack(profile: Profile, out: Path) -> Path:
    """Write the page into ``out``; returns its ``index.html``."""
    text = f"globalThis.DIAL_DATA = {json.dumps(packed(profile))};\n"
    size = f"{len(text) / 1e6:.1f}"
    store.write_atomically(out / "data.js", text)
    for path in sorted(PAGE.iterdir()):
        content = path.read_text(encoding="utf-8")
        store.write_atomically(out / path.name, content.replace("{megabytes}", size))
    return out / "index.html"
