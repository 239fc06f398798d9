"""Gecko's encoder and exact search (arXiv 2403.20327, section 3.1 and appendix B).

Eq. 1 turns a text into a vector: a transformer maps n tokens to W of shape (n, d), the text's
embedding is the mean of W's rows. This file holds that encoder (BERT's architecture, parameters
named as Hugging Face names them), the formats of texts, encoding, exact top-k and checkpoints.

    python gecko.py search "round a number up" --model runs/demo/gecko
    python gecko.py encode IN.jsonl OUT.npy --model runs/demo/gecko --passages

Where we differ from the paper, or fill a gap in it:
1. Architecture (3.1: a 1.2B language model that is not public): any BERT-style encoder.
2. A passage without a title (appendix B, silent): its title reads "none".
3. The smallest encoder, `tiny`, starts as a bag of words; see TINY below for how and why.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import hashlib
import itertools
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm

from engine.files import (
    InputError,
    file_beside,
    first_line,
    folder_beside,
    read_json,
    read_jsonl,
    read_passages,
    run,
    say,
    utf8,
)
from engine.packed import length_batches, packed
from engine.search import topk

# Shapes: B texts in a batch, T tokens (the longest of the batch), d the model's dimension, H heads,
#         Q queries, P passages, k neighbours.

# --------------------------------------------------------------------------------------------------
# Formats of texts (appendix B)

FORMATS = {
    "query": "task: {task} | query: {text}",       # every input, and the targets of symmetric tasks
    "passage": "title: {title} | text: {text}",    # the targets of asymmetric tasks
}
PLAIN = {"query": "{text}", "passage": "{title} {text}"}   # an encoder that ships no prompts of ours


def fill(template: str, **values: str) -> str:
    """One pass over the template, so that braces inside a task or a passage stay what they are."""
    return re.sub(r"\{(\w+)\}", lambda m: values.get(m[1], m[0]), template).strip()


def format_query(text: str, task: str, formats: dict[str, str] = FORMATS) -> str:
    """Input format of appendix B.

    >>> format_query("round a number up", "question answering")
    'task: question answering | query: round a number up'
    """
    return fill(formats["query"], task=task, text=text)


def format_passage(text: str, title: str = "", formats: dict[str, str] = FORMATS) -> str:
    """Target format of appendix B for asymmetric tasks.

    >>> format_passage("Return the ceiling of x.", "math.ceil")
    'title: math.ceil | text: Return the ceiling of x.'
    """
    return fill(formats["passage"] if title.strip() else untitled(formats), title=title, text=text)


def untitled(formats: dict[str, str]) -> str:
    """The passage format without a title, which is then "none" where the format names it."""
    return formats["passage"].replace("title: {title}", "title: none").replace("{title} ", "")


# --------------------------------------------------------------------------------------------------
# Pooling and similarity (eq. 1)


def mean_pool(
    W: Tensor,     # (B, T, d) one row a token
    mask: Tensor,  # (B, T) 1 for a real token, 0 for padding
) -> Tensor:       # (B, d)
    """Eq. 1: q = mean over the n real tokens of M(t ++ q). Task tokens count, padding does not."""
    # EXERCISE 1 (about 2 lines)
    mask = mask.unsqueeze(-1).to(W.dtype)              # (B, T, 1)
    return (W * mask).sum(1) / mask.sum(1).clamp(min=1)  # (B, d)
    # END EXERCISE


def truncate_dim(x: Tensor, dim: int | None = None) -> Tensor:
    """Cut to the first `dim` dimensions (Matryoshka), *then* to length 1: (B, d) -> (B, dim)."""
    x = x[:, :dim].to(torch.promote_types(x.dtype, torch.float32))  # (B, dim) bfloat16 is too coarse here
    return F.normalize(x, dim=-1)                      # (B, dim)


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """sim(x, y) of section 3.1 for every pair of rows: (B, d), (C, d) -> (B, C)."""
    return truncate_dim(x) @ truncate_dim(y).T               # (B, C)


# --------------------------------------------------------------------------------------------------
# The encoder M: BERT's architecture, every parameter under Hugging Face's name


@dataclass
class EncoderConfig:
    """The fields of Hugging Face's config.json that shape the encoder."""

    vocab_size: int
    hidden_size: int = 384                # d; the paper's is 768
    num_hidden_layers: int = 6
    num_attention_heads: int = 12         # H
    intermediate_size: int = 1536
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    pad_token_id: int = 0
    hidden_act: str = "gelu"
    model_type: str = "bert"

    @property
    def first_position(self) -> int:
        """RoBERTa and XLM-R count positions from behind the padding's index, BERT from 0."""
        return 0 if self.model_type == "bert" else self.pad_token_id + 1


class Layer(nn.Module):
    """One post-norm transformer layer: attention, then a feed-forward net, each with a residual."""

    def __init__(self, c: EncoderConfig) -> None:
        super().__init__()
        d, eps = c.hidden_size, c.layer_norm_eps
        self.heads, self.dropout = c.num_attention_heads, c.hidden_dropout_prob
        self.attention_dropout = c.attention_probs_dropout_prob
        project = {name: nn.Linear(d, d) for name in ("query", "key", "value")}
        self.attention: Any = nn.ModuleDict({
            "self": nn.ModuleDict(project),
            "output": nn.ModuleDict({"dense": nn.Linear(d, d), "LayerNorm": nn.LayerNorm(d, eps)}),
        })
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(d, c.intermediate_size)})
        self.output = nn.ModuleDict(
            {"dense": nn.Linear(c.intermediate_size, d), "LayerNorm": nn.LayerNorm(d, eps)})

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        """x: (B, T, d), keep: (B, 1, 1, T) true where a token may be attended to -> (B, T, d)."""
        B, T, d = x.shape
        project, out = self.attention["self"], self.attention["output"]
        q, k, v = (project[name](x).view(B, T, self.heads, -1).transpose(1, 2)
                   for name in ("query", "key", "value"))            # 3 of (B, H, T, d/H)
        a = attend(q, k, v, keep, self.attention_dropout if self.training else 0.0)  # (B, H, T, d/H)
        a = out["dense"](a.transpose(1, 2).reshape(B, T, d))         # (B, T, d)
        x = out["LayerNorm"](x + dropout(a, self.dropout, self.training))   # (B, T, d)
        h = self.output["dense"](F.gelu(self.intermediate["dense"](x)))     # (B, T, d)
        return self.output["LayerNorm"](x + dropout(h, self.dropout, self.training))  # (B, T, d)


class Encoder(nn.Module):
    """M of eq. 1: token ids (B, T) -> one vector a token, W (B, T, d)."""

    def __init__(self, c: EncoderConfig) -> None:
        super().__init__()
        self.config = c
        d = c.hidden_size
        self.embeddings: Any = nn.ModuleDict({
            "word_embeddings": nn.Embedding(c.vocab_size, d, padding_idx=c.pad_token_id),
            "position_embeddings": nn.Embedding(c.max_position_embeddings, d),
            "token_type_embeddings": nn.Embedding(c.type_vocab_size, d),
            "LayerNorm": nn.LayerNorm(d, c.layer_norm_eps),
        })
        self.encoder: Any = nn.ModuleDict(
            {"layer": nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))})

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask: (B, T) -> W: (B, T, d)."""
        _, T = ids.shape
        e, first = self.embeddings, self.config.first_position
        position = e["position_embeddings"].weight[first:first + T]  # (T, d)
        kind = e["token_type_embeddings"].weight[0]                  # (d)
        x = e["LayerNorm"](e["word_embeddings"](ids) + position + kind)  # (B, T, d)
        x = dropout(x, self.config.hidden_dropout_prob, self.training)  # (B, T, d)
        keep = mask.bool()[:, None, None, :]                         # (B, 1, 1, T)
        for layer in self.encoder["layer"]:
            x = layer(x, keep)                                       # (B, T, d)
        return x


def embed(encoder: Encoder, ids: Tensor, mask: Tensor) -> Tensor:
    """Eq. 1 for a batch: ids, mask (B, T) -> (B, d), not yet of length 1 (see `truncate_dim`)."""
    return mean_pool(encoder(ids, mask), mask)                       # (B, d)


# --------------------------------------------------------------------------------------------------
# A text embedding model: encoder + tokenizer + formats


class Gecko:
    """The encoder with all that a text needs to become its vector; a folder on disk."""

    def __init__(self, encoder: Encoder, tokenizer: Tokenizer, max_length: int,
                 formats: dict[str, str] = FORMATS, dims: Sequence[int] = ()) -> None:
        self.encoder, self.tokenizer, self.max_length = encoder, tokenizer, max_length
        self.formats, self.dims = dict(formats), tuple(dims) or (encoder.config.hidden_size,)
        self.cut = 0
        tokenizer.no_padding()

    @property
    def device(self) -> torch.device:
        return next(self.encoder.parameters()).device

    def tokens(self, texts: Sequence[str], max_length: int | None = None) -> list[list[int]]:
        """Token ids of each text, cut at max_length; `self.cut` counts the texts that were."""
        tokens, self.cut = self.tokenise(texts, max_length)
        return tokens

    def tokenise(self, texts: Sequence[str], max_length: int | None = None) -> tuple[list[list[int]], int]:
        """The same and that count, for a thread that must not touch `self.cut`."""
        self.tokenizer.enable_truncation(min(max_length or self.max_length, self.max_length))
        encodings = self.tokenizer.encode_batch_fast(list(texts))
        tokens = [e.ids for e in encodings]
        for text, ids in zip(texts, tokens, strict=True):
            if not ids:
                raise InputError(f"a text of no tokens has no embedding: {text!r}; remove it")
        return tokens, sum(bool(e.overflowing) for e in encodings)

    def embed(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Token ids of B texts -> (B, d) with gradient: `embed` above, or its twin for a bag of words."""
        return embed_bag(self.encoder, tokens) if is_bag(self.encoder) else embed(
            self.encoder, *pad(tokens, self.encoder.config.pad_token_id, self.device))

    def encode(self, texts: Iterable[str], dim: int | None = None, **how: Any) -> np.ndarray:
        """Texts, already formatted -> float32 unit vectors (len(texts), dim), in the order given.

        `how`: `precision` "float32" or "bf16", `batch_tokens`, and `progress`, the name of a bar.
        """
        texts, done = list(texts), 0
        out = np.empty((len(texts), check_dim(self, dim)), np.float32)   # (len(texts), dim)
        for x in encode_blocks(self, texts, dim, **how):
            out[done:done + len(x)] = x
            done += len(x)
        return out

    def encode_queries(self, texts: Sequence[str], task: str = "question answering",
                       **how: Any) -> np.ndarray:
        """Queries of one task -> (len(texts), dim). The task's tokens are in the mean (eq. 1)."""
        if blank := [i for i, t in enumerate(texts) if not t.strip()]:
            raise InputError(f"query {blank[0] + 1} of {len(texts)} is empty; give it some words")
        return self.encode([format_query(t, task, self.formats) for t in texts], **how)

    def encode_passages(self, texts: Sequence[str], titles: Sequence[str] | None = None,
                        **how: Any) -> np.ndarray:
        """Passages -> (len(texts), dim). A passage gets no task, so one index serves every task."""
        titles = titles if titles is not None else [""] * len(texts)
        return self.encode([format_passage(t, title, self.formats)
                            for t, title in zip(texts, titles, strict=True)], **how)


# --------------------------------------------------------------------------------------------------
# Exact nearest neighbours (section 3.2: the top N of q from C)


def nearest(
    queries: Tensor,   # (Q, d) float32
    passages: Tensor,  # (P, d) float32
    k: int,
) -> tuple[Tensor, Tensor]:
    """The k passages of largest inner product for each query: scores and indices (Q, k), best first.

    Equal scores come by lower index. Each is summed in float64 and then rounded, so that it does not
    depend on the order of the sum. `topk` below the fold gives the same in blocks.
    """
    s = (queries.double() @ passages.double().T).float()             # (Q, P)
    s, order = s.sort(dim=1, descending=True, stable=True)           # (Q, P)
    return s[:, :k], order[:, :k]                                    # (Q, k)


# ==================================================================================================
# In practice. Nothing below changes what is computed above: batches, a faster path for the
# smallest encoder, checkpoints, errors and the command line.
# ==================================================================================================

# --------------------------------------------------------------------------------------------------
# Batches


def pad(tokens: Sequence[Sequence[int]], pad_id: int, device: torch.device | str = "cpu",
        ) -> tuple[Tensor, Tensor]:
    """Token ids of B texts -> ids and mask, both (B, T)."""
    lengths = torch.tensor([len(t) for t in tokens])                 # (B)
    mask = torch.arange(int(lengths.max()))[None, :] < lengths[:, None]  # (B, T)
    ids = torch.full(mask.shape, pad_id)                             # (B, T)
    ids[mask] = torch.tensor([i for t in tokens for i in t])
    return ids.to(device), mask.to(device)



# --------------------------------------------------------------------------------------------------
# Dropout on a CPU, where drawing one number an element costs as much as a layer's products in bf16


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Replaces F.dropout: 16 random bits an element, of 64 drawn at a time (p to 2^-16)."""
    if not training or p in (0, 1) or x.device.type != "cpu":
        return F.dropout(x, p, training)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-2**63, None)  # (x.numel() / 4)
    keep = bits.view(torch.int16)[:x.numel()].view(x.shape) >= round(p * 2**16) - 2**15  # x's shape
    return x * keep.to(x.dtype).mul_(1 / (1 - p))                    # x's shape


def attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, p: float) -> Tensor:
    """Replaces F.scaled_dot_product_attention, for the sake of that dropout: 3 of (B, H, T, d/H) -> the same."""
    if p == 0 or q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, keep, p)
    hidden = torch.zeros(keep.shape, dtype=q.dtype).masked_fill_(~keep, -math.inf)  # (B, 1, 1, T)
    s = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + hidden     # (B, H, T, T)
    return dropout(s.softmax(-1), p, training=True) @ v              # (B, H, T, d/H)


# --------------------------------------------------------------------------------------------------
# Encoding many texts: `Gecko.embed` without gradient, padding or waiting

TEXTS_AHEAD = 8192           # texts sorted by length at a time; the next so many are tokenised meanwhile
BATCH_TOKENS = {"cpu": 4096, "cuda": 65536}
PACKED = 2048                # tokens of a block from which packing is repaid


@torch.no_grad()
def encode_blocks(model: Gecko, texts: Iterable[str], dim: int | None = None, batch_tokens: int = 0,
                  progress: str = "", precision: str = "float32", total: int | None = None,
                  ) -> Iterator[np.ndarray]:
    """Formatted texts, a stream -> float32 unit vectors (TEXTS_AHEAD or fewer, dim), block after block.

    `model.cut` counts the texts that were cut, of the blocks so far.
    """
    encoder, dim = model.encoder, check_dim(model, dim)
    if precision not in ("float32", "bf16"):
        raise InputError(f"--precision {precision}: give float32 or bf16")
    stream, training, model.cut = iter(texts), encoder.training, 0

    def next_block() -> tuple[list[list[int]], int]:
        return model.tokenise(list(itertools.islice(stream, TEXTS_AHEAD)))

    total = len(texts) if isinstance(texts, Sized) else total
    # subtle: chosen block by block, so that a run taken up at one writes the bytes of a whole run
    fastest = functools.cache(functools.partial(fastest_embed, model, precision))
    bar = tqdm(total=total, desc=progress, unit="text", disable=not progress)
    encoder.eval()
    try:
        with ThreadPoolExecutor(1) as ahead:
            tokens, cut = next_block()
            while tokens:
                coming = ahead.submit(next_block)
                embed_batch = fastest(precision == "bf16" or sum(map(len, tokens)) > PACKED)
                out = np.empty((len(tokens), dim), np.float32)
                for batch in length_batches([len(t) for t in tokens],
                                            batch_tokens or BATCH_TOKENS[model.device.type]):
                    x = embed_batch([tokens[i] for i in batch])      # (B, d)
                    out[batch] = truncate_dim(x, dim).cpu().numpy()
                    bar.update(len(batch))
                model.cut += cut
                yield out                                            # (len(tokens), dim)
                tokens, cut = coming.result()
    finally:
        bar.close()
        encoder.train(training)


def check_dim(model: Gecko, dim: int | None) -> int:
    """The dimensions that are asked for, all without a `dim`."""
    d = model.encoder.config.hidden_size
    if dim is not None and not 1 <= dim <= d:
        raise InputError(f"--dim {dim}: this model has {d} dimensions, give 1 to that (trained for {model.dims})")
    return dim or d


def fastest_embed(model: Gecko, precision: str, many: bool) -> Callable[[list[list[int]]], Tensor]:
    """`Gecko.embed` in that precision; packed on a CPU when there are `many` tokens, which repay packing."""
    encoder, dtype = model.encoder, torch.bfloat16 if precision == "bf16" else torch.float32
    if is_bag(encoder) or next(encoder.parameters()).dtype != torch.float32:
        return model.embed
    if model.device.type == "cpu" and many:
        return packed(encoder, dtype)
    if dtype == torch.float32:
        return model.embed
    low = copy.deepcopy(encoder).to(dtype)

    def embed_low(tokens: list[list[int]]) -> Tensor:
        ids, mask = pad(tokens, encoder.config.pad_token_id, model.device)       # (B, T) twice
        return mean_pool(low(ids, mask).float(), mask)               # (B, d)

    return embed_low


# --------------------------------------------------------------------------------------------------
# The smallest encoder: BERT's architecture, started as a bag of words

# Trained from random weights in minutes, a transformer learns little more than which words matter.
# So `tiny` starts there: no position vectors, layers (none by default) whose output starts at zero,
# and a layer norm whose eps is not small beside the variance, so that it hardly rescales a token:
# the length of a token's vector stays free to say how much the word counts in the mean (an "idf").
TINY = {"hidden_size": 384, "num_hidden_layers": 0, "num_attention_heads": 6,
        "intermediate_size": 768, "max_position_embeddings": 256, "layer_norm_eps": 1.0,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TINY_VOCABULARY = 8000


def tiny(texts: Sequence[str], seed: int = 0, vocabulary: int = TINY_VOCABULARY,
         **config: int | float) -> Gecko:
    """A small untrained model whose tokenizer is trained on `texts`."""
    tokenizer = train_tokenizer(texts, vocabulary)
    c = EncoderConfig(vocab_size=tokenizer.get_vocab_size(), **{**TINY, **config})  # type: ignore[arg-type]
    encoder = Encoder(c)
    generator = torch.Generator().manual_seed(seed)
    for name, p in encoder.named_parameters():
        if "position" in name or "token_type" in name or name.endswith("bias"):
            nn.init.zeros_(p)
        elif ".output.dense" in name:
            nn.init.zeros_(p)                                        # a layer starts as the identity
        elif "LayerNorm" not in name:
            nn.init.normal_(p, 0, 0.02, generator=generator)
    with torch.no_grad():
        encoder.embeddings["word_embeddings"].weight[c.pad_token_id] = 0
    encoder.embeddings["position_embeddings"].requires_grad_(c.num_hidden_layers > 0)
    return Gecko(encoder, tokenizer, max_length=c.max_position_embeddings)


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """Byte-pair encoding of lower-cased words; CamelCase and snake_case fall into their parts.

    No mark for "inside a word": the "tree" of "rmtree" is the word "tree". (A WordPiece trainer
    would mark it, and its vocabulary differs from run to run; this one's does not.)
    """
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([
        normalizers.NFKC(), normalizers.Replace(Regex("(?<=[a-z])(?=[A-Z])"), " "),
        normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, min_frequency=2, show_progress=False,
                                  special_tokens=["[PAD]", "[UNK]"], limit_alphabet=200)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def is_bag(encoder: Encoder) -> bool:
    """True where W's rows depend on their own token alone: no layers, positions or dropout."""
    return (encoder.config.num_hidden_layers == 0 and encoder.config.hidden_dropout_prob == 0
            and not encoder.embeddings["position_embeddings"].weight.any())


def embed_bag(encoder: Encoder, tokens: Sequence[Sequence[int]]) -> Tensor:
    """`embed` for a bag of words: the same numbers from one table lookup, without a W of B x T x d.

    Each row of W is LayerNorm(word + kind), so the norm is taken once a word of the vocabulary.
    """
    e = encoder.embeddings
    table = e["LayerNorm"](e["word_embeddings"].weight + e["token_type_embeddings"].weight[0])  # (V, d)
    lengths = torch.tensor([0] + [len(t) for t in tokens])           # (B + 1)
    flat = torch.tensor([i for t in tokens for i in t], device=table.device)  # (total tokens)
    offsets = lengths.cumsum(0)[:-1].to(table.device)                # (B)
    return F.embedding_bag(flat, table, offsets, mode="mean")        # (B, d)


# --------------------------------------------------------------------------------------------------
# Checkpoints: a folder of safetensors, tokenizer.json, config.json and the formats. Never a pickle.


def save(model: Gecko, folder: str | Path) -> None:
    """Write the folder beside its place, then rename it: a kill leaves no half of one there."""
    with folder_beside(folder) as new:
        weights = {k: v.detach().cpu().contiguous() for k, v in model.encoder.state_dict().items()}
        save_file(weights, str(new / "model.safetensors"), metadata={"format": "pt"})
        model.tokenizer.no_truncation()
        (new / "tokenizer.json").write_text(model.tokenizer.to_str(pretty=True), encoding="utf-8")
        for name, content in checkpoint_json(model).items():
            (new / name).parent.mkdir(exist_ok=True)
            (new / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


TASKS = ("question answering", "search result", "fact checking", "semantic similarity", "classification")


def task_prompts(formats: dict[str, str]) -> dict[str, str]:
    """The formats as sentence-transformers has them: texts put before. One a task, and for passages.

    "query" is the task of `encode_queries`; a passage's title goes into the text.
    """
    before = {task: formats["query"].replace("{task}", task) for task in TASKS}
    before |= {"query": before[TASKS[0]], "document": untitled(formats), "passage": untitled(formats)}
    return {name: text.partition("{text}")[0] for name, text in before.items()}


SPECIAL = {"unk_token": ("[UNK]", "<unk>"), "cls_token": ("[CLS]", "<s>"), "sep_token": ("[SEP]", "</s>"),
           "mask_token": ("[MASK]", "<mask>")}


def checkpoint_json(model: Gecko) -> dict[str, Any]:
    """The small files of a checkpoint; all but gecko.json are for transformers and its family."""
    c, modules = model.encoder.config, ("Transformer", "Pooling", "Normalize")
    known = {t.content for t in model.tokenizer.get_added_tokens_decoder().values() if t.special}
    special = {"pad_token": model.tokenizer.id_to_token(c.pad_token_id)} | {
        key: token for key, names in SPECIAL.items() for token in names if token in known}
    return {
        "config.json": {"architectures": [ENCODERS[c.model_type]], **asdict(c),
                        "matryoshka_dimensions": model.dims},        # vLLM's name for them
        "gecko.json": {"formats": model.formats, "dims": model.dims, "max_length": model.max_length},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", **special,
                                  "model_max_length": model.max_length},
        "modules.json": [{"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "",
                          "type": f"sentence_transformers.models.{kind}"} for i, kind in enumerate(modules)],
        "1_Pooling/config.json": {"word_embedding_dimension": c.hidden_size, "pooling_mode_mean_tokens": True},
        "2_Normalize/config.json": {},
        "sentence_bert_config.json": {"max_seq_length": model.max_length, "do_lower_case": False},
        "config_sentence_transformers.json": {
            "prompts": task_prompts(model.formats), "default_prompt_name": None,
            "similarity_fn_name": "cosine", "matryoshka_dims": model.dims},
    }


def load(folder: str | Path) -> Gecko:
    """Open a folder that `save` wrote, or a BERT, RoBERTa or XLM-R encoder: a folder or a hub id.

    Its makers' prompts, length and tokens are kept. Whatever is not the mean over such an encoder's
    tokens is refused by name.
    """
    folder = fetch(folder)
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise InputError(f"{folder}: no {name} there; give a model folder, for instance one "
                             "that `python train.py` wrote (runs/demo/gecko)")
    with readable(folder):
        c = read_config(folder / "config.json")
        check_modules(folder, c.hidden_size)
        with torch.device("meta"):                                   # shapes alone
            encoder = Encoder(c)
        weights = read_weights(folder, {name: p.shape for name, p in encoder.state_dict().items()})
    encoder.to_empty(device="cpu").load_state_dict(weights)
    with readable(folder / "tokenizer.json"):
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if (last := max(tokenizer.get_vocab().values(), default=0)) >= c.vocab_size:
        raise InputError(f"{folder}/tokenizer.json: {last + 1} tokens, but the weights have "
                         f"{c.vocab_size}; the two files do not belong together")
    with readable(folder):
        formats, dims, length = read_settings(folder, tokenizer)
        if not all(1 <= d <= c.hidden_size for d in dims):
            raise InputError(f"{folder}: dims {dims} are not all from 1 to {c.hidden_size}; save the model again")
        length = int(min(length, c.max_position_embeddings - c.first_position))
    if length <= tokenizer.num_special_tokens_to_add(False):
        raise InputError(f"{folder}: a length of {length} tokens leaves none for the text")
    model = Gecko(encoder, tokenizer, length, formats, dims)
    if is_bag(encoder):
        encoder.embeddings["position_embeddings"].requires_grad_(False)
    model.encoder.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return model


# What a folder may hold of BERT's many variants; the first value is a silent file's (model_type must be stated).
ENCODERS = {"bert": "BertModel", "roberta": "RobertaModel", "xlm-roberta": "XLMRobertaModel"}
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "model_type": tuple(ENCODERS), "hidden_act": ("gelu",), "position_embedding_type": ("absolute",),
    "is_decoder": (False,), "add_cross_attention": (False,)}
SILENT = ("type_vocab_size", "layer_norm_eps", "hidden_dropout_prob", "attention_probs_dropout_prob",
          "pad_token_id", "hidden_act")                  # EncoderConfig's values are then transformers' own
HEADS = ("pooler.", "cls.", "lm_head.", "classifier.", "qa_outputs.", "embeddings.position_ids",
         "embeddings.token_type_ids")                    # of a checkpoint, and no part of the encoder
FILES = ("config.json", "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json",
         "tokenizer.json", "tokenizer_config.json", "modules.json", "*_Pooling/config.json", "gecko.json",
         "sentence_*_config.json", "config_sentence_transformers.json")


def fetch(name: str | Path) -> Path:
    """The folder itself; ORG/NAME that is no path here is fetched from the Hugging Face hub, without pickles."""
    org, _, rest = str(name).partition("/")
    if Path(name).is_dir() or Path(org).is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        return Path(name)
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(str(name), allow_patterns=list(FILES)))
    except ImportError as error:
        raise InputError(f"{name}: no such folder, and a hub id needs huggingface_hub; install it: "
                         "pip install huggingface_hub") from error
    except Exception as error:  # the client's, of many kinds
        raise InputError(f"{name}: no such folder, and not to be had from the Hugging Face hub "
                         f"({first_line(error)}); check the name and the network") from error


def read_config(path: Path) -> EncoderConfig:
    """config.json: the fields that shape the encoder, and none that would need another one."""
    raw = read_json(path, dict)
    for key, allowed in SUPPORTED.items():
        if (value := raw.get(key, allowed[0])) not in allowed:
            raise InputError(f"{path}: {key} {value!r} is not supported; give a folder of an encoder with "
                             + " or ".join(repr(x) for x in allowed))
    kinds: dict[Any, Any] = {"int": int, "float": (int, float), "str": str}
    for f in fields(EncoderConfig):
        value = raw.get(f.name)
        if value is None and f.name in SILENT:
            continue
        if not isinstance(value, kinds[f.type]) or isinstance(value, bool) or f.type != "str" and value < 0:
            raise InputError(f"{path}: {f.name} is {value!r}; want {f.type}")
    known = {f.name: raw[f.name] for f in fields(EncoderConfig) if raw.get(f.name) is not None}
    c = EncoderConfig(**{"pad_token_id": int(raw["model_type"] != "bert"), **known})
    if c.num_hidden_layers and (c.num_attention_heads < 1 or c.hidden_size % c.num_attention_heads):
        raise InputError(f"{path}: hidden_size {c.hidden_size} is not a multiple of num_attention_heads "
                         f"{c.num_attention_heads}")
    return c


def check_modules(folder: Path, d: int) -> None:
    """sentence-transformers' modules.json and 1_Pooling: encoder, mean over all tokens, unit length."""
    kinds, poolings = ["Transformer", "Pooling"], sorted(folder.glob("1_Pooling/config.json"))
    if (path := folder / "modules.json").is_file():
        modules = [(str(m.get("type")).split(".")[-1], m.get("path")) for m in read_json(path, list)]
        kinds = [kind for kind, _ in modules]
        poolings = [folder / plain_name(path, where) / "config.json"
                    for kind, where in modules if kind == "Pooling"]
        if any(where for kind, where in modules if kind == "Transformer"):
            raise InputError(f"{path}: the encoder's path is {modules[0][1]!r}; only that of this folder, "
                             "empty, is supported: save the model again with sentence-transformers")
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise InputError(f"{path}: the modules {', '.join(kinds)} are not supported; only "
                         "Transformer, Pooling and Normalize, in this order, are")
    for path in poolings:
        raw = read_json(path, dict)
        modes = raw.get("pooling_mode") or [k[13:] for k, on in raw.items() if k.startswith("pooling_mode_") and on]
        if modes not in ("mean", ["mean"], ["mean_tokens"]) or not raw.get("include_prompt", True):
            raise InputError(f"{path}: pooling {modes!r} is not supported, nor a prompt left out of it; "
                             "only the mean over all tokens (eq. 1) is")
        if raw.get("embedding_dimension", raw.get("word_embedding_dimension", d)) != d:
            raise InputError(f"{path}: the pooling's dimension does not fit the encoder's hidden_size {d}")


def read_weights(folder: Path, wanted: dict[str, torch.Size]) -> dict[str, Tensor]:
    """The encoder's parameters from model.safetensors or the shards of its index; never from a pickle."""
    index, files = folder / "model.safetensors.index.json", [folder / "model.safetensors"]
    if not files[0].is_file() and index.is_file():
        names = sorted(set(read_json(index, dict)["weight_map"].values()))
        files = [folder / plain_name(index, name) for name in names]
    elif not files[0].is_file():
        pickled = " (a .bin is a pickle and is never opened)" if list(folder.glob("*.bin")) else ""
        raise InputError(f"{folder}: no model.safetensors there{pickled}; save the model again with "
                         "transformers' save_pretrained")
    found: dict[str, Tensor] = {}
    for path in files:
        with readable(path):
            found.update(load_file(str(path)))
    # a checkpoint with heads has its encoder under a prefix; the oldest call weight and bias otherwise
    prefix = next((p for p in ("bert.", "roberta.") if any(name.startswith(p) for name in found)), "")
    found = {name.removeprefix(prefix).replace("LayerNorm.gamma", "LayerNorm.weight").replace(
        "LayerNorm.beta", "LayerNorm.bias"): x for name, x in found.items()}
    for name, shape in wanted.items():
        if name not in found:
            raise InputError(f"{folder}: the weights lack {name}; the file is not this config.json's")
        if found[name].shape != shape:
            raise InputError(f"{folder}: {name} has shape {tuple(found[name].shape)}, but config.json makes it "
                             f"{tuple(shape)}; not a readable checkpoint")
    for name in found.keys() - wanted.keys():
        if not name.startswith(HEADS):
            raise InputError(f"{folder}: the weights hold {name}, which is no part of this encoder")
    return {name: found[name] for name in wanted}


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """What safetensors, tokenizers and misshapen JSON raise, as one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # of types of their own
        raise InputError(f"{path}: not a readable checkpoint ({first_line(error)}); "
                         "write or copy it again") from error


def plain_name(path: Path, name: Any) -> str:
    """A name that stands in a file and points to another of the same folder, and nowhere else."""
    if not isinstance(name, str) or name in ("", "..") or not re.fullmatch(r"[\w.-]+", name):
        raise InputError(f"{path}: {name!r} is not a name in this folder; refused")
    return name


def read_settings(folder: Path, tokenizer: Tokenizer) -> tuple[dict[str, str], list[int], float]:
    """Formats, Matryoshka dims, longest text in tokens: gecko.json's, else sentence-transformers'."""
    def read(name: str) -> dict[str, Any]:
        return read_json(folder / name, dict) if (folder / name).is_file() else {}

    own, theirs = read("gecko.json"), read("config_sentence_transformers.json")
    # named after BERT or, by older versions, after the encoder's family
    how = next(filter(None, (read(f"sentence_{kind}_config.json") for kind in ENCODERS)), {})
    if how.get("do_lower_case"):
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Lowercase(), *([tokenizer.normalizer] if tokenizer.normalizer else [])])
    length = own.get("max_length") or how.get("max_seq_length") or read("tokenizer_config.json").get(
        "model_max_length") or math.inf
    prompts = {name: text for name, text in (theirs.get("prompts") or {}).items() if text}
    if own:
        formats = {name: str(own["formats"][name]) for name in FORMATS}
        if not all("{text}" in form for form in formats.values()):
            raise InputError(f"{folder}/gecko.json: a format without {{text}} makes all texts one; give it a place")
    elif prompts.items() >= task_prompts(FORMATS).items():           # ours, saved by sentence-transformers
        formats = FORMATS
    else:
        default = prompts.get(theirs.get("default_prompt_name"), "")
        query = prompts.get("query", default)
        passage = next((prompts[name] for name in ("document", "passage", "corpus") if name in prompts), default)
        formats = {"query": query + PLAIN["query"], "passage": passage + PLAIN["passage"]}
    return formats, own.get("dims") or read("config.json").get("matryoshka_dimensions") or [], length


# --------------------------------------------------------------------------------------------------
# Files: written beside, then renamed


# --------------------------------------------------------------------------------------------------
# Command line


def search_command(args: argparse.Namespace) -> None:
    model = load(args.model)
    corpus = args.corpus or Path(args.model).parent / "corpus.jsonl"
    passages = read_passages(corpus)
    k = min(args.k, len(passages))
    say(model=args.model, corpus=corpus, passages=len(passages), task=args.task, dim=check_dim(model, args.dim))
    q = model.encode_queries([args.query], args.task, dim=args.dim)  # (1, dim)
    vectors = model.encode_passages([p["text"] for p in passages], [p["title"] for p in passages],
                                    dim=args.dim, progress="passages")   # (P, dim)
    for score, i in zip(*(x[0] for x in topk(q, vectors, k)), strict=True):
        text = " ".join(passages[i]["text"].split())
        print(f"{score:.3f}  {passages[i]['title'] or passages[i]['_id']}  {text[:80]}")


def encode_texts(args: argparse.Namespace, formats: dict[str, str]) -> Iterator[str]:
    """The formatted texts of the input, row after row."""
    for where, row in read_jsonl(args.input):
        text = row.get("text") if args.passages else row.get("query") or row.get("text")
        if not isinstance(text, str) or not text.strip():
            raise InputError(f'{where}: no {"" if args.passages else "query or "}"text"; every row needs one')
        yield (format_passage(text, str(row.get("title") or ""), formats) if args.passages
               else format_query(text, args.task, formats))


def encode_command(args: argparse.Namespace) -> None:
    """Written as it goes to a file beside the output; a stopped run is taken up at its last block.

    Under torchrun each process encodes its part of the rows into the same file; the last one renames it.
    """
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    model, output = load(args.model), Path(args.output)
    if output.is_dir():
        raise InputError(f"{output}: a folder stands there; name a .npy file")
    if output.resolve() == Path(args.input).resolve():
        raise InputError(f"{output}: the input stands there; name a .npy file")
    dim = check_dim(model, args.dim)
    rows = sum(1 for _ in encode_texts(args, model.formats))         # a first pass: every row is checked
    key = encode_key(args, model, rows, dim)
    part = output.with_name(f".{output.name}.{key}.part")
    states = [output.with_name(f".{output.name}.{key}.{r}-of-{world}.json") for r in range(world)]
    first, last = (rows * r // world for r in (rank, rank + 1))
    state = read_json(states[rank]) if states[rank].exists() and part.exists() else {"done": 0, "cut": 0}
    say(model=args.model, kind="passages" if args.passages else f"queries of task {args.task!r}", dim=dim,
        precision=args.precision, rows=f"{first}-{last} of {rows}", resumed_at=first + state["done"])
    texts = itertools.islice(encode_texts(args, model.formats), first + state["done"], last)
    start, before = time.perf_counter(), state
    if todo := last - first - before["done"]:
        with npy_part(part, (rows, dim), alone=world == 1) as write:
            for x in encode_blocks(model, texts, dim, progress="texts", precision=args.precision, total=todo):
                write(first + state["done"], x)
                state = {"done": state["done"] + len(x), "cut": before["cut"] + model.cut}
                with file_beside(states[rank]) as new:
                    new.write_text(json.dumps(state))
    rate = (state["done"] - before["done"]) / (time.perf_counter() - start)
    cut = finished(output, part, states, rows)
    if cut is None:
        print(f"encoded rows {first} to {last}, {rate:.0f} texts/s; the others are at work")
    else:
        print(f"wrote {output}: float32 {(rows, dim)}, {rate:.0f} texts/s; {cut} texts were cut at "
              f"{model.max_length} tokens")


def finished(output: Path, part: Path, states: Sequence[Path], rows: int) -> int | None:
    """Once the states tell of all rows, the part gets the output's name: the count of texts cut, else None."""
    done = []
    for path in states:
        with contextlib.suppress(InputError):                        # the last process has cleared them away
            done.append(read_json(path))
    if sum(d["done"] for d in done) < rows:
        return None
    for path in states:                                              # before the part: no state without one
        path.unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):                     # two may be last at once
        os.replace(part, output)
    name = re.compile(rf"\.{re.escape(output.name)}\.[0-9a-f]{{12}}\.(part|\d+-of-\d+\.json)")
    for path in filter(lambda p: name.fullmatch(p.name), output.parent.iterdir()):
        path.unlink(missing_ok=True)                                 # left by another input or model
    return sum(d["cut"] for d in done)


def encode_key(args: argparse.Namespace, model: Gecko, rows: int, dim: int) -> str:
    """A hash of all that the output's bytes depend on."""
    file = Path(args.input).stat()
    same = hashlib.sha256(json.dumps([
        file.st_size, file.st_mtime_ns, rows, dim, args.passages, args.task, args.precision, model.formats,
        model.max_length, TEXTS_AHEAD, BATCH_TOKENS, model.tokenizer.to_str()]).encode())
    for p in model.encoder.parameters():
        same.update(p.detach().cpu().numpy().tobytes())
    return same.hexdigest()[:12]


@contextlib.contextmanager
def npy_part(path: Path, shape: tuple[int, int], alone: bool) -> Iterator[Callable[[int, np.ndarray], None]]:
    """A float32 .npy file of that shape, whose rows stay if it is there: a function that puts rows at a place.

    `alone`: no other process writes, so after an error the file goes unless a state tells of rows in it.
    subtle: no memory map, because on a full disk that ends the process by a signal, without a word.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as f:
        try:
            np.lib.format.write_array_header_1_0(f, {"descr": "<f4", "fortran_order": False, "shape": shape})
            offset = f.tell()
            f.truncate(offset + 4 * shape[0] * shape[1])

            def write(row: int, x: np.ndarray) -> None:
                f.seek(offset + 4 * shape[1] * row)
                f.write(x.astype("<f4").tobytes())                   # (rows of x, d)
                f.flush()
                os.fsync(f.fileno())                                 # before the state says so

            yield write
        except BaseException:
            if alone and [p for p in path.parent.iterdir() if p.name.startswith(path.stem)] == [path]:
                path.unlink()
            raise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    search = commands.add_parser("search", help="the passages nearest to one query")
    search.add_argument("query", type=utf8)
    search.add_argument("--corpus", help="corpus.jsonl (default: the one beside the model's folder)")
    search.add_argument("-k", type=int, default=10, help="how many (%(default)s)")
    encode = commands.add_parser("encode", help="a file of texts -> a .npy file of unit vectors")
    encode.add_argument("input", help="JSONL with query or text (and _id, title with --passages)")
    encode.add_argument("output", help=".npy, float32, one row a text")
    encode.add_argument("--passages", action="store_true", help="encode as passages, not as queries")
    encode.add_argument("--precision", default="float32", help="float32 or bf16 (%(default)s)")
    for command in (search, encode):
        command.add_argument("--model", required=True, help="a model folder")
        command.add_argument("--task", type=utf8, default="question answering", help="queries' task (%(default)s)")
        command.add_argument("--dim", type=int, help="cut to this many dimensions (default: all)")
    args = parser.parse_args()
    if args.command == "search" and args.k < 1:
        raise InputError(f"-k {args.k}: give at least 1")
    search_command(args) if args.command == "search" else encode_command(args)


if __name__ == "__main__":
    run(main)
