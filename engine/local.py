"""A causal language model of Hugging Face in this process: the same string calls as an endpoint.

What all prompts share is read once; a prefix once, however many texts follow it; then the texts, in batches,
each against the keys and values of its prefix.
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.cache import Items, Strings
from engine.files import InputError, first_line
from engine.replies import Tops
from engine.search import has_bfloat16

Tokens = list[int]

# B rows of a batch, K tokens of a prompt, L of a text, V of the vocabulary. The id -1 is padding.
PROMPTS = 8  # that are read together; of answers that are written, as many as rows


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
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError as error:
            raise InputError("a model in this process needs transformers: pip install transformers") from error
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # the weights' own, but where a bfloat16 product takes four times as long as a float32 one
        dtype = "auto" if has_bfloat16(device) else torch.float32
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
            self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{folder}: transformers opens no causal language model there "
                             f"({first_line(error)})") from error
        torch.nn.Module.to(self.model, device)
        super().__init__(f"hf:{folder} in {str(self.model.dtype).removeprefix('torch.')}")
        self.temperature, self.max_tokens, self.rows = temperature, max_tokens, rows
        end = self.model.generation_config.eos_token_id
        ends = end if isinstance(end, list) else [end]
        names = inspect.signature(inspect.unwrap(self.model.forward)).parameters
        self.cache_name = "cache" if "cache" in names else "past_key_values"   # as transformers' versions have it
        # no special token is part of an answer: a small model runs on after one
        special = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        self.stop: list[Any] = [*stop, *special, *map(self.tokenizer.decode, filter(None, ends))]

    def describe(self, call: str) -> str:
        if call != "complete":
            return self.name
        return f"{self.name}, temperature {self.temperature}, {self.max_tokens} tokens, stops {self.stop}"

    def tokens(self, text: str) -> Tokens:
        return self.tokenizer(text)["input_ids"]

    # ----------------------------------------------------------------------------------------------
    # The three calls

    @torch.inference_mode()
    def ask_new(self, call: str, items: Items) -> None:
        answered = getattr(self, f"{call}_batch")
        same: dict[str, list[tuple[str, Any]]] = {}                  # items by their prompt
        for item in items:
            same.setdefault(item[0], []).append(item)
        for prompts, ids, cache in self.batches(list(same), self.rows if call == "complete" else PROMPTS):
            batch = [item for prompt in prompts for item in same[prompt]]
            batch.sort(key=lambda item: len(str(item[1])))           # texts of like length: little padding
            for start in range(0, len(batch), self.rows):
                chunk = batch[start:start + self.rows]
                rows = [prompts.index(prompt) for prompt, _ in chunk]
                answers = answered(ids[rows], of_rows(cache, rows), chunk)
                for item, answer in zip(chunk, answers, strict=True):
                    self.keep(call, item, answer)                    # a stopped run goes on from here

    # Each takes a batch of items, the ids (B, K) of their prompts, and a cache of all but the last of these.

    def log_likelihood_batch(self, ids: Tensor, cache: Any, pairs: Items) -> list[float]:
        """Of each pair the sum of log p of the text's tokens after its prefix."""
        texts = []
        for prefix, text in pairs:
            # subtle: tokenised in its place, since a tokenizer may mark the beginning of a text
            texts.append(self.tokens(prefix + text)[len(self.tokens(prefix)):])
        L = max(map(len, texts))
        padded = [text + [-1] * (L - len(text)) for text in texts]
        target = torch.tensor(padded, device=ids.device)             # (B, L)
        ids = torch.cat([ids, target[:, :-1]], dim=1)                # (B, K + L - 1)
        # the prompt's last token predicts the text's first
        log_p = self.forward(ids, cache, L).log_softmax(dim=-1)      # (B, L, V)
        token = target.clamp(min=0)[:, :, None]                      # (B, L, 1)
        log_p = log_p.gather(2, token)[:, :, 0]                      # (B, L)
        return (log_p * (target >= 0)).sum(dim=1).tolist()           # (B)

    def top_tokens_batch(self, ids: Tensor, cache: Any, prompts: Items) -> list[Tops]:
        """The likeliest first tokens of each answer, with their log p."""
        top = self.forward(ids, cache)[:, -1].log_softmax(dim=-1).topk(20)  # (B, 20) twice
        answers = []
        for values, tokens in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            answers.append(list(zip(map(self.tokenizer.decode, tokens), values, strict=True)))
        return answers

    def complete_batch(self, ids: Tensor, cache: Any, items: Items) -> list[str]:
        """Sampled answers, a token of each at a time; a seed's answer does not depend on the other rows."""
        K = ids.shape[1]
        noise = [torch.Generator().manual_seed(seed) for _, seed in items]
        for _ in range(self.max_tokens):
            logits = self.forward(ids, cache)[:, -1].cpu()           # (B, V)
            # the largest of logits / temperature + Gumbel noise is a sample of their softmax
            for row, generator in zip(logits, noise, strict=True):
                gumbel = -torch.empty_like(row).exponential_(generator=generator).log()
                row += self.temperature * gumbel
            token = logits.argmax(dim=1, keepdim=True)               # (B, 1)
            ids = torch.cat([ids, token.to(ids.device)], dim=1)      # (B, K + tokens written)
            texts = [self.tokenizer.decode(row) for row in ids[:, K:].tolist()]
            answers = [self.until_stop(text) for text in texts]
            if not set(texts) & set(answers):                        # no text is without a stop
                break
        return answers

    def until_stop(self, text: str) -> str:
        for stop in self.stop:
            text = text.partition(stop)[0]
        return text

    # ----------------------------------------------------------------------------------------------
    # Prompts, and the keys and values of their tokens

    def batches(self, prompts: Sequence[str], size: int) -> Iterator[tuple[list[str], Tensor, Any]]:
        """Prompts of like length, with little padding; their ids (B, K); a cache of all but the last of these."""
        from transformers import DynamicCache

        tokens = {prompt: self.tokens(prompt) for prompt in prompts}
        # what all begin with is read once; not a last token, which is to predict the next
        head = list(os.path.commonprefix([row[:-1] for row in tokens.values()]))
        if getattr(self.model.config, "sliding_window", None):
            head = []    # subtle: the padding after the head would count as what the window sees
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
