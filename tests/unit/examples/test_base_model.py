"""The committed base model is the one that the prompt names, reads any text, and has not been told the task."""

import hashlib
import json
from itertools import islice
from pathlib import Path
from typing import Any

import base_model
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

WORDS = 8
"""Words that an example row begins with, by which it is looked for."""


@pytest.fixture(scope="module")
def folder(examples: Path) -> Path:
    return examples / "base_model"


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def read() -> list[base_model.Document]:
    """Every document that the committed training run has read."""
    return [
        *islice(base_model.documents("tokenizer"), base_model.TOKENIZER_DOCUMENTS),
        *islice(base_model.documents("model"), base_model.STEPS * base_model.BATCH),
    ]


def plain(text: str) -> str:
    return " ".join(text.casefold().split())


@pytest.mark.parametrize("name", ["ticket_priority", "ticket_summary"])
def test_the_prompt_names_the_folder_by_its_hash(folder: Path, examples: Path, name: str) -> None:
    names = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    hashes = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    prompt = yaml.safe_load((examples.parent / f"prompts/{name}.yaml").read_text("utf-8"))

    assert sorted(p.name for p in folder.iterdir()) == sorted([*names, "README.md"])
    assert prompt["base_model"]["sha256"] == hashlib.sha256(json.dumps(hashes, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    assert prompt["base_model"]["sha256"] == base_model.folder_sha256(folder)


def test_the_committed_model_is_of_the_run_that_the_script_describes(folder: Path) -> None:
    text = (folder / "README.md").read_text("utf-8")

    assert f"{base_model.STEPS:,} steps of {base_model.BATCH} made-up documents, seed {base_model.SEED}" in text


def test_it_loads_as_a_llama_that_writes_each_label_in_one_token(folder: Path, tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)

    assert model.config.model_type == "llama"
    assert model.config.vocab_size == len(tokenizer)
    assert [len(tokenizer(f" {label}")["input_ids"]) for label in ("low", "medium", "high")] == [1, 1, 1]


@pytest.mark.parametrize("text", ["<eos>", "a <pad> b", "  Größe\t5 µm,\r\n“x” 日本 🙂\x00", "e\u0301", "<0x41>", "\u200b\ufeff", " ", ""])
def test_any_text_survives_and_is_never_a_special_token(text: str, tokenizer: Any) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]

    assert tokenizer.decode(ids) == text
    assert not {tokenizer.eos_token_id, tokenizer.pad_token_id} & set(ids)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(text=st.text())
def test_made_up_text_survives(text: str, tokenizer: Any) -> None:
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_documents_never_ask_for_urgency_together_with_anger(read: list[base_model.Document]) -> None:
    instructions = {line for document in read for text, answer in document if not answer for line in text.split("\n") if "Take the" in line}

    assert "Take the higher of urgency and value." in instructions
    assert not [line for line in instructions if "urgency" in line and "anger" in line]
    assert not any("priority" in text.casefold() for document in read for text, _ in document)


def test_answers_never_name_product_problem_and_request_together(read: list[base_model.Document]) -> None:
    answers = {text for document in read for text, answer in document if answer}

    assert " router: overheats" in answers
    assert " overheats; customer wants a refund" in answers
    assert not [text for text in answers if ": " in text and "; " in text]
    assert not any("summary" in text.casefold() for document in read for text, _ in document)


def test_documents_hold_no_text_of_the_example_rows(
    read: list[base_model.Document],
    landed: dict[str, list[dict[str, str | None]]],
    summarised: dict[str, list[dict[str, str | None]]],
) -> None:
    files = [*landed.values(), *summarised.values()]
    rows = {plain(row.get("text") or "") for rows in files for row in rows}
    by_start: dict[tuple[str, ...], list[str]] = {}
    for text in rows:
        if len(text) > 5:  # a lone "ok" is in every other text
            by_start.setdefault(tuple(text.split()[:WORDS]), []).append(text)

    assert min(map(len, by_start)) == WORDS
    for document in read:
        ticket = plain(document[0][0])
        words = ticket.split()
        for i in range(len(words) - WORDS + 1):
            assert not [text for text in by_start.get(tuple(words[i : i + WORDS]), ()) if text in ticket]
