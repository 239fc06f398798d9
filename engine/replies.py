"""What servers answer, validated: the danger is silence, a 200 that ignores what was asked.

A malformed reply raises ValueError or its like, and is asked for again; one that would not get better raises
CallFailed. Nothing else here knows of servers: a reply is the decoded JSON.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from engine.files import is_text
from engine.transport import CallFailed, Json

Tops = list[tuple[str, float]]                # tokens and their log p
Answers = list[str | None]                    # of a list of prompts; None: a call that failed
LogProbs = list[float | None]


def answer_text(answer: Json) -> str:
    """The text of an answer, without a last line that was cut off."""
    choice = answer["choices"][0]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    if not is_text(text):
        raise CallFailed("it answered 200 but no text: does the model think first?")
    text.encode()                                                    # ValueError: half a surrogate pair
    if choice.get("finish_reason") in ("length", "content_filter", "error", "abort"):
        return text.rpartition("\n")[0]
    return text


def log_prob(value: Any) -> float:
    """A log-probability, or ValueError."""
    if type(value) in (int, float) and -math.inf < value < 1e-3:
        return float(value)
    raise ValueError(f"{value!r} is no log-probability")


def listed_tokens(answer: Json, labels: Sequence[str]) -> Tops:
    """The likeliest first tokens of an answer, from either of the two shapes that servers use.

    Some servers list null or -Infinity beside tokens: they are left out, but a label must have a number.
    """
    scored = answer["choices"][0].get("logprobs") or {}
    listed = []
    if scored.get("content"):
        listed = [(top["token"], top["logprob"]) for top in scored["content"][0].get("top_logprobs", ())]
    elif scored.get("top_logprobs"):
        listed = list(scored["top_logprobs"][0].items())
    top = []
    for token, value in listed:
        try:
            top.append((token, log_prob(value)))
        except ValueError:
            if begins(labels, token):
                raise
    if not top:
        raise CallFailed("it answered 200 but sent no top_logprobs")
    return top


def begins(labels: Sequence[str], token: str) -> bool:
    """Is the token the beginning of one of the labels, in any spelling?"""
    letters = token.strip(" ▁Ġ\n").lower()
    return letters != "" and any(label.strip().lower().startswith(letters) for label in labels)


def first_token_log_prob(top: Tops, label: str) -> tuple[float, bool]:
    """(log p of a label by its first token, True), its spellings added up; (an upper bound, False) if not listed.

    >>> first_token_log_prob([(" Not", -0.1), (" the", -3.0)], " Highly Relevant")
    (-3.0, False)
    """
    values = [value for token, value in top if begins([label], token)]
    if not values:
        return min(value for _, value in top), False
    largest = max(values)
    return largest + math.log(math.fsum(math.exp(value - largest) for value in values)), True


def uncut(answer: Json, prompt: str) -> Json:
    """The answer; CallFailed where `usage` counts too few tokens for the server to have read the whole prompt."""
    tokens = (answer.get("usage") or {}).get("prompt_tokens")
    # no tokenizer makes a token of eight characters in the mean; half of that count is beyond doubt
    if tokens and tokens < len(prompt) / 16:
        raise CallFailed(f"the server read {tokens} tokens of a prompt of {len(prompt):,} characters: "
                         "it cuts prompts in silence; give the model a longer context there")
    return answer


def scored_tokens(answer: Json, prompt: str) -> tuple[list[str], list[Any]]:
    """Tokens of an echoed prompt and what stands for their log-probabilities; CallFailed if it was not scored."""
    usage: Json = answer.get("usage") or {}
    size = usage.get("prompt_tokens", 0)
    choice, generated = answer["choices"][0], usage.get("completion_tokens", 0)
    if answer.get("prompt"):                                         # Together: apart from the answer
        choice, generated = answer["prompt"][0], 0
    scored = choice.get("logprobs") or {}
    tokens, values = scored.get("tokens"), scored.get("token_logprobs")
    if not tokens or not values or prompt not in choice["text"]:
        seen = len(tokens or scored.get("content") or ())
        raise CallFailed(f"it answered 200 but did not score the prompt: {seen} log-probs for a "
                         f"{size}-token prompt")
    n = len(tokens) - generated                                      # right also after an EOS
    if len(values) != len(tokens):
        raise ValueError(f"{len(values)} log-probs for {len(tokens)} tokens")
    if n not in (size, size - 1):                                    # a BOS may be left out
        raise CallFailed(f"{n} log-probs for a {size}-token prompt")
    if prompt.split()[0] not in "".join(tokens[:12]):
        raise CallFailed("the prompt's beginning was cut off: is the model's context too short?")
    return tokens[:n], values[:n]


def continuation_log_prob(answer: Json, prefix: str, text: str,
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
    return math.fsum(log_prob(value) for value in values[start:]), len(tokens) - start
    # END EXERCISE


def forced_log_prob(answer: Json, wanted: int) -> float | None:
    """The raw log-probability of a token, where it was forced or stands beside; None where it is not listed."""
    if answer.get("truncated"):
        raise CallFailed("the prompt was cut off: is the model's context too short?")
    for token in answer.get("completion_probabilities") or ():
        for listed in [token, *token["top_logprobs"]]:
            if listed["id"] == wanted:
                return log_prob(listed["logprob"])
    return None
