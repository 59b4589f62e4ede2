import hashlib
import json
import os
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file, save

from retune.config import canonical_json
from retune.errors import BadInputError, IntegrityError
from retune.inference.release import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MANIFEST, PROMPT, read_release, write_release

INPUTS = {"data": "d" * 64, "code": "c" * 64}


def write(folder, base, soft=None, inputs=INPUTS, **changes):
    tensors = tiny.tuned(tiny.make_soft_prompt(base) if soft is None else soft)
    return write_release(folder, tiny.make_prompt(**changes), tensors, base, inputs)


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_release_reads_back_as_written(llama, tmp_path):
    soft = tiny.make_soft_prompt(llama)
    release_id = write(tmp_path / "r", llama, soft)
    release = read_release(tmp_path / "r", release_id)
    assert release.id == release_id == hashlib.sha256((tmp_path / "r" / MANIFEST).read_bytes()).hexdigest()
    assert torch.equal(release.tensors["prompt_embeddings"], soft)
    assert release.prompt == tiny.make_prompt()
    assert release.inputs == INPUTS
    assert (release.base_sha256, release.tokenizer_sha256) == (llama.sha256, llama.tokenizer_sha256)


def test_the_manifest_is_canonical_and_names_every_other_file(llama, tmp_path):
    write(tmp_path / "r", llama)
    raw = (tmp_path / "r" / MANIFEST).read_bytes()
    manifest = json.loads(raw)
    assert canonical_json(manifest) == raw
    files = contents(tmp_path / "r")
    del files[MANIFEST]
    assert set(files) == {PROMPT, ADAPTER_CONFIG, ADAPTER_WEIGHTS}
    assert manifest["files"] == {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    assert manifest["base_model"] == {"path": "models/tiny", "sha256": llama.sha256, "tokenizer_sha256": llama.tokenizer_sha256}
    assert set(manifest) == {"format_version", "files", "base_model", "inputs"}


def test_the_same_inputs_give_the_same_bytes_anywhere(llama, tmp_path):
    one = write(tmp_path / "a", llama)
    two = write(tmp_path / "deep/er/b", llama, inputs=dict(reversed(INPUTS.items())))
    assert one == two
    assert contents(tmp_path / "a") == contents(tmp_path / "deep/er/b")
    assert str(tmp_path).encode() not in b"".join(contents(tmp_path / "a").values())


@pytest.mark.parametrize(
    "changes",
    [{"inputs": {"data": "e" * 64}}, {"template": "{text}:"}, {"labels": {"high": " high", "low": " low"}}, {"soft": 0.0}],
    ids=["inputs", "template", "label order", "tensor"],
)
def test_whatever_counts_changes_the_id(llama, tmp_path, changes):
    if "soft" in changes:
        changes = {"soft": torch.zeros(4, llama.hidden_size)}
    assert write(tmp_path / "a", llama) != write(tmp_path / "b", llama, **changes)


def test_the_order_of_labels_survives(llama, tmp_path):
    labels = {"zebra": " high", "ant": " low", "Österreich": " medium"}
    write(tmp_path / "r", llama, labels=labels)
    assert list(read_release(tmp_path / "r").prompt.labels.items()) == list(labels.items())


def test_the_template_alone_has_no_adapter(llama, tmp_path):
    prompt = tiny.make_prompt(tune={"method": "none"})
    release_id = write_release(tmp_path / "r", prompt, {}, llama, INPUTS)
    assert set(contents(tmp_path / "r")) == {MANIFEST, PROMPT}
    assert read_release(tmp_path / "r", release_id).tensors == {}


def test_a_hub_model_is_recorded_with_its_revision(llama, tmp_path):
    write(tmp_path / "r", llama, base_model={"hub": "acme/tiny", "revision": "a" * 40})
    release = read_release(tmp_path / "r")
    assert release.manifest["base_model"]["revision"] == "a" * 40
    config = json.loads((tmp_path / "r" / ADAPTER_CONFIG).read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("acme/tiny", "a" * 40)


def test_writing_again_is_harmless_and_writing_over_another_is_refused(llama, tmp_path):
    first = write(tmp_path / "r", llama)
    assert write(tmp_path / "r", llama) == first
    with pytest.raises(BadInputError, match=r"exists and is not the release .* remove it first"):
        write(tmp_path / "r", llama, inputs={})
    assert read_release(tmp_path / "r", first)


def test_a_failed_write_leaves_nothing(llama, tmp_path, monkeypatch):
    def full(self, content):
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space"):
        write(tmp_path / "r", llama)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("soft", "changes", "message"),
    [
        (torch.zeros(3, 32), {}, r"prompt_embeddings must be \[4, 32\], got \[3, 32\]"),
        (torch.zeros(4, 31), {}, r"prompt_embeddings must be \[4, 32\], got \[4, 31\]"),
        (torch.full((4, 32), torch.nan), {}, "not finite"),
        (torch.zeros(4, 32), {"tune": {"method": "none"}}, "tune.method none: must hold no tensor"),
        (torch.zeros(4, 32), {"base_model": {"path": "x", "sha256": "9" * 64}}, "base_model.sha256 must be that of the model used"),
    ],
)
def test_a_soft_prompt_that_does_not_fit_is_not_written(llama, tmp_path, soft, changes, message):
    with pytest.raises(BadInputError, match=message):
        write(tmp_path / "r", llama, soft, **changes)
    assert not (tmp_path / "r").exists()


def replace_tensor(folder, change, name="prompt_embeddings"):
    tensor = load_file(folder / ADAPTER_WEIGHTS)["prompt_embeddings"]
    (folder / ADAPTER_WEIGHTS).write_bytes(save({name: change(tensor)}, metadata={"format": "pt"}))
    tiny.reseal(folder)


def flip_last_byte(folder):
    raw = bytearray((folder / ADAPTER_WEIGHTS).read_bytes())
    raw[-1] ^= 1
    (folder / ADAPTER_WEIGHTS).write_bytes(raw)


def edit_json(folder, name, sealed=True, **changes):
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))
    if sealed:
        tiny.reseal(folder)


def edit_prompt(folder, **changes):
    (folder / PROMPT).write_text(yaml.safe_dump(yaml.safe_load((folder / PROMPT).read_text()) | changes))
    tiny.reseal(folder)


def link_out(folder):
    (folder / PROMPT).rename(folder.parent / "elsewhere")
    (folder / "adapter/link").symlink_to(folder.parent)


LAUGHS = "a: &a [x, x]\n" + "".join(f"b{n}: &b{n} [{', '.join(['*' + (f'b{n - 1}' if n else 'a')] * 9)}]\n" for n in range(12))
TAMPERED = {
    "changed tensor byte": (flip_last_byte, "sha256 must be"),
    "NaN tensor": (lambda f: replace_tensor(f, lambda t: t.index_fill(0, torch.tensor([1]), torch.nan)), "not finite"),
    "infinite tensor": (lambda f: replace_tensor(f, lambda t: t / 0), "not finite"),
    "wrong hidden size": (lambda f: replace_tensor(f, lambda t: t[:, :-1].contiguous()), r"must be \[4, 32\].*got \[4, 31\]"),
    "wrong number of tokens": (lambda f: replace_tensor(f, lambda t: t[:3].contiguous()), r"must be \[4, 32\].*got \[3, 32\]"),
    "wrong dtype": (lambda f: replace_tensor(f, lambda t: t.half()), "torch.float32, got .* of torch.float16"),
    "wrong tensor name": (lambda f: replace_tensor(f, lambda t: t, "weight"), "must hold prompt_embeddings alone"),
    "not safetensors": (
        lambda f: ((f / ADAPTER_WEIGHTS).write_bytes(b"\x80\x04pickle"), tiny.reseal(f)),
        "does not hold what method prompt_tuning releases",
    ),
    "adapter of another size": (
        lambda f: edit_json(f, ADAPTER_CONFIG, num_virtual_tokens=5),
        "num_virtual_tokens must be 4 for method prompt_tuning, got 5",
    ),
    "adapter of another kind": (lambda f: edit_json(f, ADAPTER_CONFIG, peft_type="LORA"), "peft_type must be PROMPT_TUNING"),
    "adapter config damaged": (
        lambda f: ((f / ADAPTER_CONFIG).write_text("{"), tiny.reseal(f)),
        "does not hold what method prompt_tuning releases",
    ),
    "missing file": (lambda f: (f / ADAPTER_CONFIG).unlink(), f"files missing: {ADAPTER_CONFIG}"),
    "missing file, manifest too": (lambda f: ((f / ADAPTER_CONFIG).unlink(), tiny.reseal(f)), "must have the files"),
    "extra file": (lambda f: (f / "notes.txt").write_text("x"), "files too many: notes.txt"),
    "extra file, manifest too": (lambda f: ((f / "notes.txt").write_text("x"), tiny.reseal(f)), "must have the files"),
    "link to a folder": (link_out, "files too many: adapter/link"),
    "prompt edited": (lambda f: (f / PROMPT).write_text((f / PROMPT).read_text().replace("Ticket", "Docket")), "sha256 must be"),
    "prompt of another model": (lambda f: edit_prompt(f, base_model={"path": "other", "sha256": tiny.SHA}), "different base models"),
    "prompt that fills memory": (lambda f: ((f / PROMPT).write_text(LAUGHS), tiny.reseal(f)), "must hold at most 100,000 values"),
    "prompt without template": (lambda f: edit_prompt(f, template="x"), "not a resolved prompt"),
    "method without adapter": (lambda f: edit_prompt(f, tune={"method": "none"}), "method none must have the files"),
    "manifest damaged": (lambda f: (f / MANIFEST).write_bytes(b"{"), "manifest.json is damaged"),
    "manifest not canonical": (lambda f: edit_json(f, MANIFEST, sealed=False), "manifest.json is damaged"),
    "manifest of a list": (lambda f: (f / MANIFEST).write_bytes(b"[]"), "manifest.json is damaged"),
    "manifest with a path out": (
        lambda f: (f / MANIFEST).write_bytes(
            (f / MANIFEST).read_bytes().replace(b'"files":{', b'"files":{"../prompt.yaml":"' + b"a" * 64 + b'",')
        ),
        "files missing: ../prompt.yaml",
    ),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_a_tampered_release_is_refused(llama, tmp_path, case):
    change, message = TAMPERED[case]
    write(tmp_path / "r", llama)
    change(tmp_path / "r")
    with pytest.raises(IntegrityError, match=message):
        read_release(tmp_path / "r")


def test_every_single_byte_of_a_release_counts_against_its_id(llama, tmp_path):
    release_id = write(tmp_path / "r", llama)
    for name, content in contents(tmp_path / "r").items():
        for at in range(0, len(content), max(1, len(content) // 25)):
            (tmp_path / "r" / name).write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            with pytest.raises(IntegrityError):
                read_release(tmp_path / "r", release_id)
        (tmp_path / "r" / name).write_bytes(content)
    assert read_release(tmp_path / "r", release_id)


def test_another_release_than_the_expected_one_is_refused(llama, tmp_path):
    found = write(tmp_path / "r", llama)
    with pytest.raises(IntegrityError, match=f"the release must be {'a' * 64}, got {found}"):
        read_release(tmp_path / "r", "a" * 64)


def test_a_folder_without_a_release_and_a_newer_format_are_named(llama, tmp_path):
    with pytest.raises(BadInputError, match="holds no release"):
        read_release(tmp_path)
    write(tmp_path / "r", llama)
    manifest = json.loads((tmp_path / "r" / MANIFEST).read_bytes())
    (tmp_path / "r" / MANIFEST).write_bytes(canonical_json(manifest | {"format_version": 2}))
    with pytest.raises(BadInputError, match="format_version must be 1, got 2; use a newer Retune"):
        read_release(tmp_path / "r")


def test_the_folder_gets_the_mode_that_others_get(llama, tmp_path):
    before = os.umask(0o027)
    try:
        write(tmp_path / "r", llama)
    finally:
        os.umask(before)
    assert (tmp_path / "r").stat().st_mode & 0o777 == 0o750
