"""lm-evaluation-harness asks us what it asks Hugging Face's models, and gets the same answers."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from context.rotary import YarnRotary
from data.tokenizer import ByteSettings, build_tokenizer
from evals.scoring import Materials
from model.huggingface.convert import Origin, export
from model.huggingface.traits import Decoder
from model.initialize import initialize
from model.transformer import ModelSettings, build_model
from settings import Refusal, validate

lm_eval = pytest.importorskip("lm_eval", reason="pip install 'longmoe[eval]'")
datasets = pytest.importorskip("datasets")
harness = pytest.importorskip("evals.harness.model")

LENGTH = 64
SHAPE = {
    "num_layers": 2,
    "width": 32,
    "attention": {"num_heads": 4, "num_kv_heads": 2, "head_norms": True},
    "moe": {"num_experts": 4, "experts_per_token": 2, "expert_width": 24},
    "initial_std": 0.3,
}
TOKENIZER = build_tokenizer(ByteSettings())
SENTENCE = "über die großen Wälder und Felder zog ein leiser Wind und trug das Lied der Lerche fort"
WORDS = SENTENCE.split()


@pytest.fixture(scope="module")
def model():
    model = build_model(validate(SHAPE, ModelSettings, "test"), TOKENIZER.vocab_size)
    initialize(model, 0, "cpu")
    with torch.no_grad():
        model.head_weight[128:] = 0  # writes ASCII: half a character more or less would be another question
    model.use_rotary(YarnRotary(base=100.0, factor=4.0, original_length=16, beta_fast=2.0))
    return model


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "out"
    export(
        Decoder(model.settings, model.rotary.spec),
        model.state_dict(),
        Origin(LENGTH, ByteSettings(), 256),
        out,
        "float32",
    )
    return out


def ours(model, **options):
    materials = Materials(TOKENIZER, {}, torch.device("cpu"), contextlib.nullcontext)
    return harness.HarnessModel(model, materials, LENGTH, **options)


def requests(*arguments):
    return [SimpleNamespace(args=args) for args in arguments]


def documents(count: int, num_words: int, seed: int) -> list[dict]:
    """Sentences of drawn words, a question of four answers for each."""
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(WORDS, size=num_words)) for _ in range(count)]
    return [{"text": text, "choices": rng.choice(WORDS, 4).tolist(), "gold": int(rng.integers(4))} for text in texts]


def task(name: str, kind: str, num_words: int, **changes: object) -> dict:
    """A task of generated documents: nothing is downloaded."""
    docs = datasets.Dataset.from_list(documents(9, num_words, seed=len(name)))
    return {
        "task": name,
        "custom_dataset": lambda **_: {"test": docs},
        "test_split": "test",
        "output_type": kind,
        "doc_to_text": "{{text}}",
        **changes,
    }


CHOICES = {"doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}"}
ROLLING = {"doc_to_text": "", "doc_to_target": "{{text}}"}
METRICS = [{"metric": m, "aggregation": "weighted_perplexity", "higher_is_better": False} for m in ("word_perplexity",)]


def tasks(mark: str) -> list[dict]:
    writing = {"until": [mark], "max_gen_toks": 24, "do_sample": False}
    return [
        task("choices", "multiple_choice", 4, **CHOICES),
        task("no_context", "multiple_choice", 4, **{**CHOICES, "doc_to_text": ""}),
        task("too_long", "multiple_choice", 30, **CHOICES),
        task("likely", "loglikelihood", 5, doc_to_target=" {{choices[0]}}"),
        task("whole", "loglikelihood_rolling", 40, **ROLLING, metric_list=METRICS),
        task("writes", "generate_until", 5, doc_to_target="x", generation_kwargs=writing),
        task("writes_after_long", "generate_until", 30, doc_to_target="x", generation_kwargs=writing),
    ]


@pytest.fixture(scope="module")
def results(model, exported):
    """What both answer to every task, request by request."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    (text,) = ours(model).generate_until(requests(("und der", {"max_gen_toks": 24})))
    mark = next(letter for letter in text[9:] if letter.isprintable())
    theirs = HFLM(pretrained=str(exported), device="cpu", dtype="float32", batch_size=4)
    # No defaults: to list lm-eval's own tasks takes longer than all of this.
    options = {"tasks": tasks(mark), "bootstrap_iters": 0, "task_manager": TaskManager(include_defaults=False)}
    both = [lm_eval.simple_evaluate(model=one, **options) for one in (ours(model, beyond="cut"), theirs)]
    return mark, *both


def responses(result, name):
    return [sample["filtered_resps"] for sample in sorted(result["samples"][name], key=lambda s: s["doc_id"])]


@pytest.mark.parametrize("name", ["choices", "no_context", "too_long", "likely"])
def test_continuations_are_as_likely(results, name):
    _, mine, theirs = results
    for one, other in zip(responses(mine, name), responses(theirs, name), strict=True):
        for (our_sum, our_greedy), (their_sum, their_greedy) in zip(one, other, strict=True):
            assert abs(our_sum - their_sum) <= 1e-4
            assert our_greedy == their_greedy
    scores = [{k: v for k, v in one["results"][name].items() if isinstance(v, float)} for one in (mine, theirs)]
    assert len(scores[0]) >= 2 and scores[0] == pytest.approx(scores[1], rel=1e-4)


def test_whole_texts_are_as_likely(results):
    _, mine, theirs = results
    sums = np.array([responses(one, "whole") for one in (mine, theirs)], dtype=np.float64)
    assert np.abs(sums[0] - sums[1]).max() <= 1e-4 * 5  # a text is five windows
    assert sums.min() < -600


@pytest.mark.parametrize("name", ["writes", "writes_after_long"])
def test_texts_are_the_same(results, name):
    mark, mine, theirs = results
    texts = [response for (response,) in responses(mine, name)]
    assert texts == [response for (response,) in responses(theirs, name)]
    assert len({len(text) for text in texts}) > 1 and not any(mark in text for text in texts)


def test_what_is_longer_is_never_cut_in_silence(model):
    long, short = ("a" * 70, "bcd"), ("a", "b")
    with pytest.raises(Refusal, match=r"1 of 2 requests are longer than length=64; the longest takes 72 tokens"):
        ours(model).loglikelihood(requests(long, short), disable_tqdm=True)
    with pytest.raises(Refusal, match="1 of 1 requests are longer"):
        ours(model).generate_until(requests(("a" * 60, {"max_gen_toks": 5})))
    said: list[str] = []
    cut, whole = (ours(model, beyond=beyond, say=said.append) for beyond in ("cut", "read"))
    # The last token is only predicted, so 64 are read for the last of 65.
    kept = ("a" * 62, "bcd")
    answers = [one.loglikelihood(requests(long, kept), disable_tqdm=True) for one in (cut, whole)]
    assert answers[0][0] == answers[0][1] != answers[1][0]
    assert said == [
        "1 of 2 requests are longer than length=64: their beginnings left out",
        "1 of 2 requests are longer than length=64: read beyond it",
    ]
    with pytest.raises(Refusal, match="the longest takes 101 tokens"):
        cut.loglikelihood(requests(("a", "b" * 101)), disable_tqdm=True)


def test_a_request_of_exactly_the_length_is_read(model):
    said: list[str] = []
    strict, cut = ours(model), ours(model, beyond="cut", say=said.append)
    full = requests(("a" * 62, "bcd"))
    assert strict.loglikelihood(full, disable_tqdm=True) == cut.loglikelihood(full, disable_tqdm=True) and not said
    writes = requests(("a" * 59, {"max_gen_toks": 5}))
    assert strict.generate_until(writes) == cut.generate_until(writes) and not said


def test_answers_do_not_depend_on_what_is_asked_beside(model):
    asked = [("ab" * n, "c" * (1 + n % 3)) for n in (1, 9, 2, 28, 3, 3)] + [("", "cab"), ("ab" * 9 + "d", "c")]
    together = ours(model).loglikelihood(requests(*asked), disable_tqdm=True)
    for arguments, (logprob, is_greedy) in zip(asked, together, strict=True):
        ((alone, greedy_alone),) = ours(model).loglikelihood(requests(arguments), disable_tqdm=True)
        assert abs(logprob - alone) <= 1e-4 and is_greedy == greedy_alone


def test_an_end_mark_across_two_pieces_is_found(model, monkeypatch):
    context = "zog ein leiser"
    (text,) = ours(model).generate_until(requests((context, {"max_gen_toks": 40})))
    marks = {"until": [text[15:18], "", "never"], "max_gen_toks": 40}
    (cut,) = ours(model).generate_until(requests((context, marks)))
    assert cut == text[: text.index(text[15:18])] and harness.FIRST_PIECE == 16
    monkeypatch.setattr(harness, "FIRST_PIECE", 1)
    limits = [{"max_gen_toks": n} for n in (40, 3, 0)]
    assert ours(model).generate_until(requests(*((context, limit) for limit in limits))) == [text, text[:3], ""]


def test_draws_and_what_is_not_known_are_refused():
    read = harness.read_writing
    assert read({"until": "x", "do_sample": False, "temperature": 0.7}) == harness.Writing(("x",), 256)
    assert read({"until": None, "max_new_tokens": 5, "top_p": 1.0}) == harness.Writing((), 5)
    for wrong in ({"do_sample": True}, {"temperature": 0.7}):
        with pytest.raises(Refusal, match="writes the most likely tokens alone"):
            read(wrong)
    with pytest.raises(Refusal, match=r"generation_kwargs\.num_beams=4: not known here"):
        read({"num_beams": 4})


def test_the_first_of_several_marks_ends_a_text():
    assert harness.before("one. two; three", (";", ".", "")) == "one"
    assert harness.before("one", (".",)) == "one"


def test_nothing_is_written_beyond_a_mark_or_the_end(model, monkeypatch):
    """A writer that counts what it is asked for: it says "ab." for ever, or ends by itself after three tokens."""
    asked: list[list[int]] = []

    def write(model, materials, prompts, more):
        asked.append(list(more))
        ends_itself = [bytes(prompt[:1].tolist()) == b"e" for prompt in prompts]
        before = [len(prompt) - 1 for prompt in prompts]
        whole = [b"ab." * 99 if not ends else b"ab." for ends in ends_itself]
        return [np.frombuffer(text[n : n + m], np.uint8) for text, n, m in zip(whole, before, more, strict=True)]

    monkeypatch.setattr(harness, "continue_greedily", write)
    monkeypatch.setattr(harness, "FIRST_PIECE", 4)
    one = ours(model, beyond="read")
    assert one.generate_until(requests(("x", {"until": [".ab.a"], "max_gen_toks": 50}))) == ["ab"]
    assert asked == [[4], [8]]
    asked.clear()
    texts = one.generate_until(requests(("e", {"max_gen_toks": 50}), ("x", {"max_gen_toks": 10})))
    assert texts == ["ab.", "ab.ab.ab.a"] and asked == [[4, 4], [6]]


def test_an_empty_context_is_the_end_of_a_text(model):
    (text,) = ours(model).generate_until(requests(("", {"max_gen_toks": 8})))
    (expected,) = ours(model)._written([np.array([TOKENIZER.end_of_text])], [harness.Writing((), 8)])
    assert text == expected != ours(model).generate_until(requests(("A", {"max_gen_toks": 8})))[0]
