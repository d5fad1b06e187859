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
from tools import ship
from tools.dial import measure

PAGE = Path(__file__).with_name("page")


def facts_of() -> dict:
    """What ``measure`` found.

    Raises:
        ValueError: it was measured with other models than those that are here.
    """
    path = measure.DATA / measure.FACTS
    facts = json.loads(path.read_text(encoding="utf-8"))
    if facts["weights"] != ship.checksums(measure.PROFILE):
        raise ValueError(
            f"{path} was measured with other models; run `python -m tools.dial --measure`"
        )
    return facts


def difference(base: bytes, other: bytes) -> bytes:
    """``other`` minus ``base`` in 16-bit words that wrap around: all low bytes, then all high ones.

    After a short training most weights moved by a few units in the last place, so the high bytes
    are nearly all equal and compress to nothing.
    """
    words = np.frombuffer(other, "<u2") - np.frombuffer(base, "<u2")
    return words.view(np.uint8).reshape(-1, 2).T.tobytes()


def offered(facts: dict) -> list[dict[str, str]]:
    """The prompts of the page, as the fixed style lays them out."""
    records = {record.id: record for record in corpora.records(measure.PROFILE, "evaluation")}
    listing = prompts.STYLES[prompts.FIXED_STYLE].listing
    found = []
    for prompt in facts["prompts"]:
        record = records[prompt["id"]]
        found.append(prompt | {"query": record.query, "tools": listing(record.tools)})
    return found


def packed() -> dict:
    """What the engine opens. Raises as `facts_of` does."""
    facts = facts_of()
    files = ship.weights_of(measure.PROFILE)
    # Saved anew, so that both files have the same header.
    a, base = (save(load_file(files[name])) for name in ("A", "B"))
    parts = {
        "base": base,
        "difference": difference(base, a),
        "directions": (measure.DATA / measure.TENSORS).read_bytes(),
        "tokenizer": files["A"].with_name("tokenizer.json").read_bytes(),
    }
    facts = facts | {"prompts": offered(facts)}
    config = json.loads(files["A"].with_name("config.json").read_text(encoding="utf-8"))
    texts = {
        name: base64.b64encode(gzip.compress(part, 9, mtime=0)).decode()
        for name, part in parts.items()
    }
    return texts | {"facts": facts, "config": config}


def pack(out: Path) -> Path:
    """Write the page into ``out``; returns its ``index.html``."""
    text = f"globalThis.DIAL_DATA = {json.dumps(packed())};\n"
    size = f"{len(text) / 1e6:.1f}"
    store.write_atomically(out / "data.js", text)
    for path in sorted(PAGE.iterdir()):
        content = path.read_text(encoding="utf-8")
        store.write_atomically(out / path.name, content.replace("{megabytes}", size))
    return out / "index.html"
