"""The vectors of a corpus, kept on disk: a text is encoded once, and again only by another model, or where another
corpus of the same name has been searched since.

The file is a table of a vector for each text and a key made of the text and the model: another model's vectors are
never found. A file that is torn counts for nothing and is written anew.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.files import InputError, file_beside, first_line, is_text, passage_texts, read_jsonl, say, say_lost


def kept_vectors(model: Any, folder: Path, corpus: Path, texts: Sequence[str]) -> np.ndarray:
    """(len(texts), d), in their order; beside the model's folder stand those of the last call."""
    folder = folder.resolve()
    path = folder.with_name(f"{folder.name}.vectors") / f"{corpus.resolve().name}.npy"
    made_by = model_key(model)
    keys = [hashlib.blake2b(text.encode(), digest_size=16, key=made_by).digest() for text in texts]
    known: dict[bytes, np.ndarray] = {}                              # (d) each
    with contextlib.suppress(Exception):                             # no file yet, a torn one, or another's
        table = np.load(path)
        known.update(zip(table["key"].tolist(), table["vector"], strict=True))
    new = {key: text for key, text in zip(keys, texts, strict=True) if key not in known}
    if new:
        x = model.encode(list(new.values()), progress="passages")    # (new, d)
        say_lost(model, "passages")
        known.update(zip(new, x, strict=True))
    vectors = np.stack([known[key] for key in keys])                 # (len(texts), d)
    if new:
        table = np.empty(len(keys), [("key", "V16"), ("vector", np.float32, vectors.shape[1])])
        table["key"] = keys
        table["vector"] = vectors
        try:                                                         # else the next search takes as long as this
            with file_beside(path) as file:
                np.save(file, table)
        except OSError as error:
            say(vectors=f"not kept ({first_line(error)})")
    return vectors


def rows_to_encode(path: str, passages: bool) -> Iterator[tuple[str, str]]:
    """Title and text of each row of passages, or a query without a title."""
    for where, row in read_jsonl(path):
        text = row.get("query") or row.get("text")
        if passages:
            yield passage_texts(where, row)
        elif is_text(text):
            yield "", text
        else:
            raise InputError(f'{where}: no "query" or "text"; every row needs one')


def write_npy(path: str, model: Any, texts: Sequence[str], dim: int | None, precision: str) -> None:
    """Encode texts into a .npy file, a row each; the vector of an empty one is 0."""
    filled = [i for i, text in enumerate(texts) if text]
    x = model.encode([texts[i] for i in filled], dim, precision, progress="texts")
    rows = np.zeros((len(texts), x.shape[1]), np.float32)            # (texts, dim)
    rows[filled] = x
    with file_beside(path) as new, open(new, "wb") as file:
        np.save(file, rows)
    if len(filled) < len(texts):
        say(empty=f"{len(texts) - len(filled)} passages have neither title nor text; their vectors are 0")
    print(f"wrote {path}: float32 {rows.shape}; {model.lost() or 'no text was cut'}")


def model_key(model: Any) -> bytes:
    """Of all that a vector depends on beside its text; about a second for a gigabyte of weights."""
    # subtle: else the length that the last call cut its texts at would be in the key
    model.tokenizer.no_truncation()
    model.tokenizer.no_padding()
    settings = model.encoder.config, model.max_length, model.tokenizer.to_str()
    key = hashlib.blake2b(repr(settings).encode())
    for weights in model.encoder.state_dict().values():
        key.update(weights.cpu().numpy().data)
    return key.digest()
