"""Rows as an LLM makes them: in blocks that keep like rows together, written as they come, failures counted."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine.files import InputError, is_text, read_jsonl, write_jsonl
from engine.transport import LLMError

Row = dict[str, Any]
MAX_FAILED_AT_FIRST = 200  # rows that all failed from the first on: no more are asked for


def read_queries(path: str | Path, corpus: Sequence[Row]) -> list[Row]:
    """The rows that `generate` wrote; each seed must be a passage of the corpus."""
    ids = {p["_id"] for p in corpus}
    rows = []
    for where, row in read_jsonl(path):
        for name in ("_id", "task", "query", "seed_id"):
            if not is_text(row.get(name)):
                raise InputError(f"{where}: want _id, task, query and seed_id, as `llm.py generate` writes")
        if row["seed_id"] not in ids:
            raise InputError(f"{where}: seed_id {row['seed_id']!r} is not in the corpus; give the "
                             "corpus that the queries were generated from")
        rows.append(row)
    return rows


def blocks_of_same(rows: Sequence[Row], name: str, size: int) -> Iterator[list[int]]:
    """Places in rows, at least `size` at a time, with all rows that have the same `name` in one block."""
    same: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        same.setdefault(row[name], []).append(place)
    block: list[int] = []
    for places in same.values():
        block += places
        if len(block) >= size:
            yield block
            block = []
    if block:
        yield block


class Kept:
    """The rows that did not fail, and what is counted on the way, of which `check` judges them at the end."""

    def __init__(self, rows: Iterable[Row], what: str) -> None:
        self.rows, self.what = rows, what
        self.count: Counter[str] = Counter()
        self.failures: list[str] = []
        self.seed_first: Counter[str] = Counter()                    # rows, by ranking
        self.chance = 0.0                                            # the sum of the mined rows' 1 / N
        self.scores: dict[str, set[Any]] = {"ql": set(), "rc": set()}  # up to two different ones of each

    def __iter__(self) -> Iterator[Row]:
        for row in self.rows:
            if "failed" not in row:
                self.add(row)
                yield row
                continue
            self.failures.append(row["failed"])
            if len(self.failures) >= MAX_FAILED_AT_FIRST and not self.count["kept"]:
                break
        self.check()

    def add(self, row: Row) -> None:
        self.count["kept"] += 1
        self.count["relabelled"] += row.get("positive_id", row["seed_id"]) != row["seed_id"]
        self.count["no negative"] += row.get("negative_id", "") is None
        if "candidates" not in row:
            return
        for name, scores in self.scores.items():
            if len(scores) < 2:
                scores.update(candidate[name] for candidate in row["candidates"])
        self.seed_first.update(puts_seed_first(row))
        self.count["mined"] += 1
        self.chance += 1 / len(row["candidates"])

    def check(self) -> None:
        """LLMError when nine in ten failed, or all scores are equal: that endpoint does not score."""
        kept, failed = self.count["kept"], len(self.failures)
        if failed > 9 * kept:
            raise LLMError(f"{self.what}: {kept} of the first {failed + kept} rows succeeded, too few to go on; "
                           f"failures: {'; '.join(self.failures[:3])}")
        for name, scores in self.scores.items():
            if len(scores) == 1 and None not in scores:
                raise LLMError(f"all {name} scores equal {scores.pop()}: the endpoint does not score; "
                               "nothing was written")


def write_kept(path: str | Path, rows: Iterator[Row], total: int, what: str, llm: Any = None) -> Counter[str]:
    """Write the rows that did not fail; say "kept K of N", show a failure, and, however it ends, what was asked.

    The counts of rows: kept, mined, relabelled (p+ is not p_seed), no negative. LLMError, and nothing written,
    where `Kept.check` says so.
    """
    kept = Kept(tqdm(rows, total=total, desc=what, unit="row"), what)
    try:
        write_jsonl(path, kept)
    finally:
        if hasattr(llm, "report"):
            print(llm.report())
    count, mined = kept.count, kept.count["mined"]
    if mined:
        print(shares(kept.seed_first, kept.chance / mined, mined))
    example = f"; a failure: {kept.failures[0]}" if kept.failures else ""
    print(f"{what}: kept {count['kept']} of {total}{example}; wrote {path}")
    return count


def puts_seed_first(row: Row) -> dict[str, bool]:
    """Of each ranking, "retriever", "ql" or "rc": is the passage first that the query was written for?"""
    candidates = row["candidates"]
    first = {"retriever": candidates[0]}                             # nearest first
    for name in ("ql", "rc"):
        if candidates[0][name] is not None:
            first[name] = max(candidates, key=lambda candidate: candidate[name])
    return {name: candidate["id"] == row["seed_id"] for name, candidate in first.items()}


def shares(seed_first: Counter[str], chance: float, rows: int) -> str:
    """How often each ranking puts the seed first, with a 95 % interval, and whether that is more than chance."""
    parts = []
    for name, times in sorted(seed_first.items()):
        share = times / rows
        # Wilson's interval of a share, which is right for few rows too
        middle = (share + 1.92 / rows) / (1 + 3.84 / rows)
        half = 1.96 * math.sqrt(share * (1 - share) / rows + 0.96 / rows ** 2) / (1 + 3.84 / rows)
        low, high = max(0.0, middle - half), middle + half
        no_better = ", no better than chance" if low <= chance else ""
        parts.append(f"{name} {share:.1%} [{low:.1%}, {high:.1%}]{no_better}")
    return f"p_seed comes first by {'; by '.join(parts)}; by chance {chance:.1%}"


def count_calls(rows: Iterator[Row], what: str, llm: Any) -> None:
    """In place of write_kept in a dry run: say what would be asked."""
    for _ in rows:
        pass
    print(f"{what}: {llm.report()}")
