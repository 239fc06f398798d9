"""Rows as an LLM makes them, written as they come; what failed is counted and shown, never a row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine.files import write_jsonl
from engine.transport import LLMError

MAX_FAILED_AT_FIRST = 200  # rows that all failed from the first on: no more are asked for


def write_kept(path: str | Path, rows: Iterator[dict[str, Any]], total: int, what: str) -> Counter[str]:
    """Write the rows that did not fail; say "kept K of N" and show a failure.

    The counts of rows: kept, failed, relabelled (p+ is not p_seed). LLMError, and nothing written, when
    none is kept, or all scores are equal: that is an endpoint that does not score, not a judgement.
    """
    count: Counter[str] = Counter()
    failures: list[str] = []
    values: dict[str, set[Any]] = {"ql": set(), "rc": set()}         # up to two different scores of each

    def kept() -> Iterator[dict[str, Any]]:
        for row in tqdm(rows, total=total, desc=what, unit="row"):
            if "failed" in row:
                failures.append(row["failed"])
                if len(failures) >= MAX_FAILED_AT_FIRST and not count["kept"]:
                    break
                continue
            count["kept"] += 1
            count["relabelled"] += row.get("positive_id", row["seed_id"]) != row["seed_id"]
            for name, seen in values.items():
                if len(seen) < 2:
                    seen.update(candidate[name] for candidate in row.get("candidates", ()))
            yield row
        if not count["kept"]:
            raise LLMError(f"{what}: none of the first {len(failures)} rows succeeded; one: {failures[0]}")
        for name, seen in values.items():
            if len(seen) == 1 and None not in seen:
                raise LLMError(f"all {name} scores equal {seen.pop()}: the endpoint does not score; "
                               "nothing was written")

    write_jsonl(path, kept())
    count["failed"] = len(failures)
    example = f"; a failure: {failures[0]}" if failures else ""
    print(f"{what}: kept {count['kept']} of {total}{example}; wrote {path}")
    return count
