"""Tables of texts and labels: .jsonl, .csv and .tsv with a header, plain or .gz.

Nothing is guessed: each row has the header's width, a text is a string, a label a string, a whole
number or a boolean. What cannot be read one way only is refused with file:line.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from engine.files import InputError, is_text, open_text, read_jsonl

Json = dict[str, Any]                       # a row, by the names of its columns
Rows = Iterable[tuple[str, Json]]           # each with its "file:line"


def read_table(paths: Iterable[str]) -> Rows:
    """The rows of .jsonl, or of .csv or .tsv with a header; plain or .gz."""
    for path in paths:
        ending = Path(path.removesuffix(".gz")).suffix.lower()
        if ending not in (".csv", ".tsv"):
            yield from read_jsonl(path)
            continue
        with open_text(path) as file:
            text = file.read()
        yield from csv_rows(path, text) if ending == ".csv" else tsv_rows(path, text)


def csv_rows(path: str, text: str, delimiter: str = ",", quoted: bool = True) -> Rows:
    """The rows of a table, all of the header's width; an error names the line where a row begins."""
    csv.field_size_limit(2 ** 31 - 1)                                # a cell may hold a document
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True,
                        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE)
    where, line = "", 0
    try:
        header = next(reader, [])
        if len(set(header)) < len(header) or not header:
            raise InputError(f"{path}:1: two columns of one name, or none; name each column of the header")
        line = reader.line_num
        for row in reader:
            where, line = f"{path}:{line + 1}", reader.line_num
            if len(row) == len(header):
                yield where, dict(zip(header, row, strict=True))
            elif row:                                                # not a blank line
                raise InputError(f"{where}: {len(row)} columns where the header has {len(header)}; put a text "
                                 f"that holds {delimiter!r} in double quotes")
    except csv.Error as error:
        raise InputError(f"{path}:{line + 1}: {error}; close each quote, and double those within "
                         "a text") from error
    if not where:
        raise InputError(f"{path}: no rows below the header")


def tsv_rows(path: str, text: str) -> Rows:
    """TSV as pandas writes it (quoted where needed) or as GLUE does (quotes are part of a text).

    The file decides. If it reads both ways, it is quoted if its header is, or if a quoted cell has a
    doubled quote in it.
    """
    if '"' not in text:
        return csv_rows(path, text, "\t")
    readings, errors = {}, []
    for name, quoted in (("quoted", True), ("unquoted", False)):
        try:
            readings[name] = list(csv_rows(path, text, "\t", quoted))
        except InputError as error:
            errors.append(f"{error} (read as {name})")
    if not readings:
        raise InputError("; ".join(errors))
    name = next(iter(readings))                                      # "quoted" if it reads both ways
    doubled = re.search(r'(^|\t)"([^"\t]|"")*""([^"\t]|"")*"(\t|$)', text, re.M)
    if not errors and not doubled and not text.startswith('"'):
        name = "unquoted"
        if len(readings["quoted"]) != len(readings["unquoted"]):
            raise InputError(f"{path}: reads as quoted TSV and, with other rows, as unquoted; save it as CSV")
    print(f"  {path}: read as {name} TSV")
    return readings[name]


# --------------------------------------------------------------------------------------------------
# The values of a row


def column(where: str, row: Json, *names: str) -> str:
    """The first of these columns that the row has and that is not blank."""
    for name in names:
        if row.get(name) is not None and str(row[name]).strip():
            return name
    raise InputError(f"{where}: no {' or '.join(names)} that is filled, among {', '.join(row)}; rename the column, "
                     "or remove the row")


def as_text(where: str, value: Any) -> str:
    """A text of a file is a string: no number, null or list is made one."""
    if isinstance(value, str):
        return value.strip()
    raise InputError(f"{where}: {json.dumps(value)} is no text; give a string")


def text_in(where: str, row: Json, *names: str) -> str:
    return as_text(where, row[column(where, row, *names)])


def label_in(where: str, row: Json, *names: str) -> str:
    """A label is a string, a whole number or a boolean; 1 and "1" are one label."""
    value = row[column(where, row, *names)]
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, int):                                       # 1, or true and false
        return json.dumps(value)
    raise InputError(f"{where}: {json.dumps(value)} is no label; give a string or a whole number")


# --------------------------------------------------------------------------------------------------
# Records, see data.py


def read_records(path: str | Path, candidates: bool = True) -> list[Json]:
    """A training file; the first wrong row is an error that names file:line and the fix.

    Without `candidates` a mined file takes a fraction of the memory; a loss has no use for them.
    """
    rows = []
    for where, row in read_jsonl(path):
        row = {"negative": None, "symmetric": False, **row}
        check_record(where, row)
        if not candidates:
            row.pop("candidates", None)
        rows.append(row)
    return rows


def check_record(where: str, row: Json) -> None:
    """InputError for a record that training could not use, or would misread."""
    for key in ("task", "query"):
        if not is_text(row.get(key)):
            raise InputError(f'{where}: no "{key}"; a record has task, query and positive')
    if row["symmetric"] not in (True, False) or not isinstance(row.get("kind"), str | None):
        raise InputError(f'{where}: "kind" is no text, or "symmetric" neither true nor false; '
                         "mend or drop it")
    for key in ("positive", "negative"):
        p: Any = row.get(key)
        if p is None and key == "negative":
            continue
        good = isinstance(p, dict) and isinstance(p.get("text"), str) and isinstance(p.get("title"), str | None)
        # a title alone says something, but a symmetric target does not show it
        if not good or not (p["text"].strip() if row["symmetric"] else content(p)):
            raise InputError(f'{where}: "{key}" has no text; give {{"title": "", "text": "..."}}')
    if row["negative"] and content(row["negative"]) == content(row["positive"]):
        raise InputError(f"{where}: positive and negative are the same text; remove the negative")


def content(passage: dict[str, str]) -> str:
    """What a passage says: its text, or a title alone."""
    return passage["text"].strip() or (passage.get("title") or "").strip()
