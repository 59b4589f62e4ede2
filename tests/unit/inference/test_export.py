"""A release handed to others: the embeddings of a whole prompt give the answers of the Predictor on the plain model."""

import base64
import io
import json
import re

import pytest
import tiny
import torch
from safetensors.torch import load_file

from retune.errors import BadInputError
from retune.export import export
from retune.inference.predictor import Predictor
from retune.recorded import Recorded
from retune.records import Lineage
from retune.tuned import Tuned

ROWS = tiny.make_rows(8)
RECORDED = Recorded("ticket_priority", "a" * 64, 1, Lineage("", "", {}, "", False, ""))


def plain_logits(model, embeddings):
    with torch.no_grad():
        return model(inputs_embeds=embeddings[None]).logits[0, -1]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "gemma"])
@pytest.mark.parametrize("size", [0, 4])
def test_the_plain_model_on_prompt_embeddings_scores_labels_as_the_predictor(kind, size):
    """Labels of one token each, so that one position of the plain model holds all of their log-probabilities."""
    base = tiny.make_base(kind)
    labels = {"low": " late", "medium": " angry", "high": " urgent"}
    words = [base.tokenizer.convert_tokens_to_ids(word) for word in labels.values()]
    model = Predictor(base, tiny.make_prompt(labels=labels), tiny.tuned(tiny.make_soft_prompt(base, size)) if size else {})
    plain = tiny.make_model(kind, len(base.tokenizer))
    scores = model.score_labels(ROWS)
    for row, expected in zip(ROWS, scores, strict=True):
        embeddings = model.prompt_embeddings(row)
        tokens = len(base.tokenizer(tiny.TEMPLATE.format(**row)).input_ids)
        assert embeddings.shape == (size + tokens, base.hidden_size)
        torch.testing.assert_close(plain_logits(plain, embeddings).log_softmax(-1)[words], expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "gemma"])
def test_the_plain_model_on_prompt_embeddings_writes_the_same_text(kind):
    base = tiny.make_base(kind)
    model = Predictor(base, tiny.make_summary_prompt(), tiny.tuned(tiny.make_soft_prompt(base)))
    plain = tiny.make_model(kind, len(base.tokenizer))
    for row, expected in zip(ROWS, model.generate(ROWS), strict=True):
        ids = plain.generate(inputs_embeds=model.prompt_embeddings(row)[None], do_sample=False, max_new_tokens=12)[0]
        assert base.tokenizer.decode(ids, skip_special_tokens=True).strip() == expected


def test_prompt_embeddings_leave_room_for_the_answer():
    model = Predictor(tiny.make_base("llama", context=40), tiny.make_prompt(), {})
    with pytest.raises(BadInputError, match="row 0: prompt too long"):
        model.prompt_embeddings({"text": "broken router " * 40})
    with pytest.raises(BadInputError, match="row 0: no field 'text'"):
        model.prompt_embeddings({})


@pytest.fixture(params=["llama", "gemma"])
def exported(request, tmp_path, monkeypatch):
    """(folder, predictor, description) of an export; the working directory holds the base model where the prompt says."""
    base = tiny.save_base(tmp_path / "models/tiny", request.param)
    monkeypatch.chdir(tmp_path)
    prompt = tiny.make_summary_prompt(base_model=tiny.reference(base), template="<eos>Ticket: {text}\nSummary:\n")
    model = Predictor(base, prompt, tiny.tuned(tiny.make_soft_prompt(base)))
    folder = tmp_path / "out/exported"
    return folder, model, export(Tuned(RECORDED, model, tiny.make_soft_prompt(base)), folder)


def test_an_export_says_what_it_belongs_to(exported):
    folder, model, description = exported
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "export.json", "soft_prompt.safetensors"]
    assert json.loads((folder / "export.json").read_text("utf-8")) == description
    assert description["release"] == "a" * 64
    assert description["base_model"]["sha256"] == model.base.sha256
    assert description["tensor"]["shape"] == [4, 32]
    assert description["template"] == "<eos>Ticket: {text}\nSummary:"
    assert description["max_tokens"] == 12
    assert torch.equal(load_file(folder / "soft_prompt.safetensors")["soft_prompt"], model.soft_prompt)
    readme = (folder / "README.md").read_text("utf-8")
    assert model.base.sha256 in readme
    assert ("Gemma" in readme) == (description["base_model"]["architecture"] == "gemma")


def test_the_readmes_code_builds_the_request_without_retune(exported, monkeypatch):
    """Its embeddings are the Predictor's, and arrive as vLLM loads them: dense, two dimensions, a floating type, weights only."""
    folder, model, _ = exported
    code, send = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text("utf-8"), re.DOTALL)
    assert "retune" not in code + send
    compile(send, "README.md", "exec")
    monkeypatch.chdir(folder)
    scope = {}
    exec(code.replace("'models/tiny'", repr(str(folder.parents[1] / "models/tiny"))), scope)
    for row in ROWS:
        body = json.loads(json.dumps(scope["request"](text=row["text"])))
        tensor = torch.load(io.BytesIO(base64.b64decode(body["prompt_embeds"], validate=True)), weights_only=True)
        assert (tensor.layout, tensor.dtype) == (torch.strided, torch.float32)
        assert torch.equal(tensor, model.prompt_embeddings(row))
        assert (body["prompt"], body["max_tokens"], body["temperature"]) == ("", 12, 0.0)


def test_a_template_with_the_models_own_start_does_not_get_a_second_one(tmp_path, monkeypatch):
    tokenizer = tiny.make_tokenizer(bos=True)
    tiny.make_model("llama", len(tokenizer)).save_pretrained(tmp_path / "models/tiny")
    tokenizer.save_pretrained(tmp_path / "models/tiny")
    base = tiny.load_base(tmp_path / "models/tiny")
    for name, template in (("written", "<bos>{text}"), ("added", "{text}")):
        model = Predictor(
            base, tiny.make_summary_prompt(base_model=tiny.reference(base), template=template), tiny.tuned(tiny.make_soft_prompt(base))
        )
        export(Tuned(RECORDED, model, model.soft_prompt), tmp_path / name)
        code = re.findall(r"```python\n(.*?)```", (tmp_path / name / "README.md").read_text("utf-8"), re.DOTALL)[0]
        monkeypatch.chdir(tmp_path / name)
        scope = {}
        exec(code.replace("'models/tiny'", repr(str(tmp_path / "models/tiny"))), scope)
        assert torch.equal(scope["prompt_embeddings"](text="hot router"), model.prompt_embeddings({"text": "hot router"}))


def test_an_export_is_the_same_bytes_again_and_never_over_another_folder(exported):
    folder, model, _ = exported
    tuned = Tuned(RECORDED, model, model.soft_prompt)
    export(tuned, folder.with_name("again"))
    for path in folder.iterdir():
        assert (folder.with_name("again") / path.name).read_bytes() == path.read_bytes()
    with pytest.raises(BadInputError, match=r"--to must name a folder that does not exist yet, got .*exported"):
        export(tuned, folder)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["again", "exported"]


def test_a_model_of_the_hub_is_named_with_its_revision(llama, tmp_path):
    prompt = tiny.make_prompt(base_model={"hub": "org/name", "revision": "c" * 40})
    model = Predictor(llama, prompt, tiny.tuned(tiny.make_soft_prompt(llama)))
    description = export(Tuned(RECORDED, model, model.soft_prompt), tmp_path / "exported")
    assert description["base_model"]["revision"] == "c" * 40
    assert description["max_tokens"] == model.answer_tokens
    readme = (tmp_path / "exported/README.md").read_text("utf-8")
    assert f"vllm serve org/name --revision {'c' * 40} --enable-prompt-embeds" in readme
    assert f"AutoTokenizer.from_pretrained(MODEL, revision='{'c' * 40}')" in readme
    assert "words of a label" in readme
