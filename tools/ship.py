"""``make crosscoder``: puts one crosscoder of the embedded pair into ``data/crosscoder``.

So that the quickstart can show a feature at work in a minute, without caches and without training.
Which one is a rule, shown in notebook 02 with the numbers behind it: of the profile's seeds of one
recipe the crosscoder with the feature, in whichever block, whose ablation lowers A's propensity
most on the selection prompts. Notebook 02 also compares the weights with those that it trains.

The folder is one for the Hugging Face hub: weights, configuration, and a card (``ship.md.j2``).
Audit a crosscoder before you publish it (``make audit``): it can hand the stronger model's skill to
the weaker one.

Needs the caches of notebook 01 (``make figures NB=01``); crosscoders that the build folder lacks
are trained.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import pandas as pd
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME

from dfc_lib import profiles, provenance
from dfc_lib.crosscoder.fidelity import fidelity
from dfc_lib.crosscoder.model import ARCHITECTURE, Crosscoder
from dfc_lib.profiles import Profile
from dfc_lib.reading import switches
from dfc_lib.store import sha256
from dfc_lib.study import Study
from tools import fill
from tools.make_pair.card import write_checksums

CARD = "README.md"


def weights_of(profile: Profile) -> dict[str, Path]:
    """The weight files of A and B of an embedded pair."""
    models = {"A": profile.model_a, "B": profile.model_b}
    return {name: profile.location(model) / "model.safetensors" for name, model in models.items()}


def checksums(profile: Profile) -> dict[str, str]:
    """SHA-256 of both weight files: what was measured belongs to these."""
    return {name: sha256(path) for name, path in weights_of(profile).items()}


def choose(study: Study) -> tuple[Crosscoder, pd.Series]:
    """The crosscoder that the rule gives, and the line of its feature in ``switches.ablations``.

    Raises:
        FileNotFoundError: notebook 01 has not run at this profile.
        ValueError: no feature that writes to A is live on tool prompts.
    """
    found = study.crosscoders([switches.RECIPE], range(study.profile.many_seeds))
    crosscoders = {seed: crosscoder for (_, seed), crosscoder in found.items()}
    table = switches.ablations(study, crosscoders)
    if table.empty:
        raise ValueError(f"no feature of {len(crosscoders)} crosscoders that writes to A is live")
    best = table.iloc[0]
    print(f"{switches.RECIPE}, seed {best.seed}, feature {best.feature} ({best.block}):", end=" ")
    print(f"its ablation takes A's propensity from {best.clean:.3f} to {best.ablated:.3f}")
    return crosscoders[best.seed], best


def ship(study: Study, folder: Path) -> Path:
    """Write the crosscoder into ``folder``, whole, and ``SHA256SUMS`` beside it.

    What is needed to use it is in its configuration: ``cfg.metadata`` has its ``recipe``, ``seed``
    and ``feature`` with its ``block``, the ``layer``, the folders of both ``models`` and the
    SHA-256 of their ``weights``.

    Raises:
        FileExistsError: the folder holds something else.
        FileNotFoundError, ValueError: as :func:`choose`.
    """
    profile = study.profile
    crosscoder, best = choose(study)
    models = {"A": f"{profile.pair}/{profile.model_a}", "B": f"{profile.pair}/{profile.model_b}"}
    metadata = crosscoder.cfg.metadata
    metadata.recipe, metadata.seed = switches.RECIPE, int(best.seed)
    metadata.feature, metadata.block = int(best.feature), best.block
    metadata.layer, metadata.models, metadata.weights = profile.layer, models, checksums(profile)
    job = study.recipes[switches.RECIPE].job(metadata.seed)
    names = crosscoder.partition.model_names
    card = fill(
        Path(__file__).with_suffix(".md.j2"),
        name=folder.name,
        architecture=ARCHITECTURE,
        crosscoder=crosscoder,
        models=models,
        writers={b.name: [names[m] for m in b.models] for b in crosscoder.partition.blocks},
        layer=profile.layer,
        fidelity=fidelity(crosscoder, study.cache("ranking_last").to_tensor()),
        job=job,
        code_hash=provenance.code_hash("dfc_lib.crosscoder.training"),
        config=json.dumps(job.config.to_dict(), indent=1),
    )
    write(crosscoder, folder, card)
    write_checksums(folder.parent)
    return folder


def write(crosscoder: Crosscoder, folder: Path, card: str) -> None:
    """Write weights, configuration and card, in place of what was written before.

    Raises:
        FileExistsError: the folder holds something else, which would be lost.
    """
    found = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if found and found != {SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, CARD}:
        raise FileExistsError(
            f"{folder} holds {', '.join(sorted(found)[:3])}, not a crosscoder that was shipped "
            "there before; name a new folder, or empty this one"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Made beside it and renamed: a folder half written is never seen.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as place:
        made = crosscoder.save(Path(place) / "made")
        (made / CARD).write_text(card, encoding="utf-8")
        if folder.exists():
            os.replace(folder, Path(place) / "old")
        os.replace(made, folder)


def main() -> int:
    """The command line; returns the exit status."""
    try:
        ship(Study(profiles.get("toy")), switches.SHIPPED)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
