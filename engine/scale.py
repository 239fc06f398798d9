"""Several processes (torch.distributed), and seeds that no two of them share."""

from __future__ import annotations

import numpy as np
import torch.distributed as dist
from torch import Tensor


def processes() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_reduce_sum(x: Tensor) -> None:
    """Sum over all processes, in place; the same bytes on each."""
    if processes()[1] > 1:
        dist.all_reduce(x)


def barrier() -> None:
    """Wait until every process is here."""
    if processes()[1] > 1:
        dist.barrier()


def derive_seed(*numbers: int) -> int:
    """One seed from several numbers, such as (seed, step), which no other numbers give."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
