"""Which parts of a model write a direction into the residual stream, and which read it there.

A :class:`Lens` is a model as TransformerLens sees it, on some prompts; everything is asked and
changed at the last token. What a part *writes* is the projection of its output on a unit direction
(direct attribution: the parts sum to the residual stream, Elhage et al., "A Mathematical Framework
for Transformer Circuits", 2021). What a part *reads* is found by path patching: its input alone is
changed, all others keep theirs (Wang et al., arXiv 2211.00593; Goldowsky-Dill et al., 2304.05969).
"""

import copy
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dfc_lib.data.pair import depth

_BATCH = 64  # prompts that run at once
Rows = Float[Tensor, "prompt d_model"]


class Lens:
    """A model wrapped by TransformerLens, and the prompts that it is asked about.

    Attributes:
        model: the Hugging Face model, left as it is.
        bridge: a ``TransformerBridge`` around a copy of its modules; the weights are not copied.
        ids: prompts as token ids, of any lengths (at least one, else ``ValueError``); they are
            padded on the left, so that all end together.
    """

    def __init__(self, model: Any, tokenizer: Any, ids: Sequence[Sequence[int]]) -> None:
        from transformer_lens.model_bridge import TransformerBridge

        if not ids:
            raise ValueError("ids is empty; there is nothing to run")
        weights = {id(w): w for w in (*model.parameters(), *model.buffers())}
        self.model, self.ids = model, list(ids)
        # It rewires the model that it wraps and sets the tokenizer's special tokens.
        inner, tokenizer = copy.deepcopy(model, weights), copy.deepcopy(tokenizer)
        its = {"device": model.device, "dtype": model.dtype}
        self.bridge = TransformerBridge.boot_transformers(
            model.config.model_type, hf_model=inner, tokenizer=tokenizer, **its
        )

    @torch.no_grad()
    def run(
        self,
        keep: Collection[str] = (),
        add: Mapping[str, Rows] | None = None,
        heads: Mapping[tuple[str, int], Tensor] | None = None,
    ) -> tuple[Float[Tensor, "prompt vocab"], dict[str, Tensor]]:
        """Next-token logits, and what is kept, both at the last token, in float32 on the CPU.

        Args:
            keep: TransformerLens names of the activations wanted.
            add: what is added at the last token, by the name of the hook.
            heads: (prompt, d_head) that takes a head's place there, by the hook's name and head.

        Returns:
            the logits, and by name the activations (prompt, ...).
        """
        logits, kept = [], {name: [] for name in keep}
        left = partial(pad_sequence, batch_first=True, padding_side="left")
        for start in range(0, len(self.ids), _BATCH):
            rows = slice(start, start + _BATCH)
            prompts = [torch.tensor(prompt, device=self.model.device) for prompt in self.ids[rows]]
            tokens, mask = left(prompts), left([torch.ones_like(prompt) for prompt in prompts])
            hooks = [(name, partial(_add, change=x[rows])) for name, x in (add or {}).items()]
            for (name, head), x in (heads or {}).items():
                hooks.append((name, partial(_put, head=head, values=x[rows])))
            with self.bridge.hooks(fwd_hooks=hooks):
                look = {"names_filter": list(keep), "pos_slice": -1, "output_attentions": False}
                out, cache = self.bridge.run_with_cache(tokens, attention_mask=mask, **look)
            logits.append(out[:, -1].float().cpu())
            for name, found in kept.items():
                found.append(cache[name][:, 0].float().cpu())
        return torch.cat(logits), {name: torch.cat(found) for name, found in kept.items()}


def _add(x: Tensor, hook: Any, *, change: Tensor) -> Tensor:
    x = x.clone()
    x[:, -1] += change.to(x)
    return x


def _put(x: Tensor, hook: Any, *, head: int, values: Tensor) -> Tensor:
    x = x.clone()
    x[:, -1, head] = values.to(x)
    return x


def written(lens: Lens, layer: int, direction: Float[Tensor, " d_model"]) -> pd.DataFrame:
    """Projection on a unit direction of what every part up to the site adds to the last token.

    Args:
        layer: the site, after this block; blocks count from 0.
        direction: of any length; its unit vector is taken.

    Returns:
        one line per prompt and one column per part: ``embedding``, ``head {block}.{head}`` and
        ``MLP {block}``. They sum to the residual stream's projection where the attention's output
        has no bias, as in Qwen2.
    """
    u, blocks = (direction / direction.norm()).float().cpu(), range(layer + 1)
    names = [f"blocks.{i}.{part}" for i in blocks for part in ("attn.hook_z", "mlp.hook_out")]
    _, kept = lens.run([*names, "embed.hook_out"])
    parts = {"embedding": kept["embed.hook_out"] @ u}
    for i in blocks:
        z = kept[f"blocks.{i}.attn.hook_z"]  # (prompt, head, d_head)
        out = lens.model.model.layers[i].self_attn.o_proj.weight.float().cpu()
        by_head = torch.einsum("phe,he->ph", z, (u @ out).view(z.shape[1:]))
        parts |= {f"head {i}.{h}": by_head[:, h] for h in range(z.shape[1])}
        parts[f"MLP {i}"] = kept[f"blocks.{i}.mlp.hook_out"] @ u
    return pd.DataFrame({name: values.numpy() for name, values in parts.items()})


def read(lens: Lens, layer: int, change: Rows) -> dict[str, Float[Tensor, "prompt vocab"]]:
    """Next-token logits where one reader alone sees the last token's residual stream changed.

    Args:
        layer: the site, after this block.
        change: what is added to the residual stream there.

    Returns:
        by reader: ``all`` (the stream itself is changed), ``head {block}.{head}`` (its query, and
        its key and value at the last token), ``MLP {block}`` of the later blocks, and
        ``unembedding`` (the direct path, through the final norm).
    """
    found = {"all": lens.run(add={f"blocks.{layer}.hook_out": change})[0]}
    for i in range(layer + 1, depth(lens.model)):
        name = f"blocks.{i}.attn.hook_z"
        z = lens.run([name], {f"blocks.{i}.ln1.hook_in": change})[1][name]
        for h in range(z.shape[1]):
            found[f"head {i}.{h}"] = lens.run(heads={(name, h): z[:, h]})[0]
        found[f"MLP {i}"] = lens.run(add={f"blocks.{i}.ln2.hook_in": change})[0]
    return found | {"unembedding": lens.run(add={"ln_final.hook_in": change})[0]}
