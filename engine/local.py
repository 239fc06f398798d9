"""A causal language model of Hugging Face in this process: the same string calls as an endpoint.

What all prompts share is read once; a prefix once, however many texts follow it; then the texts, in batches,
each against the keys and values of its prefix.
"""

from __future__ import annotations

import copy
import inspect
import math
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from engine.cache import Items, Strings
from engine.files import InputError, first_line
from engine.replies import Tops
from engine.search import has_bfloat16
from engine.transport import CallFailed

Tokens = list[int]

# B rows of a batch, K tokens of a prompt, L of a text, V of the vocabulary. The id -1 is padding.
PROMPTS = 8  # that are read together; of answers that are written, as many as rows
# What layers may be that keep nothing but keys and values; and what names a window that some of them see
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
WINDOWS = ("sliding_window", "window_size", "attention_chunk_size")


class Local(Strings):
    """The strings of engine/cache.py."""

    def __init__(
        self,
        folder: str,
        temperature: float = 0.7,
        max_tokens: int = 80,
        stop: Sequence[str] = ("\n\n",),
        rows: int = 32,                 # texts that are scored together, or answers that are written together
    ) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # the weights' own, but where a bfloat16 product takes four times as long as a float32 one
        dtype = "auto" if has_bfloat16(device) else torch.float32
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer

            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
            opened: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
        except (ImportError, OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise InputError(f"{folder}: transformers opens no causal language model there "
                             f"({first_line(error)}); pip install transformers where it is missing") from error
        model, info = opened
        self.model = model.to(device)
        config = model.config.get_text_config()
        # weights that are missing would be drawn at random, without a word
        unknown = {*info["missing_keys"], *(getattr(config, "layer_types", None) or ())} - ATTENTION
        if unknown or not self.tokens("a"):
            raise InputError(f"{folder}: give a causal language model of attention layers alone, with all weights "
                             f"and a tokenizer ({', '.join(sorted(unknown)[:2]) or 'this makes no tokens'})")
        super().__init__(f"hf:{folder} in {str(model.dtype).removeprefix('torch.')}")
        self.temperature, self.max_tokens, self.rows = temperature, max_tokens, rows
        self.context = getattr(config, "max_position_embeddings", None) or math.inf
        names = inspect.signature(inspect.unwrap(model.forward)).parameters
        self.cache_name = "cache" if "cache" in names else "past_key_values"   # as transformers' versions have it
        # subtle: padding stands between a shared head and the rest, and would count in a window, or as a place
        self.shares_head = "position_ids" in names and not any(getattr(config, name, None) for name in WINDOWS)
        # no special token is part of an answer, nor an end of the model's: a small model runs on after one
        ends = torch.tensor(model.generation_config.eos_token_id or -1)
        special = [token.content for key, token in self.tokenizer.added_tokens_decoder.items()
                   if token.special or key in ends]
        self.stop = re.compile("|".join(map(re.escape, [*stop, *special])))

    def describe(self, call: str) -> str:
        if call != "complete":
            return self.name
        return f"{self.name}, temperature {self.temperature}, {self.max_tokens} tokens, stops {self.stop.pattern}"

    def tokens(self, text: str) -> Tokens:
        """What a passage says is no control token; and a text that is to go on has no end."""
        tokens = self.tokenizer(text, split_special_tokens=True)["input_ids"]
        return tokens[:-1] if tokens[-1:] == [self.tokenizer.eos_token_id] else tokens

    def given(self, call: str, prompt: str, text: Any) -> Any:
        """What a batch is given of an item: its seed, or its text's tokens; CallFailed where that cannot be."""
        head, given, size = self.tokens(prompt), text, self.max_tokens
        if call == "log_likelihood":
            # in its place, since a tokenizer may mark the beginning of a text
            tokens = self.tokens(prompt + text)
            given = tokens[len(head):]
            size = len(given)
            if tokens != head + given or not given:
                raise CallFailed(f"a token crosses the prompt's end before {text!r}")
        size += len(head)
        if size > self.context:
            raise CallFailed(f"{size} tokens, and the model reads {self.context}: give a smaller --chars")
        return given

    # ----------------------------------------------------------------------------------------------
    # The calls

    @torch.inference_mode()
    def ask_new(self, call: str, items: Items) -> None:
        answered = getattr(self, f"{call}_batch")
        same: dict[str, list[tuple[Any, Any]]] = {}                  # items by their prompt, with what is given
        for item in items:
            try:
                given = self.given(call, *item)
                same.setdefault(item[0], []).append((item, given))
            except CallFailed as error:                              # not `fail`: long ones may stand in a row
                self.failures.append(str(error))
        for prompts, ids, cache in self.batches(list(same), self.rows if call == "complete" else PROMPTS):
            batch = [pair for prompt in prompts for pair in same[prompt]]
            batch.sort(key=lambda pair: len(str(pair[1])))           # texts of like length: little padding
            for start in range(0, len(batch), self.rows):
                chunk = batch[start:start + self.rows]
                rows = [prompts.index(prompt) for (prompt, _), _ in chunk]
                answers = answered(ids[rows], of_rows(cache, rows), [given for _, given in chunk])
                for (item, _), answer in zip(chunk, answers, strict=True):
                    self.keep(call, item, answer)                    # a stopped run goes on from here

    # Each takes the ids (B, K) of a batch's prompts, a cache of all but the last of these, and what is given.

    def log_likelihood_batch(self, ids: Tensor, cache: Any, texts: list[Tokens]) -> list[float]:
        """Of each text the sum of log p of its tokens after the prompt."""
        target = pad_sequence(list(map(torch.tensor, texts)), batch_first=True, padding_value=-1)
        target = target.to(ids.device)                               # (B, L)
        ids = torch.cat([ids, target[:, :-1]], dim=1)                # (B, K + L - 1)
        # the prompt's last token predicts the text's first
        log_p = self.forward(ids, cache, target.shape[1]).log_softmax(dim=-1)  # (B, L, V)
        token = target.clamp(min=0)[:, :, None]                      # (B, L, 1)
        log_p = log_p.gather(2, token)[:, :, 0]                      # (B, L)
        return (log_p * (target >= 0)).sum(dim=1).tolist()           # (B)

    def top_tokens_batch(self, ids: Tensor, cache: Any, _: list[str]) -> list[Tops]:
        """The likeliest first tokens of each answer, with their log p."""
        top = self.forward(ids, cache)[:, -1].log_softmax(dim=-1).topk(20)  # (B, 20) twice
        rows = zip(top.values.tolist(), top.indices.tolist(), strict=True)
        return [list(zip(map(self.tokenizer.decode, tokens), values, strict=True)) for values, tokens in rows]

    def complete_batch(self, ids: Tensor, cache: Any, seeds: list[int]) -> list[str]:
        """Sampled answers, a token of each at a time; a seed's answer does not depend on the other rows."""
        K = ids.shape[1]
        noise = [torch.Generator().manual_seed(seed) for seed in seeds]
        for _ in range(self.max_tokens):
            logits = self.forward(ids, cache)[:, -1].cpu()           # (B, V)
            # the largest of logits / temperature + Gumbel noise is a sample of their softmax
            for row, generator in zip(logits, noise, strict=True):
                gumbel = -torch.empty_like(row).exponential_(generator=generator).log()
                row += self.temperature * gumbel
            token = logits.argmax(dim=1, keepdim=True)               # (B, 1)
            ids = torch.cat([ids, token.to(ids.device)], dim=1)      # (B, K + tokens written)
            texts = [self.tokenizer.decode(row) for row in ids[:, K:].tolist()]
            ends = [self.stop.search(text) for text in texts]
            if all(ends):
                break
        # where there is no stop, the last line was cut off
        return [text[:end.start()] if end else text.rpartition("\n")[0]
                for text, end in zip(texts, ends, strict=True)]

    # ----------------------------------------------------------------------------------------------
    # Prompts, and the keys and values of their tokens

    def batches(self, prompts: Sequence[str], size: int) -> Iterator[tuple[list[str], Tensor, Any]]:
        """Prompts of like length, with little padding; their ids (B, K); a cache of all but the last of these."""
        from transformers import DynamicCache

        tokens = {prompt: self.tokens(prompt) for prompt in prompts}
        head: Tokens = []
        if self.shares_head:
            # what all begin with is read once; not a last token, which is to predict the next
            head = list(os.path.commonprefix([row[:-1] for row in tokens.values()]))
        head_cache, device = DynamicCache(), self.model.device
        if head:
            self.forward(torch.tensor([head], device=device), head_cache)
        order = sorted(prompts, key=lambda prompt: len(tokens[prompt]))
        for start in range(0, len(order), size):
            batch = order[start:start + size]
            longest = len(tokens[batch[-1]])
            rows = []
            for prompt in batch:                                     # padded so that all end together
                row = tokens[prompt]
                rows.append(head + [-1] * (longest - len(row)) + row[len(head):])
            ids = torch.tensor(rows, device=device)                  # (B, K)
            cache = of_rows(head_cache, [0] * len(rows))
            if longest > len(head) + 1:
                self.forward(ids[:, :-1], cache)
            yield batch, ids, cache

    def forward(self, ids: Tensor, cache: Any, last: int = 1) -> Tensor:
        """Logits (B, last, V) after the last tokens of ids (B, K), of which the cache holds those before."""
        valid = ids >= 0                                             # (B, K)
        place = valid.cumsum(dim=1).sub(1).clamp(min=0)              # (B, K)
        seen = cache.get_seq_length()
        new = ids[:, seen:].clamp(min=0)                             # (B, K - seen)
        settings = {self.cache_name: cache, "attention_mask": valid, "position_ids": place[:, seen:]}
        return self.model(new, logits_to_keep=last, **settings).logits.float()


def of_rows(cache: Any, rows: Sequence[int]) -> Any:
    """A copy of the cache with these of its rows."""
    cache = copy.deepcopy(cache)
    cache.batch_select_indices(torch.tensor(rows))
    return cache
