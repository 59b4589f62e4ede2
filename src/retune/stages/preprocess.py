"""Stage preprocess: dataset parts in, three splits and a profile out.

Reads::

    data/<prompt>/*.parquet        parts as ingest wrote them
    artifacts/<prompt>/prompt.yaml resolved

Writes::

    artifacts/<prompt>/dataset/
        train.parquet  validation.parquet  test.parquet
        report.json                rows in and out, duplicates, contradictions, lengths; the base model's family
        profile.html               the same as a page
        inputs.json                hashes of what the splits were made from

Raises: BadInputError without rows or with an empty split. Retry: safe; the folder appears whole or not at all.
"""

import hashlib
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from retune.config import Prompt, sha256_json
from retune.data.parts import read_parts
from retune.data.preprocess import preprocess
from retune.data.profile import profile_page
from retune.errors import BadInputError
from retune.inference.base_model import ARCHITECTURES, check_harmless, find_base_model
from retune.stages import run_stage, whole_folder


def main(prompt: Prompt) -> None:
    parts = sorted(Path(f"data/{prompt.name}").glob("*.parquet"))
    if not parts:
        raise BadInputError(f"data/{prompt.name} holds no rows; land files in {prompt.source.path} and run the DAG `ingest`")
    folders = [Path(p) for p in os.environ.get("RETUNE_BASE_MODELS", "").split(os.pathsep) if p]
    model = find_base_model(prompt.base_model, Path.cwd(), folders)
    check_harmless(model)
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    result = preprocess(read_parts(parts), prompt, partial(_token_lengths, tokenizer))
    kind = json.loads((model / "config.json").read_text("utf-8"))["model_type"]
    report = result.report | {"base_model_family": ARCHITECTURES.get(kind)}
    splits = {"train": result.train, "validation": result.validation, "test": result.test}
    for name, frame in splits.items():
        print(f"{name}: {len(frame)} rows", flush=True)
        if frame.empty:
            raise BadInputError(
                f"the {name} split of {prompt.name} is empty with {report['rows']} rows; land more or widen preprocess.splits.{name}"
            )
    with whole_folder(Path(f"artifacts/{prompt.name}/dataset")) as folder:
        for name, frame in splits.items():
            frame.to_parquet(folder / f"{name}.parquet", index=False)
        (folder / "report.json").write_text(json.dumps(report, indent=1, sort_keys=True, ensure_ascii=False), "utf-8")
        (folder / "profile.html").write_text(profile_page(report, prompt), "utf-8")
        inputs = {
            "data": sha256_json({part.name: hashlib.sha256(part.read_bytes()).hexdigest() for part in parts}),
            "preprocess": sha256_json(prompt.preprocess.model_dump(mode="json")),
        }
        (folder / "inputs.json").write_text(json.dumps(inputs, sort_keys=True), "utf-8")


def _token_lengths(tokenizer: Any, texts: list[str]) -> list[int]:
    # Counted where the tokens are made: as Python's lists they take several times as long.
    if tokenizer.is_fast and not (tokenizer.backend_tokenizer.truncation or tokenizer.backend_tokenizer.padding):
        return [len(encoding) for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    return [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


if __name__ == "__main__":
    run_stage(main)
