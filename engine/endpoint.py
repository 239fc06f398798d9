"""Strings from an OpenAI-compatible server: a completion, log p(text | prefix), the likeliest first tokens.

No prompt of the paper stands here. Servers differ in how, and whether, they score a prompt; the first call of
each kind tries one scoring mode after another, with the caller's trial prompts, and keeps the first that works.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from engine.cache import Items, Pairs, Strings
from engine.replies import (
    answer_text,
    begins,
    continuation_log_prob,
    forced_log_prob,
    listed_tokens,
    scored_tokens,
    uncut,
)
from engine.transport import CallFailed, Json, LLMError, Server

ScoringMode = tuple[str, Json]  # chat, completions, echo or forced; of the first two, further fields of the body
Capability = tuple[ScoringMode | None, str]  # the mode that works, and the evidence

# A model that thinks first does not begin its answer with the answer: thinking off, as servers spell it.
# The last is OpenAI's for its reasoning models, which refuse max_tokens and other temperatures.
CHATS: tuple[ScoringMode, ...] = (
    ("chat", {}), ("chat", {"chat_template_kwargs": {"enable_thinking": False}}),
    ("chat", {"reasoning_effort": "none"}),
    ("chat", {"reasoning_effort": "none", "max_tokens": None, "max_completion_tokens": 256, "temperature": 1}))
MODES: dict[str, tuple[ScoringMode, ...]] = {                        # tried in this order
    # a small model copies a prompt's examples in a chat and not in a completion; Mistral, which takes no seed, and
    # OpenAI, whose mode is the last, have no completions
    "complete": (*CHATS[:-1], ("completions", {"stop": ["\n\n"]}), ("chat", {"seed": None}), CHATS[-1]),
    "log_likelihood": (("echo", {}), ("forced", {})),
    "top_tokens": (*CHATS, ("chat", {"top_logprobs": 5}), ("completions", {"logprobs": 20}),
                   ("completions", {"logprobs": 5})),
}
# subtle: max_tokens 0 is unlimited on one server and an error on others; at logprobs 0 one drops the prompt's part
ECHO: ScoringMode = ("completions", {"max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0})
NEEDS = {
    "complete": "Are the URL and the model's name right, and does it answer without thinking first?",
    "log_likelihood": "Query likelihood needs echo with logprobs (vLLM, SGLang, llama-cpp-python) or llama-server. "
                      "Use --rank rc to rank by relevance alone",
    "top_tokens": "Relevance needs scored prompts or top_logprobs, and a model that does not think first: turn "
                  "thinking off at the server, or take another model",
}


@dataclass(frozen=True)
class Trials:
    """What is asked to find the modes: the prompts and labels are the caller's."""

    prompt: str                                                      # to be completed
    check: Callable[[str], Any]                                      # of its answer; ValueError: of no use
    pairs: Pairs                                                     # two, to be scored, and differently
    questions: Sequence[str]                                         # two prompts that a label answers
    labels: Sequence[str]


class Endpoint(Strings):
    """One server and one model, as strings (see engine/cache.py)."""

    def __init__(
        self,
        url: str,
        model: str,                                                  # "": the first that the server lists
        trials: Trials,
        threads: int = 16,
        timeout: float = 120.0,                                      # seconds
        max_requests: int = 0,                                       # 0: no limit
    ) -> None:
        self.server = Server(url, threads, timeout, max_requests)
        super().__init__(self.server.url)
        self.model, self.trials = model, trials
        self.capabilities: dict[str, Capability] = {}                # by call
        self.answered: ScoringMode | None = None                     # the last that gave any answer to a trial
        self.head = functools.lru_cache(1024)(self.head_tokens)

    def report(self) -> str:
        server = self.server
        return (f"{super().report()}\nsent {server.requests:,} requests: {server.prompt_tokens:,} prompt and "
                f"{server.completion_tokens:,} completion tokens")

    def ask_new(self, call: str, items: Items) -> None:
        mode = self.require(call)
        ask_one = getattr(self, f"one_{call}")

        def work(item: tuple[str, Any]) -> None:
            try:
                self.keep(call, item, ask_one(mode, *item))
            except CallFailed as error:
                self.fail(str(error))

        self.server.map(work, items)

    # ----------------------------------------------------------------------------------------------
    # Requests

    def post(self, mode: ScoringMode, prompt: str, fields: Json, read: Callable[[Json], Any]) -> Any:
        """read(reply) of a chat or a completion; the mode's own fields stand over the others."""
        name, own = mode
        route, body = "/completions", {"model": self.model, "prompt": prompt, **fields, **own}
        if name == "chat":
            route = "/chat/completions"
            body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
        body = {field: value for field, value in body.items() if value is not None}
        return self.server.call(self.server.base + route, body, lambda answer: read(uncut(answer, prompt)))

    def one_complete(self, mode: ScoringMode, prompt: str, seed: int, **fields: Any) -> str:
        """The text of one answer."""
        body = {"max_tokens": 256, "temperature": 0.7, "seed": seed, **fields}
        return self.post(mode, prompt, body, answer_text)

    def one_top_tokens(self, mode: ScoringMode, prompt: str, _: str = "") -> list[tuple[str, float]]:
        """The likeliest first tokens of the answer."""
        body: Json = {"max_tokens": 1, "temperature": 0}
        if mode[0] == "chat":
            body |= {"logprobs": True, "top_logprobs": 20}
        return self.post(mode, prompt, body, functools.partial(listed_tokens, labels=self.trials.labels))

    def one_log_likelihood(self, mode: ScoringMode, prefix: str, text: str) -> float:
        return getattr(self, mode[0])(prefix, text)[0]

    # The two ways to score: the sum of log p of the text's tokens, and how many they are

    def echo(self, prefix: str, text: str) -> tuple[float, int]:
        """The server returns the prompt with its log-probabilities."""
        return self.post(ECHO, prefix + text, {},
                         lambda answer: continuation_log_prob(answer, prefix, text, self.head))

    def head_tokens(self, prefix: str) -> list[str]:
        """The tokens of a prefix alone."""
        return self.post(ECHO, prefix, {}, lambda answer: scored_tokens(answer, prefix)[0])

    def forced(self, prefix: str, text: str) -> tuple[float, int]:
        """llama-server: one request a token, which a bias makes it generate; the log-prob is the raw one."""
        ids, head = self.tokenize(prefix + text), self.tokenize(prefix)
        if ids[:len(head)] != head or ids == head:
            raise CallFailed(f"a token crosses the prompt's end before {text!r}")
        values = [self.forced_token(ids[:n], ids[n], head[-1]) for n in range(len(head), len(ids))]
        return math.fsum(values), len(values)

    def forced_token(self, before: list[int], wanted: int, other: int) -> float:
        """log p(wanted | before): of the token that is forced, or in the list beside it, long if needed."""
        # subtle: half a character is withheld with its log-prob; then any other token is forced
        for forced, listed in ((wanted, 1), (other, 1000), (other, 10 ** 6)):
            body: Json = {"model": self.model, "prompt": before, "n_predict": 1, "temperature": 0,
                          "logit_bias": [[forced, 1000]], "n_probs": listed, "cache_prompt": True}
            value = self.server.call(self.server.root + "/completion", body,
                                     lambda answer: forced_log_prob(answer, wanted))
            if value is not None:
                return value
        raise CallFailed(f"the server does not list token {wanted}: does it cap n_probs?")

    def tokenize(self, text: str) -> list[int]:
        """Ids; what a passage says is no control token."""
        body = {"content": text, "add_special": True, "parse_special": False}
        return self.server.call(self.server.root + "/tokenize", body,
                                lambda answer: [int(token) for token in answer["tokens"]])

    # ----------------------------------------------------------------------------------------------
    # What the server can do, with numbers

    def can(self, call: str) -> bool:
        """Does a mode of the call work? The first one is looked for once, and said with the evidence."""
        if call not in self.capabilities:
            self.server.probing = True
            if not self.capabilities:
                print(f"waiting for {self.name}: up to {self.server.timeout:g} s for an answer (--timeout)",
                      file=sys.stderr)
                with contextlib.suppress(CallFailed):                # it may have no list of its models
                    self.model = self.model or self.server.call(self.server.base + "/models", None,
                                                                lambda answer: answer["data"][0]["id"])
                print(f"{self.name} (model {self.model})")
            mode, evidence = self.capabilities[call] = self.first_that_works(call)
            print(f"  {call:14} {'yes' if mode else 'NO '}  {evidence}")
            self.server.probing = False
        return self.capabilities[call][0] is not None

    def require(self, call: str) -> ScoringMode:
        """The mode of a call; LLMError, with the evidence, where the server cannot do it."""
        self.can(call)
        mode, evidence = self.capabilities[call]
        if mode is None:
            raise LLMError(f"{self.name} (model {self.model}) cannot do {call}: {evidence}. {NEEDS[call]}")
        return mode

    def describe(self, call: str) -> str:
        mode = self.require(call)                                    # which finds the model's name too
        return f"{self.model}: {spelled(mode)}"

    def first_that_works(self, call: str) -> Capability:
        attempt = getattr(self, f"try_{call}")
        failures: dict[str, str] = {}                                # evidence -> the first mode that gave it
        for mode in MODES[call]:
            try:
                return mode, f"{spelled(mode)}: {attempt(mode)}"
            except CallFailed as error:
                failures.setdefault(str(error), spelled(mode))
        reasons = "; ".join(f"{mode}: {evidence}" for evidence, mode in failures.items())
        if call == "complete" and self.answered:
            # a model too small to follow the form still answers; what cannot be used is counted
            return self.answered, f"it answers, but no answer could be used ({reasons})"
        return None, reasons

    def try_complete(self, mode: ScoringMode) -> str:
        """Each trial gives its evidence; CallFailed, with the evidence, where the mode is of no use."""
        answer = self.one_complete(mode, self.trials.prompt, 1, temperature=0, max_tokens=96)
        if "<think" not in answer:
            self.answered = mode
        try:
            return str(self.trials.check(answer))
        except ValueError as error:
            raise CallFailed(f"{error}: {answer[:60]!r}") from error

    def try_log_likelihood(self, mode: ScoringMode) -> str:
        """Two texts must be scored, and not the same for every token."""
        (a, n), (b, m) = itertools.starmap(getattr(self, mode[0]), self.trials.pairs)
        evidence = f"{a:.2f} over {n} tokens, {b:.2f} over {m}"
        if math.isclose(a / n, b / m):
            raise CallFailed(evidence)
        return evidence

    def try_top_tokens(self, mode: ScoringMode) -> str:
        """A label must be among the first tokens of two answers, and not with the same probabilities."""
        found = []                                                   # the listed labels, of each answer
        for prompt in self.trials.questions:
            top = self.one_top_tokens(mode, prompt)
            labels = [f"{token!r} {value:.3f}" for token, value in top if begins(self.trials.labels, token)]
            if not labels:
                raise CallFailed(f"no label among the top {len(top)}, {top[:2]}: does the model think first?")
            found.append(", ".join(labels))
        evidence = f"log p of labels {'; '.join(found)}; {len(top)} tokens listed"
        if found[0] == found[1]:
            raise CallFailed(evidence)
        return evidence


def probe(url: str, model: str, trials: Trials, timeout: float) -> None:
    """Say what a server can do, with the evidence; LLMError where that is not enough."""
    endpoint = Endpoint(url, model, trials, timeout=timeout)
    can = [call for call in MODES if endpoint.can(call)]
    if "complete" not in can or len(can) == 1:
        raise LLMError("this endpoint cannot make FRet: it needs complete, and log_likelihood or top_tokens")
    rank = "" if "log_likelihood" in can else " --rank rc"
    print(f"next: python llm.py generate CORPUS QUERIES --llm {url}; then mine with the same{rank}")


def spelled(mode: ScoringMode) -> str:
    name, fields = mode
    return f"{name} {fields}" if fields else name
