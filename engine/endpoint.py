"""Strings from an OpenAI-compatible server: a completion, log p(text | prefix), the likeliest first tokens.

No prompt of the paper stands here. Servers differ in how, and whether, they score a prompt; `probe` finds
out which scoring mode works, with the caller's trial prompts. The danger is silence: servers answer 200 and
ignore what they do not know, so every reply is validated, and a call that failed is None, never a score.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from engine.files import say
from engine.transport import CallFailed, LLMError, Server, Usage

ScoringMode = tuple[str, dict[str, Any]]  # chat, completions, echo or forced; further fields of the body

# A model that thinks first does not begin its answer with the answer: thinking off, as servers spell it.
# The last is OpenAI's for its reasoning models, which refuse max_tokens and other temperatures.
CHATS: tuple[ScoringMode, ...] = (
    ("chat", {}), ("chat", {"chat_template_kwargs": {"enable_thinking": False}}),
    ("chat", {"reasoning_effort": "none"}),
    ("chat", {"reasoning_effort": "none", "max_tokens": None, "max_completion_tokens": 256, "temperature": 1}))
MODES: dict[str, tuple[ScoringMode, ...]] = {                        # tried in this order
    "complete": (*CHATS, ("completions", {})),
    "log_likelihood": (("echo", {}), ("forced", {})),
    "top_tokens": (*CHATS, ("chat", {"top_logprobs": 5}), ("completions", {"logprobs": 20}),
                   ("completions", {"logprobs": 5})),
}
NEEDS = {
    "complete": "Is there a model behind it, and does it answer without thinking first?",
    "log_likelihood": "Query likelihood needs echo with logprobs (vLLM, SGLang, llama-cpp-python) or llama-server. "
                      "Use --rank rc to rank by relevance alone",
    "top_tokens": "Relevance needs scored prompts or top_logprobs, and a model that does not think first: turn "
                  "thinking off at the server, or take another model",
}


@dataclass(frozen=True)
class Trials:
    """What `probe` asks for: the prompts and labels are the caller's."""

    prompt: str                                                      # to be completed
    check: Callable[[str], Any]                                      # of its answer; ValueError: of no use
    pairs: tuple[tuple[str, str], tuple[str, str]]                   # two (prefix, text) to be scored, differently
    questions: tuple[str, str]                                       # two prompts that a label answers
    labels: tuple[str, ...]


class Endpoint:
    """One server and one model, as strings."""

    def __init__(self, url: str, model: str, trials: Trials, threads: int = 16, timeout: float = 120.0, *,
                 usage: Usage | None = None, backoff: float = 0.5) -> None:
        self.model, self.trials = model, trials
        self.usage = usage or Usage()
        self.server = Server(url, threads, timeout, self.usage, backoff)
        self.url = url
        self.keep: Callable[[str, Any, Any], None] = lambda call, item, answer: None
        self.capabilities: dict[str, tuple[ScoringMode | None, str]] = {}  # call -> its mode, the evidence
        self.answered: ScoringMode | None = None                     # the last that gave any answer to a trial
        self.prompts_per_request = 1                                 # more where the server takes lists
        self.head = functools.lru_cache(1024)(self.head_tokens)

    def identity(self, call: str) -> str:
        return json.dumps([self.url, self.model, self.require(call)])

    def describe(self, call: str) -> str:
        route, _ = self.require(call)
        return f"{self.model}: {route}" if call != "top_tokens" else f"{self.model}: top tokens of {route}"

    def report(self) -> str:
        return self.usage.report()

    def complete(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[str | None]:
        mode = self.require("complete")
        return self.each("complete", list(zip(prompts, seeds, strict=True)),
                         lambda chunk: [self.completion(mode, *chunk[0])])

    def log_likelihood(self, pairs: Sequence[tuple[str, str]]) -> list[float | None]:
        route, _ = self.require("log_likelihood")
        if route == "echo":
            return self.each("log_likelihood", pairs, lambda chunk: [s for s, _ in self.echo(chunk)],
                             self.prompts_per_request)
        return self.each("log_likelihood", pairs, lambda chunk: [self.forced_decoding(*chunk[0])[0]])

    def top_tokens(self, prompts: Sequence[str]) -> list[list[tuple[str, float]] | None]:
        mode = self.require("top_tokens")
        return self.each("top_tokens", prompts, lambda chunk: [self.top(mode, chunk[0])])

    def each(self, call: str, items: Sequence[Any], ask: Callable[[Sequence[Any]], list[Any]],
             group: int = 1) -> list[Any]:
        """ask(chunk), `group` items a chunk, for all items; None where a call failed."""
        answers: list[Any] = [None] * len(items)
        size = max(1, min(group, len(items) // self.server.threads))  # all threads busy comes first

        def work(chunk: Sequence[int]) -> None:
            try:
                values = ask([items[i] for i in chunk])
            except CallFailed as error:
                if len(chunk) > 1:                                   # one bad prompt fails alone
                    for i in chunk:
                        work([i])
                elif not self.server.stopped.is_set():
                    self.usage.settle(str(error))
                return
            for i, value in zip(chunk, values, strict=True):
                answers[i] = value
                self.keep(call, items[i], value)
            self.usage.settle()

        self.server.map(work, [range(a, min(a + size, len(items))) for a in range(0, len(items), size)])
        return answers

    # ----------------------------------------------------------------------------------------------
    # Requests

    def post(self, route: str, body: dict[str, Any], read: Callable[[dict[str, Any]], Any], tries: int = 0) -> Any:
        body = {name: value for name, value in body.items() if value is not None}
        return self.server.call(self.server.base + route, {"model": self.model} | body, read, tries)

    def completion(self, mode: ScoringMode, prompt: str, seed: int, **fields: Any) -> str:
        """The text of one answer."""
        route, more = mode
        body = {"max_tokens": 256, "temperature": 0.7, "seed": seed} | fields | more
        if route == "chat":
            return self.post("/chat/completions", body | {"messages": [{"role": "user", "content": prompt}]},
                             answer_text)
        return self.post("/completions", body | {"prompt": prompt, "stop": ["\n\n"]}, answer_text)

    def top(self, mode: ScoringMode, prompt: str) -> list[tuple[str, float]]:
        """The likeliest first tokens of the answer."""
        route, more = mode
        body = {"max_tokens": 1, "temperature": 0}
        if route == "chat":
            return self.post("/chat/completions", body | {
                "messages": [{"role": "user", "content": prompt}], "logprobs": True, "top_logprobs": 20} | more,
                listed_tokens)
        return self.post("/completions", body | {"prompt": prompt} | more, listed_tokens)

    def echo(self, chunk: Sequence[tuple[str, str]], tries: int = 0) -> list[tuple[float, int]]:
        """The server returns the prompt with its log-probabilities; several prompts a request."""
        prompts = [prefix + text for prefix, text in chunk]

        def read(answer: dict[str, Any]) -> list[tuple[float, int]]:
            replies = split_batched_reply(answer, len(chunk))
            return [continuation_log_prob(reply, prefix, text, self.head)
                    for reply, (prefix, text) in zip(replies, chunk, strict=True)]

        return self.post("/completions", echo_body(prompts if len(prompts) > 1 else prompts[0]), read, tries)

    def head_tokens(self, prefix: str) -> tuple[str, ...]:
        """The tokens of a prefix alone."""
        return self.post("/completions", echo_body(prefix), lambda answer: tuple(scored_tokens(answer, prefix)[0]))

    def forced_decoding(self, prefix: str, text: str) -> tuple[float, int]:
        """llama-server: one request a token, which a bias makes it generate; the log-prob is the raw one."""
        tokens, head = self.tokenize(prefix + text), self.tokenize(prefix)
        if tokens[:len(head)] != head or len(tokens) == len(head):
            raise CallFailed(f"a token crosses the prompt's end before {text!r}")
        ids = [id for id, _ in tokens]
        values = []
        for n in range(len(head), len(ids)):
            whole = tokens[n][1]
            if whole:
                value = self.forced_token(ids[:n], ids[n], ids[n], 1)
            else:
                # subtle: it withholds half a character and its log-prob; then the prefix's last token is
                # forced, and the one that is wanted found in the list beside it, a long one if need be
                value = self.forced_token(ids[:n], head[-1][0], ids[n], 1000)
                if value is None:
                    value = self.forced_token(ids[:n], head[-1][0], ids[n], 10 ** 6)
            if value is None:
                raise CallFailed(f"the server does not list token {ids[n]}: does it cap n_probs?")
            values.append(value)
        return math.fsum(values), len(values)

    def forced_token(self, before: list[int], forced: int, wanted: int, listed: int) -> float | None:
        """log p(wanted | before) from a request that forces a token and lists others beside it."""
        body = {"model": self.model, "prompt": before, "n_predict": 1, "n_probs": listed, "temperature": 0,
                "logit_bias": [[forced, 1000]], "cache_prompt": True}
        return self.server.call(self.server.root + "/completion", body,
                                lambda answer: forced_log_prob(answer, forced, wanted))

    def tokenize(self, text: str) -> list[tuple[int, bool]]:
        """(token id, is it whole characters) of a text; what a passage says is never a control token."""
        body = {"content": text, "add_special": True, "parse_special": False, "with_pieces": True}
        return self.server.call(self.server.root + "/tokenize", body, lambda answer: [
            (int(token["id"]), isinstance(token["piece"], str)) for token in answer["tokens"]])

    # ----------------------------------------------------------------------------------------------
    # probe: what the server can do, with numbers

    def can(self, call: str) -> bool:
        """Does the server do it? Asked once."""
        if call not in self.capabilities:
            self.probe(call)
        return self.capabilities[call][0] is not None

    def evidence(self, call: str) -> str:
        return self.capabilities[call][1]

    def require(self, call: str) -> ScoringMode:
        """The mode of a call; LLMError, with the evidence, where the server cannot do it."""
        if call not in self.capabilities:
            self.probe(call)
            say(**{call: self.evidence(call)})
        mode, evidence = self.capabilities[call]
        if mode is None:
            raise LLMError(f"{self.url} (model {self.model}) cannot do {call}: {evidence}. {NEEDS[call]}")
        return mode

    def probe(self, call: str) -> None:
        """Try the modes of a call, one after another, until one works; the evidence is what came back."""
        if not self.capabilities:
            self.find_model()
        attempt = {"complete": self.try_complete, "log_likelihood": self.try_log_likelihood,
                   "top_tokens": self.try_top_tokens}[call]
        failures: dict[str, str] = {}                                # evidence -> the first mode that gave it
        for mode in MODES[call]:
            name = " ".join([mode[0], *(f"{field}={value}" for field, value in mode[1].items())])
            try:
                works, evidence = attempt(mode)
            except (CallFailed, LLMError) as error:
                if isinstance(error, LLMError) and not str(error).startswith("HTTP 404"):
                    raise                                            # a key, a limit: no mode will do
                works, evidence = False, str(error)
            if works:
                self.capabilities[call] = mode, f"{name}: {evidence}"
                return
            failures.setdefault(evidence, name)
        reasons = "; ".join(f"{name}: {evidence}" for evidence, name in failures.items())
        if call == "complete" and self.answered:
            # a model too small to follow the form still answers; what cannot be used is counted
            self.capabilities[call] = self.answered, f"{self.answered[0]}, but no answer could be used ({reasons})"
        else:
            self.capabilities[call] = None, reasons

    def find_model(self) -> None:
        """The model's name, where none was given: the first that the server lists."""
        try:
            models = self.server.call(self.server.base + "/models", None,
                                      lambda answer: [model["id"] for model in answer["data"]])
            self.model = self.model or next(iter(models), "")
        except (CallFailed, LLMError) as error:
            # a server may have no such list; one that is not there, or refuses the key, is left
            if not re.match("HTTP 40[045]|a malformed|stopped at", str(error)):
                raise LLMError(f"{self.url} does not answer: {error}") from error

    def try_complete(self, mode: ScoringMode) -> tuple[bool, str]:
        answer = self.completion(mode, self.trials.prompt, 1, temperature=0, max_tokens=96)
        if "<think" not in answer:
            self.answered = mode
        try:
            return True, f"{self.trials.check(answer)}"
        except ValueError as error:
            return False, f"{error}: {answer[:60]!r}"

    def try_log_likelihood(self, mode: ScoringMode) -> tuple[bool, str]:
        """Two texts must be scored, and differently; are lists of prompts taken?"""
        first, second = self.trials.pairs
        if mode[0] == "forced":
            (a, n), (b, m) = self.forced_decoding(*first), self.forced_decoding(*second)
            return not math.isclose(a / n, b / m), f"{a:.2f} over {n} tokens, {b:.2f} over {m}"
        (a, n), (b, m) = self.echo([first])[0], self.echo([second])[0]
        with contextlib.suppress(CallFailed, LLMError):
            (x, _), (y, _) = self.echo([first, second], tries=1)
            if math.isclose(x, a, rel_tol=1e-3) and math.isclose(y, b, rel_tol=1e-3):
                self.prompts_per_request = 16
        evidence = f"{a:.2f} over {n} tokens, {b:.2f} over {m}; {self.prompts_per_request} prompts a request"
        return not math.isclose(a / n, b / m), evidence              # not the same for every token

    def try_top_tokens(self, mode: ScoringMode) -> tuple[bool, str]:
        """A label must be among the first tokens of two answers, and not with the same probabilities."""
        tops = [self.top(mode, prompt) for prompt in self.trials.questions]
        rows = [[first_token_log_prob(top, label) for label in self.trials.labels] for top in tops]
        first = " and ".join(repr(max(top, key=lambda item: item[1])[0]) for top in tops)
        found = [sum(listed for _, listed in row) for row in rows]
        if 0 in found:
            return False, f"no label among the top {len(tops[0])}, first {first}: does the model think first?"
        evidence = (f"{sum(found)} of {2 * len(rows[0])} labels in the top {len(tops[0])}, first {first}; "
                    f"log p of {self.trials.labels[0]!r} {rows[0][0][0]:.3f} and {rows[1][0][0]:.3f}")
        return rows[0] != rows[1], evidence


# --------------------------------------------------------------------------------------------------
# Replies, validated: ValueError and its like for a malformed one, which is asked for again, CallFailed for
# one that will not get better


def answer_text(answer: dict[str, Any]) -> str:
    """The text of an answer, without a last line that was cut off."""
    choice = answer["choices"][0]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    if not isinstance(text, str) or not text.strip():
        raise CallFailed(f"no text, finish_reason {choice.get('finish_reason')}: does the model think first?")
    text.encode()                                                    # ValueError: half a surrogate pair
    if choice.get("finish_reason") in ("length", "content_filter"):
        return text.rpartition("\n")[0]
    return text


def log_prob(value: Any) -> float:
    """A log-probability, or ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -math.inf < value < 1e-3:
        raise ValueError(f"{value!r} is no log-probability")
    return float(value)


def listed_tokens(answer: dict[str, Any]) -> list[tuple[str, float]]:
    """The likeliest first tokens of an answer, from either of the two shapes that servers use."""
    scored = answer["choices"][0].get("logprobs") or {}
    if scored.get("content"):
        return [(top["token"], log_prob(top["logprob"])) for top in scored["content"][0]["top_logprobs"]]
    if not scored.get("top_logprobs"):
        raise CallFailed("it answered 200 but sent no top_logprobs")
    return [(token, log_prob(value)) for token, value in scored["top_logprobs"][0].items()]


def first_token_log_prob(top: Sequence[tuple[str, float]], label: str) -> tuple[float, bool]:
    """(log p of a label by its first token, True), its spellings added up; (an upper bound, False) if not listed.

    >>> first_token_log_prob([(" Not", -0.1), (" the", -3.0)], " Highly Relevant")
    (-3.0, False)
    """
    values = []
    for token, value in top:
        letters = token.strip(" ▁Ġ\n").lower()
        if letters and label.strip().lower().startswith(letters):
            values.append(value)
    if not values:
        return min(value for _, value in top), False
    largest = max(values)
    return largest + math.log(math.fsum(math.exp(value - largest) for value in values)), True


def echo_body(prompt: str | list[str]) -> dict[str, Any]:
    # subtle: max_tokens 0 is unlimited on one server and an error on others; at logprobs 0 one drops the
    # prompt's part
    return {"prompt": prompt, "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}


def scored_tokens(answer: dict[str, Any], prompt: str) -> tuple[list[str], list[float | None]]:
    """Tokens of an echoed prompt and their log-probabilities; CallFailed if it was not scored."""
    usage: dict[str, Any] = answer.get("usage") or {}
    choice, generated = answer["choices"][0], usage.get("completion_tokens", 0)
    if answer.get("prompt"):                                         # Together: apart from the answer
        choice, generated = answer["prompt"][0], 0
    scored = choice.get("logprobs") or {}
    tokens, values = scored.get("tokens"), scored.get("token_logprobs")
    if not isinstance(tokens, list) or not isinstance(values, list) or prompt not in choice["text"]:
        seen = len(tokens or scored.get("content") or ())
        raise CallFailed(f"it answered 200 but did not score the prompt: {seen} log-probs for a "
                         f"{usage.get('prompt_tokens')}-token prompt")
    n = len(tokens) - generated                                      # right also after an EOS
    if len(values) != len(tokens):
        raise ValueError(f"{len(values)} log-probs for {len(tokens)} tokens")
    if n not in (usage["prompt_tokens"], usage["prompt_tokens"] - 1):  # a BOS may be left out
        raise CallFailed(f"{n} log-probs for a {usage['prompt_tokens']}-token prompt")
    if prompt.split()[0] not in "".join(tokens[:12]):
        raise CallFailed("the prompt's beginning was cut off: is the model's context too short?")
    return tokens[:n], values[:1] + [log_prob(value) for value in values[1:n]]


def continuation_log_prob(answer: dict[str, Any], prefix: str, text: str,
                          head: Callable[[str], Sequence[str]]) -> tuple[float, int]:
    """(sum of log p, number) of the tokens that spell `text` at the end of prefix + text.

    Found from the right, since servers count offsets differently. Where tokens do not spell it (half
    a character a token), or the one before them is empty (it may be the first half of theirs), `head`
    gives the prefix's own tokens, which must begin the list; else CallFailed, "a token crosses ...".
    """
    tokens, values = scored_tokens(answer, prefix + text)
    # EXERCISE 6 (about 10 lines)
    start, spelled = len(tokens), ""
    while start > 1 and len(spelled) < len(text):
        start -= 1
        spelled = tokens[start] + spelled
    # subtle: an empty token before may be the first half of the text's first character
    if spelled != text or not tokens[start - 1]:
        alone = list(head(prefix))
        start = len(alone)
        if not 0 < start < len(tokens) or tokens[:start] != alone:
            raise CallFailed(f"a token crosses the prompt's end before {text!r}")
    return math.fsum(v for v in values[start:] if v is not None), len(tokens) - start
    # END EXERCISE


def split_batched_reply(answer: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """The reply to a list of prompts as replies to each; CallFailed where that is ambiguous."""
    if count == 1:
        return [answer]
    choices, usage = sorted(answer["choices"], key=lambda choice: choice["index"]), answer["usage"]
    lengths = [len((choice.get("logprobs") or {}).get("tokens") or ()) - 1 for choice in choices]
    bos, rest = divmod(usage["prompt_tokens"] - sum(lengths), count)
    if [c["index"] for c in choices] != list(range(count)) or usage["completion_tokens"] != count or rest:
        raise CallFailed("the reply to a list of prompts cannot be split")
    return [{"choices": [choice], "usage": {"prompt_tokens": length + bos, "completion_tokens": 1}}
            for choice, length in zip(choices, lengths, strict=True)]


def forced_log_prob(answer: dict[str, Any], forced: int, wanted: int) -> float | None:
    """The raw log-probability of a token where one was forced; None where it is not listed."""
    if answer.get("truncated"):
        raise CallFailed("the prompt was cut off: is the model's context too short?")
    token, = answer["completion_probabilities"]
    if token["id"] != forced:
        raise CallFailed(f"token {token['id']} came where {forced} was forced")
    for listed in [token, *token["top_logprobs"]]:
        if listed["id"] == wanted:
            return log_prob(listed["logprob"])
    return None
