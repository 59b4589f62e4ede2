"""A release for vLLM: its soft prompt as a file, and how to build a request of it.

vLLM's `prompt_embeds` (`vllm serve --enable-prompt-embeds`) is the whole prompt of a request, [tokens, hidden size], in the space of the
base model's input embeddings: the base64 of what `torch.save` writes, which vLLM reads with `weights_only=True`. So a request holds the
soft prompt and, after it, the embeddings of the rendered template's tokens, which is `Predictor.prompt_embeddings`.

    soft_prompt.safetensors    `soft_prompt` [P, H], fp32
    export.json                release, base model with hashes, template, labels, generation settings
    README.md                  code that builds a request without Retune
"""

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import save

from retune.errors import BadInputError
from retune.tuned import Tuned

__all__ = ["TENSOR", "export"]

TENSOR_FILE, DESCRIPTION, README = "soft_prompt.safetensors", "export.json", "README.md"
TENSOR = "soft_prompt"


def export(tuned: Tuned, folder: Path) -> dict[str, Any]:
    """Writes the folder, which must not exist yet and appears whole or not at all; returns what export.json holds.

    The same release gives the same bytes. Raises BadInputError if the folder exists.
    """
    if folder.exists():
        raise BadInputError(f"--to must name a folder that does not exist yet, got {folder}")
    tensor = save({TENSOR: tuned.soft_prompt.float().cpu().contiguous()}, metadata={"format": "pt"})
    description = _description(tuned, hashlib.sha256(tensor).hexdigest())
    files = {
        TENSOR_FILE: tensor,
        DESCRIPTION: (json.dumps(description, indent=2, ensure_ascii=False) + "\n").encode(),
        README: _readme(tuned, description).encode(),
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        written = Path(scratch) / folder.name
        written.mkdir()
        for name, content in files.items():
            (written / name).write_bytes(content)
        shutil.move(written, folder)
    return description


def _description(tuned: Tuned, sha256: str) -> dict[str, Any]:
    prompt, base = tuned.predictor.prompt, tuned.predictor.base
    return {
        "prompt": prompt.name,
        "release": tuned.recorded.release,
        "task": prompt.task,
        "base_model": {
            **prompt.base_model.model_dump(mode="json", exclude_none=True),
            "sha256": base.sha256,
            "tokenizer_sha256": base.tokenizer_sha256,
            "architecture": base.model.config.model_type,
        },
        "tensor": {"file": TENSOR_FILE, "name": TENSOR, "shape": list(tuned.soft_prompt.shape), "dtype": "float32", "sha256": sha256},
        "template": prompt.template.removesuffix("\n"),
        "inputs": list(prompt.inputs),
        "max_tokens_of_an_input": prompt.preprocess.max_tokens,
        "labels": dict(prompt.labels),
        "max_tokens": tuned.predictor.answer_tokens,
        "temperature": 0.0 if prompt.labels else prompt.generation.temperature,
    }


def _readme(tuned: Tuned, description: dict[str, Any]) -> str:
    prompt, model = tuned.predictor.prompt, description["base_model"]
    name, revision = prompt.base_model.hub or prompt.base_model.path, prompt.base_model.revision
    pinned = f", revision={revision!r}" if revision else ""
    tokens, hidden_size = description["tensor"]["shape"]
    fields = ", ".join(f"{field}=..." for field in prompt.inputs)
    answer = (
        f"The answer begins with the words of a label (`labels` in `{DESCRIPTION}`). Retune compares the probabilities of whole\n"
        "labels instead of writing token by token: where two labels are close, the two may differ."
        if prompt.labels
        else "Length and temperature are those of the release."
    )
    scaled = (
        "\n- Gemma scales its embeddings. This code takes them scaled, as transformers 5.4 and later gives them; vLLM before its pull\n"
        "  request 36787 (March 2026) would scale them once more."
        if model["architecture"] == "gemma"
        else ""
    )
    return f"""# {prompt.name}, release {tuned.recorded.release[:12]}, for vLLM

A soft prompt of {tokens} virtual tokens for the base model `{name}`{f" at revision `{revision}`" if revision else ""}
(sha256 `{model["sha256"]}`).
It means nothing on any other model, nor on another size or revision of it.

```bash
vllm serve {name}{f" --revision {revision}" if revision else ""} --enable-prompt-embeds --dtype float32
```

Retune computes in float32. A lower `--dtype` is faster and may change an answer here and there: measure it on your own rows. vLLM may crash
on embeddings of a wrong shape, so open such a server to trusted users only.

## A request

The prompt of a request is the soft prompt and, after it, the embeddings of the template's tokens. Run this in this folder:

```python
import base64
import io

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

MODEL = {name!r}  # {"the same one" if revision else "its folder, as seen from here"}
TEMPLATE = {description["template"]!r}

tokenizer = AutoTokenizer.from_pretrained(MODEL{pinned})
embed = AutoModelForCausalLM.from_pretrained(MODEL{pinned}, dtype=torch.float32).get_input_embeddings()
soft_prompt = load_file({TENSOR_FILE!r})[{TENSOR!r}]  # [{tokens}, {hidden_size}]


@torch.no_grad()
def prompt_embeddings(**fields):
    start = tokenizer("").input_ids[:1]
    start = start if start == [tokenizer.bos_token_id] else []
    ids = tokenizer(TEMPLATE.format(**fields), add_special_tokens=False).input_ids
    ids = ids if ids[: len(start)] == start else start + ids
    return torch.cat([soft_prompt, embed(torch.tensor(ids))])  # [{tokens} + tokens of the template, {hidden_size}]


def request(**fields):
    stream = io.BytesIO()
    torch.save(prompt_embeddings(**fields), stream)
    encoded = base64.b64encode(stream.getvalue()).decode()
    return {{
        "model": {name!r},  # as `vllm serve` was given it
        "prompt": "",
        "prompt_embeds": encoded,
        "max_tokens": {description["max_tokens"]},
        "temperature": {description["temperature"]},
    }}
```

```python
import json
import urllib.request

body = json.dumps(request({fields})).encode()
call = urllib.request.Request("http://localhost:8000/v1/completions", body, {{"Content-Type": "application/json"}})
print(json.load(urllib.request.urlopen(call))["choices"][0]["text"])
```

{answer}

- This code takes a text as it is. Retune also cleans it as its training data were cleaned, cuts each input to
  {description["max_tokens_of_an_input"]} tokens, and reads special tokens in a user's text as plain text. In Python, all of that is
  `retune.inference.predictor.Predictor.load(release_folder, [base_models]).prompt_embeddings(row)`, to be encoded as above.{scaled}
"""
