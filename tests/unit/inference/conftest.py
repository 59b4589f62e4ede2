import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if "tiny" not in sys.modules:  # test folders are no packages: their shared module is loaded by path
    spec = importlib.util.spec_from_file_location("tiny", Path(__file__).parents[1] / "inference" / "tiny.py")
    assert spec
    assert spec.loader
    sys.modules["tiny"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["tiny"])

import tiny

from retune.inference.base_model import BaseModel

_BASES: dict[str, BaseModel] = {}


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.delenv("RETUNE_THREADS", raising=False)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["llama", "qwen2", "gpt2"])
def base(request: pytest.FixtureRequest) -> BaseModel:
    """A tiny random model of each family; shared, since nothing may change it."""
    return _BASES.setdefault(request.param, tiny.make_base(request.param))


@pytest.fixture
def llama() -> BaseModel:
    return _BASES.setdefault("llama", tiny.make_base("llama"))
