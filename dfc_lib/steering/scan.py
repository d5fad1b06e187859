"""The site scan: where patching one model with the other's residual moves whether it acts.

Before anything is steered, it has to be known that something *can* move there: for every layer, at
the last prompt token or at every position, the tuned model's residual is written into the base
(``A->B``) and the base's into the tuned model (``B->A``). This is the ceiling of every intervention
at that site, and its positive control.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dfc_lib.data import prompts
from dfc_lib.data.pair import Pair, depth
from dfc_lib.data.prompts import Record
from dfc_lib.data.scoring import lenient
from dfc_lib.steering import generation
from dfc_lib.steering.evaluation import end_tokens
from dfc_lib.steering.interventions import Clean, Intervention, OtherModel

if TYPE_CHECKING:
    import pandas as pd

DIRECTIONS = {"A->B": "B", "B->A": "A"}  # whose residual replaces whose -> the model acted on


def scan(
    tuned: Mapping[str, Any],
    base: Any,
    tokenizer: Any,
    records: Sequence[Record],
    *,
    styles: Mapping[str, str],
    openers: Sequence[int],
    positions: Sequence[generation.Position] = ("last", "every"),
    layers: Sequence[int] | None = None,
    max_new_tokens: int = 80,
    batch_size: int = 512,
    out_dir: str | Path | None = None,
) -> "pd.DataFrame":
    """Patch every tuned model and the base with each other, layer by layer.

    Args:
        tuned: models by name, each of which is an A beside the base.
        records: prompts whose gold is a call.
        styles: prompt styles by the name that they get in the result.
        openers: token ids that open an acting turn.
        layers: blocks counted from 0; default: all.
        out_dir: as in ``generation.generate``.

    Returns:
        one line per (model, style, direction, layer, position, prompt): ``propensity``, the
        probability of an opener at the first generated token, and ``lenient``, whether the greedy
        answer calls a listed tool; and both of the same model left alone, ``clean_propensity`` and
        ``clean_lenient``.
    """
    import pandas as pd

    layers = range(depth(base)) if layers is None else layers
    parts = []

    def ask(pair: Pair, target: str, style: str, cell: Intervention, position: str) -> pd.DataFrame:
        texts = [prompts.chat_text(tokenizer, record, style) for record in records]
        made = generation.generate(
            pair,
            target,
            prompts.encode(tokenizer, texts),
            {"cell": cell},
            position=position,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            eos=end_tokens(pair.models[target], tokenizer),
            readout=openers,
            out_dir=out_dir,
            progress=False,
        )
        called = [
            lenient(tokenizer.decode(tokens), record.tool_names).tool_correctness
            for tokens, record in zip(made.tokens, records, strict=True)
        ]
        propensity = np.exp(np.stack(made.first_logprobs)).sum(1)
        return pd.DataFrame(
            {"prompt": made.prompt, "propensity": propensity, "lenient": np.array(called)}
        )

    with torch.no_grad():
        for name, model in tuned.items():
            for style_name, style in styles.items():
                for direction, target in DIRECTIONS.items():
                    models = {"A": model, "B": base}
                    alone = ask(Pair(models, tokenizer, 0), target, style, Clean(), "last")
                    alone = alone.drop(columns="prompt").add_prefix("clean_")
                    for layer in layers:
                        pair = Pair(models, tokenizer, layer)
                        for position in positions:
                            patch = OtherModel(1 - pair.index(target))
                            found = ask(pair, target, style, patch, position).join(alone)
                            where = {"model": name, "style": style_name, "direction": direction}
                            where |= {"layer": layer, "position": position}
                            parts.append(found.assign(**where))
    return pd.concat(parts, ignore_index=True)
