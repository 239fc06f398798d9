"""A causal language model of Hugging Face in this process: the same string calls as an endpoint.

What all prompts share is read once; a prefix once, however many texts follow it; then the texts, in batches,
each against the keys and values of its prefix.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.cache import Pairs, Strings, Tops
from engine.files import InputError, first_line
from engine.search import has_bfloat16

Tokens = list[int]
Batch = tuple[list[int], Tensor, Any]  # numbers of prompts, their ids (B, K), a cache of all but the last of these

# B rows of a batch, K tokens of a prompt, L of a text, V of the vocabulary. The id -1 is padding.
PREFIXES = 8  # that are read together


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
            from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
        except ImportError as error:
            raise InputError("a model in this process needs transformers: pip install transformers") from error
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # the weights' own, but for a CPU to which bfloat16 products take four times as long as float32 ones
        dtype = "auto" if device.type == "cuda" or has_bfloat16(device) else torch.float32
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
            self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{folder}: transformers opens no causal language model there "
                             f"({first_line(error)})") from error
        torch.nn.Module.to(self.model, device)
        self.name = f"hf:{folder}"
        self.temperature, self.max_tokens, self.stop, self.rows = temperature, max_tokens, tuple(stop), rows
        end = self.model.generation_config.eos_token_id
        self.ends = {self.tokenizer.eos_token_id, *(end if isinstance(end, list) else [end])}
        names = inspect.signature(inspect.unwrap(self.model.forward)).parameters
        self.cache_name = "cache" if "cache" in names else "past_key_values"  # as transformers' versions have it
        self.new_cache: Callable[[], Any] = DynamicCache

    def describe(self, call: str) -> str:
        how = f"{self.name} in {str(self.model.dtype).removeprefix('torch.')}"
        if call == "complete":
            return f"{how}, temperature {self.temperature}, {self.max_tokens} tokens, stops {self.stop}"
        return how

    def report(self) -> str:
        return f"{self.name} answered in this process"

    def tokens(self, text: str) -> Tokens:
        return list(self.tokenizer(text)["input_ids"])

    # ----------------------------------------------------------------------------------------------
    # The three calls

    @torch.inference_mode()
    def ask(self, call: str, items: Sequence[Any]) -> list[Any]:
        if call == "complete":
            return self.completions(items)
        return self.sums(items) if call == "log_likelihood" else self.tops(items)

    def sums(self, pairs: Pairs) -> list[float]:
        """Of each pair the sum of log p of the text's tokens after its prefix."""
        texts: dict[str, list[str]] = {}
        for prefix, text in dict.fromkeys(pairs):
            texts.setdefault(prefix, []).append(text)
        prefixes = list(texts)
        scores: dict[tuple[str, str], float] = {}
        for numbers, ids, cache in self.batches(prefixes, PREFIXES):
            row_of = {prefixes[n]: row for row, n in enumerate(numbers)}
            batch = [(prefix, text) for prefix in row_of for text in texts[prefix]]
            batch.sort(key=lambda pair: len(pair[1]))                # of like length: little padding
            for start in range(0, len(batch), self.rows):
                chunk = batch[start:start + self.rows]
                rows = [row_of[prefix] for prefix, _ in chunk]
                values = self.continuations(ids[rows], of_rows(cache, rows), chunk)
                for pair, value in zip(chunk, values, strict=True):
                    scores[pair] = value
                    self.keep("log_likelihood", pair, value)         # a stopped run goes on from here
        return [scores[pair] for pair in pairs]

    def continuations(self, ids: Tensor, cache: Any, pairs: Pairs) -> list[float]:
        """log p of each text after its prefix, of which ids (B, K) are the tokens."""
        texts = []
        for prefix, text in pairs:
            # subtle: tokenised in its place, since a tokenizer may mark the beginning of a text
            texts.append(self.tokens(prefix + text)[len(self.tokens(prefix)):])
        L = max(map(len, texts))
        target = self.tensor([text + [-1] * (L - len(text)) for text in texts])  # (B, L)
        ids = torch.cat([ids, target[:, :-1]], dim=1)                # (B, K + L - 1)
        # the prompt's last token predicts the text's first
        log_p = self.forward(ids, cache, L).log_softmax(dim=-1)      # (B, L, V)
        token = target.clamp(min=0)[:, :, None]                      # (B, L, 1)
        log_p = log_p.gather(2, token)[:, :, 0]                      # (B, L)
        return (log_p * (target >= 0)).sum(dim=1).tolist()           # (B)

    def tops(self, prompts: Sequence[str]) -> list[Tops]:
        """The likeliest first tokens of each answer, with their log p."""
        answers: list[Tops] = [[]] * len(prompts)
        for numbers, ids, cache in self.batches(prompts, PREFIXES):
            log_p = self.forward(ids, cache)[:, -1].log_softmax(dim=-1)  # (B, V)
            values, tokens = log_p.topk(20)                          # (B, 20) twice
            for row, n in enumerate(numbers):
                words = [self.tokenizer.decode(token) for token in tokens[row].tolist()]
                answers[n] = list(zip(words, values[row].tolist(), strict=True))
                self.keep("top_tokens", prompts[n], answers[n])
        return answers

    def completions(self, items: Sequence[tuple[str, int]]) -> list[str]:
        """What the model writes after each prompt, up to a stop; equal prompts differ by their seed."""
        answers = [""] * len(items)
        prompts, seeds = zip(*items, strict=True)
        for numbers, ids, cache in self.batches(prompts, self.rows):
            written = self.write(ids, cache, [seeds[n] for n in numbers])
            for n, text in zip(numbers, written, strict=True):
                answers[n] = text
                self.keep("complete", items[n], text)
        return answers

    def write(self, ids: Tensor, cache: Any, seeds: Sequence[int]) -> list[str]:
        """Sampled answers, a token of each at a time; a seed's answer does not depend on the other rows."""
        K = ids.shape[1]
        noise = [torch.Generator().manual_seed(seed) for seed in seeds]
        answers = [("", False)] * len(seeds)
        for _ in range(self.max_tokens):
            logits = self.forward(ids, cache)[:, -1].cpu()           # (B, V)
            # the largest of logits / temperature + Gumbel noise is a sample of their softmax
            for row, generator in zip(logits, noise, strict=True):
                gumbel = -torch.empty_like(row).exponential_(generator=generator).log()
                row += self.temperature * gumbel
            token = logits.argmax(dim=1, keepdim=True)               # (B, 1)
            ids = torch.cat([ids, token.to(ids.device)], dim=1)      # (B, K + tokens written)
            answers = [self.until_stop(row) for row in ids[:, K:].tolist()]
            if all(done for _, done in answers):
                break
        return [text for text, _ in answers]

    def until_stop(self, tokens: Tokens) -> tuple[str, bool]:
        """The text before the first end or stop, and whether there is one."""
        written = list(itertools.takewhile(lambda token: token not in self.ends, tokens))
        whole = text = self.tokenizer.decode(written, skip_special_tokens=True)
        for stop in self.stop:
            text = text.partition(stop)[0]
        return text, len(written) < len(tokens) or text != whole

    # ----------------------------------------------------------------------------------------------
    # Prompts, and the keys and values of their tokens

    def batches(self, prompts: Sequence[str], size: int) -> Iterator[Batch]:
        """The prompts, read in batches of like length, so that there is little padding."""
        tokens = [self.tokens(prompt) for prompt in prompts]
        # what all begin with is read once; not a last token, which is to predict the next
        head = list(os.path.commonprefix([row[:-1] for row in tokens]))
        if getattr(self.model.config, "sliding_window", None):
            head = []    # subtle: the padding after the head would count as what the window sees
        head_cache = self.new_cache()
        if head:
            self.forward(self.tensor([head]), head_cache)
        order = sorted(range(len(tokens)), key=lambda n: len(tokens[n]))
        for start in range(0, len(order), size):
            numbers = order[start:start + size]
            longest = len(tokens[numbers[-1]])
            rows = []
            for n in numbers:                                        # padded so that all end together
                padding = [-1] * (longest - len(tokens[n]))
                rows.append(head + padding + tokens[n][len(head):])
            ids = self.tensor(rows)
            cache = of_rows(head_cache, [0] * len(rows))
            if longest > len(head) + 1:
                self.forward(ids[:, :-1], cache)
            yield numbers, ids, cache

    def forward(self, ids: Tensor, cache: Any, last: int = 1) -> Tensor:
        """Logits (B, last, V) after the last tokens of ids (B, K), of which the cache holds those before."""
        valid = ids >= 0                                             # (B, K)
        place = valid.cumsum(dim=1).sub(1).clamp(min=0)              # (B, K)
        seen = cache.get_seq_length()
        settings = {self.cache_name: cache, "attention_mask": valid, "position_ids": place[:, seen:]}
        return self.model(ids[:, seen:].clamp(min=0), logits_to_keep=last, **settings).logits.float()

    def tensor(self, rows: list[Tokens]) -> Tensor:
        return torch.tensor(rows, device=self.model.device)


def of_rows(cache: Any, rows: Sequence[int]) -> Any:
    """A copy of the cache with these of its rows."""
    cache = copy.deepcopy(cache)
    cache.batch_select_indices(torch.tensor(rows))
    return cache
