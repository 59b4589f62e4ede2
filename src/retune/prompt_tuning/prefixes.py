"""What can be tuned before every row, the base model frozen: vectors, a network that gives vectors, or keys and values of every layer."""

from collections.abc import Mapping
from typing import Any

import torch

from retune.inference.adapters import EMBEDDINGS, layer_prefix
from retune.inference.attention import Prefix
from retune.inference.base_model import BaseModel
from retune.inference.decoder import run_prefix

__all__ = ["EncodedPrompt", "LayerPrefix", "SoftPrompt"]


class SoftPrompt:
    """Prompt tuning (arXiv:2104.08691): P vectors before every row, tuned as they are."""

    def __init__(self, base: BaseModel, start: torch.Tensor) -> None:
        """start: [P, H], left as it is."""
        self.base, self.values = base, start.detach().clone().requires_grad_(True)
        self.parameters = {EMBEDDINGS: self.values}
        self.size = len(start)

    def prefix(self) -> Prefix | None:
        return Prefix(vectors=self.values)

    def released(self, best: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return dict(best)


class EncodedPrompt:
    """P-tuning (arXiv:2103.10385): the vectors come out of a small network (PEFT's, an MLP), which is not released: they are."""

    def __init__(self, base: BaseModel, size: int, width: int | None, seed: int) -> None:
        """size: P. width: of the network's hidden layers; None: H."""
        from peft import PromptEncoder, PromptEncoderConfig  # seconds of start-up that other methods do not need

        hidden = base.hidden_size
        config = PromptEncoderConfig(
            num_virtual_tokens=size, token_dim=hidden, num_transformer_submodules=1, encoder_hidden_size=width or hidden
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoder: Any = PromptEncoder(config)  # type: ignore[no-untyped-call]
        self.base, self.size = base, size
        self._encoder = encoder.to(base.device, torch.promote_types(base.dtype, torch.float32))
        self._places = torch.arange(size, device=base.device)[None]
        self.parameters: dict[str, torch.Tensor] = dict(self._encoder.named_parameters())

    def prefix(self) -> Prefix | None:
        return Prefix(vectors=self._encoder(self._places)[0])

    @torch.no_grad()
    def released(self, best: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {EMBEDDINGS: torch.func.functional_call(self._encoder, dict(best), (self._places,))[0]}


class LayerPrefix:
    """Prefix tuning (arXiv:2101.00190): keys and values before every row in every layer. They start as those of a soft prompt, as the
    paper advises (activations of real words; causal ones, also on an encoder), and are tuned as they are."""

    def __init__(self, base: BaseModel, start: torch.Tensor) -> None:
        """start: [P, H]."""
        with torch.no_grad():
            run = run_prefix(base, start)
        each = torch.stack([x for layer in zip(run.keys, run.values, strict=True) for x in layer])  # [2 * L, G, P, D]
        values = each.permute(2, 0, 1, 3).reshape(len(start), -1)
        self.base, self.values = base, values.to(torch.promote_types(base.dtype, torch.float32)).requires_grad_(True)
        self.parameters = {EMBEDDINGS: self.values}
        self.size = len(start)

    def prefix(self) -> Prefix | None:
        return layer_prefix(self.base, self.values)

    def released(self, best: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return dict(best)
