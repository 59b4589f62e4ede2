import itertools

import pandas as pd
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from retune.errors import BadInputError, ConfigError
from retune.inference.encoding import Encoder, check_labels, cut_text, plain_tokenizer

TOKENIZER = tiny.make_tokenizer()
EOS = TOKENIZER.eos_token_id


def ids(text, tokenizer=TOKENIZER):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode(template, *rows, tokenizer=TOKENIZER, **more):
    return Encoder(tiny.make_prompt(template=template, **more), tokenizer).prompts(rows)


def test_prompt_is_the_rendered_template_as_the_tokenizer_reads_it():
    assert encode("Ticket: {text}\nPriority:", {"text": "angry router"}) == [ids("Ticket: angry router\nPriority:")]


def test_braces_and_format_specs_in_a_text_stay_as_they_are():
    text = "{0} {text.__class__} {{x}} %s"
    assert encode("Ticket: {text}\n{{json}}:", {"text": text}) == [ids("Ticket: " + text + "\n{json}:")]


def test_one_newline_at_the_templates_end_is_the_yaml_block_scalars_and_is_dropped():
    assert encode("{text}\nPriority:\n", {"text": "late"}) == encode("{text}\nPriority:", {"text": "late"})
    assert encode("{text}\nPriority:\n\n", {"text": "late"}) == [ids("late\nPriority:\n")]


def test_several_fields_and_repeated_ones_are_filled_in():
    row = {"text": "late", "channel": "mail", "unused": None}
    assert encode("{channel}: {text} {text}", row) == [ids("mail: late late")]


def test_texts_are_cleaned_as_in_preprocess():
    assert encode("{text}:", {"text": " a\u200b  b\tjohn@example.org "}) == encode("{text}:", {"text": "a b <mail>"})


@pytest.mark.parametrize("text", ["<eos>", "a <eos> b", "<eos><pad><eos>", "x<eos>", "<eos>\n", "<<eos>>"])
def test_special_tokens_in_a_text_are_ordinary_characters(text):
    (found,) = encode("Ticket: {text}\nPriority:", {"text": text})
    assert not {0, EOS, 2} & set(found)
    assert TOKENIZER.decode(found) == f"Ticket: {text.strip()}\nPriority:"
    assert EOS in ids(f"Ticket: {text}\nPriority:") or "<pad>" in text  # as the tokenizer alone would read it


def test_a_special_token_cannot_be_put_together_from_template_and_text():
    (found,) = encode("Ticket: <{text}", {"text": "eos>"})
    assert EOS not in found


def test_special_tokens_of_the_template_are_special():
    template = "Ticket: {text}<eos>\nPriority:"
    (found,) = encode(template, {"text": "angry router"})
    assert found == ids("Ticket: angry router<eos>\nPriority:")
    assert found.count(EOS) == 1


@pytest.mark.parametrize("text", ["late <eos> hot", "<eos>", "<pad>"])
def test_only_the_templates_special_tokens_are_special_when_a_text_brings_its_own(text):
    (found,) = encode("Ticket: {text}<eos>\nPriority:", {"text": text})
    assert found.count(EOS) == 1
    assert 0 not in found
    at = found.index(EOS)
    assert TOKENIZER.decode(found[:at]) == f"Ticket: {text}"
    assert found[at + 1 :] == ids("\nPriority:")


def test_encoding_leaves_the_tokenizers_own_settings_alone():
    encode("Ticket: {text}", {"text": "<eos>"})
    assert ids("<eos>") == [EOS]


def test_a_start_token_comes_before_the_prompt_where_the_tokenizer_puts_one():
    tokenizer = tiny.make_tokenizer(bos=True)
    bos = tokenizer.bos_token_id
    assert encode("{text}:", {"text": "late"}, tokenizer=tokenizer) == [tokenizer("late:")["input_ids"]]
    assert encode("{text}:", {"text": "late"}, tokenizer=tokenizer)[0][0] == bos
    assert encode("<bos>{text}:", {"text": "late"}, tokenizer=tokenizer)[0].count(bos) == 1


def test_texts_are_cut_and_the_template_is_not():
    words = "router " * 30
    template = "printer " * 20 + "{text} {channel}\nPriority:"
    (found,) = encode(template, {"text": words, "channel": words}, preprocess={"max_tokens": 5})
    cut = TOKENIZER.decode(ids(words)[:5])
    assert found == ids("printer " * 20 + cut + " " + cut + "\nPriority:")


@given(st.text(max_size=60), st.integers(1, 12))
@settings(max_examples=100, deadline=None)
def test_a_cut_text_is_a_prefix_within_the_limit_and_a_short_one_is_whole(text, limit):
    plain = plain_tokenizer(TOKENIZER)
    (cut,) = cut_text(plain, [text], limit)
    assert text.startswith(cut)
    assert len(plain.encode(cut, add_special_tokens=False).ids) <= limit
    if len(plain.encode(text, add_special_tokens=False).ids) <= limit:
        assert cut == text


def test_a_character_spelt_by_several_tokens_is_cut_whole():
    faces = "🙂🙂"  # 4 bytes each, a token each
    assert [cut_text(plain_tokenizer(TOKENIZER), [faces], n) for n in (3, 4, 7, 8)] == [[""], ["🙂"], ["🙂"], [faces]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"body": "x"}, "row 1: no field 'text'; the row has body"),
        ({}, "row 1: no field 'text'; the row has no fields"),
        ({"text": None}, "row 1: field 'text' must be text, got None"),
        ({"text": float("nan")}, "row 1: field 'text' must be text, got nan"),
        ({"text": pd.NA}, "row 1: field 'text' must be text, got <NA>"),
    ],
)
def test_a_row_without_its_text_is_named(row, message):
    with pytest.raises(BadInputError, match=message):
        encode("{text}:", {"text": "fine"}, row)


def test_numbers_are_read_as_text():
    assert encode("{text}:", {"text": 12}) == [ids("12:")]


def test_answers_are_the_labels_words():
    encoder = Encoder(tiny.make_prompt(), TOKENIZER)
    assert encoder.answers([{"label": "high"}, {"label": "low"}]) == [[ids(" high")], [ids(" low")]]
    assert encoder.labels() == [ids(" low"), ids(" medium"), ids(" high")]


def test_an_unknown_label_is_named():
    with pytest.raises(BadInputError, match="row 0: label must be one of low, medium, high, got 'urgent'"):
        Encoder(tiny.make_prompt(), TOKENIZER).answers([{"label": "urgent"}])


@pytest.mark.parametrize(
    ("template", "expected"), [("{text}\nSummary:", " late router"), ("{text}\n\n", "late router"), ("{text}=> ", "late router")]
)
def test_a_generated_answer_is_set_off_by_a_space_unless_the_template_ends_in_one(template, expected):
    encoder = Encoder(tiny.make_summary_prompt(template=template), TOKENIZER)
    assert encoder.answers([{"summary": " late router "}]) == [[ids(expected)]]


def test_special_tokens_in_an_answer_are_ordinary_characters():
    ((found,),) = Encoder(tiny.make_summary_prompt(), TOKENIZER).answers([{"summary": "late<eos>"}])
    assert EOS not in found


def test_answers_continue_the_template_where_a_tokenizer_marks_the_start_of_a_text():
    """Sentence-piece tokenizers put ▁ before a text: answer tokens are those of the joint text, without a second ▁."""
    backend = tiny.make_tokenizer().backend_tokenizer
    backend.normalizer = normalizers.Prepend("a ")
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=tiny.EOS)
    encoder = Encoder(tiny.make_summary_prompt(template="{text}\nSummary:"), tokenizer)
    prompt, answer = ids("late\nSummary:", tokenizer), encoder.answers([{"summary": "x"}])[0][0]
    assert prompt + answer == ids("late\nSummary: x", tokenizer)
    assert answer != ids(" x", tokenizer)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"a": [1, 2], "b": [1, 2, 3]}, r"labels.a and labels.b must differ .*\(\[1, 2\] and \[1, 2, 3\]\)"),
        ({"b": [1, 2, 3], "z": [2], "a": [1]}, "labels.a and labels.b"),
        ({"a": [4], "b": [4]}, "labels.[ab] and labels.[ab]"),
        ({"a": [], "b": [4]}, "labels.a must have at least one token, got none"),
    ],
)
def test_labels_that_begin_one_another_are_refused(labels, message):
    with pytest.raises(ConfigError, match=message):
        check_labels(labels)


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), min_size=2, max_size=6))
@settings(max_examples=100, deadline=None)
def test_labels_are_refused_exactly_if_one_begins_another(labels):
    collide = any(a == b[: len(a)] for a, b in itertools.permutations(labels, 2))
    if collide:
        with pytest.raises(ConfigError):
            check_labels(dict(enumerate(labels)))
    else:
        check_labels(dict(enumerate(labels)))


def test_label_words_of_a_prompt_are_checked():
    with pytest.raises(ConfigError, match=r"labels.high and labels.higher"):
        Encoder(tiny.make_prompt(labels={"high": " high", "higher": " high er"}), TOKENIZER).labels()


@pytest.mark.parametrize("target", ["", "  ", "one answer\n\nanother"])
def test_an_empty_target_is_refused_with_its_row(target):
    encoder = Encoder(tiny.make_summary_prompt(), TOKENIZER)
    rows = [{"text": "late", "summary": "late"}, {"text": "late", "summary": target}]
    with pytest.raises(BadInputError, match=r"row 1: summary must not be empty, got .*give the row an answer, or leave it out"):
        encoder.answers(rows)
