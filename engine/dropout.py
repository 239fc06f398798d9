"""Dropout in training, and attention with it, that do not wait for a CPU's random numbers.

torch draws a float for each number, one after another: a sixth of a training step. A byte is enough.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def dropout(x: Tensor, p: float) -> Tensor:
    """`F.dropout(x, p)`, with p to the nearest 1/256 on a CPU; its mean is x all the same."""
    least = round(256 * p)
    if x.device.type != "cpu" or not 1 <= least <= 255:
        return F.dropout(x, p)
    words = torch.empty(x.numel() // 8 + 1, dtype=torch.int64).random_(-2 ** 63, None)   # 64 random bits each
    byte = words.view(torch.uint8)[:x.numel()].view(x.shape)         # 0 to 255
    return torch.where(byte >= least, x, 0.0) * (256 / (256 - least))


def attention(
    q: Tensor,     # (B, H, T, d/H), as k and v
    k: Tensor,
    v: Tensor,
    keep: Tensor,  # (B, 1, 1, T) true where a token may be attended to
    p: float,      # of dropout
) -> Tensor:       # (B, H, T, d/H)
    """softmax(q k^T / sqrt(d/H)) v of each head."""
    if p == 0 or q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, keep, p)
    scores = q @ k.transpose(2, 3) / q.shape[3] ** 0.5               # (B, H, T, T)
    a = scores.masked_fill(~keep, -torch.inf).softmax(dim=3)         # (B, H, T, T)
    return dropout(a, p) @ v
