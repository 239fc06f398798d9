"""Answers of an LLM in an append-only file: a run that was stopped pays nothing twice.

`Cached` stands above any `Strings`, a server or a model in this process, and asks it only for what the
file does not hold. The key of an answer is the sha256 of all that decides it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol


class Strings(Protocol):
    """An LLM that knows nothing but strings. None stands for a call that failed: never for a score."""

    keep: Callable[[str, Any, Any], None]                            # (call, item, answer), as each answer comes

    def identity(self, call: str) -> str:
        """All that decides an answer beside the item: server or folder, model, scoring mode."""

    def describe(self, call: str) -> str:
        """Model and scoring mode, for the records; LLMError where it cannot do this call."""

    def can(self, call: str) -> bool:
        """Does it do this call? Some servers score no prompt."""

    def report(self) -> str:
        """What was asked of it so far."""

    def complete(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[str | None]:
        """A text that continues, or answers, each prompt."""

    def log_likelihood(self, pairs: Sequence[tuple[str, str]]) -> list[float | None]:
        """Of each (prefix, text): the sum of log p of the text's tokens after the prefix."""

    def top_tokens(self, prompts: Sequence[str]) -> list[list[tuple[str, float]] | None]:
        """The likeliest first tokens of the answer to each prompt, with their log p."""


class Cached:
    """The same strings, with the answers kept in a JSONL of {"key", "value"}.

    Memory holds where an answer stands, not the answer. A torn line (kill -9) is passed over.
    """

    def __init__(self, strings: Strings, path: str | Path) -> None:
        self.strings, self.path = strings, path
        self.identity, self.describe, self.can = strings.identity, strings.describe, strings.can
        self.keep: Callable[[str, Any, Any], None] = self.put
        strings.keep = self.put                                      # written as each answer comes
        self.found = 0                                               # answers that cost nothing again
        self.lock = threading.Lock()
        self.offsets: dict[int, int] = {}                            # the first 64 bits of a key -> its line
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self.file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        offset, line = 0, b"\n"
        with open(path, "rb") as lines:
            for line in lines:
                with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
                    self.offsets[first_bits(json.loads(line)["key"])] = offset
                offset += len(line)
        if not line.endswith(b"\n"):
            os.write(self.file, b"\n")

    def report(self) -> str:
        return f"{self.found:,} answers from the cache; {self.strings.report()}"

    def complete(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[str | None]:
        return self.answers("complete", list(zip(prompts, seeds, strict=True)))

    def log_likelihood(self, pairs: Sequence[tuple[str, str]]) -> list[float | None]:
        return self.answers("log_likelihood", pairs)

    def top_tokens(self, prompts: Sequence[str]) -> list[list[tuple[str, float]] | None]:
        return self.answers("top_tokens", prompts)

    def answers(self, call: str, items: Sequence[Any]) -> list[Any]:
        """The answers to items: each item is asked for once, and only if the file does not hold it."""
        answers = {item: self.get(self.key(call, item)) for item in items}
        # sorted: prompts that share their beginning follow each other, which a prefix cache makes cheap
        new = sorted(item for item, answer in answers.items() if answer is None)
        self.found += len(answers) - len(new)
        ask = getattr(self.strings, call)
        if new:
            got = ask(*zip(*new, strict=True)) if call == "complete" else ask(new)
            for item, answer in zip(new, got, strict=True):
                answers[item] = answer
                if answer is not None:
                    self.put(call, item, answer)
        return [answers[item] for item in items]

    def key(self, call: str, item: Any) -> str:
        return hashlib.sha256(json.dumps([self.identity(call), call, item]).encode()).hexdigest()

    def get(self, key: str) -> Any:
        """The answer, or None."""
        offset = self.offsets.get(first_bits(key))
        if offset is None:
            return None
        with open(self.path, "rb") as lines:
            lines.seek(offset)
            line = lines.readline()
        try:
            row = json.loads(line)
            return row["value"] if row["key"] == key else None
        except (ValueError, LookupError, TypeError):                 # another process wrote between
            return None

    def put(self, call: str, item: Any, value: Any) -> None:
        """Append one answer, unless it stands there."""
        key = self.key(call, item)
        line = (json.dumps({"key": key, "value": value}) + "\n").encode()
        with self.lock:
            if first_bits(key) in self.offsets:
                return
            if os.write(self.file, line) != len(line):
                raise OSError("the cache could not be written: is the disk full?")
            self.offsets[first_bits(key)] = os.lseek(self.file, 0, os.SEEK_END) - len(line)


def first_bits(key: str) -> int:
    return int(key[:16], 16)
