"""One tuning run on several processes or GPUs, each with its share of every batch (data parallel, torch.distributed).

They are started by torchrun or `accelerate launch`; a process started on its own is a group of one. Gradients are added up, so that every
process takes the same step: the curve is that of one process with the same batches, up to the order of additions.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist

__all__ = ["add_up", "is_first", "process_group", "share"]

T = TypeVar("T")


@contextmanager
def process_group() -> Iterator[None]:
    """Joins the group that the launcher's environment names (WORLD_SIZE, RANK, MASTER_ADDR, MASTER_PORT); leaves it at the end."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def is_first() -> bool:
    """Whether this process speaks for the group: it writes, prints and saves."""
    return not dist.is_initialized() or dist.get_rank() == 0


def share(items: Sequence[T]) -> Sequence[T]:
    """This process's part of the items; every item is in exactly one part."""
    return items[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else items


def add_up(*tensors: torch.Tensor) -> None:
    """Replaces each tensor by its sum over the group."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)
