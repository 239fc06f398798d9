"""Records as people read them: FRet for the terminal and as one HTML page that needs nothing else, any by counts.

How ranks are counted comes as an argument, `ranks(scores)`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from engine.corpus import Corpus
from engine.files import InputError, check_outputs, file_beside, one_line, read_jsonl, read_passages
from engine.table import check_record

Row = dict[str, Any]
Passages = dict[str, dict[str, str]]  # {"title", "text"} by id
Ranks = Callable[[Sequence[float]], list[int]]
UNKNOWN = {"title": "", "text": ""}  # a passage whose text is not here
ON_PAGE = ("_id", "kind", "task", "query", "seed_id", "positive_id", "negative_id")  # of a row


def show(args: Any, ranks: Ranks) -> None:
    """`llm.py show`: print the first rows, or write them as a page; say how many there are and what is left out."""
    source = Path(args.corpus or Path(args.fret).parent / "corpus.jsonl")
    check_outputs([args.html], args.fret, source)
    rows, about = first_rows(args.fret, args.changed, args.limit or (10_000 if args.html else 5))
    corpus = read_passages(source) if args.corpus or source.is_file() else []
    passages = known_passages(rows, corpus)
    if args.html:
        with file_beside(args.html) as new:
            new.write_text(as_page(rows, passages, about, ranks), encoding="utf-8")
        about = f"wrote {args.html}: {about}\nnext: open it in a browser"
    else:
        for row in rows:
            print(*as_lines(row, passages, ranks), sep="\n", end="\n\n")
    candidates = {candidate["id"] for row in rows for candidate in row["candidates"]}
    unknown = len(candidates - passages.keys())
    if unknown:
        print(f"no text here for {unknown:,} of the candidates; --corpus FILE gives it")
    print(about)


def first_rows(path: str, changed: bool, limit: int) -> tuple[list[Row], str]:
    """The first rows, or of those where p+ is not p_seed; how many there are, and how many are left out."""
    rows: list[Row] = []
    total = matching = 0
    for total, row in enumerate(read_fret(path), 1):
        if changed and row["positive_id"] == row["seed_id"]:
            continue
        matching += 1
        if matching <= limit:
            rows.append(row)
    about = f"{Path(path).name}: {total:,} records"
    if changed:
        about += f", p+ is not p_seed in {matching:,}"
    about += f"; {len(rows):,} shown"
    if matching > len(rows):
        about += f", {matching - len(rows):,} left out (--limit)"
    return rows, about


def read_fret(path: str) -> Iterator[Row]:
    """The rows that `mine` wrote."""
    for where, row in read_jsonl(path):
        try:
            scores = [c[name] or 0.0 for c in row["candidates"] for name in ("R", "ql", "rc")]
            good = all(c["id"] for c in row["candidates"]) and scores and all(map(math.isfinite, scores))
        except (LookupError, TypeError, OverflowError):
            good = False
        if not good:
            raise InputError(f"{where}: no record with candidates; give a file that `llm.py mine` wrote")
        check_record(where, row)
        yield row


def in_order(row: Row, ranks: Ranks) -> list[tuple[int | None, int | None, Row]]:
    """(rank by QL, rank by RC, candidate) of p_1 ... p_N; no rank where there is no score."""
    candidates = row["candidates"]
    columns = []
    for name in ("ql", "rc"):
        scores = [candidate[name] for candidate in candidates]
        columns.append([None] * len(scores) if None in scores else ranks(scores))
    return sorted(zip(*columns, candidates, strict=True), key=lambda item: -item[2]["R"])


def known_passages(rows: Sequence[Row], corpus: Corpus) -> Passages:
    """The corpus's passages, and those whose texts stand in the rows themselves."""
    passages = {p["_id"]: p for p in corpus}
    for row in rows:
        for name in ("positive", "negative"):
            if row[name]:
                passages[row[f"{name}_id"]] = {"title": "", **row[name]}
    return passages


def as_lines(row: Row, passages: Passages, ranks: Ranks) -> Iterator[str]:
    """Task, query, and the candidates in the order of R."""
    yield one_line(f"{row['_id']}  {row['query']}", 100)
    yield f"  task: {one_line(row['task'], 90)}"
    yield "   n        QL rank       RC rank      R"
    for n, (r_ql, r_rc, candidate) in enumerate(in_order(row, ranks), 1):
        line = f"  {n:2}"
        for score, rank in ((candidate["ql"], r_ql), (candidate["rc"], r_rc)):
            number = "none" if score is None else f"{score:.3f}"
            line += f"{number:>10} {rank or '':>4}"
        names = (("p+", "positive_id"), ("p-", "negative_id"), ("seed", "seed_id"))
        marks = [mark for mark, key in names if row[key] == candidate["id"]]
        p = passages.get(candidate["id"], UNKNOWN)
        text = one_line(f"{p['title'] or candidate['id']}  {p['text']}", 60)
        yield f"{line}  {candidate['R']:.3f}  {' '.join(marks):7}  {text}".rstrip()


def as_page(rows: Sequence[Row], passages: Passages, about: str, ranks: Ranks) -> str:
    """viewer.html with the rows as JSON, which its script draws on demand."""
    texts: dict[str, list[str]] = {}                                 # title and text by id
    records = []
    for row in rows:
        candidates = []
        for r_ql, r_rc, c in in_order(row, ranks):
            candidates.append([c["id"], c["ql"], r_ql, c["rc"], r_rc, c["R"]])
            if c["id"] in passages:
                p = passages[c["id"]]
                text = p["text"]
                if len(text) > 1000:
                    text = text[:1000] + "..."
                texts[c["id"]] = [p["title"], text]
        records.append({name: row[name] for name in ON_PAGE} | {"candidates": candidates})
    # subtle: a "<" in the data could end the script element that holds it
    data = json.dumps({"about": about, "passages": texts, "records": records}).replace("<", "\\u003c")
    return Path(__file__).with_name("viewer.html").read_text(encoding="utf-8").replace("@data@", data, 1)


# --------------------------------------------------------------------------------------------------
# A training file


def counted(rows: Sequence[Row]) -> str:
    with_negative = sum(row["negative"] is not None for row in rows)
    symmetric = sum(row["symmetric"] for row in rows)
    return f"{len(rows)} records, {with_negative} with a hard negative, {symmetric} symmetric"


def overview(rows: Sequence[Row], texts: Sequence[Sequence[str | None]], tasks: Sequence[str]) -> Iterator[str]:
    """What training will see: the most frequent tasks, doubtful rows, the first row's texts as formatted."""
    for task, count in Counter(tasks).most_common(10):
        yield f"{count:7d}  {task[:80]}"
    inputs, positives, _ = map(set, zip(*texts, strict=True))
    for name, distinct in (("input", inputs), ("positive", positives)):
        yield f"{len(texts) - len(distinct)} repeated {name} texts (in a batch they are masked, not negatives)"
    same = sum(row["query"] == row["positive"]["text"] for row in rows)
    yield f"{same} rows whose query is their positive (nothing to learn from)"
    for name, text in zip(("input", "positive", "negative"), texts[0], strict=True):
        yield f"first {name}: {' '.join((text or '(none)').split())[:100]}"
