"""Exact search: the ids and scores of `nearest` in gecko.py, bit for bit, faster and in bounded memory.

1. A cheap product (bfloat16 where the hardware has it) finds more candidates than k for each query.
2. They are scored as `nearest` scores. The best k are the answer if no other passage can reach them:
   rounding q and p to q~ and p~ moves a score by at most |q| |p - p~| + |q - q~| |p~|, norms measured.
3. Queries for which that certificate fails are searched again in float32, below a floor: `search_again`.

On a CUDA device the same steps run with torch's products; that has not been measured on one.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.files import InputError

# Shapes: Q queries, P passages, d dimensions, k neighbours, m candidates.

# --------------------------------------------------------------------------------------------------
# Products

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def has_bfloat16(device: torch.device) -> bool:
    """True where a bfloat16 product is faster than a float32 one."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and ONEDNN and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()


def product(x: Tensor, w: Tensor, b: Tensor | None = None, then: str = "none", plus: Tensor | None = None,
            ) -> Tensor:
    """x w^T + b, then gelu or plus a tensor: (n, d), (c, d), (c), and (n, c) -> (n, c).

    On a CPU by oneDNN, because MKL's float32 is less than half as fast on some, and what follows costs a pass;
    bfloat16 alone is faster as torch calls oneDNN.
    """
    if x.device.type == "cpu" and ONEDNN and (x.dtype == torch.float32 or b is not None and has_bfloat16(x.device)):
        if plus is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(x, plus, w, b, "add")
        return torch.ops.mkldnn._linear_pointwise(x, w, b, then, [], "none")
    y = F.linear(x, w, b)                                            # (n, c)
    return F.gelu(y) if then == "gelu" else y if plus is None else y + plus


# --------------------------------------------------------------------------------------------------
# Search

GROUP = 32                   # columns of one maximum, a power of 2
SPARE = 8                    # candidates beyond 2k
BLOCK = 8 << 20              # bytes on a CPU, which stay in its cache; a CUDA device gives a share of its memory


def topk(
    queries: np.ndarray | Tensor,   # (Q, d)
    passages: np.ndarray | Tensor,  # (P, d), may be a memory map
    k: int,
    budget: int = 0,                # bytes for one block of scores; 0: as many as the device likes
) -> tuple[np.ndarray, np.ndarray]:
    """`nearest` for any number of passages: scores and indices (Q, k), the same whatever the blocks."""
    return certified_topk(queries, passages, k, budget)[:2]


@torch.no_grad()
def certified_topk(queries: np.ndarray | Tensor, passages: np.ndarray | Tensor, k: int, budget: int = 0,
                   dtype: torch.dtype | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`topk`, and (Q) true where the first search was proven; `dtype` is its product's, else the fastest.

    A block of queries at a time: `candidates` gives candidates and, as proof, a score that no other passage is
    above; `ranked` has the candidates' exact scores. Where the k-th is not above the proof too, a passage
    may be missing, or tie: `search_again` takes all into account.
    """
    Q, P = len(queries), len(passages)
    if not 1 <= k <= P:
        raise InputError(f"k = {k} neighbours of {P} passages: give 1 to {P}")
    if Q and queries.shape[1:] != passages.shape[1:]:
        raise InputError(f"queries {tuple(queries.shape)} and passages {tuple(passages.shape)} are of other "
                         "dimensions; encode both with one model and --dim")
    if not Q:
        return np.empty((0, k), np.float32), np.empty((0, k), np.int64), np.empty(0, bool)
    device = passages.device if isinstance(passages, Tensor) else torch.device(
        "cuda" if torch.cuda.is_available() else "cpu")
    queries, passages = tensor_of(queries), tensor_of(passages)
    dtype = dtype or (torch.bfloat16 if has_bfloat16(device) else torch.float32)
    cuda = device.type == "cuda"
    budget = budget or (torch.cuda.get_device_properties(device).total_memory // 16 if cuda else BLOCK)
    rows, found = 1024, []
    # EXERCISE 10 (about 11 lines)
    for a in range(0, Q, rows):
        q = block(queries, a, a + rows, device)                      # (rows, d)
        which, proof = candidates(q, passages, min(P, 2 * k + SPARE), dtype, budget)   # (rows, m), (rows)
        scores, indices = ranked(q, passages, which, k)              # (rows, k) twice
        proven = scores[:, -1] > proof                               # (rows)
        for some in (~proven).nonzero().split(64):
            if len(some := some[:, 0]):
                scores[some], indices[some] = search_again(q[some], passages, k, scores[some, -1], budget)
        found.append([x.cpu().numpy() for x in (scores, indices, proven)])
    all_scores, all_indices, all_proven = (np.concatenate(x) for x in zip(*found, strict=True))
    return all_scores, all_indices, all_proven
    # END EXERCISE


def candidates(q: Tensor, passages: Tensor, m: int, dtype: torch.dtype, budget: int,
               ) -> tuple[Tensor, Tensor]:
    """The m passages of largest product in `dtype`, (rows, m), and what no other's score exceeds, (rows).

    Of a block only what beats the m-th best so far is kept, in a table with room for a few times m.
    """
    (n, d), P, room = q.shape, len(passages), 3 * m
    q, q_norm, q_off = lowered(q, dtype, "query")                    # (rows, d), (rows), (rows)
    p_norm = p_off = q.new_zeros((), dtype=torch.float32)
    values = q.new_full((n, room), -torch.inf)                       # (rows, room)
    which = torch.zeros(n, room, dtype=torch.long, device=q.device)  # (rows, room)
    filled, floor = torch.full((n,), m, device=q.device), values[:, 0]    # (rows), (rows)
    columns = max(GROUP, min(16384, budget // (n * q.element_size())) // GROUP * GROUP)
    tiles = F.pad(q, (0, 0, 0, -n % 16))                             # (rows + pad, d): whole tiles multiply faster
    for b in range(0, P, columns):
        p, norm, off = lowered(block(passages, b, b + columns, q.device), dtype, "passage", b)   # (columns, d)
        p_norm, p_off = torch.maximum(p_norm, norm.max()), torch.maximum(p_off, off.max())
        s = product(p, tiles)[:, :n]                                 # (columns, rows)
        row, column = above(s, floor) if b else (filled[:0], filled[:0])
        place, count = places(row, n)                                # (found), (rows)
        whole = not b or int((filled + count).max()) > room          # more than there is room for: sort the block
        if whole:
            v, i = s.T.topk(min(m, len(s)), dim=1)                   # (rows, <= m)
            values, which = torch.cat([values, v], 1), torch.cat([which, i + b], 1)   # (rows, <= room + m)
        else:
            at = filled[row] + place                                 # (found)
            values[row, at], which[row, at] = s[column, row], column + b
            filled = filled + count                                  # (rows)
        if whole or int(filled.sum()) > 3 * m * n // 2:              # keep the best m, and raise the floor
            values[:, :m], order = values.topk(m, dim=1)             # (rows, m)
            which[:, :m] = which.gather(1, order)                    # (rows, m)
            values, which = values[:, :room].contiguous(), which[:, :room].contiguous()
            values[:, m:] = -torch.inf
            filled, floor = torch.full_like(filled, m), values[:, m - 1].clone()   # (rows), (rows)
    best, order = values.topk(m, dim=1)                              # (rows, m)
    highest = best[:, -1].float() if m < P else values.new_full((n,), -torch.inf, dtype=torch.float32)
    return which.gather(1, order), highest + error_bound(q_norm, q_off, p_norm, p_off, highest, d, dtype)


def above(s: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns, rows ascending, of all s > floor: (columns, rows), (rows) -> 2 of (found).

    The maxima of groups of columns are compared first, then those of a group's quarters: few hold anything.
    """
    if s.dtype == torch.bfloat16 and bool((floor >= 0).all()):
        # subtle: the bits of numbers from 0 on ascend as they do, those below 0 are negative integers, and
        # integers are compared faster; + 0 makes 0 of -0
        s, floor = s.view(torch.int16), (floor + 0).view(torch.int16)
    floor = floor[:, None]                                           # (rows, 1)
    if len(s) % GROUP:
        return (s.T > floor).nonzero(as_tuple=True)                  # type: ignore[return-value]
    groups = len(s) // GROUP
    s = s.view(GROUP // 4, 4, groups, -1)                            # (eighths, quarters, groups, rows)
    quarters = largest(s)                                            # (quarters, groups, rows)
    row, group = (largest(quarters).T > floor).nonzero(as_tuple=True)                             # (groups found)
    hit, i = (quarters.permute(2, 1, 0)[row, group] > floor[row]).nonzero(as_tuple=True)          # (quarters found)
    row, group = row[hit], group[hit]
    hit, j = (s.permute(3, 2, 1, 0)[row, group, i] > floor[row]).nonzero(as_tuple=True)           # (found)
    return row[hit], (4 * j + i[hit]) * groups + group[hit]          # (found), (found)


def places(row: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Of ascending row numbers: how many of its row stand before each, (found), and how many a row has, (n)."""
    count = torch.bincount(row, minlength=n)                         # (n)
    return torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row], count


def largest(x: Tensor) -> Tensor:
    """The maximum over the first dimension, whose length is a power of 2: on a CPU faster than amax."""
    while len(x) > 1:
        x = torch.maximum(x[:len(x) // 2], x[len(x) // 2:])
    return x[0]


def ranked(q: Tensor, passages: Tensor, which: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The best k of each query's candidates, scored and ordered as in `nearest`: (rows, m) -> (rows, k) twice."""
    which = which.sort(dim=1).values                                 # (rows, m) so that ties go by index
    scores = torch.empty(which.shape, device=q.device)               # (rows, m)
    rows = max(1, (1 << 18 if q.device.type == "cpu" else 1 << 26) // (which.shape[1] * q.shape[1]))
    for a in range(0, len(q), rows):
        p = passages[which[a:a + rows].to(passages.device)].to(q.device, torch.float32)   # (rows, m, d)
        scores[a:a + rows] = exact_dot(q[a:a + rows, None], p)           # (rows, m)
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return scores[:, :k], which.gather(1, order[:, :k])              # (rows, k)


def exact_dot(x: Tensor, y: Tensor) -> Tensor:
    """x . y over the last dimension, summed in float64, rounded to float32; y has the product's shape.

    subtle: no BLAS, whose last bits change with blocks and alignment; here each sum is taken alone.
    """
    return y.to(torch.float64, copy=True).mul_(x.double()).sum(-1).float()


def search_again(q: Tensor, passages: Tensor, k: int, floor: Tensor, budget: int,
                 ) -> tuple[Tensor, Tensor]:
    """`nearest` for a few queries whose k-th best score is known to be at least `floor`: (rows, k) twice.

    Every passage whose float32 product comes within its own error of the floor is scored exactly.
    """
    n, d = q.shape
    q, q_norm, q_off = lowered(q, torch.float32, "query")            # (rows, d), (rows), (rows)
    columns = max(GROUP, min(16384, budget // (4 * n), budget // (64 * d)) // GROUP * GROUP)
    row = index = torch.zeros(0, dtype=torch.long, device=q.device)  # (kept) twice
    score = torch.zeros(0, device=q.device)                          # (kept)
    for b in range(0, len(passages), columns):
        p, p_norm, p_off = lowered(block(passages, b, b + columns, q.device), torch.float32, "passage", b)
        error = error_bound(q_norm, q_off, p_norm.max(), p_off.max(), floor, d, torch.float32)   # (rows)
        r, c = above(product(p, q), floor - 2 * error)               # (found) twice
        parts = zip(r.split(4096), c.split(4096), strict=True)
        score = torch.cat([score] + [exact_dot(q[i], p[j]) for i, j in parts])
        row, index = torch.cat([row, r]), torch.cat([index, c + b])  # (kept + found) twice
        order = index.argsort(stable=True)                           # by row, then score, then index
        order = order[score[order].argsort(descending=True, stable=True)]
        order = order[row[order].argsort(stable=True)]               # (kept + found)
        row, index, score = row[order], index[order], score[order]
        place, _ = places(row, n)                                    # (kept + found)
        floor = floor.index_put((row[place == k - 1],), score[place == k - 1])   # (rows)
        row, index, score = row[place < k], index[place < k], score[place < k]   # (kept) 3 times
    return score.view(n, k), index.view(n, k)


def block(x: Tensor, a: int, b: int, device: torch.device) -> Tensor:
    """Rows a to b in float32 on the device."""
    return x[a:b].to(device, torch.float32)                          # (b - a, d)


def tensor_of(x: np.ndarray | Tensor) -> Tensor:
    """The same memory as a tensor; a read-only memory map is only read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.as_tensor(x)


def lowered(x: Tensor, dtype: torch.dtype, name: str, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x in a cheaper dtype, the norm of each row and of what the rounding took: (n, d), (n), (n)."""
    low = x if dtype == x.dtype else torch.empty_like(x, dtype=dtype)          # (n, d)
    norm, off = x.new_empty(len(x)), x.new_zeros(len(x))             # (n) twice
    rows = 512 if x.device.type == "cpu" else 65536                  # on a CPU they stay in the cache
    wide = torch.empty_like(x[:rows])                                # (rows, d)
    for a in range(0, len(x), rows):
        part = x[a:a + rows]                                         # (rows, d)
        torch.linalg.vector_norm(part, dim=1, out=norm[a:a + rows])
        if dtype != x.dtype:
            lost = wide[:len(part)].copy_(low[a:a + rows].copy_(part)).sub_(part)    # (rows, d)
            torch.linalg.vector_norm(lost, dim=1, out=off[a:a + rows])
    if not bool((norm < 2.0 ** 60).all()):
        i = int((~(norm < 2.0 ** 60)).nonzero()[0])
        raise InputError(f"{name} {first + i} (from 0) is of length {float(norm[i])}; give finite, moderate "
                         "numbers")
    return low, norm, off


def error_bound(q_norm: Tensor, q_off: Tensor, p_norm: Tensor, p_off: Tensor, s: Tensor, d: int,
                dtype: torch.dtype) -> Tensor:
    """The most by which a score can be above its product in `dtype` where that is at most s: (rows).

    The terms: rounding p and q (measured), adding d products in float32 (twice), the sum's own bfloat16,
    and what is too small for float32 to square or multiply.
    """
    tiny, exact = d ** 0.5 * 2.0 ** -62, torch.get_float32_matmul_precision() == "highest"
    q_norm, p_norm = q_norm * 1.001 + tiny, p_norm * 1.001 + tiny
    q_off, p_off = q_off * 1.001 + tiny, p_off * 1.001 + tiny
    unit = 2.0 ** -22 * (d + 8) + (0 if exact or dtype != torch.float32 else 2.0 ** -6)
    added = unit * (q_norm + q_off) * (p_norm + p_off) + d * 2.0 ** -120 * (1 + q_norm + p_norm)
    stored = s.abs() * 2.0 ** -7.9 if dtype == torch.bfloat16 else 0
    return q_norm * p_off + q_off * (p_norm + p_off) + added + stored
