"""The encoder without padding: `embed` of gecko.py, with all tokens of a batch in one matrix."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.search import ONEDNN, has_bfloat16, product


def length_batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices in batches of like length, longest first; texts x longest <= budget (or one text)."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        B = max(1, budget // max(1, lengths[order[0]]))
        yield order[:B]
        order = order[B:]


SCORES = 4 << 20             # bytes of attention's scores at a time, which stay in a CPU's cache
FLASH = 48                   # tokens from which torch's own bfloat16 attention is faster, on a CPU with AMX


def softmax_times(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    """(q k^T).softmax(-1) @ v in bfloat16: 3 of (B, n, d/H), and s, room for the scores (B, n, n) -> (B, n, d/H).

    Torch's own is slow for short texts, or without AMX. No maximum is taken off before the exponential: bfloat16
    has float32's range, and where that is not enough it shows in the sum.
    """
    e = torch.bmm(q, k.transpose(1, 2), out=s).exp_()                # (B, n, n)
    total = e.sum(-1, keepdim=True)                                  # (B, n, 1)
    if bool(((total > 1e-30) & (total < 1e30)).all()):
        return (e @ v).div_(total)                                   # (B, n, d/H)
    return torch.bmm(q, k.transpose(1, 2)).softmax(-1) @ v           # (B, n, d/H)


def packed(encoder: Any, dtype: torch.dtype) -> Callable[[list[list[int]]], Tensor]:
    """`embed` with all tokens of a batch in one matrix, no padding: token ids of B texts -> (B, d) float32.

    Query, key and value are one product; attention goes by runs of texts of one length.
    """
    c, e = encoder.config, encoder.embeddings
    d, eps, first, H = c.hidden_size, c.layer_norm_eps, c.first_position, c.num_attention_heads
    scale = (d // H) ** -0.5                                         # of attention's scores; goes into q

    def ready(w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        w, b = w.to(dtype), b.to(dtype)                              # (out, in), (out)
        if ONEDNN and (dtype == torch.float32 or has_bfloat16(w.device)):
            w = torch.ops.mkldnn._reorder_linear_weight(w, None)     # once, not in every product
        return w, b

    layers = []
    for layer in encoder.encoder["layer"]:
        project, out = layer.attention["self"], layer.attention["output"]
        query, key, value = (project[name] for name in ("query", "key", "value"))
        qkv = ready(torch.cat([query.weight * scale, key.weight, value.weight]),     # (3d, d)
                    torch.cat([query.bias * scale, key.bias, value.bias]))           # (3d)
        dense = [ready(x["dense"].weight, x["dense"].bias) for x in (out, layer.intermediate, layer.output)]
        norms = [(x.weight.to(dtype), x.bias.to(dtype)) for x in (out["LayerNorm"], layer.output["LayerNorm"])]
        layers.append((qkv, *dense, *norms))

    def attend_run(q: Tensor, k: Tensor, v: Tensor, a: Tensor) -> None:
        """Texts of one length, some at a time: 3 of (texts, H, n, d/H) -> a (texts, n, H, d/H)."""
        n = q.shape[2]
        if dtype == torch.float32 or n >= FLASH and getattr(torch.cpu, "_is_amx_tile_supported", bool)():
            a.copy_(F.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(1, 2))
            return
        most = max(1, SCORES // (2 * H * n * n))                     # texts whose scores SCORES holds
        room = q.new_empty(min(most, len(q)) * H, n, n)              # for the scores of so many
        for at in range(0, len(q), most):
            some_q, some_k, some_v = (x[at:at + most].reshape(-1, n, d // H) for x in (q, k, v))  # (some, n, d/H)
            x = softmax_times(some_q, some_k, some_v, room[:len(some_q)])      # (some, n, d/H)
            a[at:at + most] = x.view(-1, H, n, d // H).transpose(1, 2)

    def embed_packed(tokens: list[list[int]]) -> Tensor:
        lengths = torch.tensor([len(t) for t in tokens])             # (B)
        ids = torch.tensor([i for t in tokens for i in t])           # (N) tokens of the whole batch
        position = torch.cat([torch.arange(first, first + len(t)) for t in tokens])  # (N)
        x = e["word_embeddings"](ids) + e["position_embeddings"](position)       # (N, d)
        x = e["LayerNorm"](x + e["token_type_embeddings"].weight[0]).to(dtype)   # (N, d)
        runs = [(n, len(list(run))) for n, run in itertools.groupby(map(len, tokens))]
        for qkv, out, up, down, norm_1, norm_2 in layers:
            a, start, y = torch.empty_like(x), 0, product(x, *qkv)   # (N, d), (N, 3d)
            for n, texts in runs:
                here, start = slice(start, start + n * texts), start + n * texts
                q, k, v = y[here].view(texts, n, 3, H, d // H).permute(2, 0, 3, 1, 4)   # 3 of (texts, H, n, d/H)
                attend_run(q, k, v, a[here].view(texts, n, H, d // H))
            x = F.layer_norm(product(a, *out, plus=x), (d,), *norm_1, eps)       # (N, d)
            h = product(x, *up, "gelu")                              # (N, c.intermediate_size)
            x = F.layer_norm(product(h, *down, plus=x), (d,), *norm_2, eps)      # (N, d)
        return torch.segment_reduce(x.float(), "mean", lengths=lengths, axis=0)  # (B, d)

    return embed_packed
