"""Many texts at once: batches of like length, and eq. 1 without padding for a CPU.

`packed` is `embed` of gecko.py with all tokens of a batch in one matrix: the same vectors in float32, to
the last digits; in bfloat16 near ones, on a CPU that multiplies in it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.files import InputError, one_line, say
from engine.search import has_bfloat16, product
from engine.tokens import TokenIds

# Shapes: B texts, N tokens of all texts, n tokens of each text of a run, d the model's dimension,
#         H heads. A run is what stands together and has one length; attention goes run by run.

def length_batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices in batches of like length, longest first; texts x longest <= budget (or one text)."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        B = max(1, budget // lengths[order[0]])
        yield order[:B]
        order = order[B:]


def check_list(texts: Sequence[str]) -> None:
    if isinstance(texts, str):                                       # whose items are its letters
        raise TypeError(f"give a list of texts, such as [{one_line(texts, 40)!r}], not one text")


def check_finite(vectors: Tensor, texts: Sequence[str]) -> None:
    """InputError where a vector is no number, or has no direction."""
    bad = torch.where(~(vectors.norm(dim=1) > 0.5))[0].tolist()      # true of nan as well
    if bad:
        raise InputError(f"{len(bad)} of {len(texts)} texts have no finite vector, the first: "
                         f"{one_line(texts[bad[0]], 60)!r}; the model's weights are damaged")


# --------------------------------------------------------------------------------------------------
# Faster than `embed` of gecko.py, and the same

EmbedBatch = Callable[[TokenIds], Tensor]             # token ids of B texts -> (B, d)


def fast_embed(encoder: Any, embed: EmbedBatch, precision: str) -> EmbedBatch:
    """`embed` in that precision, on a CPU packed."""
    device = next(encoder.parameters()).device
    dtype = {"float32": torch.float32, "bf16": torch.bfloat16}[precision]
    if is_bag(encoder):
        return embed
    if device.type == "cpu" and (precision == "float32" or has_bfloat16(device)):
        return packed(encoder, dtype)
    return autocast(device, precision)(embed)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Products in bfloat16 where `precision` is bf16; said where the device only emulates them."""
    if precision == "bf16" and not has_bfloat16(device):
        say(precision=f"bf16, which this {device.type} only emulates: float32 takes a fraction of the time")
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def is_bag(encoder: Any) -> bool:
    """True where W's rows depend on their own token alone: no layers, positions or dropout."""
    c = encoder.config
    return bool(c.num_hidden_layers == 0 and c.hidden_dropout_prob == 0
                and not encoder.embeddings["position_embeddings"].weight.any())


def embed_bag(encoder: Any, tokens: TokenIds) -> Tensor:
    """`embed` for a bag of words: the same numbers from one table lookup, without a W of B x T x d.

    Each row of W is LayerNorm(word + segment), so the norm is taken once a word of the vocabulary.
    """
    e = encoder.embeddings
    segment = e["token_type_embeddings"].weight[0]                   # (d)
    table = e["LayerNorm"](e["word_embeddings"].weight + segment)    # (V, d)
    lengths = torch.tensor([len(ids) for ids in tokens])             # (B)
    flat = torch.tensor(list(itertools.chain(*tokens)))              # (N)
    offsets = lengths.cumsum(0) - lengths                            # (B)
    return F.embedding_bag(flat.to(table.device), table, offsets.to(table.device), mode="mean")  # (B, d)


def attend(
    q: Tensor,                        # (N, d), as k and v
    k: Tensor,
    v: Tensor,
    runs: Sequence[tuple[int, int]],  # (texts, n) of each
    H: int,
) -> Tensor:                          # (N, d)
    """Attention within each text."""
    sizes = [texts * n for texts, n in runs]
    parts = []
    for (texts, n), *run in zip(runs, q.split(sizes), k.split(sizes), v.split(sizes), strict=True):
        heads = [x.view(texts, n, H, -1).transpose(1, 2) for x in run]   # 3 of (texts, H, n, d/H)
        out = F.scaled_dot_product_attention(*heads)                 # (texts, H, n, d/H)
        parts.append(out.transpose(1, 2).reshape(texts * n, -1))     # (texts * n, d)
    return torch.cat(parts)


def packed(encoder: Any, dtype: torch.dtype) -> EmbedBatch:
    """`embed` in `dtype` for this encoder of gecko.py: token ids of B texts -> (B, d) float32."""
    c = encoder.config
    e = encoder.embeddings
    layers = []
    for layer in encoder.encoder["layer"]:
        after = layer.attention["output"]
        linears = [*layer.attention["self"].values(), after["dense"],
                   layer.intermediate["dense"], layer.output["dense"]]
        weights = [(part.weight.to(dtype), part.bias.to(dtype)) for part in linears]
        layers.append((*weights, after["LayerNorm"], layer.output["LayerNorm"]))

    def embed_packed(tokens: TokenIds) -> Tensor:
        lengths = torch.tensor([len(t) for t in tokens])             # (B)
        ids = torch.tensor(list(itertools.chain(*tokens)))           # (N)
        position = torch.cat([torch.arange(len(t)) for t in tokens]) + c.first_position  # (N)
        runs = [(len(list(run)), n) for n, run in itertools.groupby(map(len, tokens))]
        x = e["word_embeddings"](ids) + e["position_embeddings"](position)       # (N, d)
        x = e["LayerNorm"](x + e["token_type_embeddings"].weight[0]).to(dtype)   # (N, d)
        for query, key, value, out, up, down, norm_1, norm_2 in layers:
            q, k, v = product(x, *query), product(x, *key), product(x, *value)   # (N, d) each
            a = attend(q, k, v, runs, c.num_attention_heads)         # (N, d)
            x = norm_1(x + product(a, *out))                         # (N, d)
            h = F.gelu(product(x, *up))                              # (N, intermediate_size)
            x = norm_2(x + product(h, *down))                        # (N, d)
        return torch.segment_reduce(x.float(), "mean", lengths=lengths, axis=0)  # (B, d)

    return embed_packed
