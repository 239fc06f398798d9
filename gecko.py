"""Gecko's encoder: text -> vector, and the nearest of them (arXiv 2403.20327, section 3.1, appendix B).

Eq. 1 turns a text into a vector: a transformer M maps its n tokens to W of shape (n, d), and the mean
of W's rows is the text's embedding. This page holds the formats of texts, that encoder (BERT's
architecture, parameters named as Hugging Face names them), encoding, nearest neighbours, and the
smallest encoder. engine/search.py and packed.py do the same faster, folder.py knows model folders.

    python gecko.py search "round a number up" --model runs/demo/gecko
    python gecko.py encode IN.jsonl OUT.npy --model runs/demo/gecko --passages

Where we differ from the paper, or fill a gap in it:
1. Architecture (3.1: a 1.2B language model that is not public): any BERT-style encoder.
2. A passage without a title (appendix B, silent): its title reads "none".
3. The smallest encoder, `tiny`, is a bag of words by default; see TINY for how and why.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm

from engine.commandline import Arguments, gecko_arguments
from engine.documents import read_corpus
from engine.dropout import attention, dropout
from engine.files import InputError, check_outputs, one_line, run, say, say_lost
from engine.folder import Folder, fetch, read_folder, readable, write_folder
from engine.packed import check_finite, check_list, embed_bag, fast_embed, is_bag, length_batches
from engine.search import topk
from engine.tokens import TokenIds, tokenise, train_tokenizer
from engine.vectors import kept_vectors, rows_to_encode, write_npy

# Shapes: B texts in a batch, T tokens (the longest of the batch), d the model's dimension, H heads,
#         Q queries, P passages, k neighbours.

# --------------------------------------------------------------------------------------------------
# Formats of texts (appendix B)

FORMATS = {
    "query": "task: {task} | query: {text}",       # every input, and the targets of symmetric tasks
    "passage": "title: {title} | text: {text}",    # the targets of asymmetric tasks
}
PLAIN = {"query": "{text}", "passage": "{title} {text}"}   # an encoder that ships no prompts
TASKS = ("question answering", "search result", "fact checking", "semantic similarity", "classification")


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
    form = formats["passage"]
    if not title.strip():                                # gap 2; other makers' formats leave it out
        form = form.replace("title: {title}", "title: none").replace("{title} ", "")
    return fill(form, title=title, text=text)


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
    """First `dim` dimensions (Matryoshka), *then* scaled to length 1: (B, d) -> (B, dim)."""
    x = x[:, :dim].to(torch.promote_types(x.dtype, torch.float32))  # (B, dim) bfloat16 is too coarse
    return F.normalize(x, dim=-1)                      # (B, dim)


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """sim(x, y) of section 3.1 for every pair of rows: (B, d), (C, d) -> (B, C)."""
    return truncate_dim(x) @ truncate_dim(y).T         # (B, C)


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
        """RoBERTa and XLM-R count positions from pad_token_id + 1, BERT from 0."""
        return 0 if self.model_type == "bert" else self.pad_token_id + 1


class Layer(nn.Module):
    """One post-norm transformer layer: attention, then a feed-forward net, each with a residual."""

    def __init__(self, c: EncoderConfig) -> None:
        super().__init__()
        d, eps = c.hidden_size, c.layer_norm_eps
        self.heads = c.num_attention_heads
        self.p, self.attention_p = c.hidden_dropout_prob, c.attention_probs_dropout_prob
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
        q = project["query"](x).view(B, T, self.heads, -1).transpose(1, 2)  # (B, H, T, d/H)
        k = project["key"](x).view(B, T, self.heads, -1).transpose(1, 2)    # (B, H, T, d/H)
        v = project["value"](x).view(B, T, self.heads, -1).transpose(1, 2)  # (B, H, T, d/H)
        p, attention_p = (self.p, self.attention_p) if self.training else (0.0, 0.0)
        a = attention(q, k, v, keep, attention_p)                    # (B, H, T, d/H)
        a = out["dense"](a.transpose(1, 2).reshape(B, T, d))         # (B, T, d)
        x = out["LayerNorm"](x + dropout(a, p))                      # (B, T, d)
        # d -> intermediate_size -> d
        h = self.output["dense"](F.gelu(self.intermediate["dense"](x)))  # (B, T, d)
        return self.output["LayerNorm"](x + dropout(h, p))           # (B, T, d)


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
        layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        self.encoder: Any = nn.ModuleDict({"layer": layers})

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask: (B, T) -> W: (B, T, d)."""
        _, T = ids.shape
        e, first = self.embeddings, self.config.first_position
        position = e["position_embeddings"].weight[first:first + T]  # (T, d)
        segment = e["token_type_embeddings"].weight[0]               # (d) BERT's "first sentence"
        x = e["LayerNorm"](e["word_embeddings"](ids) + position + segment)    # (B, T, d)
        x = dropout(x, self.config.hidden_dropout_prob if self.training else 0.0)  # (B, T, d)
        keep = mask.bool()[:, None, None, :]                         # (B, 1, 1, T)
        for layer in self.encoder["layer"]:
            x = layer(x, keep)                                       # (B, T, d)
        return x


def embed(encoder: Encoder, ids: Tensor, mask: Tensor) -> Tensor:
    """Eq. 1 for a batch: ids, mask (B, T) -> (B, d), not yet of length 1 (see `truncate_dim`)."""
    return mean_pool(encoder(ids, mask), mask)                       # (B, d)


def pad(tokens: TokenIds, pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids of B texts -> ids and mask, both (B, T)."""
    lengths = torch.tensor([len(ids) for ids in tokens])             # (B)
    mask = torch.arange(int(lengths.max()))[None, :] < lengths[:, None]  # (B, T)
    padded = torch.full(mask.shape, pad_id)                          # (B, T)
    padded[mask] = torch.tensor([i for ids in tokens for i in ids])
    return padded, mask


# --------------------------------------------------------------------------------------------------
# A text embedding model: encoder + tokenizer + formats

BATCH_TOKENS = {"cpu": 4096, "cuda": 65536}


class Gecko:
    """The encoder with all that a text needs to become its vector; a folder on disk."""

    def __init__(
        self,
        encoder: Encoder,
        tokenizer: Tokenizer,
        max_length: int,
        formats: dict[str, str] = FORMATS,
        dims: Sequence[int] = (),
    ) -> None:
        self.encoder, self.tokenizer, self.max_length = encoder, tokenizer, max_length
        self.formats = dict(formats)
        self.dims = tuple(dims) or (encoder.config.hidden_size,)     # that it was trained for
        # of the last call of `tokens`
        self.texts = self.truncated = self.length = 0                # texts, those that were cut, and where
        self.unknown = 0.0                                           # the share of unknown tokens

    @property
    def device(self) -> torch.device:
        return next(self.encoder.parameters()).device

    def tokens(self, texts: Sequence[str], max_length: int | None = None) -> list[array[int]]:
        """Token ids of each text, cut at max_length; `lost` says what was lost."""
        check_list(texts)
        self.length = min(max_length or self.max_length, self.max_length)
        tokens, self.truncated, self.unknown = tokenise(self.tokenizer, texts, self.length)
        self.texts = len(tokens)
        return tokens

    def lost(self) -> str:
        """What of its texts the last call of `tokens` lost, in words; empty if nothing."""
        notes = []
        if self.truncated:
            notes.append(f"{self.truncated} of {self.texts} texts were cut at {self.length} tokens")
        if self.unknown > 0.01:
            notes.append(f"{self.unknown:.0%} of the tokens are unknown to this model's tokenizer")
        return "; ".join(notes)

    def embed(self, tokens: TokenIds) -> Tensor:
        """Token ids of B texts -> (B, d) with gradient: `embed` above, or its twin for a bag of words."""
        if is_bag(self.encoder):
            return embed_bag(self.encoder, tokens)                   # (B, d)
        ids, mask = pad(tokens, self.encoder.config.pad_token_id)    # (B, T) twice
        return embed(self.encoder, ids.to(self.device), mask.to(self.device))  # (B, d)

    @torch.no_grad()
    def encode(
        self,
        texts: Sequence[str],          # already formatted
        dim: int | None = None,        # None: all
        precision: str = "float32",    # or "bf16"
        progress: str = "",            # the name of a bar; none without
    ) -> np.ndarray:                   # (len(texts), dim) float32 unit vectors, in the order given
        """Eq. 1 for any number of texts: tokens, batches of like length, means, cut to length 1."""
        d = self.encoder.config.hidden_size
        if dim is not None and not 1 <= dim <= d:
            raise InputError(f"--dim {dim}: this model has {d} dimensions, give 1 to that "
                             f"(it was trained for {self.dims})")
        tokens = self.tokens(texts)
        embed_batch = fast_embed(self.encoder, self.embed, precision)
        vectors = torch.empty(len(texts), dim or d)                  # (len(texts), dim)
        was_training = self.encoder.training
        self.encoder.eval()
        with tqdm(total=len(texts), desc=progress, unit="text", disable=not progress) as bar:
            for batch in length_batches([len(ids) for ids in tokens], BATCH_TOKENS[self.device.type]):
                x = embed_batch([tokens[i] for i in batch])          # (B, d)
                vectors[batch] = truncate_dim(x, dim).cpu()          # (B, dim)
                bar.update(len(batch))
        self.encoder.train(was_training)
        check_finite(vectors, texts)
        return vectors.numpy()

    def encode_queries(
        self,
        texts: Sequence[str],
        task: str = TASKS[0],
        **how: Any,
    ) -> np.ndarray:
        """Queries of one task -> (len(texts), dim). The task's tokens are in the mean (eq. 1)."""
        check_list(texts)
        for i, text in enumerate(texts, 1):
            if not text.strip():
                raise InputError(f"query {i} of {len(texts)} is empty; give it some words")
        return self.encode([format_query(text, task, self.formats) for text in texts], **how)

    def encode_passages(
        self,
        texts: Sequence[str],
        titles: Sequence[str] | None = None,
        **how: Any,
    ) -> np.ndarray:
        """Passages -> (len(texts), dim). A passage gets no task, so one index serves every task."""
        check_list(texts)
        if titles is None:
            titles = [""] * len(texts)
        check_list(titles)
        formatted = []
        for text, title in zip(texts, titles, strict=True):
            formatted.append(format_passage(text, title, self.formats))
        return self.encode(formatted, **how)


# --------------------------------------------------------------------------------------------------
# Exact nearest neighbours (section 3.2: the top N of q from C)


def nearest(
    queries: Tensor,   # (Q, d) float32
    passages: Tensor,  # (P, d) float32
    k: int,
) -> tuple[Tensor, Tensor]:  # scores and indices, (Q, k) each
    """The k passages of largest inner product (of unit vectors: cosine) for each query, best first.

    Equal scores come by lower index. Each is summed in float64 and then rounded, so that it does not
    depend on the order of the sum. `topk` of engine/search.py gives the same numbers in blocks.
    """
    s = (queries.double() @ passages.double().T).float()             # (Q, P)
    s, order = s.sort(dim=1, descending=True, stable=True)           # (Q, P) twice
    return s[:, :k], order[:, :k]                                    # (Q, k) twice


# --------------------------------------------------------------------------------------------------
# The smallest encoder: BERT's architecture, by default a bag of words

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
    settings: dict[str, Any] = {**TINY, **config}
    c = EncoderConfig(vocab_size=tokenizer.get_vocab_size(), **settings)
    encoder = Encoder(c)
    generator = torch.Generator().manual_seed(seed)
    for name, p in encoder.named_parameters():
        if "position" in name or "token_type" in name or name.endswith("bias"):
            nn.init.zeros_(p)
        elif ".output.dense" in name:
            nn.init.zeros_(p)                                        # a layer is its norms at first
        elif "LayerNorm" not in name:
            nn.init.normal_(p, 0, 0.02, generator=generator)
    with torch.no_grad():
        encoder.embeddings["word_embeddings"].weight[c.pad_token_id] = 0
    encoder.embeddings["position_embeddings"].requires_grad_(c.num_hidden_layers > 0)
    return Gecko(encoder, tokenizer, max_length=c.max_position_embeddings)


# --------------------------------------------------------------------------------------------------
# Model folders: safetensors, tokenizer.json, config.json and the formats. Never a pickle.


def prompts_of(formats: dict[str, str]) -> dict[str, str]:
    """What sentence-transformers puts before a text: a prompt for each task, and one for passages."""
    forms = {task: format_query("{text}", task, formats) for task in TASKS}
    forms["query"] = forms[TASKS[0]]                                 # as in `encode_queries`
    forms["document"] = forms["passage"] = format_passage("{text}", "", formats)
    return {name: form.partition("{text}")[0] for name, form in forms.items()}


def formats_of(prompts: dict[str, str]) -> dict[str, str]:
    """The formats of an encoder of other makers: their prompts."""
    if prompts.items() >= prompts_of(FORMATS).items():               # ours, saved by sentence-transformers
        return FORMATS
    passage = prompts["corpus"]
    for name in ("passage", "document"):
        passage = prompts.get(name, passage)
    return {"query": prompts["query"] + PLAIN["query"], "passage": passage + PLAIN["passage"]}


def save(model: Gecko, path: str | Path) -> None:
    """Write a folder that transformers and sentence-transformers open too, whole or not at all."""
    folder = Folder(
        config=asdict(model.encoder.config),
        weights=model.encoder.state_dict(),
        tokenizer=model.tokenizer,
        max_length=model.max_length,
        dims=list(model.dims),
        prompts=prompts_of(model.formats),
        formats=model.formats,
    )
    write_folder(path, folder)


def load(name: str | Path) -> Gecko:
    """Open a folder that `save` wrote, or a BERT, RoBERTa or XLM-R encoder: a folder or a hub id.

    Its makers' prompts, length and tokens are kept. Whatever is not the mean over such an encoder's
    tokens is refused by name.
    """
    path = fetch(name)
    folder = read_folder(path)
    with readable(path):
        c = EncoderConfig(**folder.config)
        with torch.device("meta"):                                   # shapes alone
            encoder = Encoder(c)
        encoder.to_empty(device="cpu").load_state_dict(folder.weights)
        formats = folder.formats or formats_of(folder.prompts)
    positions = c.max_position_embeddings - c.first_position
    model = Gecko(encoder, folder.tokenizer, min(folder.max_length, positions), formats, folder.dims)
    if is_bag(encoder):
        encoder.embeddings["position_embeddings"].requires_grad_(False)
    encoder.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return model


# --------------------------------------------------------------------------------------------------
# Command line


def search_command(args: Arguments) -> None:
    folder = fetch(args.model)
    model = load(folder)
    corpus = Path(args.corpus or folder.parent / "corpus.jsonl")
    passages = read_corpus(corpus)
    say(**vars(args), passages=len(passages))
    q = model.encode_queries([args.query], args.task, dim=args.dim)  # (1, dim)
    say_lost(model, "query")
    texts = [format_passage(p["text"], p["title"], model.formats) for p in passages]
    P = torch.from_numpy(kept_vectors(model, folder, corpus, texts))  # (P, d) encoded once, then on disk
    scores, indices = topk(q, truncate_dim(P, args.dim), min(args.k, len(passages)))  # (1, k) twice
    for score, i in zip(scores[0], indices[0], strict=True):
        found = passages[i]
        name = found["title"] or found["_id"]
        print(f"{score:.3f}  {one_line(name, 80)}  {one_line(found['text'], 80)}")


def encode_command(args: Arguments) -> None:
    check_outputs([args.output], args.input)
    model = load(args.model)
    texts = []
    for title, text in rows_to_encode(args.input, args.passages):
        if not args.passages:
            texts.append(format_query(text, args.task, model.formats))
        else:
            # an empty passage keeps its row
            texts.append(format_passage(text, title, model.formats) if title or text else "")
    say(**vars(args), rows=len(texts))
    write_npy(args.output, model, texts, args.dim, args.precision)


def main() -> None:
    args = gecko_arguments(__doc__, TASKS[0])
    if args.command == "search":
        search_command(args)
    else:
        encode_command(args)


if __name__ == "__main__":
    run(main)
