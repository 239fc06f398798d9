"""Records as people read them: FRet for the terminal and as one HTML page that needs nothing else, any by counts.

How ranks are counted comes as an argument, `ranks(scores)`.
"""

from __future__ import annotations

import json
import math
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from engine.files import InputError, check_outputs, file_beside, one_line, read_jsonl, read_passages
from engine.table import check_record

KEYS = set("_id seed_id positive_id negative_id negative symmetric".split())   # of a mined row, beside a record's
Row = dict[str, Any]
Texts = dict[str, tuple[str, str]]  # title and text, cut, by id
Ranks = Callable[[Sequence[float]], list[int]]


def show(args: Any, ranks: Ranks) -> None:
    """`llm.py show`: print the first rows, or write them as a page; say how many there are and what is left out."""
    source = Path(args.corpus or Path(args.fret).parent / "corpus.jsonl")
    check_outputs([args.html], args.fret, source)
    rows, about = first_rows(args.fret, args.changed, args.limit or (10_000 if args.html else 5))
    corpus = read_passages(source) if args.corpus or source.is_file() else []
    passages: Row = {p["_id"]: p for p in corpus}
    shown = set[str]()
    for row in rows:
        row["candidates"] = in_order(row["candidates"], ranks)
        shown.update(candidate["id"] for candidate in row["candidates"])
        for name in ("positive", "negative"):                        # the page holds each text once
            passages[row[f"{name}_id"]] = row.pop(name)
    texts = {key: (p.get("title") or "", one_line(p["text"], 1000)) for key, p in passages.items() if key in shown}
    if args.html:
        # subtle: a "<" in the data could end the script element that holds it
        data = json.dumps({"about": about, "passages": texts, "records": rows}).replace("<", "\\u003c")
        page = Path(__file__).with_name("viewer.html").read_text(encoding="utf-8")
        with file_beside(args.html) as new:
            new.write_text(page.replace("@data@", data, 1), encoding="utf-8")
        about = f"wrote {args.html}: {about}\nnext: open it in a browser"
    else:
        for row in rows:
            print(*as_lines(row, texts), sep="\n", end="\n\n")
    if len(texts) < len(shown):
        print(f"no text here for {len(shown) - len(texts):,} of the candidates; --corpus FILE gives it")
    print(about)


def first_rows(path: str, changed: bool, limit: int) -> tuple[list[Row], str]:
    """The first rows that `mine` wrote, or of those where p+ is not p_seed; how many there are, and are shown."""
    rows: list[Row] = []
    total = moved = 0
    for where, row in read_jsonl(path):
        try:
            scores = [c["R"] + (c[name] or 0.0) for c in row["candidates"] for name in ("ql", "rc")]
            good = all({c["id"] for c in row["candidates"]}) and scores and all(map(math.isfinite, scores))
        except (LookupError, TypeError, OverflowError):
            good = False
        if not good or not row.keys() >= KEYS:
            raise InputError(f"{where}: no record with candidates; give a file that `llm.py mine` wrote")
        check_record(where, row)
        relabelled = row["positive_id"] != row["seed_id"]
        total += 1
        moved += relabelled
        if len(rows) < limit and (relabelled or not changed):
            rows.append(row)
    matching = moved if changed else total
    return rows, (f"{Path(path).name}: {total:,} records, p+ is not p_seed in {moved:,}; "
                  f"{len(rows):,} of {matching:,} shown (--limit)")


def in_order(candidates: list[Row], ranks: Ranks) -> list[Row]:
    """p_1 ... p_N with their ranks, "r_ql" and "r_rc"; None where there is no score."""
    for name in ("ql", "rc"):
        scores = [candidate[name] for candidate in candidates]
        places = [None] * len(scores) if None in scores else ranks(scores)
        for candidate, place in zip(candidates, places, strict=True):
            candidate[f"r_{name}"] = place
    return sorted(candidates, key=operator.itemgetter("R"), reverse=True)


def as_lines(row: Row, texts: Texts) -> Iterator[str]:
    """Task, query, and the candidates in the order of R."""
    yield one_line(f"{row['_id']}  {row['query']}", 100)
    yield f"  task: {one_line(row['task'], 90)}"
    yield "   n        QL rank       RC rank      R"
    names = (("p+", "positive_id"), ("p-", "negative_id"), ("seed", "seed_id"))
    for n, c in enumerate(row["candidates"], 1):
        line = f"  {n:2}"
        for name in ("ql", "rc"):
            number = "none" if c[name] is None else f"{c[name]:.3f}"
            rank = c[f"r_{name}"] or ""
            line += f"{number:>10} {rank:>4}"
        marks = [mark for mark, name in names if row[name] == c["id"]]
        title, text = texts.get(c["id"], ("", ""))
        text = one_line(f"{title or c['id']}  {text}", 60)
        yield f"{line}  {c['R']:.3f}  {' '.join(marks):7}  {text}".rstrip()


# --------------------------------------------------------------------------------------------------
# A training file


def counted(rows: Sequence[Row]) -> str:
    with_negative = sum(row["negative"] is not None for row in rows)
    symmetric = sum(row["symmetric"] for row in rows)
    return f"{len(rows)} records, {with_negative} with a hard negative, {symmetric} symmetric"


def overview(texts: Sequence[Sequence[str | None]], tasks: Sequence[str]) -> Iterator[str]:
    """What training will see: the most frequent tasks, repeated texts, the first row's texts as formatted."""
    for task, count in Counter(tasks).most_common(10):
        yield f"{count:7d}  {one_line(task, 80)}"
    for name, side in zip(("input", "positive"), zip(*texts, strict=True), strict=False):
        yield f"{len(side) - len(set(side))} repeated {name} texts (in a batch they are masked, not negatives)"
    for name, text in zip(("input", "positive", "negative"), texts[0], strict=True):
        yield f"first {name}: {one_line(text or '(none)', 100)}"
