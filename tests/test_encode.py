"""Encoding many texts: the packed path, blocks, the command that can be stopped.   pytest tests/test_encode.py

Invariants: packed without padding gives the vectors of the plain encoder; blocks and bfloat16 change
nothing but the last digits; a command that is killed goes on where it was, and ends with the same bytes.
"""

import functools
import json
import os
import signal
import time

import numpy as np
import pytest
import torch
from processes import Command

import gecko
from engine import files, packed

TEXTS = [" ".join(f"word{(i * j) % 17}" for j in range(1 + i * 7 % 23)) for i in range(120)]


@pytest.fixture(scope="module")
def model():
    """Two transformer layers that are not the identity."""
    model = gecko.tiny(TEXTS, num_hidden_layers=2, hidden_size=48, num_attention_heads=3,
                       intermediate_size=96, layer_norm_eps=1e-12)
    generator = torch.Generator().manual_seed(0)
    for p in model.encoder.parameters():
        torch.nn.init.normal_(p, 0, 0.2, generator=generator)
    model.encoder.eval()
    return model


def plainly(model):
    """One text at a time: nothing is padded, nothing packed."""
    with torch.no_grad():
        return torch.cat([gecko.truncate_dim(gecko.embed(model.encoder, *gecko.pad([ids], 0)))
                          for ids in model.tokens(TEXTS)]).numpy()


@pytest.mark.parametrize("batch_tokens", [1, 64, 4096])
def test_packed_gives_the_plain_vectors(model, batch_tokens, monkeypatch):
    """In float32 within 1e-5; with one layer's bias changed they differ, so the comparison can fail."""
    monkeypatch.setattr(gecko, "TEXTS_AHEAD", 50)
    want = plainly(model)
    pack = packed.packed(model.encoder, torch.float32)
    tokens = model.tokens(TEXTS)
    for batch in packed.length_batches([len(t) for t in tokens], batch_tokens):
        with torch.no_grad():
            x = gecko.truncate_dim(pack([tokens[i] for i in batch])).numpy()
        np.testing.assert_allclose(x, want[batch], atol=1e-5)
    with torch.no_grad():
        model.encoder.encoder["layer"][1].attention["self"]["key"].weight += 0.1
        changed = gecko.truncate_dim(packed.packed(model.encoder, torch.float32)(tokens)).numpy()
        model.encoder.encoder["layer"][1].attention["self"]["key"].weight -= 0.1
    assert np.abs(changed - want).max() > 1e-4


@pytest.mark.parametrize("precision, atol", [("float32", 1e-5), ("bf16", 0.05)])
def test_blocks_and_precision_keep_the_vectors(model, precision, atol, monkeypatch):
    """A stream of texts in blocks: float32 unit vectors in order; bfloat16 is near and not the same."""
    want = plainly(model)
    monkeypatch.setattr(gecko, "TEXTS_AHEAD", 50)
    blocks = list(gecko.encode_blocks(model, iter(TEXTS), precision=precision))
    assert [len(x) for x in blocks] == [50, 50, 20]
    x = np.concatenate(blocks)
    assert x.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(x, want, atol=atol)
    assert (x == model.encode(TEXTS, precision=precision)).all()
    assert precision == "float32" or np.abs(x - want).max() > 1e-5


def test_texts_cut_are_counted_over_the_blocks(model, monkeypatch):
    monkeypatch.setattr(gecko, "TEXTS_AHEAD", 50)
    model.encode([*TEXTS, "word1 " * 1000, *TEXTS, "word1 " * 1000])
    assert model.cut == 2
    so_far = [model.cut for _ in gecko.encode_blocks(model, ["word1 " * 1000, *TEXTS, "word1 " * 1000])]
    assert so_far == [1, 1, 2]                                       # while the next block's are counted ahead


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_block_is_the_same_bytes_whatever_went_before(model, precision, monkeypatch):
    """A short one, as the last often is, after one that is long enough to be packed."""
    monkeypatch.setattr(gecko, "TEXTS_AHEAD", 50)
    blocks = list(gecko.encode_blocks(model, ["word1 " * 200] * 50 + TEXTS[:50], precision=precision))
    assert (blocks[1] == model.encode(TEXTS[:50], precision=precision)).all()


def test_precision_and_training_mode(model):
    """A wrong name is refused; the encoder goes back to training, also after an error."""
    with pytest.raises(files.InputError, match="--precision fp8"):
        model.encode(TEXTS, precision="fp8")
    model.encoder.train()
    with pytest.raises(files.InputError, match="no tokens"):
        model.encode([*TEXTS, " "])
    assert model.encoder.training
    model.encoder.eval()


@pytest.fixture(scope="module")
def encoded(model, tmp_path_factory):
    """The model's folder, 120 rows to encode, and their bytes from a run that nobody stopped."""
    folder = tmp_path_factory.mktemp("encode")
    gecko.save(model, folder / "model")
    files.write_jsonl(folder / "in.jsonl", [{"title": f"t{i % 3}", "text": t} for i, t in enumerate(TEXTS)])
    assert run(folder, "whole.npy").result()[0] == 0
    return folder


def run(folder, name, pause=0.0, stop=None, **environment):
    return Command(gecko.main, "encode", folder / "in.jsonl", folder / name, "--passages", "--model",
                   folder / "model", before=functools.partial(in_blocks, pause, stop), **environment)


def in_blocks(pause, stop):
    """In the command's process: blocks of 8 texts, a pause after each, and `stop` at the third one's write."""
    blocks, sync, left = gecko.encode_blocks, os.fsync, [2]

    def slowly(*a, **k):
        for x in blocks(*a, **k):
            yield x
            time.sleep(pause)

    def fsync(n):
        left[0] -= 1
        if stop and left[0] < 0:
            raise stop
        sync(n)

    gecko.TEXTS_AHEAD, gecko.encode_blocks, os.fsync = 8, slowly, fsync


def test_killed_command_goes_on_and_ends_with_the_same_bytes(encoded):
    killed = run(encoded, "killed.npy", 0.3)
    while len(done := list(encoded.glob(".killed.npy.*.json"))) < 1 or json.loads(done[0].read_text())["done"] < 24:
        assert killed.process.is_alive()
        time.sleep(0.02)
    killed.process.kill()
    assert killed.result()[0] == -signal.SIGKILL and not (encoded / "killed.npy").exists()
    code, out, err = run(encoded, "killed.npy").result()
    assert code == 0 and "wrote" in out
    at = int(err.split("resumed_at=")[1].split()[0])
    assert 24 <= at < 120
    assert (encoded / "killed.npy").read_bytes() == (encoded / "whole.npy").read_bytes()
    assert not list(encoded.glob(".*.npy.*")), "a part or a state was left behind"


@pytest.mark.parametrize("stop, code, said", [
    (OSError(28, "No space left on device"), 2,
     "error: [Errno 28] No space left on device; free some space, then run the same command again"),
    (KeyboardInterrupt(), 1, "interrupted; run the same command again")], ids=["full", "ctrl-c"])
def test_stopped_after_a_block_it_keeps_that_and_says_so_in_a_line(encoded, stop, code, said):
    """At the third block's write. Only the part and its state stand there, and the next run goes on at them."""
    name = f"stopped{code}.npy"
    ended, _, err = run(encoded, name, stop=stop).result()
    assert ended == code and err.splitlines()[-1] == said and "Traceback" not in err
    assert sorted(p.suffix for p in encoded.iterdir() if name in p.name) == [".json", ".part"]
    assert "resumed_at=16\n" in run(encoded, name).result()[2]
    assert (encoded / name).read_bytes() == (encoded / "whole.npy").read_bytes()
    assert [p.name for p in encoded.iterdir() if name in p.name] == [name]


def test_command_counts_the_texts_cut_also_over_a_stop(encoded):
    """Three, one of them before the stop."""
    texts = [*TEXTS, *["word1 " * 1000] * 2]
    texts[3] = texts[-1]
    files.write_jsonl(encoded / "long.jsonl", [{"text": t} for t in texts])
    long = [encoded / "long.jsonl", encoded / "long.npy", "--model", encoded / "model"]
    Command(gecko.main, "encode", *long, before=functools.partial(in_blocks, 0, KeyboardInterrupt())).result()
    out = Command(gecko.main, "encode", *long, before=functools.partial(in_blocks, 0, None)).result()[1]
    assert "; 3 texts were cut at " in out


def test_two_processes_write_one_file(encoded):
    """As torchrun starts them; the vectors are those of one process."""
    both = [run(encoded, "two.npy", RANK=str(r), WORLD_SIZE="2") for r in (0, 1)]
    results = [command.result() for command in both]
    assert [code for code, *_ in results] == [0, 0], results
    assert any("wrote" in out for _, out, _ in results)
    np.testing.assert_allclose(np.load(encoded / "two.npy"), np.load(encoded / "whole.npy"), atol=1e-6)
    assert not list(encoded.glob(".*.npy.*"))


def test_more_processes_than_rows(encoded):
    """One that has no rows and comes last leaves nothing."""
    files.write_jsonl(encoded / "one.jsonl", [{"text": "word1"}])
    for rank in (1, 0):                                              # the row is rank 1's
        assert Command(gecko.main, "encode", encoded / "one.jsonl", encoded / "one.npy",
                       "--model", encoded / "model",
                       RANK=str(rank), WORLD_SIZE="2").result()[0] == 0
        assert (encoded / "one.npy").exists() and not list(encoded.glob(".one.npy*"))


def test_another_input_does_not_resume(encoded):
    """What a stopped run left is not mixed with another text's vectors."""
    key = {p: p.stat().st_mtime_ns for p in encoded.glob("*.jsonl")}
    stopped = run(encoded, "other.npy", 5)
    while not list(encoded.glob(".other.npy.*.json")):
        assert stopped.process.is_alive()
        time.sleep(0.02)
    stopped.process.kill()
    stopped.process.join()
    rows = (encoded / "in.jsonl").read_text()
    try:
        (encoded / "in.jsonl").write_text(rows.replace("word1", "word2"))
        assert "resumed_at=0\n" in run(encoded, "other.npy").result()[2]
    finally:
        (encoded / "in.jsonl").write_text(rows)
        for path, at in key.items():
            os.utime(path, ns=(at, at))
    assert (encoded / "other.npy").read_bytes() != (encoded / "whole.npy").read_bytes()
