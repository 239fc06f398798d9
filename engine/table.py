"""Tables of texts and labels: .jsonl, .csv and .tsv with a header, plain or .gz.

Nothing is guessed: each row has the header's width, a text is a string, a label a string, a whole
number or a boolean. What cannot be read one way only is refused with file:line.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.files import InputError, is_text, open_text, read_jsonl

Json = dict[str, Any]                       # a row, by the names of its columns
Cells = Iterator[tuple[str, list[str]]]     # ("file:line", the cells of a row)


def read_table(path: str) -> Iterator[tuple[str, Json]]:
    """("file:line", row) of .jsonl, or of .csv or .tsv with a header; plain or .gz."""
    ending = Path(path.removesuffix(".gz")).suffix.lower()
    if ending not in (".csv", ".tsv"):
        yield from read_jsonl(path)
        return
    with open_text(path) as file:
        text = file.read()
    rows = cells(path, text, ",", True) if ending == ".csv" else tsv(path, text)
    _, header = next(rows, ("", []))
    if len(set(header)) < len(header) or not header:
        raise InputError(f"{path}:1: two columns of one name, or none; name each column of the header")
    for where, row in rows:
        yield where, dict(zip(header, row, strict=True))


def cells(path: str, text: str, delimiter: str, quoted: bool) -> Cells:
    """The rows of a table, all of the header's width; an error names the line where a row begins."""
    csv.field_size_limit(2 ** 31 - 1)                                # a cell may hold a document
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True,
                        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE)
    width = line = 0
    try:
        for row in reader:
            where, line = f"{path}:{line + 1}", reader.line_num
            if row:                                                  # not a blank line
                width = width or len(row)
                if len(row) != width:
                    raise InputError(f"{where}: {len(row)} columns where the header has {width}; put "
                                     f"a text that holds {delimiter!r} in double quotes")
                yield where, row
    except csv.Error as error:
        raise InputError(f"{path}:{line + 1}: {error}; close each quote, and double those within "
                         "a text") from error


def tsv(path: str, text: str) -> Cells:
    """TSV as pandas writes it (quoted where needed) or as GLUE does (quotes are part of a text).

    The file decides. If it reads both ways, it is quoted if its header is, or if a quoted cell has a
    doubled quote in it.
    """
    if '"' not in text:
        yield from cells(path, text, "\t", False)
        return
    errors: dict[bool, InputError] = {}
    counts: dict[bool, int] = {}                                     # rows, read as quoted and as unquoted
    for quoted in (True, False):
        try:
            counts[quoted] = sum(1 for _ in cells(path, text, "\t", quoted))
        except InputError as error:
            errors[quoted] = error
    if len(errors) == 2:
        raise InputError(f"{errors[True]} (read as unquoted: {errors[False]})")
    quoted = True in counts
    if not errors:
        doubled = re.search(r'(^|\t)"([^"\t]|"")*""([^"\t]|"")*"(\t|$)', text, re.M)
        quoted = text.startswith('"') or doubled is not None
        if not quoted and counts[True] != counts[False]:
            raise InputError(f"{path}: reads as quoted TSV with {counts[True]} rows and as unquoted "
                             f"with {counts[False]}; save it as CSV")
    print(f"  {path}: read as {'quoted' if quoted else 'unquoted'} TSV")
    yield from cells(path, text, "\t", quoted)


# --------------------------------------------------------------------------------------------------
# The values of a row


def column(where: str, row: Json, *names: str) -> str:
    """The first of these columns that the row has and that is not blank."""
    for name in names:
        if row.get(name) is not None and str(row[name]).strip():
            return name
    raise InputError(f"{where}: no {' or '.join(names)} among {', '.join(map(str, row))}; "
                     "rename the column")


def as_text(where: str, value: Any) -> str:
    """A text of a file is a string: no number, null or list is made one."""
    if isinstance(value, str):
        return value.strip()
    raise InputError(f"{where}: {json.dumps(value)} is no text; give a string")


def optional_text(where: str, row: Json, name: str) -> str:
    """The same, where a text may be missing."""
    return "" if row.get(name) is None else as_text(where, row[name])


def as_label(where: str, value: Any) -> str:
    """A label is a string, a whole number or a boolean; 1 and "1" are one label."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | int):
        return str(value).strip()
    raise InputError(f"{where}: {json.dumps(value)} is no label; give a string or a whole number")


def text_in(where: str, row: Json, *names: str) -> str:
    return as_text(where, row[column(where, row, *names)])


def label_in(where: str, row: Json, *names: str) -> str:
    return as_label(where, row[column(where, row, *names)])


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
    sides: Json = {"positive": row.get("positive")}
    if row["negative"] is not None:
        sides["negative"] = row["negative"]
    for key, passage in sides.items():
        if not is_passage(passage, row["symmetric"]):
            raise InputError(f'{where}: "{key}" has no text; give {{"title": "", "text": "..."}}')
    if len(set(map(content, sides.values()))) < len(sides):
        raise InputError(f"{where}: positive and negative are the same text; remove the negative")


def is_passage(p: Any, symmetric: bool) -> bool:
    """Whether it says something; a title alone does, but a symmetric target shows none."""
    good = isinstance(p, dict) and isinstance(p.get("text"), str) and isinstance(p.get("title"), str | None)
    return good and (p["text"] if symmetric else content(p)).strip() != ""


def content(passage: dict[str, str]) -> str:
    """What a passage says: its text, or a title alone."""
    return passage["text"].strip() or (passage.get("title") or "").strip()
