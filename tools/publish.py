"""A crosscoder as a folder for the Hugging Face hub: weights, configuration, and a card.

>>> made = Provenance(
...     models={"A": "you/tuned", "B": "you/base"},
...     site="residual stream after block 13, last prompt token",
...     config=job.config.to_dict(),
...     data_key=job.data_key,
...     code_hash=provenance.code_hash("dfc_lib.crosscoder.training"),
... )
>>> publish(dfc, "release", fidelity=fidelity(dfc, held_out), audit=report, provenance=made)

Audit it first (``make audit``): a crosscoder can hand the stronger model's skill to the weaker one.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME

from dfc_lib.crosscoder.model import ARCHITECTURE, Crosscoder

if TYPE_CHECKING:
    import pandas as pd

CARD = "README.md"
AUDIT_FILES = "audit.png", "audit.csv"  # beside the audit's report; the card shows them


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a crosscoder comes from.

    Attributes:
        models: the hub names of the models, by the crosscoder's own names, in its order.
        site: what was read, in words: stream, layer, tokens.
        config: everything that decided the weights, as ``TrainConfig.to_dict()``.
        data_key: names the activations, see ``training.Job``.
        code_hash: names the code, see ``provenance.code_hash``.
        license: of the weights, as the hub abbreviates it.
    """

    models: Mapping[str, str]
    site: str
    config: Mapping[str, Any]
    data_key: str
    code_hash: str
    license: str = "mit"


def publish(
    crosscoder: Crosscoder,
    folder: str | Path,
    *,
    fidelity: "pd.DataFrame",
    audit: str | Path | None = None,
    provenance: Provenance,
) -> Path:
    """Write the folder whole, in place of one that was written before.

    Args:
        fidelity: the table of :func:`dfc_lib.crosscoder.fidelity.fidelity`, on held-out data.
        audit: the audit's ``report.md``; its verdict and table go into the card.

    Returns:
        The folder: ``cfg.json``, ``sae_weights.safetensors`` and ``README.md``, and the audit's
        picture and table if there is one.

    Raises:
        FileExistsError: the folder holds something else, which would be lost.
        FileNotFoundError: there is no such report.
        ValueError: the names of the models are not the crosscoder's.
    """
    folder = Path(folder).resolve()
    names = list(crosscoder.partition.model_names)
    if list(provenance.models) != names:
        raise ValueError(f"provenance.models names {list(provenance.models)}, not {names}")
    _refuse_others(folder)
    report = Path(audit).read_text(encoding="utf-8") if audit else ""
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Made beside it and renamed: a folder half written is never seen.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as place:
        made, old = Path(place) / "made", Path(place) / "old"
        crosscoder.save(made)
        text = card(crosscoder, folder.name, fidelity, report, provenance)
        (made / CARD).write_text(text, encoding="utf-8")
        for name in AUDIT_FILES if audit else ():
            shutil.copyfile(Path(audit).with_name(name), made / name)
        if folder.exists():
            os.replace(folder, old)
        os.replace(made, folder)
    return folder


def _refuse_others(folder: Path) -> None:
    found = {path.name for path in folder.iterdir()} if folder.exists() else set()
    own = {SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, CARD, *AUDIT_FILES}
    if found and not ({SAE_CFG_FILENAME, CARD} <= found <= own):
        raise FileExistsError(
            f"{folder} holds {', '.join(sorted(found)[:3])}, not a crosscoder that was published "
            "there before; name a new folder, or empty this one"
        )


def card(
    crosscoder: Crosscoder, name: str, fidelity: "pd.DataFrame", report: str, made: Provenance
) -> str:
    """The model card: what it is, how faithful, how trained, what an audit found, how to load."""
    from huggingface_hub import ModelCardData

    models = ", ".join(f"{model}: `{hub}`" for model, hub in made.models.items())
    partition = {block.name: block for block in crosscoder.partition.blocks}
    about = ModelCardData(
        license=made.license,
        library_name="sae_lens",
        tags=["crosscoder", "model-diffing", "interpretability", ARCHITECTURE],
        base_model=list(made.models.values()),
    )
    fve = fidelity[fidelity.scope == "model"]
    blocks = fidelity[fidelity.scope == "block"]
    scale = "none, raw activations" if crosscoder.normaliser.is_identity else "in the checkpoint"
    lines = [
        f"---\n{about.to_yaml()}\n---\n",
        f"# {name}\n",
        f"A crosscoder: one sparse dictionary of {crosscoder.d_dict:,} features over several "
        f"models, of which {crosscoder.cfg.k} are active per sample. A feature of an exclusive "
        "block reads and writes one model only; its other weights are exactly 0.\n",
        f"- Models, in this order: {models}",
        f"- Site: {made.site}; width {crosscoder.d_model}",
        f"- Normaliser: {scale}\n",
        "## Fidelity, on held-out data\n",
        "| model | variance explained |\n|---|---|",
        *(f"| {row.name} | {row.fve:.4f} |" for row in fve.itertuples(index=False)),
        "\n| block | models | features | active per sample | never fire |\n|---|---|---|---|---|",
    ]
    for row in blocks.itertuples(index=False):
        of = ", ".join(crosscoder.partition.model_names[m] for m in partition[row.name].models)
        numbers = f"{row.n_features:.0f} | {row.l0:.2f} | {row.dead_share:.1%}"
        lines.append(f"| {row.name} | {of} | {numbers} |")
    lines += [
        "\n## Training\n",
        f"- Data key: `{made.data_key}`\n- Code: `{made.code_hash}`\n",
        f"```json\n{json.dumps(made.config, indent=1)}\n```\n",
        "## Release audit\n",
        report.partition("\n")[2].strip() if report else "It was not audited.",
        "\n## Use\n",
        "```python\nfrom dfc_lib.crosscoder.checkpoint import load, locate\n",
        f'crosscoder = load(locate("owner/{name}").folder)  # or a folder',
        f"f = crosscoder.encode(x)  # x: raw, (batch, {crosscoder.n_models}, {crosscoder.d_model})",
        "x_hat = crosscoder.decode(f)  # raw again\n```\n",
    ]
    return "\n".join(lines)
