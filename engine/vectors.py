"""The vectors of a corpus, kept on disk: a text is encoded once, and again only by another model.

The file holds a key and a vector of each text, and in its header the key of the model. One of another model,
or one that is torn, counts for nothing and is written anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from engine.files import InputError, file_beside, first_line, is_text, passage_texts, read_jsonl, say, say_lost


def kept_vectors(model: Any, folder: Path, corpus: Path, texts: Sequence[str]) -> np.ndarray:
    """(len(texts), d), in their order; beside the model's folder stand those of the last call."""
    folder = folder.resolve()
    path = folder.with_name(f"{folder.name}.vectors") / f"{corpus.resolve().name}.safetensors"
    made_by = model_key(model)
    keys = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts]
    known, vectors = read_vectors(path, made_by)
    rows = {key: row for row, key in enumerate(known)}
    new = {key: text for key, text in zip(keys, texts, strict=True) if key not in rows}
    if not new:
        return vectors[[rows[key] for key in keys]]                  # (len(texts), d)
    x = model.encode(list(new.values()), progress="passages")        # (new, d)
    say_lost(model, "passages")
    for row, key in enumerate(new, len(known)):
        rows[key] = row
    vectors = np.concatenate([vectors.reshape(-1, x.shape[1]), x])   # (known + new, d)
    vectors = vectors[[rows[key] for key in keys]]                   # (len(texts), d)
    write_vectors(path, made_by, keys, vectors)
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
    empty = len(texts) - len(filled)
    if empty:
        say(empty=f"{empty} passages have neither title nor text; their vectors are 0")
    print(f"wrote {path}: float32 {rows.shape}; {model.lost() or 'no text was cut'}")


def model_key(model: Any) -> str:
    """Of all that a vector depends on beside its text; about a second for a gigabyte of weights."""
    # subtle: else the length that the last call cut its texts at would be in the key
    model.tokenizer.no_truncation()
    model.tokenizer.no_padding()
    settings = model.encoder.config, model.max_length, model.tokenizer.to_str()
    key = hashlib.blake2b(repr(settings).encode())
    for weights in model.encoder.state_dict().values():
        key.update(weights.cpu().numpy().data)
    return key.hexdigest()


def read_vectors(path: Path, made_by: str) -> tuple[list[bytes], np.ndarray]:
    """The keys of texts, and their vectors; of none where the file is not this model's."""
    try:
        with safe_open(path, "numpy") as file:
            if file.metadata() == {"model": made_by}:
                return [key.tobytes() for key in file.get_tensor("keys")], file.get_tensor("vectors")
    except (OSError, SafetensorError):                               # none yet, or torn
        pass
    return [], np.empty((0, 0), np.float32)


def write_vectors(path: Path, made_by: str, keys: Sequence[bytes], vectors: np.ndarray) -> None:
    """Whole or not at all; where nothing can be written, the next search only takes as long as this one."""
    numbers = np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), -1)
    try:
        with file_beside(path) as new:
            save_file({"keys": numbers, "vectors": vectors}, new, {"model": made_by})
    except (OSError, SafetensorError) as error:
        say(vectors=f"not kept ({first_line(error)})")
