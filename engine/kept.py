"""Rows as an LLM makes them: in blocks that keep like rows together, written as they come, failures counted."""

from __future__ import annotations

import math
import operator
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
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


def blocks_of_same_query(rows: Sequence[Row], size: int) -> Iterator[list[int]]:
    """Places in rows, at least `size` at a time, with all rows of one query in one block."""
    same: dict[str, list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        same[row["query"]].append(place)
    block: list[int] = []
    for places in same.values():
        block += places
        if len(block) >= size:
            yield block
            block = []
    if block:
        yield block


def write_kept(path: str | Path, rows: Iterator[Row], total: int, what: str, llm: Any = None) -> Counter[str]:
    """Write the rows that did not fail; say "kept K of N", show a failure, and, however it ends, what was asked.

    The counts of rows: kept, relabelled (p+ is not p_seed), no negative. LLMError, and nothing written, where
    `check_kept` says so.
    """
    count = Counter[str]()
    failures: list[str] = []
    seed_first: dict[str, float] = defaultdict(float)                # rows, by ranking and by "chance"
    scores: dict[str, set[Any]] = {"ql": set(), "rc": set()}         # up to two different ones of each

    def kept() -> Iterator[Row]:
        for row in tqdm(rows, total=total, desc=what, unit="row"):
            if "failed" in row:
                failures.append(row["failed"])
                if len(failures) >= MAX_FAILED_AT_FIRST and not count["kept"]:
                    break
                continue
            count["kept"] += 1
            count["relabelled"] += row.get("positive_id", row["seed_id"]) != row["seed_id"]
            count["no negative"] += row.get("negative_id", "") is None
            if "candidates" in row:
                add_ranking(row, seed_first, scores)
            yield row
        check_kept(what, count["kept"], failures, scores)

    try:
        write_jsonl(path, kept())
    finally:
        if hasattr(llm, "report"):
            print(llm.report())
    if seed_first:
        print(shares(seed_first, count["kept"]))
    example = f"; a failure: {failures[0]}" if failures else ""
    print(f"{what}: kept {count['kept']} of {total}{example}; wrote {path}")
    return count


def add_ranking(row: Row, seed_first: dict[str, float], scores: dict[str, set[Any]]) -> None:
    """Which rankings put the passage first that the query was written for, and the row's scores."""
    candidates = row["candidates"]
    seed_first["chance"] += 1 / len(candidates)
    seed_first["retriever"] += candidates[0]["id"] == row["seed_id"]  # nearest first
    for name, different in scores.items():
        if len(different) < 2:
            different.update(candidate[name] for candidate in candidates)
        if candidates[0][name] is not None:
            first = max(candidates, key=operator.itemgetter(name))
            seed_first[name] += first["id"] == row["seed_id"]


def check_kept(what: str, kept: int, failures: Sequence[str], scores: dict[str, set[Any]]) -> None:
    """LLMError when nine in ten failed, or all scores are equal: that endpoint does not score."""
    failed = len(failures)
    if failed > 9 * kept:
        raise LLMError(f"{what}: {kept} of the first {failed + kept} rows succeeded, too few to go on; "
                       f"failures: {'; '.join(failures[:3])}")
    for name, different in scores.items():
        if len(different) == 1 and None not in different:
            raise LLMError(f"all {name} scores equal {different.pop()}: the endpoint does not score; "
                           "nothing was written")


def shares(seed_first: dict[str, float], rows: int) -> str:
    """How often each ranking puts the seed first, with a 95 % interval, and whether that is more than chance."""
    parts = []
    chance = seed_first.pop("chance") / rows
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
