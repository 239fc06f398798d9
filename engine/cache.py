"""What an LLM is below the page: calls on strings, whose answers are kept. `DryRun` counts what would be asked."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.replies import Answers, LogProbs, Tops, first_token_log_prob
from engine.transport import LLMError

Pairs = Sequence[tuple[str, str]]  # (prefix, text)
Items = Sequence[tuple[str, Any]]  # what a call is asked for: (prompt, its seed or text)

MAX_FAILED_IN_A_ROW = 20  # calls; then the run stops


class Strings:
    """An LLM that knows nothing but strings. None stands for a call that failed: never for a score."""

    path = Path(os.devnull)                                          # of the answers
    found = 0                                                        # answers that cost nothing again
    labels = unlisted = 0                                            # by first tokens; not among the top ones
    failed_in_a_row = 0

    def __init__(self, name: str = "") -> None:
        self.name = name                                             # the server or folder
        self.answers: dict[str, Any] = {}                            # by key
        self.failures: list[str] = []                                # of calls, after all their tries

    # ----------------------------------------------------------------------------------------------
    # The calls

    def complete(self, prompts: Sequence[str], seeds: Sequence[int]) -> Answers:
        """A text that continues, or answers, each prompt."""
        return self.ask("complete", list(zip(prompts, seeds, strict=True)))

    def log_likelihood(self, pairs: Pairs) -> LogProbs:
        """Of each (prefix, text): the sum of log p of the text's tokens after the prefix."""
        return self.ask("log_likelihood", pairs)

    def top_tokens(self, prompts: Sequence[str]) -> list[Tops | None]:
        """Where no prompt is scored: the likeliest first tokens of each answer, with their log p."""
        return self.ask("top_tokens", [(prompt, "") for prompt in prompts])

    def label_log_likelihood(self, pairs: Pairs) -> LogProbs:
        """Of each (prompt, label) its log p: by the label's first token where no prompt is scored."""
        if self.can("log_likelihood"):
            return self.log_likelihood(pairs)
        log_p: LogProbs = []
        for (_, label), top in zip(pairs, self.top_tokens([prompt for prompt, _ in pairs]), strict=True):
            value, listed = first_token_log_prob(top, label) if top else (None, True)
            log_p.append(value)
            self.labels += 1
            self.unlisted += not listed
        return log_p

    def ask(self, call: str, items: Items) -> list[Any]:
        """The answers to items: each item is asked for once, and only if its answer is not known."""
        keys = {item: self.key(call, item) for item in set(items)}
        # sorted: prompts that share their beginning follow each other, which a prefix cache makes cheap
        new = sorted(item for item, key in keys.items() if key not in self.answers)
        self.found += len(keys) - len(new)
        if new:
            self.ask_new(call, new)
        return [self.answers.get(keys[item]) for item in items]

    # ----------------------------------------------------------------------------------------------
    # What an LLM is

    def ask_new(self, call: str, items: Items) -> None:
        """Ask for each item; `keep` each answer as it comes, or `fail`."""
        raise NotImplementedError

    def can(self, call: str) -> bool:
        """Does it do this call? Some servers score no prompt."""
        return True

    def describe(self, call: str) -> str:
        """Model and scoring mode: with the name all that decides an answer. An error where it cannot."""
        return self.name

    # ----------------------------------------------------------------------------------------------
    # What is said of it

    def scored_by(self, rank: str, score: str) -> dict[str, str | None]:
        """Which model gives QL and RC, and how; LLMError where it cannot. `score` is how labels make RC."""
        source: dict[str, str | None] = {"ql": None, "rc": None}
        if "ql" in rank:
            source["ql"] = self.describe("log_likelihood")
        if "rc" in rank:
            call = "log_likelihood" if self.can("log_likelihood") else "top_tokens"
            source["rc"] = f"{self.describe(call)} ({score})"
        return source

    def report(self) -> str:
        """What was asked, and how far the scores can be trusted."""
        report = f"{self.found:,} answers of {self.name} from {self.path}"
        if self.failures:
            report += (f"\n{len(self.failures):,} calls failed; the last: {self.failures[-1]}\n"
                       "the same command asks for these again; a busy server wants fewer --threads")
        if self.unlisted > 0.01 * self.labels:
            report += (f"\nwarning: {self.unlisted:,} of {self.labels:,} labels were outside the top tokens: "
                       "their log-probability is only bounded (an upper bound was taken)")
        return report

    # ----------------------------------------------------------------------------------------------
    # The file: a JSONL of {"key", "value"}, so that a run that was stopped pays nothing twice

    def keep_in(self, path: str | Path) -> None:
        """Take the answers that the file holds, and append all that come. A torn line (kill -9) is passed over."""
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError), open(path, "rb+") as lines:  # +: an error before all is paid
            for line in lines:
                with contextlib.suppress(ValueError, LookupError, TypeError):
                    row = json.loads(line)
                    self.answers[row["key"]] = row["value"]

    def key(self, call: str, item: tuple[str, Any]) -> str:
        decides = [self.name, self.describe(call), call, item]
        return hashlib.sha256(json.dumps(decides).encode()).hexdigest()

    def keep(self, call: str, item: tuple[str, Any], value: Any) -> None:
        key = self.key(call, item)
        # one write an answer, from any thread; the line before may be torn, and ends here
        with open(self.path, "ab", buffering=0) as file:
            file.write(b"\n" + json.dumps({"key": key, "value": value}).encode())
        self.answers[key] = value
        self.failed_in_a_row = 0

    def fail(self, reason: str) -> None:
        """Count a call that failed; LLMError when too many in a row have."""
        self.failures.append(reason)
        self.failed_in_a_row += 1
        if self.failed_in_a_row >= MAX_FAILED_IN_A_ROW:
            raise LLMError(f"{MAX_FAILED_IN_A_ROW} calls in a row failed; the last: {reason}")


class DryRun(Strings):
    """Strings that ask nobody and count: calls, prompt tokens (four bytes each), and what a prefix cache saves."""

    calls = size = shared = longest = 0                              # all but the calls in bytes
    previous = b""

    def ask_new(self, call: str, items: Items) -> None:
        for prompt, text in items:
            data = (prompt + text if call == "log_likelihood" else prompt).encode()
            self.calls += 1
            self.size += len(data)
            self.longest = max(self.longest, len(data))
            self.shared += len(os.path.commonprefix([self.previous, data]))
            self.previous = data

    def report(self) -> str:
        return (f"{self.calls:,} calls, about {self.size // 4:,} prompt tokens (4 bytes each); a prefix cache "
                f"saves {self.shared // 4:,} of them; the longest prompt has {self.longest // 4:,}")
