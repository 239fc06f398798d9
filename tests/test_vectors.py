"""engine/vectors.py: the vectors of a corpus, kept.   pytest tests/test_vectors.py

Invariants: kept vectors are those that encoding gives; only new texts are encoded; no other model's vectors
are ever taken, and a torn file is none.
"""

import io

import numpy as np
import pytest
import torch
from toys import small_model

from engine.vectors import kept_vectors, model_key

TEXTS = ["red stone", "blue river and cloud", "salt", "red stone"]


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Kept vectors of texts, and the texts that were encoded for them."""
    def call(model, texts):
        encoded = []
        encode = model.encode
        monkeypatch.setattr(model, "encode", lambda new, **how: (encoded.extend(new), encode(new, **how))[1])
        x = kept_vectors(model, tmp_path / "m", tmp_path / "docs.jsonl", texts)
        monkeypatch.undo()
        np.testing.assert_allclose(x, encode(texts), atol=1e-6)
        return encoded
    return call


def test_a_text_is_encoded_once(kept, tmp_path):
    """Others may come, go and stand elsewhere; an equal text is one."""
    model = small_model()
    assert kept(model, TEXTS) == TEXTS[:3]
    assert kept(model, TEXTS) == []
    assert kept(model, [TEXTS[2], "wind", TEXTS[0]]) == ["wind"]
    assert kept(model, ["wind", *TEXTS]) == [TEXTS[1]], "the file holds the last corpus, not all that ever were"
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.*") if p.is_file()] == [
        "m.vectors/docs.jsonl.npy"]
    (tmp_path / "other").touch()
    assert (tmp_path / "m.vectors/docs.jsonl.npy").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_another_model_has_other_vectors(kept):
    """Weights, length and words each make another; what a call leaves behind in the tokenizer does not."""
    model = small_model(seed=1)
    key = model_key(model)
    kept(model, TEXTS)
    assert model_key(model) == key and kept(small_model(seed=1), TEXTS) == []
    assert len(kept(small_model(seed=2), TEXTS)) == 3 and len(kept(model, TEXTS)) == 3
    with torch.no_grad():
        next(model.encoder.parameters())[5, 3] += 1e-3
    assert len(kept(model, TEXTS)) == 3
    model.max_length = 2
    assert len(kept(model, TEXTS)) == 3
    key = model_key(model)
    model.tokenizer.add_tokens(["river"])
    assert model_key(model) != key


def archive(_):
    """As numpy writes several tables."""
    file = io.BytesIO()
    np.savez(file, np.ones(3))
    return file.getvalue()


@pytest.mark.parametrize("damage", [lambda b: b[:-7], lambda b: b[:5], lambda b: b"", lambda b: b"x" * len(b),
                                    lambda b: b.replace(b"}", b"("), lambda b: archive(b)[:-9], archive])
def test_a_torn_or_foreign_file_is_made_anew(kept, tmp_path, damage):
    model = small_model()
    kept(model, TEXTS)
    path = tmp_path / "m.vectors/docs.jsonl.npy"
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert len(kept(model, TEXTS)) == 3 and path.read_bytes() == whole


def test_where_nothing_can_be_written_a_search_goes_on(kept, tmp_path, capsys):
    (tmp_path / "m.vectors").write_text("a file, where the folder would be")
    assert len(kept(small_model(), TEXTS)) == 3
    assert "vectors=not kept (" in capsys.readouterr().err
