"""The frozen language model: found by hash or revision, verified, loaded without running foreign code."""

import fnmatch
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from retune.config import canonical_json
from retune.errors import BadInputError, ConfigError
from retune.inference.precision import fast_bf16, multiply_in_fp32
from retune.policy import BaseModelRef

__all__ = [
    "ARCHITECTURES",
    "BaseModel",
    "Family",
    "base_sha256",
    "check_harmless",
    "find_base_model",
    "folder_sha256",
    "load_base",
    "open_base_model",
    "set_threads",
    "tokenizer_sha256",
]

Family = Literal["decoder", "encoder", "encoder-decoder"]

ARCHITECTURES: Mapping[str, Family] = MappingProxyType(
    {
        **dict.fromkeys(("gemma", "gpt2", "llama", "mistral", "olmo2", "qwen2", "qwen3", "smollm3"), "decoder"),
        **dict.fromkeys(("bert", "roberta", "xlm-roberta"), "encoder"),
        **dict.fromkeys(("mt5", "t5"), "encoder-decoder"),
    }
)
"""`model_type` of the models that may be loaded, and how each reads.

Of a decoder the answer's logits are the output embedding of the last hidden state and nothing more (no soft-capping, no scaling), and
positions are taken from `position_ids`. A test holds each of them to that."""

HUB_WEIGHTS = ("config.json", "*.safetensors", "model.safetensors.index.json")
"""Files that make the hash of a hub model. The revision pins the rest, and a cache need not hold all of it."""
VOCABULARIES = ("vocab.json", "merges.txt", "tokenizer.model", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
"""Files that decide how text becomes tokens, where there is no tokenizer.json."""
HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")
VARIABLE = "RETUNE_BASE_MODELS"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BaseModel:
    model: Any = field(repr=False)
    """A transformers model in eval mode (of an encoder its body alone), no parameter requires a gradient."""
    tokenizer: Any = field(repr=False)
    """A transformers tokenizer with a `tokenizers` backend."""
    sha256: str
    tokenizer_sha256: str
    head: tuple[torch.Tensor, torch.Tensor] | None = field(default=None, repr=False)
    """Of an encoder: what classifies, weight [C, H] and bias [C]. It is tuned, and is no part of the model's folder."""

    @property
    def family(self) -> Family:
        return ARCHITECTURES[self.model.config.model_type]

    @property
    def hidden_size(self) -> int:
        """H."""
        return int(self.model.get_input_embeddings().weight.shape[1])

    @property
    def context(self) -> int:
        """Largest number of positions, soft prompt included; within it every token sees all before it, sliding windows notwithstanding.

        Of an encoder-decoder: of its input."""
        config = self.model.config
        if self.family == "encoder-decoder":  # positions are relative: it is what the model was trained with
            return int(getattr(config, "n_positions", None) or 512)
        most = int(config.max_position_embeddings) - self.first_position
        return min(most, getattr(config, "sliding_window", None) or most)

    @property
    def first_position(self) -> int:
        """Position of a row's first token."""
        return int(self.model.config.pad_token_id) + 1 if self.model.config.model_type in ("roberta", "xlm-roberta") else 0

    @property
    def vocabulary(self) -> int:
        """V, rows of the output embedding."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    @property
    def dtype(self) -> torch.dtype:
        """Of the hidden states."""
        return self.embed(torch.zeros(0, dtype=torch.long, device=self.device)).dtype

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    @property
    def eos_id(self) -> int | None:
        """Token that training writes after an answer; None where the tokenizer has no end of sequence."""
        eos = self.tokenizer.eos_token_id
        return None if eos is None else int(eos)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end a generated answer: the tokenizer's and those of the model's generation settings."""
        settings = getattr(self.model, "generation_config", None)
        more = getattr(settings, "eos_token_id", None)
        ids = [] if more is None else list(more) if isinstance(more, list | tuple) else [more]
        return frozenset(int(i) for i in [*ids, self.eos_id] if i is not None)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: [...] -> [..., H], as the model itself embeds them (some scale inside the module)."""
        vectors: torch.Tensor = self.model.get_input_embeddings()(ids)
        return vectors


def folder_sha256(path: Path, patterns: Sequence[str] | None = None) -> str:
    """sha256 over names and contents of a folder's files, README.md and hidden ones apart.

    It is the hash of the canonical JSON {relative posix path: sha256 of the file}, so neither times nor modes nor order count.

    patterns: only files at the top of the folder whose name matches one of them.

    Raises BadInputError if there is no such folder or no file in it.
    """
    if not path.is_dir():
        raise BadInputError(f"no base model folder {path}")
    files = {}
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path)
        if not file.is_file() or name.name == "README.md" or any(part.startswith(".") for part in name.parts):
            continue
        if patterns is not None and (len(name.parts) > 1 or not any(fnmatch.fnmatch(name.name, p) for p in patterns)):
            continue
        files[name.as_posix()] = _file_sha256(file)
    if not files:
        raise BadInputError(f"the base model folder {path} holds no files")
    return hashlib.sha256(canonical_json(files)).hexdigest()


def base_sha256(path: Path, ref: BaseModelRef) -> str:
    """Hash of a base model's folder: all of it for a local one, configuration and weights for one of the hub."""
    return folder_sha256(path, HUB_WEIGHTS if ref.hub else None)


def tokenizer_sha256(path: Path) -> str:
    """Hash of the files that decide how text becomes tokens."""
    names = ("tokenizer.json",) if (path / "tokenizer.json").is_file() else VOCABULARIES
    return folder_sha256(path, (*names, "tokenizer_config.json"))


def find_base_model(ref: BaseModelRef, project: Path | None = None, folders: Sequence[Path] = ()) -> Path:
    """Folder of the base model that `ref` names, its hash verified where `ref` holds one.

    A local one is looked up at its path in the project, then in each of `folders`: the folder itself and the folders directly in it. One
    of the hub is looked up in each of `folders` as a Hugging Face cache, then in the user's own, and is downloaded only if it is in none
    and HF_HUB_OFFLINE is not set.

    Raises BadInputError naming what was looked for and the way out.
    """
    return _find_hub(ref.hub, ref.revision, folders) if ref.hub else _find_local(ref, project, folders)


def open_base_model(
    ref: BaseModelRef, project: Path | None = None, folders: Sequence[Path] = (), dtype: torch.dtype = torch.float32
) -> BaseModel:
    """Finds, verifies and loads the base model that `ref` names. Raises as `find_base_model` and `load_base` do."""
    path = find_base_model(ref, project, folders)
    return load_base(path, base_sha256(path, ref), dtype=dtype)


def _device(environ: Mapping[str, str] = os.environ) -> str:
    """RETUNE_DEVICE where it is set: cpu, cuda, cuda:N, or sharded (a model that no single GPU holds, laid over all of them by
    Accelerate). Else the process's own GPU where there is one, else cpu."""
    own = f"cuda:{environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    return environ.get("RETUNE_DEVICE") or own


def load_base(path: Path, sha256: str | None = None, device: str | None = None, dtype: torch.dtype = torch.float32) -> BaseModel:
    """Loads a model and its tokenizer from a folder, frozen, in eval mode.

    Only safetensors are read, and no code that the folder holds or names runs: the architecture is one of those that are known here before
    transformers sees the folder, whose own settings (`auto_map`, an attention kernel of the hub, an adapter) turn nothing on.

    sha256: the folder's hash as already verified; None: computed here over the whole folder. device: cpu, cuda, cuda:N or sharded;
    None: what RETUNE_DEVICE says, else the GPU if there is one.
    dtype: of the weights. Where the processor multiplies bf16 no faster than fp32, it does so in fp32.

    Raises BadInputError if the architecture is unknown, weights are missing, or the tokenizer has no `tokenizers` backend.
    """
    set_threads()
    sha256 = sha256 or folder_sha256(path)
    check_harmless(path)
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    place = device or _device()
    settings: dict[str, Any] = {"device_map": "balanced"} if place == "sharded" else {}
    family = ARCHITECTURES[config.model_type]
    if family == "encoder-decoder" and getattr(config, "decoder_start_token_id", None) is None:
        raise BadInputError(f"{path / 'config.json'}: decoder_start_token_id must name the token that an answer starts from, got none")
    if family == "encoder":
        settings["add_pooling_layer"] = False
    with _quietly():
        loaded: Any = _LOADERS[family].from_pretrained(
            path, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **settings
        )
    model, loading = loaded
    if loading["missing_keys"]:
        raise BadInputError(f"{path}: the weights lack {', '.join(sorted(loading['missing_keys']))}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (ValueError, OSError) as error:
        raise BadInputError(f"{path}: the tokenizer cannot be loaded without code of its own, which is never run: {error}") from None
    if not getattr(tokenizer, "is_fast", False):
        raise BadInputError(f"{path}: the tokenizer must have a tokenizers backend (tokenizer.json), got {type(tokenizer).__name__}")
    if place != "sharded":
        model = model.to(place)
    if dtype == torch.bfloat16 and place == "cpu" and not fast_bf16():
        logger.warning("bf16 weights are multiplied in fp32: this processor is no faster in bf16")
        multiply_in_fp32(model)
    return BaseModel(model.eval().requires_grad_(False), tokenizer, sha256, tokenizer_sha256(path))


def check_harmless(path: Path) -> None:
    """Raises BadInputError for a folder that transformers must not see: it names code to run, or is not all that would be loaded."""
    if not list(path.glob("*.safetensors")):
        raise BadInputError(f"{path} holds no *.safetensors; other weight formats can run code and are not read")
    if (path / "adapter_config.json").exists():
        raise BadInputError(f"{path} holds an adapter (adapter_config.json), which would change the model; merge it, or remove it")
    try:
        config = json.loads((path / "config.json").read_text("utf-8"))
        kind, attention = config.get("model_type"), [config.get(name) for name in ("attn_implementation", "_attn_implementation")]
    except (OSError, ValueError, AttributeError) as error:
        raise BadInputError(f"{path / 'config.json'} cannot be read: {error}") from None
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        own = "; code that comes with a model (auto_map) is never run" if "auto_map" in config else ""
        raise BadInputError(f"base model architecture must be one of {', '.join(sorted(ARCHITECTURES))}, got {kind!r} ({path}){own}")
    for name in ("quantization_config", "compression_config"):
        if config.get(name) is not None:
            raise BadInputError(f"{path / 'config.json'} has {name}: another package would load the weights; save the model without it")
    for name in attention:
        if name not in (None, "eager", "sdpa"):
            raise BadInputError(
                f"{path / 'config.json'}: attn_implementation must be eager or sdpa, got {name!r}: others may be fetched code"
            )


_LOADERS: Mapping[Family, Any] = MappingProxyType(
    {"decoder": AutoModelForCausalLM, "encoder": AutoModel, "encoder-decoder": AutoModelForSeq2SeqLM}
)


@contextmanager
def _quietly() -> Iterator[None]:
    """transformers draws a bar for every load and reports weights that it leaves out (an encoder's pooler), which a log keeps as noise;
    the caller's own choices are put back. What is missing is found here."""
    bar, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def set_threads(environ: Mapping[str, str] = os.environ) -> None:
    """Sets torch's threads to RETUNE_THREADS where it is set: results are byte-identical for equal thread counts only.

    Raises ConfigError if it is not a whole number of at least 1.
    """
    value = environ.get("RETUNE_THREADS")
    if not value:
        return
    if not value.isdigit() or int(value) < 1:
        raise ConfigError(f"RETUNE_THREADS must be a whole number >= 1, got {value!r}")
    if torch.get_num_threads() != int(value):
        torch.set_num_threads(int(value))


def _find_local(ref: BaseModelRef, project: Path | None, folders: Sequence[Path]) -> Path:
    seen: list[str] = []
    for path in _local_candidates(ref, project, folders):
        found = folder_sha256(path)
        if found == ref.sha256:
            return path
        seen.append(f"{path} has {found}")
    places = [str(project / ref.path)] if project is not None and ref.path else []
    raise BadInputError(
        f"no base model with sha256 {ref.sha256} ({ref.path}); looked in {', '.join([*places, *map(str, folders)]) or 'no folder'}"
        + (f"; {'; '.join(seen)}" if seen else "")
        + f". Set {VARIABLE} to the folder that holds it (several are separated by {os.pathsep!r})"
    )


def _local_candidates(ref: BaseModelRef, project: Path | None, folders: Sequence[Path]) -> list[Path]:
    """Folders that look like a model (they hold a config.json), the likeliest first, none twice."""
    paths = [project / ref.path] if project is not None and ref.path else []
    for folder in folders:
        paths += [folder, *(sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else [])]
    return [p for p in dict.fromkeys(p.resolve() for p in paths) if (p / "config.json").is_file()]


def _find_hub(hub: str, revision: str | None, folders: Sequence[Path]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    for cache in [*folders, None]:
        try:
            path = Path(snapshot_download(hub, revision=revision, cache_dir=cache, local_files_only=True))
        except LocalEntryNotFoundError:
            continue
        if (path / "config.json").is_file() and list(path.glob("*.safetensors")):
            return path
    try:
        return Path(snapshot_download(hub, revision=revision, allow_patterns=list(HUB_FILES), ignore_patterns=["*/*"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise BadInputError(
            f"base model {hub} at revision {revision} is in no local cache and could not be downloaded: {error}. "
            f"Download it once (hf download {hub} --revision {revision}), or set {VARIABLE} to a Hugging Face cache folder "
            "that holds it; HF_HUB_OFFLINE=1 forbids the download"
        ) from error


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
