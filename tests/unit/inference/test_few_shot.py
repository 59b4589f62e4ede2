"""Examples before each row: which ones, what the model reads of them, and a release that holds what they are chosen from."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import tiny
import torch

from retune.errors import BadInputError, IntegrityError
from retune.inference.encoding import Encoder, cut_text, plain_tokenizer
from retune.inference.examples import example_lines, example_rows
from retune.inference.families import family_of, generate_batch, row_losses
from retune.inference.inputs import EncodedRow, LabelTree
from retune.inference.predictor import Predictor
from retune.inference.release import EXAMPLES, MANIFEST, PROMPT, read_release, write_release
from retune.inference.retrieval import Nearest
from retune.prompt_tuning import tune

TRAIN, ROWS = tiny.make_rows(60, seed=5), tiny.make_rows(12, seed=6)
TOKENIZER = tiny.make_tokenizer()
KNOWN = [
    {"text": "printer broken", "label": "low", "summary": "printer"},
    {"text": "tablet hot", "label": "medium", "summary": "tablet\nhot tablet"},
    {"text": "printer late again", "label": "high", "summary": "late printer"},
]


def few_shot(examples=2, maker=tiny.make_prompt, **changes):
    return maker(tune={"method": "few_shot", "examples": examples}, **changes)


def ids(text, tokenizer=TOKENIZER):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def model(base, prompt, train=TRAIN):
    return Predictor(base, prompt, {}, example_rows(prompt, train))


def test_the_nearest_texts_are_those_of_the_largest_cosine_of_tf_idf():
    texts = ["printer broken", "tablet hot", "printer late again", "Printer!"]
    # Weights by hand, ln((1 + N) / (1 + texts with the word)) + 1: "printer" stands in three of the four texts, every other word in one.
    common, rare = math.log(5 / 4) + 1, math.log(5 / 2) + 1
    query = math.hypot(common, rare)  # printer and late; the other words are unknown
    expected = [common**2 / query**2, 0, (common**2 + rare**2) / (query * math.hypot(common, rare, rare)), common / query]
    np.testing.assert_allclose(Nearest(texts, 4)._similarities(["the printer is late"]), [expected], atol=1e-9)
    assert [round(x, 3) for x in expected] == [0.289, 0, 0.765, 0.538]
    assert Nearest(texts, 4).of(["the printer is late"], [None]) == [[1, 0, 3, 2]]
    assert Nearest(texts, 2).of(["the printer is late"], [None]) == [[3, 2]]


def test_of_texts_that_are_as_alike_the_first_comes_nearest():
    nearest = Nearest(["a b", "c", "b a", "a  b", "d"], 3)
    assert nearest.of(["b a", "e", "", "?!"], [None] * 4) == [[3, 2, 0], [2, 1, 0], [2, 1, 0], [2, 1, 0]]
    assert Nearest(["!", "?"], 4).of(["?"], [None]) == [[1, 0]], "without a word nothing is alike"
    assert nearest.of([], []) == []


def test_many_queries_are_answered_as_each_alone(monkeypatch):
    texts, queries = [row["text"] for row in TRAIN], [row["text"] for row in ROWS]
    together = Nearest(texts, 3).of(queries, [None] * len(queries))
    monkeypatch.setattr("retune.inference.retrieval.HELD", 2 * len(texts))
    nearest = Nearest(texts, 3)
    assert nearest.of(queries, [None] * len(queries)) == together == [nearest.of([query], [None])[0] for query in queries]


def test_a_row_reads_the_most_alike_rows_before_it_the_nearest_last():
    prompt = few_shot()
    encoder = Encoder(prompt, TOKENIZER, examples=example_rows(prompt, KNOWN))
    (found,) = encoder.prompts([{"text": "late printer again"}])
    assert found == ids(
        "Ticket: printer broken\nPriority: low\n\nTicket: printer late again\nPriority: high\n\nTicket: late printer again\nPriority:"
    )


def test_a_generated_answer_stands_behind_a_space_and_is_the_first_reference():
    prompt = few_shot(1, tiny.make_summary_prompt, template="{text}\nSummary:")
    encoder = Encoder(prompt, TOKENIZER, examples=example_rows(prompt, KNOWN))
    (found,) = encoder.prompts([{"text": "a hot tablet"}])
    assert found == ids("tablet hot\nSummary: tablet\n\na hot tablet\nSummary:")
    several = [{"text": "hot", "summary": "first"}, {"text": "hot", "summary": "second"}, {"text": "late", "summary": "third\nfourth"}]
    assert example_rows(prompt, several) == [{"text": "hot", "summary": "first"}, {"text": "late", "summary": "third"}]


def test_texts_of_examples_are_cleaned_and_cut_as_any_rows():
    prompt = few_shot(1, preprocess={"max_tokens": 3})
    long = " ".join(tiny.WORDS)
    (cut,) = cut_text(plain_tokenizer(TOKENIZER), [long], 3)
    encoder = Encoder(prompt, TOKENIZER, examples=[{"text": f" a\u200b{long}"[3:], "label": "low"}])
    assert encoder.prompts([{"text": "router"}]) == [ids(f"Ticket: {cut}\nPriority: low\n\nTicket: router\nPriority:")]


@pytest.mark.parametrize("text", ["late <eos> hot", "late"])
@pytest.mark.parametrize("template", ["Ticket: {text}\nPriority:", "Ticket: {text}<eos>\nPriority:"])
def test_special_tokens_are_the_templates_alone_in_examples_too(template, text):
    prompt = few_shot(1, template=template)
    encoder = Encoder(prompt, TOKENIZER, examples=[{"text": text, "label": "low"}])
    (found,) = encoder.prompts([{"text": "hot"}])
    eos = TOKENIZER.eos_token_id
    assert found.count(eos) == 2 * ("<eos>" in template)
    assert TOKENIZER.decode(found) == f"{template.format(text=text)} low\n\n{template.format(text='hot')}"


def test_a_tokenizers_own_first_token_stands_once_before_all():
    tokenizer = tiny.make_tokenizer(bos=True)
    encoder = Encoder(few_shot(1), tokenizer, examples=[{"text": "late", "label": "low"}])
    (found,) = encoder.prompts([{"text": "hot"}])
    assert found == [tokenizer.bos_token_id, *ids("Ticket: late\nPriority: low\n\nTicket: hot\nPriority:", tokenizer)]


def test_a_training_row_is_never_its_own_example_and_a_row_that_says_the_same_may_be():
    known = [row | {"id": f"a.csv:{number}"} for number, row in enumerate(KNOWN)]
    prompt = few_shot(3)
    encoder = Encoder(prompt, TOKENIZER, examples=example_rows(prompt, known))
    own, other, unnamed = encoder.prompts([known[0], known[0] | {"id": "b.csv:0"}, KNOWN[0]])
    assert TOKENIZER.decode(own).count("Ticket: printer broken") == 1
    assert TOKENIZER.decode(other).count("Ticket: printer broken") == 2
    assert other == unnamed
    (alone,) = Encoder(prompt, TOKENIZER, examples=example_rows(prompt, known[:1])).prompts(known[:1])
    assert TOKENIZER.decode(alone) == "Ticket: printer broken\nPriority:"


def test_examples_beyond_the_context_are_left_out_the_least_alike_first():
    prompt = few_shot(3)
    encoder = Encoder(prompt, TOKENIZER, examples=example_rows(prompt, KNOWN))
    row = {"text": "late printer again"}
    shots = ["Ticket: tablet hot\nPriority: medium\n\n", "Ticket: printer broken\nPriority: low\n\n"]
    shots += ["Ticket: printer late again\nPriority: high\n\n", "Ticket: late printer again\nPriority:"]
    texts = ["".join(shots[left_out:]) for left_out in range(4)]
    for text, shorter in zip(texts, [*texts[1:], texts[-1]], strict=True):
        assert encoder.prompts([row], [len(ids(text))]) == [ids(text)]
        assert encoder.prompts([row], [len(ids(text)) - 1]) == [ids(shorter)]
    several = [len(ids(texts[2])), 10_000, 1]
    assert encoder.prompts([row] * 3, several) == [ids(texts[2]), ids(texts[0]), ids(texts[3])]


def test_the_context_holds_row_answer_and_as_many_examples_as_fit():
    base = tiny.make_base("llama", context=64)
    labels, texts = model(base, few_shot(32)), model(base, few_shot(32, tiny.make_summary_prompt))
    assert len(labels.predict(ROWS)) == len(texts.predict(ROWS)) == len(ROWS)
    for predictor, answer in ((labels, 1), (texts, 12)):
        lengths = [len(row.prompt) for row in predictor._encode(ROWS, answer)]
        assert max(lengths) <= 64 - answer
        assert min(lengths) > 64 - answer - 30, "no more was left out than had to be"
    with pytest.raises(BadInputError, match="row 0: prompt too long: 0 virtual"):
        labels.predict([{"text": "broken router " * 100}])


def by_hand(base, rows, target, count=2):
    """Each row after its examples, as text and as what the model reads."""
    chosen = Nearest([row["text"] for row in TRAIN], count).of([row["text"] for row in rows], [None] * len(rows))
    shots = [[f"Ticket: {TRAIN[i]['text']}\nPriority: {TRAIN[i][target]}" for i in numbers] for numbers in chosen]
    texts = ["\n\n".join([*of_row, f"Ticket: {row['text']}\nPriority:"]) for of_row, row in zip(shots, rows, strict=True)]
    end = [base.eos_id] if base.family == "encoder-decoder" else []
    return [ids(text) + end for text in texts]


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_labels_texts_streams_and_losses_follow_the_rows_rendered_by_hand(kind):
    base = tiny.make_base(kind)
    labels, texts = model(base, few_shot()), model(base, few_shot(maker=tiny.make_summary_prompt))
    family = family_of(base)
    rows = [EncodedRow(prompt) for prompt in by_hand(base, ROWS, "label")]
    expected = family.score_batch(base, None, rows, LabelTree([ids(words) for words in labels.prompt.labels.values()]))
    torch.testing.assert_close(labels.score_labels(ROWS), expected, rtol=0, atol=2e-5)
    assert (labels.score_labels(ROWS) - Predictor(base, labels.prompt, {}).score_labels(ROWS)).abs().max() > 0.5

    rows = [EncodedRow(prompt) for prompt in by_hand(base, ROWS, "summary")]
    written = [texts._decode(tokens).strip() for tokens in generate_batch(base, None, rows, 12)]
    assert texts.generate(ROWS) == texts.predict(ROWS)["prediction"].tolist() == written
    assert "".join(texts.stream(ROWS[0])) == written[0]

    space = " " if base.family == "decoder" else ""
    answers = [[*ids(space + row["summary"]), base.eos_id] for row in ROWS]
    rows = [EncodedRow(row.prompt, answer) for row, answer in zip(rows, answers, strict=True)]
    losses, counts = texts.reference_losses(ROWS)
    np.testing.assert_allclose(losses, row_losses(base, None, family.lay(base, None, rows)), rtol=1e-4)
    assert counts.tolist() == [len(answer) for answer in answers]


def test_prompt_embeddings_hold_the_examples(llama):
    prompt = few_shot()
    (read,) = by_hand(llama, ROWS[:1], "label")
    assert torch.equal(model(llama, prompt).prompt_embeddings(ROWS[0]), llama.embed(torch.tensor(read)))


def test_a_row_reads_the_same_alone_and_in_any_company(llama):
    found = model(llama, few_shot())
    together = found.score_labels(pd.DataFrame(ROWS))
    torch.testing.assert_close(together, torch.cat([found.score_labels([row]) for row in ROWS]), rtol=0, atol=2e-5)


def test_nothing_is_tuned_and_the_validation_loss_is_that_of_the_predictor(llama):
    for maker in (tiny.make_prompt, tiny.make_summary_prompt):
        prompt = few_shot(maker=maker)
        result = tune(llama, prompt, pd.DataFrame(TRAIN), ROWS)
        assert (result.best, result.curve, result.steps, result.best_step) == ({}, [], 0, 0)
        expected = math.log(Predictor(llama, prompt, {}, result.examples).perplexity(ROWS))
        assert result.best_validation_loss == result.initial_validation_loss == pytest.approx(expected, rel=1e-4)
        assert expected != pytest.approx(math.log(Predictor(llama, prompt, {}).perplexity(ROWS)), rel=1e-2)


def test_what_cannot_be_an_example_is_named(llama):
    with pytest.raises(BadInputError, match="ticket_priority: the train split is empty"):
        tune(llama, few_shot(), [], ROWS)
    with pytest.raises(BadInputError, match="ticket_priority: train split: row 1: label must be one of low, medium, high, got 'late'"):
        tune(llama, few_shot(), [TRAIN[0], {"text": "x", "label": "late"}], ROWS)
    with pytest.raises(BadInputError, match=r"tune.method few_shot is not offered on a base model of type bert \(encoder\)"):
        tune(tiny.make_base("bert"), few_shot(), TRAIN, ROWS)


def test_a_release_holds_the_rows_and_reads_back_as_what_was_measured(llama, tmp_path):
    train = [row | {"id": f"Übersicht.csv:{number}", "channel": "mail"} for number, row in enumerate(TRAIN)]
    prompt = few_shot()
    written = [write_release(tmp_path / name, prompt, {}, llama, {}, example_rows(prompt, train)) for name in "ab"]
    assert written[0] == written[1]
    content = (tmp_path / "a" / EXAMPLES).read_bytes()
    assert content.count(b"\n") == len({row["text"] for row in TRAIN})
    assert json.loads(content.split(b"\n")[0]) == {"id": "Übersicht.csv:0", "text": TRAIN[0]["text"], "label": TRAIN[0]["label"]}
    assert set(json.loads((tmp_path / "a" / MANIFEST).read_bytes())["files"]) == {PROMPT, EXAMPLES}
    release = read_release(tmp_path / "a", written[0])
    assert (release.tensors, release.examples) == ({}, example_rows(prompt, train))
    pd.testing.assert_frame_equal(Predictor.of(release, llama).predict(ROWS), model(llama, prompt).predict(ROWS), check_exact=True)
    fewer = few_shot(1)
    assert write_release(tmp_path / "c", fewer, {}, llama, {}, example_rows(fewer, train)) != written[0]


@pytest.mark.parametrize(
    ("examples", "tune", "message"),
    [
        ([], {"method": "few_shot"}, "tune.method few_shot: must hold training rows, got none"),
        (TRAIN[:2], {"method": "none"}, "tune.method none: must hold no training row, got 2"),
        ([{"text": "late"}], {"method": "few_shot"}, "line 1 must hold the texts of label, text"),
        ([{"text": "late", "label": "?"}], {"method": "few_shot"}, "row 0: label must be one of"),
    ],
)
def test_rows_that_do_not_fit_are_not_written(llama, tmp_path, examples, tune, message):
    with pytest.raises(BadInputError, match=message):
        write_release(tmp_path / "r", tiny.make_prompt(tune=tune), {}, llama, {}, examples)
    assert not (tmp_path / "r").exists()


def test_it_is_served_from_mlflow_as_it_was_measured(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from retune.inference.pyfunc_model import RetunePromptModel

    base = tiny.save_base(tmp_path / "base")
    prompt = few_shot(base_model=tiny.reference(base))
    write_release(tmp_path / "release", prompt, {}, base, {}, example_rows(prompt, TRAIN))
    monkeypatch.setenv("RETUNE_BASE_MODELS", str(tmp_path))
    served = RetunePromptModel()
    served.load_context(SimpleNamespace(artifacts={"release": str(tmp_path / "release")}))
    rows = pd.DataFrame(ROWS)
    pd.testing.assert_frame_equal(served.predict(None, rows[["text"]]), model(base, prompt).predict(rows), check_exact=True)


LINE = example_lines([{"text": "late", "label": "low"}])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LINE + b"{", "does not hold what method few_shot releases"),
        (LINE.replace(b":", b": "), "canonical JSON"),
        (LINE + LINE, "each input once"),
        (b"", "at least one row"),
        (LINE.replace(b'"late"', b"1"), "line 1 must hold the texts"),
        (b"[]\n", "line 1 must hold the texts"),
        (LINE.replace(b"low", b"lower"), "label must be one of"),
        (b"\xff\n", "does not hold what method few_shot releases"),
    ],
)
def test_tampered_rows_are_refused(llama, tmp_path, content, message):
    write_release(tmp_path / "r", few_shot(), {}, llama, {}, example_rows(few_shot(), TRAIN))
    (tmp_path / "r" / EXAMPLES).write_bytes(content)
    with pytest.raises(IntegrityError, match="sha256 must be"):
        read_release(tmp_path / "r")
    tiny.reseal(tmp_path / "r")
    with pytest.raises(IntegrityError, match=message):
        read_release(tmp_path / "r")


def test_a_release_without_its_rows_is_refused(llama, tmp_path):
    write_release(tmp_path / "r", few_shot(), {}, llama, {}, example_rows(few_shot(), TRAIN))
    (tmp_path / "r" / EXAMPLES).unlink()
    tiny.reseal(tmp_path / "r")
    with pytest.raises(IntegrityError, match="method few_shot must have the files"):
        read_release(tmp_path / "r")
