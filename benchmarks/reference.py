"""The plain loop that the engine is held against, by the benchmark and by the tests."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import DynamicCache

from dfc_lib.data.activations import residual
from dfc_lib.data.pair import Pair
from dfc_lib.steering.interventions import Intervention, apply


@torch.no_grad()
def generate_reference(
    pair: Pair,
    target: str,
    prompt: Sequence[int],
    intervention: Intervention,
    *,
    position: str = "last",
    max_new_tokens: int = 128,
    eos: Sequence[int] = (),
    hidden: Float[Tensor, "token model d_model"] | None = None,
) -> tuple[list[int], Float[Tensor, " vocab"]]:
    """One prompt, one intervention, one token at a time: what ``generation.generate`` must equal.

    Hugging Face's own forward pass and KV cache, with a forward hook on block ``pair.layer``; the
    other models are run up to the site on the tokens so far. ``hidden`` spares that for the
    prompt, where it is known (only with ``position="last"``). Returns the tokens without the end
    token, and the logits of the first one.
    """
    t, models = pair.index(target), list(pair.models.values())
    model, device = models[t], next(models[t].parameters()).device
    past = DynamicCache(config=model.config)
    text, tokens, first = list(prompt), [], None

    def hook(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        start = len(text) - output.shape[1]  # position of the first token in this call
        if position == "last":
            start = len(text) - 1
        elif position == "every_but_first":
            start = max(start, 1)
        n = len(text) - start
        if n == 0:
            return output
        if hidden is not None:
            h = hidden[-n:]
        else:
            ids = torch.tensor([text], device=device)
            h = torch.stack(
                [
                    output[0, -n:] if m == t else residual(other, pair.layer, ids)[0, -n:]
                    for m, other in enumerate(models)
                    if m == t or intervention.reads_others
                ],
                1,
            )
        alone = not intervention.reads_others and hidden is None
        h = h.expand(-1, len(models), -1) if alone else h
        output[0, -n:] = apply(intervention, h, t)[0].to(output.dtype)
        return output

    handle = model.model.layers[pair.layer].register_forward_hook(hook)
    try:
        ids = torch.tensor([text], device=device)
        while len(tokens) < max_new_tokens:
            logits = model(ids, past_key_values=past, use_cache=True, logits_to_keep=1).logits[
                0, -1
            ]
            first = logits.float() if first is None else first
            if position == "last":
                handle.remove()
            token = int(logits.argmax())
            if token in eos:
                break
            tokens.append(token)
            text.append(token)
            ids = torch.tensor([[token]], device=device)
    finally:
        handle.remove()
    return tokens, first
