"""Tiny random models with sharp weights, a tokenizer with byte fallback, prompts and rows: enough to tell right from almost right."""

import hashlib
import io
import json
import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pandas as pd
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

from retune.config import Prompt, canonical_json
from retune.dvc_files import EMPTY_DATA, REMOTE, entry, listing, lock_text, md5_of, object_name
from retune.inference.base_model import ARCHITECTURES, BaseModel, Family, load_base
from retune.inference.inputs import EncodedRow
from retune.records import Lineage
from retune.store import Store

PAD, EOS, BOS = "<pad>", "<eos>", "<bos>"
SHA = "0" * 64
WORDS = [
    "router",
    "printer",
    "tablet",
    "broken",
    "late",
    "angry",
    "refund",
    "urgent",
    "please",
    "today",
    "again",
    "never",
    "charged",
    "twice",
    "cracked",
    "slow",
    "hot",
]
TEMPLATE = "Ticket: {text}\nPriority:"


def make_tokenizer(bos: bool = False, family: Family = "decoder") -> PreTrainedTokenizerFast:
    """BPE on sentences of WORDS that keeps spaces as they are and spells what it does not know in bytes.

    An encoder's puts BOS and EOS around a text, an encoder-decoder's EOS behind it."""
    rng = random.Random(0)
    texts = [f"Ticket: {' '.join(rng.choices(WORDS, k=8))}\nPriority: {rng.choice(['low', 'medium', 'high'])}" for _ in range(200)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}|\s| ?[^\s\p{L}\p{N}]"), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    special = [PAD, EOS, BOS]
    raw = [*special, *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, special_tokens=raw, min_frequency=2, show_progress=False))
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = [x for x in spec["added_tokens"] if x["content"] in special]  # bytes are ordinary tokens
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    if family != "decoder":
        single = f"{BOS} $A {EOS}" if family == "encoder" else f"$A {EOS}"
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[(token, tokenizer.token_to_id(token)) for token in (BOS, EOS)]
        )
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, bos_token=BOS if bos else None)


def make_model(
    kind: str, vocab: int, dtype: torch.dtype = torch.float32, std: float = 0.3, context: int = 256, seed: int = 0, **more: Any
) -> Any:
    """32 wide, 2 layers, 4 heads. `std` is far above what training starts with: small mistakes show in the output."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {"vocab_size": vocab, "initializer_range": std, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    if kind == "gpt2":
        settings |= {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": context}
    elif ARCHITECTURES[kind] == "encoder":
        settings |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        settings |= {"max_position_embeddings": context}
    elif ARCHITECTURES[kind] == "encoder-decoder":
        settings |= {"d_model": 32, "num_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": 64, "decoder_start_token_id": 0}
        settings |= {"initializer_factor": std / 0.2}
    else:
        settings |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
        settings |= {"intermediate_size": 64, "max_position_embeddings": context}
    config = AutoConfig.for_model(kind, **(settings | more))
    if ARCHITECTURES[kind] == "encoder":
        model = AutoModel.from_config(config, add_pooling_layer=False)
    else:
        loader = AutoModelForCausalLM if ARCHITECTURES[kind] == "decoder" else AutoModelForSeq2SeqLM
        model = loader.from_config(config)
    return model.to(dtype).eval().requires_grad_(False)


def make_base(kind: str = "llama", **more: Any) -> BaseModel:
    """In memory, with a made-up hash."""
    tokenizer = make_tokenizer(family=ARCHITECTURES[kind])
    return BaseModel(make_model(kind, len(tokenizer), **more), tokenizer, SHA, "1" * 64)


def save_base(folder: Path, kind: str = "llama", **more: Any) -> BaseModel:
    tokenizer = make_tokenizer(family=ARCHITECTURES[kind])
    make_model(kind, len(tokenizer), **more).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_base(folder)


def make_prompt(**changes: Any) -> Prompt:
    """A classification prompt; `changes` replace its sections."""
    raw: dict[str, Any] = {
        "name": "ticket_priority",
        "task": "classification",
        "base_model": {"path": "models/tiny", "sha256": SHA},
        "source": "landing",
        "template": TEMPLATE,
        "target": "label",
        "labels": {"low": " low", "medium": " medium", "high": " high"},
        "tune": {"num_virtual_tokens": 4},
    }
    return Prompt.model_validate(raw | changes)


def make_summary_prompt(**changes: Any) -> Prompt:
    return make_prompt(task="generation", labels={}, target="summary", generation={"max_new_tokens": 12}, **changes)


def make_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Texts of 1 to 20 words, of which the label is a function."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        words = rng.choices(WORDS, k=rng.randint(1, 20))
        label = "high" if "urgent" in words else "medium" if "angry" in words else "low"
        rows.append({"text": " ".join(words), "label": label, "summary": " ".join(words[:3])})
    return rows


def make_soft_prompt(base: BaseModel, size: int = 4, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, base.hidden_size, generator=generator) * 0.5


def tuned(soft: torch.Tensor) -> dict[str, torch.Tensor]:
    """A soft prompt as a release holds it."""
    return {"prompt_embeddings": soft}


def reseal(folder: Path) -> None:
    """Makes a release's manifest agree with its files, as somebody who means to deceive would."""
    file = folder / "manifest.json"
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file() and p != file}
    hashes = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    file.write_bytes(canonical_json(json.loads(file.read_bytes()) | {"files": hashes}))


def reference(base: BaseModel, path: str = "models/tiny") -> dict[str, str]:
    return {"path": path, "sha256": base.sha256}


def padded(rows: Sequence[EncodedRow], side: Literal["left", "right"]) -> Any:
    """A batch as PEFT and transformers take it: ids, mask and labels, [B, T]."""
    width = max(len(row) for row in rows)
    batch = SimpleNamespace(ids=[], mask=[], labels=[])
    for row in rows:
        pads = width - len(row)
        before, after = (pads, 0) if side == "left" else (0, pads)
        batch.ids.append([0] * before + [*row.prompt, *row.answer] + [0] * after)
        batch.mask.append([0] * before + [1] * len(row) + [0] * after)
        batch.labels.append([-100] * (before + len(row.prompt)) + [*row.answer] + [-100] * after)
    return SimpleNamespace(**{name: torch.tensor(value) for name, value in vars(batch).items()})


def lineage(store: Store, release: Path, **tables: pd.DataFrame) -> Lineage:
    """What the stages of prompt p would have left of a release and the tables of its dataset, in the store."""
    contents = {path.relative_to(release).as_posix(): path.read_bytes() for path in release.rglob("*") if path.is_file()}
    folder = listing({name: md5_of(content) for name, content in contents.items()})
    md5 = f"{md5_of(folder)}.dir"
    store.put(f"{REMOTE}/{object_name(md5)}", folder)
    outs = []
    for name, table in tables.items():
        stream = io.BytesIO()
        table.to_parquet(stream, index=False)
        outs.append(entry(f"artifacts/p/dataset/{name}.parquet", stream.getvalue()))
        store.put(f"{REMOTE}/{object_name(md5_of(stream.getvalue()))}", stream.getvalue())
    for content in contents.values():
        store.put(f"{REMOTE}/{object_name(md5_of(content))}", content)
    out = {"path": "artifacts/p/release", "hash": "md5", "md5": md5}
    return Lineage(EMPTY_DATA, lock_text({"preprocess@p": {"outs": outs}, "tune@p": {"outs": [out]}}), {}, "", False, "")
