"""A causal language model of Hugging Face in this process: the same string calls as an endpoint.

The plainest telling of query likelihood: one forward, one log_softmax, one gather. It is fast because what all
prompts share is read once, each prefix once for all the texts that follow it, and many prefixes go in one
sequence without padding, where a mask keeps them apart.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.files import InputError, first_line

Tokens = list[int]
Group = tuple[Tokens, list[Tokens]]  # a prefix, and texts that follow it
# H tokens that all prompts begin with, the head; L those read at once after it, K = H + L; P those scored;
# B answers written together; V the vocabulary.
TEXTS = 32  # of a prefix in one group


class Local:
    """`room`: tokens that are read at once; `rows`: answers that are written together."""

    def __init__(self, folder: str, temperature: float = 0.7, max_tokens: int = 80,
                 stop: Sequence[str] = ("\n\n",), room: int = 640, rows: int = 32) -> None:
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError as error:
            raise InputError("a model in this process needs transformers: pip install transformers") from error
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
            # subtle: our masks are yes and no, which "eager" attention would add to its scores
            self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation="sdpa")
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{folder}: transformers opens no causal language model there "
                             f"({first_line(error)})") from error
        torch.nn.Module.to(self.model, "cuda" if torch.cuda.is_available() else "cpu")
        self.name, self.read_tokens = f"hf:{folder}", 0
        self.temperature, self.max_tokens, self.stop = temperature, max_tokens, tuple(stop)
        self.room, self.rows = room, rows
        self.keep: Callable[[str, Any, Any], None] = lambda call, item, answer: None
        config = self.model.config
        sliding = "sliding_attention" in (getattr(config, "layer_types", None) or [])
        self.window = config.sliding_window if sliding else None
        end = self.model.generation_config.eos_token_id
        self.ends = {self.tokenizer.eos_token_id, *(end if isinstance(end, list) else [end])}
        names = inspect.signature(inspect.unwrap(self.model.forward)).parameters
        self.cache_name = "cache" if "cache" in names else "past_key_values"  # as transformers' versions have it
        self.head: Tokens = []
        self.head_states: list[tuple[Tensor, Tensor]] = []           # keys and values of each layer

    def describe(self, call: str) -> str:
        how = f"{self.name} in {str(self.model.dtype).removeprefix('torch.')}"
        if call == "complete":
            return f"{how}, temperature {self.temperature}, {self.max_tokens} tokens, stops {self.stop}"
        return how

    def can(self, call: str) -> bool:
        return True

    def report(self) -> str:
        return f"{self.name} read {self.read_tokens:,} tokens in this process"

    def log_likelihood(self, pairs: Sequence[tuple[str, str]]) -> list[float | None]:
        """Sum of log p of the text's tokens after its prefix."""
        texts: dict[str, list[str]] = {}
        for prefix, text in dict.fromkeys(pairs):
            texts.setdefault(prefix, []).append(text)
        groups: list[Group] = []
        scores: dict[tuple[str, str], float] = {}
        for prefix in texts:
            tokens = self.tokens(prefix)
            # subtle: tokenised in its place, since a tokenizer may mark the beginning of a text
            groups.append((tokens, [self.tokens(prefix + text)[len(tokens):] for text in texts[prefix]]))
        of_pairs = iter([(prefix, text) for prefix in texts for text in texts[prefix]])
        for pack in self.packs(groups):
            targets = [text for _, group in pack for text in group]
            log_p = self.read(pack).log_softmax(dim=-1)              # (P, V)
            token = self.tensor(sum(targets, []))                    # (P,)
            of_token = log_p.gather(1, token[:, None])[:, 0]         # (P,)
            for of_text in of_token.split([len(text) for text in targets]):
                pair = next(of_pairs)
                scores[pair] = float(of_text.sum())
                self.keep("log_likelihood", pair, scores[pair])      # a stopped run goes on from the last pack
        return [scores[pair] for pair in pairs]

    def top_tokens(self, prompts: Sequence[str], k: int = 20) -> list[list[tuple[str, float]] | None]:
        """The likeliest first tokens of the answer, each with its log p."""
        answers: list[list[tuple[str, float]] | None] = []
        for pack in self.packs([(self.tokens(prompt), [[0]]) for prompt in prompts]):  # 0: any text of one token
            best = self.read(pack).log_softmax(dim=-1).topk(k)       # (P, k)
            for log_p, tokens in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                words = [self.tokenizer.decode([token]) for token in tokens]
                answers.append(list(zip(words, log_p, strict=True)))
        return answers

    @torch.inference_mode()
    def complete(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[str | None]:
        """What the model writes after each prompt, up to a stop; equal prompts differ by their seed."""
        tokens = [self.tokens(prompt) for prompt in prompts]
        self.read_head(tokens)
        answers: list[str | None] = [None] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: len(tokens[i]))  # of like length: little padding
        for start in range(0, len(order), self.rows):
            chunk = order[start:start + self.rows]
            written = self.write([tokens[i] for i in chunk], [seeds[i] for i in chunk])
            for i, text in zip(chunk, written, strict=True):
                answers[i] = text
                self.keep("complete", (prompts[i], seeds[i]), text)
        return answers

    # ----------------------------------------------------------------------------------------------
    # How they are made

    def tokens(self, text: str) -> Tokens:
        return list(self.tokenizer(text)["input_ids"])

    def tensor(self, values: Any) -> Tensor:
        return torch.tensor(values, device=self.model.device)

    def forward(self, ids: Tensor, seen: Tensor, position: Tensor, key_position: Tensor, cache: Any,
                logits_to_keep: Any) -> Tensor:
        """Logits; `seen` (B, L, K) says which keys a token attends to."""
        masks: Any = seen[:, None]                                   # (B, 1, L, K)
        if self.window:                                              # some layers see only what is near
            near = position[:, :, None] - key_position[:, None] < self.window
            masks = {"full_attention": masks, "sliding_attention": (seen & near)[:, None]}
        self.read_tokens += ids.numel()
        return self.model(ids, attention_mask=masks, position_ids=position, logits_to_keep=logits_to_keep,
                          **{self.cache_name: cache}).logits.float()

    @torch.inference_mode()
    def read_head(self, prompts: Sequence[Tokens]) -> None:
        """Keys and values of what all prompts share but for a last token, which is to predict the next."""
        first, last, size = min(prompts), max(prompts), 0            # what these two share, all share
        while size < min(map(len, prompts)) - 1 and first[size] == last[size]:
            size += 1
        if first[:size] != self.head:
            self.head, self.head_states = first[:size], []
            if size:
                cache, place = self.start(1), torch.arange(size, device=self.model.device)[None]  # (1, H)
                self.forward(self.tensor([self.head]), place[:, :, None] >= place[:, None], place, place, cache, 1)
                self.head_states = [(layer.keys, layer.values) for layer in cache.layers]

    def start(self, B: int) -> Any:
        """A cache that holds the head, for B rows."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer, (keys, values) in enumerate(self.head_states):
            cache.update(keys.expand(B, -1, -1, -1), values.expand(B, -1, -1, -1), layer)
        return cache

    def packs(self, groups: Sequence[Group]) -> list[list[Group]]:
        """Groups, in order, in packs of about `room` tokens."""
        self.read_head([prefix for prefix, _ in groups])
        packs: list[list[Group]] = [[]]
        size = 0
        for prefix, texts in groups:
            for start in range(0, len(texts), TEXTS):
                part = texts[start:start + TEXTS]
                cost = len(prefix) - len(self.head) + sum(map(len, part))
                if packs[-1] and size + cost > self.room:
                    packs.append([])
                    size = 0
                packs[-1].append((prefix, part))
                size += cost
        return packs

    @torch.inference_mode()
    def read(self, pack: Sequence[Group]) -> Tensor:
        """Logits (P, V) that predict the tokens of each text, in order."""
        H = len(self.head)
        segments: list[Tokens] = []                                  # a prefix, its texts, the next prefix
        starts: list[int] = []                                       # position of a segment's first token
        roots: list[int] = []                                        # the segment of its prefix
        for prefix, texts in pack:
            root = len(segments)
            segments.append(prefix[H:-1])
            segments += [[prefix[-1], *text[:-1]] for text in texts]  # each token predicts the text's next one
            starts += [H] + [len(prefix) - 1] * len(texts)
            roots += [root] * (1 + len(texts))
        length = self.tensor([len(segment) for segment in segments])
        owner = torch.arange(len(segments), device=length.device).repeat_interleave(length)  # (L,)
        root_of = self.tensor(roots)[owner]                          # (L,)
        offset = torch.arange(len(owner), device=length.device) - (length.cumsum(0) - length)[owner]
        position = self.tensor(starts)[owner] + offset               # (L,)
        seen = (owner[:, None] == owner) | (root_of[:, None] == owner)  # (L, L): its own segment, its prefix
        seen = torch.cat([seen.new_ones(len(owner), H), seen.tril()], dim=1)  # (L, K)
        key_position = torch.cat([torch.arange(H, device=length.device), position])
        return self.forward(self.tensor([sum(segments, [])]), seen[None], position[None], key_position[None],
                            self.start(1), torch.nonzero(owner != root_of)[:, 0])[0]

    def write(self, prompts: Sequence[Tokens], seeds: Sequence[int]) -> list[str]:
        """Sampled answers, a token of each at a time; a row that is done leaves."""
        H, longest, B = len(self.head), max(map(len, prompts)), len(prompts)
        pads = [longest - len(prompt) for prompt in prompts]         # after the head, so that all end together
        ids = self.tensor([[0] * pad + prompt[H:] for pad, prompt in zip(pads, prompts, strict=True)])  # (B, L)
        place = torch.arange(longest, device=ids.device).expand(B, -1)  # (B, K)
        pad = self.tensor(pads)[:, None]                             # (B, 1)
        valid = (place < H) | (place >= H + pad)                     # (B, K)
        key_position = torch.where(place < H, place, place - pad)    # (B, K)
        position = key_position[:, H:].clamp(min=0)                  # (B, L)
        seen = valid[:, None] & (place[:, H:, None] >= place[:, None])  # (B, L, K)
        seen |= place[:, H:, None] == place[:, None]                 # a pad sees itself: no softmax over nothing
        cache, rows = self.start(B), list(range(B))
        answers: list[Tokens] = [[] for _ in prompts]
        texts = [""] * B
        noise = [torch.Generator().manual_seed(seed) for seed in seeds]
        for _ in range(self.max_tokens):
            logits = self.forward(ids, seen, position, key_position, cache, 1)[:, -1].cpu()  # (B, V)
            stay = []
            for n, row in enumerate(rows):
                # the largest of logits / temperature + Gumbel noise is a sample of their softmax
                gumbel = -torch.empty(logits.shape[1]).exponential_(generator=noise[row]).log()
                token = int((logits[n] + self.temperature * gumbel).argmax())
                answers[row].append(token)
                texts[row] = self.tokenizer.decode(answers[row], skip_special_tokens=True)
                if token not in self.ends and not any(stop in texts[row] for stop in self.stop):
                    stay.append(n)
            if not stay:
                break
            rows = [rows[n] for n in stay]
            cache.batch_select_indices(self.tensor(stay))
            ids = self.tensor([[answers[row][-1]] for row in rows])  # (B, 1)
            position = position[stay, -1:] + 1                       # (B, 1)
            key_position = torch.cat([key_position[stay], position], dim=1)
            valid = torch.cat([valid[stay], valid.new_ones(len(stay), 1)], dim=1)
            seen = valid[:, None]                                    # (B, 1, K)
        for stop in self.stop:
            texts = [text.partition(stop)[0] for text in texts]
        return texts
