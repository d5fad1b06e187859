"""What writes and reads a direction: parts sum to the stream, and plain hooks say the same."""

import numpy as np
import pytest
import torch

from dfc_lib.data.activations import residual
from dfc_lib.data.pair import fingerprint
from dfc_lib.reading import circuit
from tests.test_pair import qwen, word_tokenizer

LAYER = 1
IDS = [[3, 9, 27, 41, 5, 6], [8, 4, 33], [50, 51, 52, 53, 10, 12, 13, 14], [7, 20, 21, 22]]


@pytest.fixture(scope="module")
def model():
    return qwen().requires_grad_(False)


@pytest.fixture(scope="module")
def lens(model):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(circuit, "_BATCH", 3)  # one batch is not full
        yield circuit.Lens(model, word_tokenizer(), IDS)


@pytest.fixture(scope="module")
def change():
    return torch.randn(len(IDS), 32, generator=torch.Generator().manual_seed(3))


def hooked(model, module, make) -> torch.Tensor:
    """Last-token logits, prompt by prompt, with a plain hook from ``make(prompt index)``."""
    rows = []
    for i, prompt in enumerate(IDS):
        kind, hook = make(i)
        with getattr(module, f"register_forward_{kind}")(hook):
            rows.append(model(torch.tensor([prompt])).logits[0, -1])
    return torch.stack(rows)


def pre(change):
    """A hook that adds to the last token of a module's input."""

    def make(i):
        def hook(_module, args):
            x = args[0].clone()
            x[:, -1] += change[i]
            return (x, *args[1:])

        return "pre_hook", hook

    return make


def test_the_wrapped_model_gives_the_same_logits_and_the_original_is_left_alone(model, lens):
    """Prompts of several lengths in one batch, against the model one prompt at a time."""
    before = fingerprint(model)
    want = torch.stack([model(torch.tensor([p])).logits[0, -1] for p in IDS])
    torch.testing.assert_close(lens.run()[0], want, rtol=0, atol=1e-4)
    assert fingerprint(model) == before
    assert type(model.model.layers[0]).__module__.startswith("transformers")
    weights = {w.data_ptr() for w in model.parameters()}
    assert weights <= {w.data_ptr() for w in lens.bridge.original_model.parameters()}


def test_contributions_sum_to_the_residual_stream(model, lens):
    direction = torch.randn(32, generator=torch.Generator().manual_seed(1))
    parts = circuit.written(lens, LAYER, direction)
    assert parts.shape == (len(IDS), 1 + 2 * (4 + 1))
    h = torch.stack([residual(model, LAYER, torch.tensor([p]))[0, -1] for p in IDS])
    np.testing.assert_allclose(parts.sum(axis=1), h @ direction / direction.norm(), atol=1e-4)


def test_a_heads_contribution_is_what_plain_hooks_say(model, lens):
    direction = torch.nn.functional.one_hot(torch.tensor(5), 32).float()
    out = model.model.layers[1].self_attn.o_proj
    seen = []
    with out.register_forward_pre_hook(lambda _module, args: seen.append(args[0][0, -1])):
        for prompt in IDS:
            model(torch.tensor([prompt]))
    want = torch.stack(seen)[:, 16:24] @ out.weight[5, 16:24]  # head 2 of four, eight wide
    parts = circuit.written(lens, LAYER, 3 * direction)
    np.testing.assert_allclose(parts["head 1.2"], want, atol=1e-5)


def test_readers_are_what_plain_hooks_say(model, lens, change):
    found = circuit.read(lens, LAYER, change)
    assert list(found) == ["all", *(f"head 2.{h}" for h in range(4)), "MLP 2", "unembedding"]
    block = model.model.layers[2]
    plain = {
        "all": hooked(model, block, pre(change)),
        "MLP 2": hooked(model, block.post_attention_layernorm, pre(change)),
        "unembedding": hooked(model, model.model.norm, pre(change)),
    }
    for name, want in plain.items():
        torch.testing.assert_close(found[name], want, rtol=0, atol=1e-4)
        assert (want - lens.run()[0]).abs().max() > 0.01


def test_a_head_alone_sees_the_change(model, lens, change):
    """Its output is the one it has where the whole attention sees it; the others keep theirs."""
    block, h = model.model.layers[2], 3
    z = {}

    def record(i):
        def hook(_module, args):
            z[i] = args[0][0, -1].clone()

        return hook

    for i in range(len(IDS)):
        with (
            block.self_attn.o_proj.register_forward_pre_hook(record(i)),
            block.input_layernorm.register_forward_pre_hook(pre(change)(i)[1]),
        ):
            model(torch.tensor([IDS[i]]))

    def put(i):
        def hook(_module, args):
            x = args[0].clone()
            x[0, -1, 8 * h : 8 * h + 8] = z[i][8 * h : 8 * h + 8]
            return (x,)

        return "pre_hook", hook

    want = hooked(model, block.self_attn.o_proj, put)
    found = circuit.read(lens, LAYER, change)[f"head 2.{h}"]
    torch.testing.assert_close(found, want, rtol=0, atol=1e-4)


def test_no_change_changes_nothing(lens):
    still = circuit.read(lens, LAYER, torch.zeros(len(IDS), 32))
    for logits in still.values():
        torch.testing.assert_close(logits, lens.run()[0], rtol=0, atol=1e-5)


def test_no_prompts_are_refused(model):
    with pytest.raises(ValueError, match="ids is empty"):
        circuit.Lens(model, word_tokenizer(), [])
