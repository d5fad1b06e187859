"""Examples, explainers and scores on made-up texts whose features are known; the OpenAI-compatible
explainer against a real HTTP server on this machine."""

import json
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from dfc_lib.data.activations import Tokens
from dfc_lib.reading import autointerp, dashboard, windows
from dfc_lib.reading.autointerp import Explanation, PredicateExplainer
from dfc_lib.reading.windows import MARKS, Corpus, Example

KEY = "sk-secret-0123456789"
WORDS = ["red", "green", "blue", "cat", "dog", "cow", "one", "two", "runs", "sits", "eats", "is"]
PIECES = [
    *("<|im_start|>", "<|im_end|>", "\n", "system", "user", "assistant", "Tools", ":", "-", " "),
    *("add", "get", "_event", "(", "title", ",", " day", "):", " Add", " event", ".", "7", "J"),
    *("<tool_call>", "</tool_call>", '{"', "name", '":', ' "', '"}', "<think>", "</think>"),
    *(f" {word}" for word in WORDS),
]
ID = {piece: i for i, piece in enumerate(PIECES)}
TOKENIZER = SimpleNamespace(decode=lambda ids: PIECES[ids[0]])


def cache(texts: list[list[int]]) -> SimpleNamespace:
    """What a corpus reads of a cache."""
    tokens = Tokens.of(texts)
    rows = [(i, p, text[p]) for i, text in enumerate(texts) for p in range(1, len(text))]
    table = pd.DataFrame(rows, columns=["sequence", "position", "token"])
    return SimpleNamespace(tokens=tokens, rows=table)


def chat(rng) -> list[int]:
    """A prompt under the template: a fixed beginning, a tool list, a query of random words."""
    query, told = ([f" {w}" for w in rng.choice(WORDS, n)] for n in (6, 4))
    tools = ["-", rng.choice(["add", "get"]), "_event", "(", "title", ",", " day", "):"]
    tools += [*told, "\n", "-", "get", "_event", "(", "title", "):", " Add", *told[:2], " event"]
    pieces = ["<|im_start|>", "system", "\n", "Tools", ":", "\n", *tools, "<|im_end|>", "\n"]
    pieces += ["<|im_start|>", "user", "\n", *query, "7", ".", "<|im_end|>", "\n"]
    return [ID[p] for p in [*pieces, "<|im_start|>", "assistant", "\n"]]


def prose(rng) -> list[int]:
    return [ID[p] for p in [*(f" {w}" for w in rng.choice(WORDS, 30)), "."]]


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    rng = np.random.default_rng(0)
    texts = [chat(rng) for _ in range(60)] + [prose(rng) for _ in range(60)]
    return Corpus.of(cache([*texts, texts[0]]), TOKENIZER)  # the last one is a repetition


def is_token(corpus: Corpus, *pieces: str) -> np.ndarray:
    return np.isin(corpus.token, [ID[p] for p in pieces])


def planted(corpus: Corpus, where: np.ndarray, seed: int = 0) -> np.ndarray:
    strength = np.random.default_rng(seed).uniform(0.5, 2.0, len(corpus))
    return np.where(where, strength, 0.0).astype(np.float32)


FEATURES = {  # where it fires, and what an explanation should say
    "a token": (lambda c: is_token(c, " cow"), "is ‘␣cow’", "content"),
    "several tokens": (lambda c: is_token(c, " red", " blue"), "‘␣red’", "content"),
    "the header": (lambda c: c.mark("opening"), "opens the assistant's turn", "structural"),
    "a tool's name": (lambda c: c.mark("tool"), "tool's name", "content"),
    "token in prose": (lambda c: is_token(c, " dog") & c.mark("prose"), "‘␣dog’", "mixed"),
    "after a token": (lambda c: c.before == ID[" eats"], "follows ‘␣eats’", "content"),
}


# -- texts and marks


def test_repeated_texts_are_read_once_and_the_first_position_is_left_out(corpus):
    assert len(np.unique(corpus.text)) == 120
    assert corpus.position.min() == 1
    assert 0 < corpus.held_out.mean() < 1
    for text in range(120):
        assert len(np.unique(corpus.held_out[corpus.text == text])) == 1


def test_windows_stay_in_their_text(corpus):
    assert (corpus.text[corpus.start] == corpus.text).all()
    assert (corpus.text[corpus.stop - 1] == corpus.text).all()
    tokens = [tuple(corpus.token[a:b]) for a, b in zip(corpus.start, corpus.stop, strict=True)]
    same_hash = pd.Series(tokens).groupby(corpus.window).nunique()
    same_tokens = pd.Series(corpus.window).groupby(pd.Series(tokens)).nunique()
    assert same_hash.max() == same_tokens.max() == 1


def marked(pieces: list[str]) -> dict[str, set[str]]:
    marks = windows._marks(pieces)
    return {
        piece: {n for n, m in zip(MARKS, row, strict=True) if m}
        for piece, row in zip(pieces, marks, strict=True)
    }


def test_marks_of_a_prompt():
    rng = np.random.default_rng(1)
    found = marked([PIECES[i] for i in chat(rng)])
    assert {"tool", "system"} <= found["_event"]
    assert {"parameter"} <= found["title"]
    assert {"parameter"} <= found[" day"]
    assert "parameter" not in found[","]
    assert "brackets" in found["("]
    assert {"description"} <= found[" event"]
    assert {"turn", "opening"} <= found["assistant"]
    assert {"user", "digit"} <= found["7"]
    assert "prose" not in found["7"]


def test_marks_of_a_call():
    pieces = ["<think>", " Add", "</think>", "<tool_call>", '{"', "name", '":', ' "', "add", '"}']
    found = marked(["<|im_start|>", "assistant", "\n", *pieces, "</tool_call>"])
    assert "think" in found[" Add"]
    assert {"tool_call", "tool"} <= found["add"]
    assert {"tool_call", "brackets"} <= found['":']
    assert "tag" in found["<tool_call>"]
    assert "tool_call" not in found[" Add"]


def test_marks_of_prose():
    found = marked([" red", " J", "add", ".", " red"])
    assert {"prose", "stop", "after capital"} - found["."] == {"after capital"}
    assert "inner" in found["add"]
    assert not found["add"] & {"turn", "system", "tool", "chat"}


def test_the_shared_beginning_is_the_template_s(corpus):
    fixed = corpus.mark("fixed")
    assert fixed[corpus.position < 5][corpus.mark("chat")[corpus.position < 5]].all()
    assert not fixed[corpus.mark("user") & is_token(corpus, "7")].any()
    assert not fixed[corpus.mark("prose")].any()


# -- examples


@pytest.mark.parametrize("name", FEATURES)
def test_examples_are_disjoint_and_negatives_inactive(corpus, name):
    activation = planted(corpus, FEATURES[name][0](corpus))
    case = windows.examples(corpus, activation, n=20)
    texts = {part: {corpus.text[e.centre] for e in getattr(case, part)} for part in case._fields}
    assert not texts["explain"] & texts["detection"]
    assert texts["fuzzing"] <= texts["detection"]
    for part in (case.explain, case.detection):
        for truth in (True, False):
            side = [e for e in part if e.active == truth]
            assert len({corpus.text[e.centre] for e in side}) == len(side)
        assert len({corpus.window[e.centre] for e in part}) == len(part)
    explained = {e.tokens for e in case.explain}
    assert not explained & {e.tokens for e in case.detection}
    for e in [*case.explain, *case.detection]:
        window = activation[e.start : e.stop]
        assert e.activations == tuple(window.tolist())
        assert (window.max() == 0) == (not e.active)
        if e.active:
            assert activation[e.centre] > 0
    for e in case.fuzzing:
        assert e.highlight
        assert (activation[e.centre] > 0) == e.active
    kinds = [e.kind for e in case.fuzzing if not e.active]
    assert len(kinds) == sum(e.active for e in case.fuzzing)


def test_half_of_the_negatives_are_hard(corpus):
    """The feature fires on a token in prose only: the hard negatives are that token in a prompt."""
    case = windows.examples(corpus, planted(corpus, FEATURES["token in prose"][0](corpus)), n=20)
    negatives = [e for e in case.detection if not e.active]
    hard = [e for e in negatives if e.kind == "hard"]
    assert len(hard) == len(negatives) // 2
    assert any(corpus.token[e.centre] == ID[" dog"] for e in hard)


def test_top_examples_are_the_strongest(corpus):
    activation = planted(corpus, is_token(corpus, " cow"))
    case = windows.examples(corpus, activation, n=20)
    top = [activation[e.centre] for e in case.explain if e.kind == "top"]
    others = [activation[e.centre] for e in case.explain if e.kind == "quantile"]
    assert top == sorted(top, reverse=True)
    assert len(top) == 10
    assert min(top) >= max(others)
    assert max(others) - min(others) > 0.5  # of all strengths, not of the next ones


def test_a_feature_too_rare_to_be_scored_gives_none(corpus):
    rare = np.zeros(len(corpus), dtype=np.float32)
    rare[np.flatnonzero(is_token(corpus, " cow"))[:3]] = 1.0
    assert windows.examples(corpus, rare) is None
    assert windows.examples(corpus, np.zeros(len(corpus))) is None
    assert windows.examples(corpus, np.ones(len(corpus))) is None  # nothing inactive


# -- predicates and scores


@pytest.fixture(scope="module")
def cases(corpus):
    return {
        name: windows.examples(corpus, planted(corpus, where(corpus), i), n=20)
        for i, (name, (where, _, _)) in enumerate(FEATURES.items())
    }


@pytest.mark.parametrize("name", FEATURES)
def test_predicates_find_what_was_planted(corpus, cases, name):
    explanation = PredicateExplainer(corpus).explain(cases[name].explain)
    assert FEATURES[name][1] in explanation.text
    assert explanation.kind == FEATURES[name][2]


def test_planted_features_score_high_and_shuffled_explanations_near_chance(corpus, cases):
    table = autointerp.interpret(cases, PredicateExplainer(corpus))
    assert (table[["detection", "fuzzing"]] > 0.95).all(axis=None)
    assert abs(table[["detection_shuffled", "fuzzing_shuffled"]].mean().mean() - 0.5) < 0.1
    assert (table.detection_n == [len(case.detection) for case in cases.values()]).all()
    assert (table.detection_unread == 0).all()


def test_a_lone_feature_has_no_shuffled_score(corpus, cases):
    table = autointerp.interpret({"x": cases["a token"]}, PredicateExplainer(corpus))
    assert table.detection_shuffled.isna().all()


def test_no_feature_is_scored_with_its_own_explanation_when_shuffled(cases):
    asked = []

    class Spy:
        def explain(self, examples):
            return Explanation(str(id(examples)), "content")

        def judge(self, explanation, examples):
            asked.append((explanation.text, examples))
            return [e.active for e in examples]

    autointerp.interpret(cases, Spy())
    own = [str(id(case.explain)) for case in cases.values() for _ in range(2)]
    assert [text for text, _ in asked[0::2]] == own
    assert all(a != b for (a, _), b in zip(asked[1::2], own, strict=True))


def test_balanced_accuracy_by_hand():
    truth = [True] * 4 + [False] * 10
    score = autointerp.balanced_accuracy(
        truth, [True, True, True, False] + [False] * 5 + [True] * 5
    )
    assert score.score == pytest.approx((3 / 4 + 5 / 10) / 2)
    assert score.low < score.score < score.high
    assert (score.n, score.unread) == (14, 0)


def test_unread_answers_are_left_out_not_scored_as_guesses():
    truth = [True, True, True, False, False]
    score = autointerp.balanced_accuracy(truth, [True, None, True, False, None])
    assert score[0] == 1.0
    assert (score.n, score.unread) == (3, 2)
    nothing = autointerp.balanced_accuracy(truth, [None] * 5)
    assert np.isnan(nothing.score)
    assert nothing.unread == 5


def test_interval_covers_the_truth():
    rng, covered = np.random.default_rng(0), 0
    truth = [True] * 40 + [False] * 40
    for _ in range(400):
        answers = [*(rng.random(40) < 0.8), *(rng.random(40) < 0.3)]
        score = autointerp.balanced_accuracy(truth, [bool(a) for a in answers])
        covered += score.low <= 0.75 <= score.high
    assert 0.92 <= covered / 400 <= 0.99


# -- the code of a crosscoder, the scrambled model


def test_codes_are_those_of_encode(corpus, monkeypatch):
    monkeypatch.setattr(windows, "_BATCH", 100)
    x = torch.randn(len(corpus) + 5, 2, 8, generator=torch.Generator().manual_seed(0))
    crosscoder = SimpleNamespace(device="cpu", encode=lambda x: x.flatten(1).relu())
    source = SimpleNamespace(gather=lambda rows: x[torch.as_tensor(rows)])
    found = windows.codes(crosscoder, source, corpus).toarray()
    np.testing.assert_array_equal(found, x[corpus.rows].flatten(1).relu())


def test_scrambled_keeps_every_tensor_s_values_and_the_original():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
    before = [p.clone() for p in model.parameters()]
    null = autointerp.scrambled(model, seed=1)
    again = autointerp.scrambled(model, seed=1)
    for p, q, r, old in zip(
        model.parameters(), null.parameters(), again.parameters(), before, strict=True
    ):
        assert torch.equal(p, old)
        assert torch.equal(q, r)
        assert not torch.equal(q, p)
        assert torch.equal(q.flatten().sort().values, p.flatten().sort().values)


# -- pages


def window(tokens: list[str], activations: list[float], **options) -> Example:
    given = {"start": 0, "stop": len(tokens), "centre": 0, "kind": "top"} | options
    active = given.pop("active", max(activations) > 0)
    return Example(tokens=tuple(tokens), activations=tuple(activations), active=active, **given)


def test_the_table_escapes_text_and_marks_strong_tokens():
    example = window(["<|im_start|>", "a&b", "\n"], [2.0, 0.5, 0.0])
    text = dashboard.example_table({"feature <1>": [example]})
    assert "<mark><b>&lt;|im_start|&gt;</b></mark><b>a&amp;b</b>↵" in text
    assert "feature &lt;1&gt;" in text


def test_a_dashboard_is_self_contained_and_the_same_every_time(corpus, cases):
    activation = planted(corpus, is_token(corpus, " cow"))
    scores = autointerp.interpret(cases, PredicateExplainer(corpus)).iloc[0]
    effect = pd.DataFrame({"side": ["promoted"], "token": ["<b>"], "effect": [1.0]})
    pages = [
        dashboard.dashboard(
            "A <feature>", corpus, activation, cases["a token"].explain, scores, effect
        )
        for _ in range(2)
    ]
    assert pages[0] == pages[1]
    for forbidden in ("http", "src=", "<script", "url(", "<feature>"):
        assert forbidden not in pages[0]
    assert "A &lt;feature&gt;" in pages[0]
    assert f"{(activation > 0).sum():,} of {len(corpus):,} tokens" in pages[0]


def test_logit_effect_reads_through_norm_and_unembedding():
    head = torch.nn.Linear(3, 4, bias=False)
    head.weight.data = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [-1, 0, 0]])
    model = SimpleNamespace(
        model=SimpleNamespace(norm=lambda x: x * 2), get_output_embeddings=lambda: head
    )
    effect = dashboard.logit_effect(
        model, torch.tensor([1.0, 0.5, 0.0]), SimpleNamespace(decode=lambda i: f"t{int(i[0])}"), n=2
    )
    assert effect.token.tolist() == ["t0", "t1", "t3", "t2"]
    assert effect.effect.tolist() == pytest.approx([1.75, 0.75, -2.25, -0.25])


# -- an OpenAI-compatible endpoint


class Server(ThreadingHTTPServer):
    """Speaks chat completions; ``script`` holds one way to answer per request, the last stays."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.requests, self.times = ["good"], [], []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_POST(self):
        server = self.server
        how = server.script[min(len(server.requests), len(server.script) - 1)]
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.requests.append({"path": self.path, "auth": self.headers["Authorization"], **body})
        server.times.append(time.monotonic())
        if how == "slow":
            time.sleep(1.0)
        content = self.answer(body) if how in ("good", "slow") else how
        status, headers = 200, {}
        if how == "limit":
            status, headers = 429, {"Retry-After": "0.4"}
        if how == "denied":
            status = 401
            reply = {"error": {"message": f"Incorrect API key provided: {KEY}"}}
        else:
            reply = {"choices": [{"message": {"role": "assistant", "content": content}}]}
        text = "<html>no JSON" if how == "not the API" else json.dumps(reply)
        try:
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text.encode())
        except OSError:
            pass  # the client has given up waiting

    def answer(self, body: dict) -> str:
        """Explains, and judges by whether a snippet has `` cow`` (highlighted, where one is)."""
        system, user = (m["content"] for m in body["messages"])
        if "answers" not in system:
            return '```json\n{"explanation": "cows", "structural": false}\n```'
        wanted = "« cow»" if "«»" in system else " cow"
        snippets = [part for part in user.split("\n") if part[:1].isdigit()]
        return json.dumps({"answers": [wanted in snippet for snippet in snippets]})


@pytest.fixture
def server():
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def explainer(server, tmp_path, monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.setenv("DFC_OPENAI_BASE_URL", server.url)
    monkeypatch.setenv("DFC_OPENAI_MODEL", "a-model")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    return autointerp.OpenAIExplainer.from_environment(tmp_path / "kept")


@pytest.fixture
def cow(corpus):
    """Without line breaks in its snippets, which the server splits at."""
    return windows.examples(
        corpus, planted(corpus, is_token(corpus, " cow") & corpus.mark("prose"))
    )


def test_an_endpoint_explains_and_judges(server, explainer, cow):
    table = autointerp.interpret({"cow": cow}, explainer)
    assert table.explanation.item() == "cows"
    assert table.kind.item() == "content"
    assert table.fuzzing.item() > 0.9
    assert table.detection_unread.item() == 0
    assert {r["auth"] for r in server.requests} == {f"Bearer {KEY}"}
    assert {r["path"] for r in server.requests} == {"/v1/chat/completions"}
    assert {r["model"] for r in server.requests} == {"a-model"}
    assert "« cow»" in server.requests[0]["messages"][1]["content"]


def test_a_rerun_makes_no_request(server, explainer, cow):
    first = autointerp.interpret({"cow": cow}, explainer)
    made = len(server.requests)
    again = replace(explainer, client=explainer.client.with_options(api_key="another key"))
    second = autointerp.interpret({"cow": cow}, again)
    assert len(server.requests) == made
    pd.testing.assert_frame_equal(first, second)


def test_a_killed_run_goes_on(server, explainer, cow):
    server.script = ["good", "good", "denied"]
    with pytest.raises(autointerp.ExplainerError):
        autointerp.interpret({"cow": cow}, explainer)
    server.script = ["good"]
    made = len(server.requests)
    autointerp.interpret({"cow": cow}, explainer)
    whole = 1 + 2 * sum(-(-len(part) // explainer.batch) for part in cow[1:])
    asked = {json.dumps(r["messages"]) for r in server.requests}
    assert len(server.requests) == len(asked) + 1  # the one that was denied is asked again
    assert made == 3
    assert len(asked) < whole  # a lone feature is judged twice with the same explanation


def test_rate_limits_are_waited_for(server, explainer, cow):
    server.script = ["limit", "limit", "good"]
    assert explainer.explain(cow.explain).text == "cows"
    assert len(server.requests) == 3
    assert np.diff(server.times).min() >= 0.4


def test_timeouts_are_tried_again(server, explainer, cow):
    impatient = replace(explainer, client=explainer.client.with_options(timeout=0.3, max_retries=2))
    server.script = ["slow", "good"]
    assert impatient.explain(cow.explain).text == "cows"
    server.script = ["slow"]
    with pytest.raises(autointerp.ExplainerError, match="Timeout"):
        impatient.judge(Explanation("cows", "content"), cow.detection)
    assert len(server.requests) == 2 + 3


@pytest.mark.parametrize(
    "reply",
    [
        "not JSON",
        '{"answers": [true]}',
        '{"answers": "yes"}',
        "[true, false]",
        '{"answers": [tru',
        "",
    ],
)
def test_malformed_answers_are_counted_never_scored(server, explainer, cow, reply):
    server.script = [reply]
    answers = explainer.judge(Explanation("cows", "content"), cow.detection)
    assert answers == [None] * len(cow.detection)
    made = len(server.requests)
    explainer.judge(Explanation("cows", "content"), cow.detection)
    assert len(server.requests) == made  # the same model would say the same again


def test_single_odd_values_lose_only_themselves(server, explainer):
    examples = [window([" a"], [1.0]), window([" b"], [0.0]), window([" c"], [1.0])]
    server.script = ['{"answers": [true, "maybe", false]}']
    assert explainer.judge(Explanation("x", "content"), examples) == [True, None, False]


def test_an_unread_explanation_leaves_its_feature_out(server, explainer, cow):
    server.script = ["I cannot answer in JSON."]
    table = autointerp.interpret({"cow": cow}, explainer)
    assert table.explanation.item() == ""
    assert table.kind.item() == "unknown"
    assert np.isnan(table.detection.item())
    assert table.detection_unread.item() == len(cow.detection)
    assert len(server.requests) == 1


def test_a_reply_of_another_api_is_not_kept(server, explainer, cow, tmp_path):
    server.script = ["not the API", "good"]
    assert explainer.explain(cow.explain).text == ""
    assert not list((tmp_path / "kept").glob("*"))
    assert explainer.explain(cow.explain).text == "cows"


def test_the_key_is_nowhere(server, explainer, cow, tmp_path, capfd, caplog):
    caplog.set_level("DEBUG")
    server.script = ["good", f'{{"answers": [], "echo": "{KEY}"}}', "denied"]
    explainer.explain(cow.explain)
    with pytest.raises(autointerp.ExplainerError) as caught:
        explainer.judge(Explanation("cows", "content"), cow.detection)
    assert "***" in str(caught.value)
    assert "DFC_OPENAI_MODEL" in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    kept = [path.read_text() for path in (tmp_path / "kept").iterdir()]
    assert len(kept) == 2
    out = capfd.readouterr()
    for text in (*kept, str(caught.value), repr(explainer), out.out, out.err, caplog.text):
        assert KEY not in text
        assert "Bearer" not in text


def test_a_missing_model_name_says_what_to_set(monkeypatch, tmp_path):
    monkeypatch.delenv("DFC_OPENAI_MODEL", raising=False)
    with pytest.raises(autointerp.ExplainerError, match="DFC_OPENAI_MODEL"):
        autointerp.OpenAIExplainer.from_environment(tmp_path)
