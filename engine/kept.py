"""Rows as an LLM makes them: in blocks that keep like rows together, written as they come, failures counted."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine.files import InputError, is_text, read_jsonl, write_jsonl
from engine.transport import LLMError

Row = dict[str, Any]
Counts = dict[str, Any]    # numbers of rows
SCORES = ("ql", "rc")      # the rankings of an LLM
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


def write_kept(path: str | Path, rows: Iterator[Row], total: int, what: str, llm: Any = None) -> None:
    """Write the rows that did not fail; say "kept K of N", show a failure, and, however it ends, what was asked.

    LLMError, and nothing written, where nine in ten failed, or the scores of no query differ.
    """
    counts: Counts = defaultdict(int)
    failures: list[str] = []

    def kept() -> Iterator[Row]:
        for row in tqdm(rows, total=total, desc=what, unit="row"):
            if "failed" not in row:
                counts["kept"] += 1
                if "candidates" in row:
                    count_mined(row, counts)
                yield row
                continue
            failures.append(row["failed"])
            if len(failures) >= MAX_FAILED_AT_FIRST and not counts["kept"]:
                break
        asked = counts["kept"] + len(failures)
        if asked > 10 * counts["kept"]:
            raise LLMError(f"{what}: {counts['kept']} of the first {asked} rows succeeded, too few to go on; "
                           f"failures: {'; '.join(failures[:3])}")
        for name in SCORES:
            if name in counts and not counts[f"{name} differ"]:
                raise LLMError(f"all {name} scores equal those of the same query: the endpoint does not score; "
                               "nothing was written")

    try:
        write_jsonl(path, kept())
    finally:
        if hasattr(llm, "report"):
            print(llm.report())
    if "chance" in counts:
        print(f"p_seed comes first by {shares(counts)}; p+ is another passage in "
              f"{counts['relabelled'] / counts['kept']:.1%} (paper: 15 %); {counts['no negative']} of "
              f"{counts['kept']} have no hard negative")
    example = f"; a failure: {failures[0]}" if failures else ""
    print(f"{what}: kept {counts['kept']} of {total}{example}; wrote {path}")


def count_mined(row: Row, counts: Counts) -> None:
    """Whether p+ is not p_seed, p- is missing, and which rankings put p_seed first and tell passages apart."""
    candidates, seed = row["candidates"], row["seed_id"]
    counts["relabelled"] += row["positive_id"] != seed
    counts["no negative"] += row["negative_id"] is None
    counts["chance"] += 1 / len(candidates)
    counts["retriever"] += candidates[0]["id"] == seed               # nearest first
    for name in SCORES:
        scores = [candidate[name] for candidate in candidates]
        if None not in scores:
            first = scores.index(max(scores))
            counts[name] += candidates[first]["id"] == seed
            counts[f"{name} differ"] += max(scores) > min(scores)


def shares(counts: Counts) -> str:
    """How often each ranking puts the seed first, with a 95 % interval, and whether that is more than chance."""
    parts = []
    rows = counts["kept"]
    chance = counts["chance"] / rows
    for name in (*SCORES, "retriever"):
        if name not in counts:
            continue
        share = counts[name] / rows
        # Wilson's interval of a share, which is right for few rows too; 3.84 is 1.96 squared
        z = 3.84 / rows
        middle = (share + z / 2) / (1 + z)
        half = math.sqrt(z * share * (1 - share) + z ** 2 / 4) / (1 + z)
        low, high = max(0.0, middle - half), middle + half
        no_better = ", no better than chance" if low <= chance else ""
        parts.append(f"{name} {share:.1%} [{low:.1%}, {high:.1%}]{no_better}")
    return f"{'; by '.join(parts)}; by chance {chance:.1%}"


def count_calls(rows: Iterator[Row], what: str, llm: Any) -> None:
    """In place of write_kept in a dry run: say what would be asked."""
    for _ in rows:
        pass
    print(f"{what}: {llm.report()}")
