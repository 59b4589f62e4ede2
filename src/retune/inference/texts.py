"""What a model says of texts by themselves: how likely each is, and how alike two are."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from retune.errors import BadInputError
from retune.inference.base_model import BaseModel
from retune.inference.encoder import lay, means
from retune.inference.encoding import plain_tokenizer
from retune.inference.inputs import EncodedRow, sorted_batches
from retune.inference.predictor import TOKENS, answer_nats

__all__ = ["similarities", "text_nats"]


def text_nats(base: BaseModel, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Negative log-likelihood of each text, end of sequence included, under a decoder with nothing before it but the token that starts one.

    Returns (nats [N], tokens [N]); an empty text has one token, its end. A text is cut to the model's context.
    """
    end = min(base.stop_ids, default=0) if base.eos_id is None else base.eos_id
    start = end if base.tokenizer.bos_token_id is None else base.tokenizer.bos_token_id
    encodings = plain_tokenizer(base.tokenizer).encode_batch(list(texts), add_special_tokens=False)
    rows = [EncodedRow([start], [*encoding.ids[: base.context - 2], end]) for encoding in encodings]
    return answer_nats(base, None, rows), np.array([len(row.answer) for row in rows], dtype=np.int64)


def similarities(encoder: BaseModel, ones: Sequence[str], others: Sequence[str]) -> np.ndarray:
    """Cosine of the embeddings of each pair of texts, [N], -1 to 1; 0 where one of them is empty.

    A text's embedding is the mean of the encoder's last hidden states (arXiv:1908.10084). Raises BadInputError for any other model.
    """
    if encoder.family != "encoder":
        raise BadInputError(f"evaluate.encoder must be an encoder (bert, roberta, xlm-roberta), got one of family {encoder.family}")
    cosines = F.cosine_similarity(_embeddings(encoder, ones), _embeddings(encoder, others))
    there = [bool(one.strip() and other.strip()) for one, other in zip(ones, others, strict=True)]
    return np.where(there, cosines.double().numpy(), 0.0)


@torch.no_grad()
def _embeddings(encoder: BaseModel, texts: Sequence[str]) -> torch.Tensor:
    """[N, H], fp32, on the CPU."""
    backend = encoder.tokenizer.backend_tokenizer
    rows = [EncodedRow(encoding.ids[: encoder.context]) for encoding in backend.encode_batch(list(texts), add_special_tokens=True)]
    out = torch.zeros(len(rows), encoder.hidden_size)
    for numbers in sorted_batches(rows, TOKENS):
        out[numbers] = means(encoder, None, lay(encoder, None, [rows[i] for i in numbers])).float().cpu()
    return out
