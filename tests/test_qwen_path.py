"""The path of the hub pair, at tiny sizes: Qwen2.5's architecture and tokenizer, ToolRL, FineWeb.

The stand-ins have what differs from the embedded pair: bfloat16, more embedding rows than tokens, a
base whose configuration names another end token than the chat template's, tags of several tokens,
tool texts of the data's own, prompts without a known kind.
"""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from dfc_lib import paths, profiles
from dfc_lib.crosscoder.recipes import Recipe
from dfc_lib.data import activations, corpora, pair, prompts
from dfc_lib.data.pair import PairError, load_model, load_pair
from dfc_lib.reading import ranking
from dfc_lib.steering import evaluation
from dfc_lib.steering.interventions import Clean, Codec, Steer
from dfc_lib.study import Study
from tests.test_corpora import fineweb_rows, toolrl_rows, write
from tools import budget

LAYER, WIDTH, ROWS = 1, 64, 512  # ROWS: of the embedding, more than there are tokens
TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer_like_qwen() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=460, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    row = toolrl_rows(1)[0]
    bpe.train_from_iterator([row["instruction"], row["input"], fineweb_rows(2)[1]["text"]], trainer)
    tags = ("<tool_call>", "</tool_call>")  # as in Qwen2.5: single tokens, but not special
    bpe.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def model_like_qwen(seed: int, width: int = WIDTH) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=ROWS,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=2_048,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return Qwen2ForCausalLM(config).to(torch.bfloat16).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Downloads by hand: three models, and the two data sets, in the folders that are looked at."""
    root = tmp_path_factory.mktemp("qwen")
    names = ("Qwen2.5-3B", "ToolRL-Qwen2.5-3B", "Qwen2.5-3B-Instruct")
    for seed, name in enumerate(names):
        model_like_qwen(seed).save_pretrained(root / "downloads" / name)
        tokenizer_like_qwen().save_pretrained(root / "downloads" / name)
    write(root / "downloads" / "ToolRL" / "rlla_rl.json", toolrl_rows(80))
    write(root / "downloads" / "fineweb" / "sample" / "000.parquet", fineweb_rows(400))
    return root


@pytest.fixture
def profile(folder, tmp_path, monkeypatch):
    """The profile ``qwen`` itself, with tiny budgets; hub names are found among the downloads."""
    monkeypatch.setattr(paths, "DOWNLOADS", folder / "downloads")
    monkeypatch.setenv("DFC_BUILD", str(tmp_path / "build"))
    return replace(
        profiles.get("qwen"),
        layer=LAYER,
        n_crosscoder_texts=40,
        n_all_token_texts=8,
        n_neutral_texts=12,
        n_ranking=12,
        n_steering=3,
        dict_size=128,
        k=8,
        steps=30,
        batch_size=64,
        learning_rate=1e-3,
        batch_generation=8,
        max_new_tokens=12,
        device="cpu",
    )


def the_pair(profile):
    sources = {"A": profile.location(profile.model_a), "B": profile.location(profile.model_b)}
    return load_pair(sources, profile.layer, dtype=profile.dtype, device=profile.device)


def test_from_two_models_to_a_grid(profile):
    """Load, cache, lint, train, rank, steer: what the notebooks do, by one profile."""
    both = the_pair(profile)
    assert {p.dtype for m in both.models.values() for p in m.parameters()} == {torch.bfloat16}
    texts, sources = [], []
    for split in ("crosscoder", "ranking"):
        records = corpora.records(profile, split)[: profile.n_crosscoder_texts]
        neutral = corpora.neutral(profile, split)[: len(records)]
        texts += [prompts.chat_text(both.tokenizer, r, prompts.FIXED_STYLE) for r in records]
        texts += neutral
        sources += [(split, "tool")] * len(records) + [(split, "neutral")] * len(neutral)
    ids = prompts.encode(both.tokenizer, texts)
    meta = {"split": [s for s, _ in sources], "source": [s for _, s in sources]}
    build = partial(paths.build, profile.name, "activations")
    last = activations.cache(both, ids, build("train_last"), batch_size=8, meta=meta)
    some = [i for i, (_, source) in enumerate(sources) if i % 7 == 0]
    meta_some = {name: [values[i] for i in some] for name, values in meta.items()}
    activations.cache(both, [ids[i] for i in some], build("train_all"), "all", 8, meta=meta_some)

    assert last.directory.joinpath("A-00000.safetensors").stat().st_size < 2 * last.n * WIDTH + 999
    lint = activations.lint(last, both).set_index("check").passed
    assert lint[["last token", "token ids", "from scratch", "non-finite", "split overlap"]].all()
    with torch.no_grad():
        hidden = both.models["B"](torch.tensor([ids[5]]), output_hidden_states=True).hidden_states
    want = hidden[LAYER + 1][0, -1].float()
    assert (last.gather([5])[0, 1] - want).norm() < 0.05 * want.norm()

    tied = Recipe(profile, vectors="last", tie_shared=True)
    named = {"last tied": tied, "all untied": Recipe(profile)}
    crosscoders = Study(profile).crosscoders(named, seeds=[0], progress=False)
    crosscoder = crosscoders["last tied", 0]
    assert crosscoders["all untied", 0].d_model == WIDTH
    loss = tied.metrics(seed=0)
    assert loss.mse.iloc[-1] < loss.mse.iloc[0]

    f = crosscoder.encode(last.to_tensor())
    table = ranking.discriminability(f[last.where(source="tool")], f[last.where(source="neutral")])
    ranked = ranking.rank_within_blocks(table, crosscoder.partition.slices)
    order = ranked[ranked.block == "A_exclusive"].sort_values("rank").feature.tolist()

    records = corpora.records(profile, "evaluation")
    records = [r for r in records if r.kind == "call" and not r.held_out][: profile.n_steering]
    codec = Codec(crosscoder)
    grid = {(n, a): Steer(codec, tuple(order[:n]), a) for n in (1, 3) for a in (1.0, 32.0)}
    cells = {(0, 0.0): Clean()} | grid
    limits = {"max_new_tokens": profile.max_new_tokens, "batch_size": 8}
    levels = ("features", "alpha")
    got = evaluation.intervene(both, "A", records, cells, levels=levels, **limits)
    assert len(got) == len(records) * (1 + len(grid))
    wide = got.pivot(index="prompt", columns=["features", "alpha"], values="margin")
    clean = wide[0, 0.0]
    assert (clean - wide[1, 1.0]).abs().max() < 0.2  # a no-op, up to rounding to 8 bits
    plain = evaluation.evaluate(
        both.models["A"], both.tokenizer, records, prompts.FIXED_STYLE, **limits
    )
    assert plain.margin.tolist() == pytest.approx(clean.tolist(), abs=0.2)
    assert got[["lenient", "strict", "format"]].notna().all(axis=None)


def test_an_answer_ends_where_the_chat_template_closes_the_turn(profile):
    """Qwen2.5's base names <|endoftext|> alone; it would go on with a next turn."""
    both = the_pair(profile)
    ends = evaluation.end_tokens(both.models["B"], both.tokenizer)
    assert both.tokenizer.convert_ids_to_tokens(ends) == ["<|endoftext|>", "<|im_end|>"]
    embedded = profiles.get("smoke")
    source = embedded.location("base")
    tokenizer = pair.load_tokenizer(source)
    assert evaluation.end_tokens(load_model(source), tokenizer) == [tokenizer.eos_token_id]
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    assert evaluation.end_tokens(load_model(source), tokenizer) == [tokenizer.eos_token_id]


def test_openers_of_several_tokens(profile):
    """<think> is no token of Qwen2.5's: the margin is read at its first piece."""
    tokenizer = the_pair(profile).tokenizer
    openers = tokenizer.convert_ids_to_tokens(evaluation.opener_ids(tokenizer))
    assert "<tool_call>" in openers
    assert len(tokenizer("<think>", add_special_tokens=False)["input_ids"]) > 1


def test_all_layers_at_once(profile):
    """Two passes instead of 36 for the divergence over layers, and the same bits."""
    model = the_pair(profile).models["A"]
    ids = torch.arange(3, 40)[None]
    found = activations.last_token_by_layer(model, ids)
    each = [activations.residual(model, layer, ids)[:, -1] for layer in range(4)]
    assert torch.equal(found, torch.stack(each))


def test_a_third_model(profile):
    """ToolRL starts from the Instruct model: it must fit beside the pair, in one cache."""
    family = {name: profile.location(model) for name, model in profile.family.items()}
    assert list(family) == ["base", "Instruct", "A"]
    three = load_pair(family, LAYER, dtype=profile.dtype)
    assert three.names == ("base", "Instruct", "A")
    assert profile.checkpoints("rl") == {0: family["base"]}
    assert profile.log("rl") == []


# ---------------------------------------------------------------------------------------------
# What can go wrong


def test_no_network(tmp_path, monkeypatch):
    """Offline with nothing downloaded: the error gives the command, and the folder it looks in."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(paths, "DOWNLOADS", tmp_path / "downloads")
    qwen = profiles.get("qwen")
    for load in (load_model, pair.load_tokenizer):
        with pytest.raises(
            PairError, match=r"hf download Qwen/Qwen2\.5-3B --local-dir downloads/Q"
        ):
            load(qwen.location(qwen.model_b))


def test_other_width(folder, profile, tmp_path):
    model_like_qwen(0, width=32).save_pretrained(tmp_path / "narrow")
    sources = {"A": folder / "downloads" / "Qwen2.5-3B", "B": tmp_path / "narrow"}
    with pytest.raises(PairError, match=r"width \(hidden_size\) \(A: 64, B: 32\).*one family"):
        load_pair(sources, LAYER)


def test_no_such_device(profile, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(PairError, match=r"device 'cuda': .*TORCH_INDEX.*\"device\": \"cpu\""):
        load_model(profile.location(profile.model_b), device="cuda")


def test_weights_too_large_for_the_device(profile, monkeypatch):
    """Not the hub's fault, which the message must not blame."""

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 594.00 MiB.")

    monkeypatch.setattr(Qwen2ForCausalLM, "to", full)
    with pytest.raises(PairError, match=r"does not fit into the memory of cpu.*tools\.budget"):
        load_model(profile.location(profile.model_b))


def test_out_of_memory_in_caching(profile, tmp_path, monkeypatch):
    """Halve the batch and go on; with one sequence left, say what helps."""
    both, plain = the_pair(profile), activations.residual
    ids = [list(range(3, 20))] * 8

    def small(model, layer, batch, mask=None):
        if len(batch) > small.limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(model, layer, batch, mask)

    monkeypatch.setattr(activations, "residual", small)
    small.limit = 2
    with pytest.warns(UserWarning, match="going on with batch_size=2"):
        got = activations.cache(both, ids, tmp_path / "a", batch_size=8, progress=False)
    assert got.n == 8
    small.limit = 0
    with (
        pytest.warns(UserWarning, match="out of memory"),
        pytest.raises(PairError, match=r"one row at a time.*bfloat16"),
    ):
        activations.cache(both, ids, tmp_path / "b", batch_size=8, progress=False)


def test_missing_files_are_named(folder, profile, tmp_path):
    (tmp_path / "empty").mkdir()
    for name, message in {"empty": "no config.json", "x": "no such model folder"}.items():
        with pytest.raises(PairError, match=message):
            load_model(tmp_path / name)


# ---------------------------------------------------------------------------------------------
# Profile files: a pair of one's own


def test_a_profile_file(folder, tmp_path):
    """Paths beside the file; what belongs to the other pair goes; its name is the file's."""
    (tmp_path / "tuned").mkdir()
    rows = write(tmp_path / "rows.jsonl", toolrl_rows(3))
    path = tmp_path / "mine.json"
    settings = {"like": "toy", "model_a": "tuned", "model_b": "Qwen/Qwen2.5-3B", "seeds": [0]}
    settings |= {"records": "rows.jsonl", "learning_rate": 1, "others": {"third": "tuned"}}
    path.write_text(json.dumps(settings))
    mine = profiles.get(str(path))
    assert (mine.name, mine.published, mine.pair) == ("mine", False, None)
    assert mine.location(mine.model_a) == str(tmp_path / "tuned")
    assert (mine.records, mine.neutral) == (str(rows), "data/neutral")
    assert (mine.seeds, mine.learning_rate) == ((0,), 1.0)
    assert mine.others == (("third", str(tmp_path / "tuned")),)
    assert profiles.get(mine.handle) == mine
    before = mine.identity
    path.write_text(json.dumps(settings | {"k": 4}))
    assert profiles.get(str(path)).identity != before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "cannot be read"),
        ("a.json", "{}", "needs an object with .like."),
        ("a.json", '{"like": "toi"}', "toy, smoke, qwen"),
        ("a.json", '{"like": "toy", "kk": 3}', "unknown field 'kk'"),
        ("a.json", '{"like": "toy", "k": "3"}', "k is '3'; it should be like 16"),
        ("a.json", '{"like": "toy", "published": true}', "unknown field 'published'"),
        ("toy.json", '{"like": "toy"}', "rename the file"),
        ("a.json", '{"like": "toy", "k": 0}', "k = 0"),
    ],
)
def test_a_wrong_profile_file_says_what_is_wrong(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        profiles.get(str(tmp_path / name))


# ---------------------------------------------------------------------------------------------
# What it needs


def test_the_budget_counts_parameters_exactly(capsys):
    """Weights are most of what a GPU must hold: counted, not guessed."""
    assert budget.parameters(budget.KNOWN["Qwen/Qwen2.5-3B"]) == 3_085_938_688  # as published
    for model in (model_like_qwen(0), load_model(profiles.get("toy").location("base"))):
        config = model.config.to_dict()
        assert budget.parameters(config) == sum(p.numel() for p in model.parameters())
    assert budget.main(["--profile", "qwen"]) == 0
    shown = capsys.readouterr().out
    assert "6.17  cuda" in shown
    assert budget.main(["--profile", "nothing"]) == 1
