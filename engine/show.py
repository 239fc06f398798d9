"""Records of a FRet file as people read them: for the terminal, and as one HTML page that needs nothing else.

How ranks are counted and how a task is named come as arguments, `ranks(scores)` and `task_kind(task)`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from engine.files import InputError, file_beside, one_line, read_jsonl, read_passages

Row = dict[str, Any]
Ranks = Callable[[Sequence[float]], list[int]]


def show(fret: str, corpus: str, html: str, changed: bool, limit: int, ranks: Ranks,
         task_kind: Callable[[str], str]) -> None:
    """Print the first `limit` rows, or write them as a page; say how many there are and what is left out."""
    source = Path(corpus or Path(fret).parent / "corpus.jsonl")
    corpus_rows = read_passages(source) if corpus or source.is_file() else []
    rows: list[Row] = []
    total = matching = 0
    for total, row in enumerate(read_fret(fret), 1):
        if not changed or row.get("positive_id") != row.get("seed_id"):
            matching += 1
            if matching <= limit:
                rows.append(row)
    about = f"{Path(fret).name}: {total:,} records"
    if changed:
        about += f", p+ is not p_seed in {matching:,}"
    about += f"; {len(rows):,} shown"
    if matching > len(rows):
        about += f", {matching - len(rows):,} left out (--limit)"
    passages = known_passages(rows, corpus_rows)
    unknown = {str(candidate["id"]) for row in rows for candidate in row["candidates"]} - passages.keys()
    if html:
        with file_beside(html) as new:
            new.write_text(as_page(rows, passages, about, ranks, task_kind), encoding="utf-8")
        about = f"wrote {html}: {about}\nnext: open it in a browser"
    else:
        for row in rows:
            print(*as_lines(row, passages, ranks), sep="\n", end="\n\n")
    if unknown:
        print(f"no text here for {len(unknown):,} of the candidates; --corpus FILE gives it")
    print(about)


def read_fret(path: str | Path) -> Iterator[Row]:
    """The rows that `mine` wrote, with all that is shown of them."""
    for where, row in read_jsonl(path, strict=False):
        candidates = row.get("candidates")
        sides = [row.get("positive"), row.get("negative") or {"text": ""}]
        good = isinstance(candidates, list) and len(candidates) > 0 and all(map(is_candidate, candidates))
        good = good and isinstance(row.get("task"), str) and isinstance(row.get("query"), str)
        if not good or not all(isinstance(side, dict) and isinstance(side.get("text"), str) for side in sides):
            raise InputError(f"{where}: no record with candidates; give a file that `llm.py mine` wrote")
        yield row


def is_candidate(candidate: Any) -> bool:
    def number(x: Any) -> bool:
        return isinstance(x, (int, float)) and abs(x) < 1e300        # not nan either

    if not isinstance(candidate, dict) or "id" not in candidate or not number(candidate.get("R")):
        return False
    return all(candidate.get(name) is None or number(candidate[name]) for name in ("ql", "rc"))


def in_order(row: Row, ranks: Ranks) -> list[tuple[int | None, int | None, Row]]:
    """(rank by QL, rank by RC, candidate) of p_1 ... p_N; no rank where there is no score."""
    candidates = row["candidates"]
    columns = []
    for name in ("ql", "rc"):
        scores = [candidate.get(name) for candidate in candidates]
        columns.append([None] * len(scores) if None in scores else ranks(scores))
    return sorted(zip(*columns, candidates, strict=True), key=lambda item: -item[2]["R"])


def known_passages(rows: Sequence[Row], corpus: Sequence[dict[str, str]]) -> dict[str, dict[str, str]]:
    """Passages by id: the corpus's, and those whose texts stand in the rows themselves."""
    passages = {p["_id"]: p for p in corpus}
    for row in rows:
        for name in ("positive", "negative"):
            if row.get(name):
                title = str(row[name].get("title") or "")
                passages[str(row.get(f"{name}_id"))] = {"title": title, "text": row[name]["text"]}
    return passages


def as_lines(row: Row, passages: dict[str, dict[str, str]], ranks: Ranks) -> Iterator[str]:
    """Task, query, and the candidates in the order of R."""
    yield one_line(f"{row.get('_id', '')}  {row['query']}", 100)
    yield f"  task: {one_line(row['task'], 90)}"
    yield "   n        QL rank       RC rank      R"
    for n, (r_ql, r_rc, candidate) in enumerate(in_order(row, ranks), 1):
        line = f"  {n:2}"
        for score, rank in ((candidate.get("ql"), r_ql), (candidate.get("rc"), r_rc)):
            line += f"{'none' if score is None else format(score, '.3f'):>10} {rank or '':>4}"
        marks = [mark for mark, name in (("p+", "positive"), ("p-", "negative"), ("seed", "seed"))
                 if row.get(f"{name}_id") == candidate["id"]]
        p = passages.get(str(candidate["id"]), {"title": "", "text": ""})
        text = one_line(f"{p['title'] or candidate['id']}  {p['text']}", 60)
        yield f"{line}  {candidate['R']:.3f}  {' '.join(marks):7}  {text}".rstrip()


def summary(row: Row, passages: dict[str, dict[str, str]], ranks: Ranks) -> Iterator[str]:
    """Task, query, and of the candidates p_seed, p+ and p- alone."""
    ranked = {candidate["id"]: (r_ql, r_rc, candidate["R"]) for r_ql, r_rc, candidate in in_order(row, ranks)}
    yield f"  task      {row['task']}"
    yield f"  query     {row['query']}"
    for name in ("seed", "positive", "negative"):
        key = row[f"{name}_id"]
        if key is not None:
            r_ql, r_rc, R = ranked[key]
            yield f"  {name:9} {key}: {' '.join(passages[key]['text'].split())[:70]}"
            yield f"            rank {r_ql} by QL, {r_rc} by RC, R = {R:.3f}"


def as_page(rows: Sequence[Row], passages: dict[str, dict[str, str]], about: str, ranks: Ranks,
            task_kind: Callable[[str], str]) -> str:
    """viewer.html with the rows as JSON, which its script draws on demand."""
    numbers: dict[str, int] = {}                                     # a passage's id -> its place in `texts`

    def number(key: Any) -> int | None:
        return None if key is None else numbers.setdefault(str(key), len(numbers))

    def rounded(x: float | None) -> float | None:
        return None if x is None else float(f"{x:.4g}")

    records = []
    for row in rows:
        record = {"id": str(row.get("_id", "")), "kind": row.get("kind") or task_kind(row["task"]),
                  "task": row["task"], "query": row["query"][:2000], "seed": number(row.get("seed_id")),
                  "pos": number(row.get("positive_id")), "neg": number(row.get("negative_id"))}
        record["candidates"] = [
            [number(c["id"]), rounded(c.get("ql")), r_ql, rounded(c.get("rc")), r_rc, rounded(c["R"])]
            for r_ql, r_rc, c in in_order(row, ranks)]
        records.append(record)
    texts = []
    for key in numbers:
        p = passages.get(key, {"title": "", "text": ""})
        texts.append([key, p["title"], p["text"] if len(p["text"]) <= 1000 else p["text"][:1000] + "..."])
    # subtle: a "<" in the data could end the script element that holds it
    data = json.dumps({"about": about, "passages": texts, "records": records}).replace("<", "\\u003c")
    return Path(__file__).with_name("viewer.html").read_text(encoding="utf-8").replace("@data@", data, 1)
