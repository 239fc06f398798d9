"""Files, errors and flags: JSONL in and out, output written whole or not at all, one-line mistakes.

Nothing here knows what Gecko is. A user's mistake is an InputError: one line that names the file, line or
argument and the fix; `run` prints it and exits with code 2.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import os
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import field, fields
from pathlib import Path
from typing import Any, TypeGuard

from safetensors import SafetensorError
from tqdm import tqdm


class InputError(ValueError):
    """A user's mistake: one line that names the file, line or argument and the fix; exit code 2."""


def read_json(path: Path, kind: type) -> Any:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({first_line(error)}); write or copy it again"
                         ) from error
    if not isinstance(content, kind):
        raise InputError(f"{path}: not a JSON {kind.__name__}; write or copy it again")
    return content


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def one_line(text: str, most: int) -> str:
    """A text for a terminal: no line breaks, no control characters, at most so many characters."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split()))
    return text if len(text) <= most else text[:most - 3] + "..."


@contextlib.contextmanager
def file_beside(path: str | Path) -> Iterator[Path]:
    """A temporary path, which takes the place of a file or folder on success and is deleted otherwise.

    subtle: no call swaps two folders on every system; a kill between the renames leaves both, whole and hidden.
    """
    path = Path(path).resolve()                                      # a link stays, what it leads to is new
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as hidden:
        new = Path(hidden, path.name)                                # of the same ending: numpy reads it
        yield new
        if new.is_dir() and path.is_dir():
            os.replace(path, Path(hidden, f"old {path.name}"))
        os.replace(new, path)


@contextlib.contextmanager
def folder_beside(path: str | Path) -> Iterator[Path]:
    """The same for a folder, which is there and empty."""
    with file_beside(path) as new:
        new.mkdir()
        yield new


def check_outputs(outputs: Sequence[str], *inputs: str | Path) -> None:
    """InputError, before anything is read or paid, where an output is an input too, another output, or no file.

    An output "" is none.
    """
    taken = {Path(name).resolve() for name in inputs}
    for output in filter(None, outputs):
        path = Path(output).resolve()
        if path.exists() and not path.is_file():                     # a rename would replace /dev/null itself
            what = "folder" if path.is_dir() else "device"
            raise InputError(f"{output}: a {what} stands there; name a file")
        if path in taken:
            raise InputError(f"{output}: it is an input too; name another file")
        taken.add(path)


@contextlib.contextmanager
def open_text(path: str | Path) -> Iterator[Any]:
    """UTF-8 text, plain or .gz, to read it; InputError, also within the `with`, where it is not.

    Where there is no such file, but its .gz, that is read.
    """
    there = Path(path)
    if not there.exists():
        there = Path(f"{path}.gz")
    if not there.exists() or there.is_dir():                         # but a pipe may stand there
        raise InputError(f"{path}: no such file; check the path")
    opener = gzip.open if there.suffix == ".gz" else open
    try:
        with opener(there, "rt", encoding="utf-8-sig") as file:      # with a byte order mark or without
            yield file
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise InputError(f"{path}: unreadable ({first_line(error)}); plain or .gz UTF-8 text") from error


def read_jsonl(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields ("file:line", row) for each non-empty line; an error names file:line and the fix.

    Half a surrogate pair is an error too: JSON can escape it, but no tokenizer or file takes it.
    """
    where = ""
    with open_text(path) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
                if "\\ud" in line.lower():                           # the escape of a half, or of both
                    json.dumps(row, ensure_ascii=False).encode()
            except (ValueError, RecursionError) as error:
                raise InputError(f"{where}: not JSON ({error}); one JSON object a line") from error
            if not isinstance(row, dict):
                raise InputError(f"{where}: not a JSON object; one JSON object a line")
            yield where, row
    if not where:
        raise InputError(f"{path}: no rows; one JSON object a line is needed")


def write_jsonl(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes rows to a plain or .gz file, whole or not at all."""
    with file_beside(path) as new, open(new, "wb") as file:
        out: Any = file
        if str(path).endswith(".gz"):
            # subtle: a .gz may hold a name and a time; with them the same rows would not be the same bytes
            out = gzip.GzipFile("", "wb", fileobj=file, mtime=0)
        with out:
            for row in rows:
                out.write((json.dumps(row, ensure_ascii=False) + "\n").encode())


def write_json(path: Path, content: Any) -> None:
    with file_beside(path) as new:
        new.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def flag(default: Any, meaning: str, choices: Sequence[Any] | None = None) -> Any:
    """A dataclass field that is also a command-line flag: its metadata are what argparse is told."""
    told: dict[str, Any] = {"type": type(default), "choices": choices}
    if isinstance(default, bool):
        told = {"action": argparse.BooleanOptionalAction}
    return field(default=default, metadata={"default": default, "help": f"{meaning} (%(default)s)", **told})


def add_flags(add: Callable[..., Any], config: type) -> None:
    """One --flag for each field of a config dataclass."""
    for f in fields(config):
        add("--" + f.name.replace("_", "-"), **f.metadata)


def from_flags(config: type, args: argparse.Namespace) -> Any:
    return config(**{f.name: getattr(args, f.name) for f in fields(config)})


def run(main: Callable[[], None]) -> None:
    """Call main(); a user's mistake or Ctrl-C becomes one line and an exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")            # letters that the terminal's encoding lacks
    try:
        main()
        print(end="", flush=True)                                    # a failure at the exit would be a traceback
    except (KeyboardInterrupt, InputError, OSError, SafetensorError) as error:
        try:
            print(end="", flush=True)
        except OSError:                                              # it would fail again at the exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):                       # the reader closed the pipe, as `head` does
            return
        if getattr(tqdm, "_instances", ()):                          # a progress bar stands on the line
            print(file=sys.stderr)
        if isinstance(error, KeyboardInterrupt):
            sys.exit("interrupted; run the same command again")
        print(f"error: {first_line(error)}", file=sys.stderr)
        sys.exit(2)


def say(**configuration: Any) -> None:
    """The configuration a command runs with, one line, to stderr."""
    print("  ".join(f"{k}={v}" for k, v in configuration.items()), file=sys.stderr)


def say_lost(model: Any, what: str) -> None:
    """How many texts were cut, and the share of unknown tokens, of what was encoded last."""
    if model.lost():
        say(**{what: model.lost()})


def path_and_rest(item: str, default: str) -> tuple[str, str]:
    """PATH or PATH:REST, as on a command line; a path may hold a colon."""
    path, _, rest = item.rpartition(":")
    if not path or Path(item).exists():
        return item, default
    return path, rest


def is_text(value: Any) -> TypeGuard[str]:
    """A string that is not blank."""
    return isinstance(value, str) and value.strip() != ""


def passage_texts(where: str, row: dict[str, Any]) -> tuple[str, str]:
    """Title and text of a passage, of which one may be empty; two empty ones for a row with neither."""
    title, text = row.get("title"), row.get("text")
    if row.keys() <= {"_id", "title", "metadata"}:                   # no other name can be the text's
        text = ""
    if not isinstance(text, str) or not isinstance(title, str | None):
        raise InputError(f'{where}: no "text", or it or the title is not a string; every passage needs a text '
                         '("" where it has a title alone)')
    title = title or ""
    return (title, text) if title.strip() or text.strip() else ("", "")


def read_passages(path: str | Path) -> list[dict[str, str]]:
    """A BEIR corpus.jsonl: rows of _id, title and text, in their order.

    A title alone is a passage. A row with neither is left out, and one that stands twice, word for word, is
    read once. Both are counted, to stderr.
    """
    passages: dict[str, dict[str, str]] = {}
    rows = 0
    for where, row in read_jsonl(path):
        rows += 1
        key = row.get("_id")
        if type(key) not in (str, int) or key == "":
            raise InputError(f'{where}: no "_id"; every passage needs one of its own')
        key = str(key)
        title, text = passage_texts(where, row)
        passage = {"_id": key, "title": title, "text": text}
        if passages.setdefault(key, passage) != passage:
            raise InputError(f'{where}: "_id" {key!r} has another text above; make it unique')
    filled = [p for p in passages.values() if p["title"] or p["text"]]
    if not filled:
        raise InputError(f'{path}: no passage has a "title" or a "text"; check the file')
    if len(filled) < len(passages):
        empty = len(passages) - len(filled)
        print(f"{path}: {empty} of {len(passages)} passages have neither title nor text", file=sys.stderr)
    if rows > len(passages):
        print(f"{path}: {rows - len(passages)} repeated rows are read once", file=sys.stderr)
    return filled
