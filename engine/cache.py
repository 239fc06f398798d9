"""What an LLM is below the page, three calls on strings whose answers are kept; and what stands in place of one.

`Labels` scores labels also where a server scores no prompt. `DryRun` counts what would be asked.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.replies import Answers, LogProbs, Tops, first_token_log_prob

Pairs = Sequence[tuple[str, str]]  # (prefix, text)
Items = Sequence[tuple[str, Any]]  # what a call is asked for: (prompt, its seed or text)


class Strings:
    """An LLM that knows nothing but strings. None stands for a call that failed: never for a score."""

    name: str                                                        # the server or folder
    path: str | Path = "no file"                                     # of the answers that are kept
    file: Any = None
    kept: dict[str, Any] = {}                                        # answers by key
    found = 0                                                        # answers that cost nothing again

    def complete(self, prompts: Sequence[str], seeds: Sequence[int]) -> Answers:
        """A text that continues, or answers, each prompt."""
        return self.ask("complete", list(zip(prompts, seeds, strict=True)))

    def log_likelihood(self, pairs: Pairs) -> LogProbs:
        """Of each (prefix, text): the sum of log p of the text's tokens after the prefix."""
        return self.ask("log_likelihood", pairs)

    def top_tokens(self, prompts: Sequence[str]) -> list[Tops | None]:
        """Where no prompt is scored: the likeliest first tokens of each answer, with their log p."""
        return self.ask("top_tokens", [(prompt, "") for prompt in prompts])

    def ask(self, call: str, items: Items) -> list[Any]:
        """The answers to items: each item is asked for once, and only if the file does not hold it."""
        answers = {item: self.kept.get(self.key(call, item)) for item in items}
        # sorted: prompts that share their beginning follow each other, which a prefix cache makes cheap
        new = sorted(item for item, answer in answers.items() if answer is None)
        self.found += len(answers) - len(new)
        if new:
            answers |= zip(new, self.ask_new(call, new), strict=True)
        return [answers[item] for item in items]

    def ask_new(self, call: str, items: Items) -> list[Any]:
        """The answers of the LLM itself, each given to `keep` as it comes."""
        raise NotImplementedError

    def can(self, call: str) -> bool:
        """Does it do this call? Some servers score no prompt."""
        return True

    def describe(self, call: str) -> str:
        """Model and scoring mode: with the name all that decides an answer. An error where it cannot."""
        return self.name

    def sent(self) -> str:
        """What was asked of the LLM itself."""
        raise NotImplementedError

    def report(self) -> str:
        return f"{self.found:,} answers of {self.name} from {self.path}; {self.sent()}"

    # ----------------------------------------------------------------------------------------------
    # The file: a JSONL of {"key", "value"}, so that a run that was stopped pays nothing twice

    def keep_in(self, path: str | Path) -> None:
        """Take the answers that the file holds, and append all that come. A torn line (kill -9) is passed over."""
        self.path, self.kept = path, {}
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path, "ab", buffering=0)                    # one write a line, from any thread
        line = b"\n"
        with open(path, "rb") as lines:
            for line in lines:
                with contextlib.suppress(ValueError, LookupError, TypeError):
                    row = json.loads(line)
                    self.kept[row["key"]] = row["value"]
        if not line.endswith(b"\n"):
            self.file.write(b"\n")

    def key(self, call: str, item: tuple[str, Any]) -> str:
        decides = [self.name, self.describe(call), call, item]
        return hashlib.sha256(json.dumps(decides).encode()).hexdigest()

    def keep(self, call: str, item: tuple[str, Any], value: Any) -> None:
        """Append one answer."""
        if self.file is None:
            return
        key = self.key(call, item)
        line = (json.dumps({"key": key, "value": value}) + "\n").encode()
        if self.file.write(line) != len(line):
            raise OSError("the cache could not be written: is the disk full?")
        self.kept[key] = value


class Labels:
    """Strings that score labels after prompts: by their first tokens where no prompt can be scored."""

    asked = unlisted = 0                                             # labels; those not among the top first tokens

    def __init__(self, strings: Strings) -> None:
        self.strings = strings

    def log_likelihood(self, pairs: Pairs) -> LogProbs:
        if self.strings.can("log_likelihood"):
            return self.strings.log_likelihood(pairs)
        tops = self.strings.top_tokens([prompt for prompt, _ in pairs])
        log_p: LogProbs = []
        for (_, label), top in zip(pairs, tops, strict=True):
            value, listed = first_token_log_prob(top, label) if top else (None, True)
            log_p.append(value)
            self.asked += 1
            self.unlisted += not listed
        return log_p

    def scored_by(self, rank: str, score: str) -> dict[str, str | None]:
        """Which model gives QL and RC, and how; LLMError where it cannot. `score` is how labels make RC."""
        source: dict[str, str | None] = {"ql": None, "rc": None}
        rankings = rank.split(",")
        if "ql" in rankings:
            source["ql"] = self.strings.describe("log_likelihood")
        if "rc" in rankings:
            call = "log_likelihood" if self.strings.can("log_likelihood") else "top_tokens"
            source["rc"] = f"{self.strings.describe(call)} ({score})"
        return source

    def report(self) -> str:
        """What was asked, and how far the scores can be trusted."""
        if self.unlisted <= 0.01 * self.asked:
            return self.strings.report()
        return (f"{self.strings.report()}\nwarning: {self.unlisted:,} of {self.asked:,} labels were outside the "
                "top tokens: their log-probability is only bounded (an upper bound was taken)")


class DryRun(Strings):
    """Strings that ask nobody and count: calls, prompt tokens (four bytes each), and what a prefix cache saves."""

    name = "dry run"
    calls = size = shared = longest = 0                              # all but the calls in bytes
    previous = b""

    def ask_new(self, call: str, items: Items) -> list[None]:
        for prompt, text in items:
            data = prompt.encode()
            if call == "log_likelihood":
                data += text.encode()
            self.calls += 1
            self.size += len(data)
            self.longest = max(self.longest, len(data))
            self.shared += len(os.path.commonprefix([self.previous, data]))
            self.previous = data
        return [None] * len(items)

    def report(self) -> str:
        return (f"{self.calls:,} calls, about {self.size // 4:,} prompt tokens (4 bytes each); a prefix cache "
                f"saves {self.shared // 4:,} of them; the longest prompt has {self.longest // 4:,}")
