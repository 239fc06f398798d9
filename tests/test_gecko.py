"""gecko.py: eq. 1, formats, encoding, exact top-k, checkpoints.   pytest tests/test_gecko.py

Invariants: padding never enters a mean, task tokens do; a cut embedding has length 1 again;
top-k equals a full stable sort whatever the blocks; a saved model gives the same vectors.
"""

import json
import math

import numpy as np
import pytest
import torch
from teach import check, graded_seed
from toys import outcome

import gecko
from engine import files

TEXTS = ["round a number up", "delete a file", "sort a list in place and return None", "x"] * 4


@pytest.fixture(scope="module")
def layered():
    """A model with one transformer layer that is not the identity."""
    model = gecko.tiny(TEXTS, num_hidden_layers=1, hidden_size=24, intermediate_size=48,
                       layer_norm_eps=1e-12)
    for p in model.encoder.parameters():
        torch.nn.init.normal_(p, 0, 0.3)
    return model


@pytest.fixture(scope="module")
def bag():
    return gecko.tiny(TEXTS, hidden_size=24)


def mean_pool_spec(W, mask):
    """Eq. 1 in loops: the mean over the real tokens."""
    B, T, d = W.shape
    out = []
    for b in range(B):
        real = [t for t in range(T) if mask[b][t]]
        out.append([sum(float(W[b, t, i].detach()) for t in real) / len(real) for i in range(d)])
    return torch.tensor(out)


@pytest.mark.ex1
def test_eq1_mean_pool_equals_loops():
    """Value and gradient are those of a plain mean over real tokens."""
    generator = torch.Generator().manual_seed(graded_seed(101))
    W = torch.randn(3, 5, 4, generator=generator).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    pooled, later = gecko.mean_pool(W, mask), mask.clone()
    later[:, 0] = 0
    check(pooled, mean_pool_spec(W, mask), {
        "padding is in the mean; only tokens with mask 1 count": W.mean(1),
        "the sum is divided by T, the longest text; divide by the text's own n": mean_pool_spec(W, mask)
        * mask.sum(1, keepdim=True) / 5,
        "this is the first token alone; eq. 1 is the mean of all real ones": W[:, 0],
        "the first token is left out; the task's tokens are in the mean too": mean_pool_spec(W, later),
        "this is the last token alone; eq. 1 is the mean of all real ones": W[range(3), mask.sum(1) - 1],
        "the sum is not divided by n": mean_pool_spec(W, mask) * mask.sum(1, keepdim=True),
        "divided by n + 1": mean_pool_spec(W, mask) * (mask.sum(1) / (mask.sum(1) + 1))[:, None],
        "this is the largest value, not the mean": W.masked_fill(mask[..., None] == 0, -9e9).max(1).values})
    pooled.sum().backward()
    assert W.grad is not None and torch.allclose(W.grad[2, :2], torch.full((2, 4), 0.5))
    assert not W.grad[1, 3:].any(), "padding received a gradient"


def test_the_pages_mean_equals_loops_to_the_last_digits():
    """What is graded lets rounding pass; the page's own mean has float32's."""
    W = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    assert torch.allclose(gecko.mean_pool(W, mask), mean_pool_spec(W, mask), rtol=1e-5, atol=1e-7)


@pytest.mark.ex1
def test_eq1_padding_changes_nothing(layered):
    """A text's vector is the same alone and beside a longer one."""
    tokens = layered.tokens(TEXTS[:3])
    together = layered.embed(tokens)
    for i, ids in enumerate(tokens):
        torch.testing.assert_close(layered.embed([ids])[0], together[i], check_dtype=False, atol=1e-5, rtol=1e-4)


@pytest.mark.ex1
def test_eq1_task_tokens_are_in_the_mean(layered):
    """Another task before the same query is another vector; a passage's has no task."""
    a, b = (layered.embed(layered.tokens([gecko.format_query("sort a list", task)]))[0]
            for task in ("fact checking", "search result"))
    assert (a - b).abs().max() > 1e-3
    ids = layered.tokens([gecko.format_query("sort a list", "search result")])
    W = layered.encoder(*gecko.pad(ids, 0))
    torch.testing.assert_close(layered.embed(ids)[0], W[0].mean(0), check_dtype=False, atol=1e-5, rtol=1e-4)


def test_bag_equals_the_plain_encoder(bag):
    """The table lookup for a bag of words has the values and gradients of eq. 1 through W."""
    tokens = bag.tokens(TEXTS[:4])
    assert gecko.is_bag(bag.encoder)
    fast, plain = gecko.embed_bag(bag.encoder, tokens), gecko.embed(bag.encoder, *gecko.pad(tokens, 0))
    torch.testing.assert_close(fast, plain)
    weight = bag.encoder.embeddings["word_embeddings"].weight
    grads = [torch.autograd.grad((x ** 2).sum(), weight, retain_graph=True)[0] for x in (fast, plain)]
    torch.testing.assert_close(*grads)
    assert grads[0].abs().max() > 0
    with torch.no_grad():
        bag.encoder.embeddings["position_embeddings"].weight[1] += 1
        assert not gecko.is_bag(bag.encoder), "positions that count make it no bag of words"
        bag.encoder.embeddings["position_embeddings"].weight.zero_()


def test_cosine_ignores_length():
    """cos(ax, by) = cos(x, y) for a, b > 0, and equals the loop."""
    x, y = torch.randn(3, 6), torch.randn(4, 6)
    s = gecko.cosine(x, y)
    torch.testing.assert_close(gecko.cosine(3 * x, 0.1 * y), s)
    for i in range(3):
        for j in range(4):
            dot = sum(float(a * b) for a, b in zip(x[i], y[j], strict=True))
            assert math.isclose(dot / float(x[i].norm() * y[j].norm()), float(s[i, j]), abs_tol=1e-5)


def test_cut_is_normalised_again(bag):
    """The first dimensions alone have length 1; without the second normalisation they do not."""
    full, cut = bag.encode(TEXTS[:3]), bag.encode(TEXTS[:3], dim=8)
    np.testing.assert_allclose(np.linalg.norm(cut, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(cut, full[:, :8] / np.linalg.norm(full[:, :8], axis=1, keepdims=True), atol=1e-6)
    assert np.abs(np.linalg.norm(full[:, :8], axis=1) - 1).min() > 0.01


def test_formats_are_appendix_b():
    """Braces inside a text stay text, and an untitled passage says so."""
    assert gecko.format_query("a {task} b", "t") == "task: t | query: a {task} b"
    assert gecko.format_passage("text", "") == "title: none | text: text"
    assert gecko.format_passage("text", " ") == gecko.format_passage("text", "")
    assert gecko.format_passage("{title}", "T") == "title: T | text: {title}"
    assert gecko.format_passage("text", "", gecko.PLAIN) == "text"
    assert gecko.format_query("q", "any task", gecko.PLAIN) == "q"


def test_encode_keeps_the_order_and_reports_cuts(layered, monkeypatch):
    """Batches by length change neither order nor values; long texts are cut and counted."""
    a = layered.encode(TEXTS)
    monkeypatch.setitem(gecko.BATCH_TOKENS, "cpu", 8)
    b = layered.encode(TEXTS)
    np.testing.assert_allclose(a, b, atol=1e-5)
    assert layered.truncated == 0
    layered.encode(["a " * 10_000])
    assert layered.truncated == 1


def test_tokenizer_splits_names_and_repeats():
    """CamelCase and snake_case fall into words; training twice gives the same vocabulary."""
    texts = ["DictReader reads a dict", "a dict reader", "a tree, the tree and rm"] * 3 + ["rmtree"]
    a, b = gecko.train_tokenizer(texts, 200), gecko.train_tokenizer(texts, 200)
    assert a.to_str() == b.to_str()
    assert a.encode("DictReader").tokens == a.encode("dict reader").tokens
    assert "tree" in a.encode("rmtree").tokens


@pytest.mark.parametrize("which", ["bag", "layered"])
def test_save_and_load_give_the_same_vectors(which, request, tmp_path):
    model = request.getfixturevalue(which)
    gecko.save(model, tmp_path / "m")
    gecko.save(model, tmp_path / "m")  # over an older one
    again = gecko.load(tmp_path / "m")
    np.testing.assert_allclose(again.encode_queries(TEXTS), model.encode_queries(TEXTS), atol=1e-6)
    assert again.formats == model.formats and again.max_length == model.max_length
    assert [p.name for p in tmp_path.iterdir()] == ["m"], "a temporary folder was left behind"


@pytest.mark.parametrize("name, content, message", [
    ("model.safetensors", b"\x08\0\0\0\0\0\0\0{}nonsens", "not a readable checkpoint"),
    ("model.safetensors", None, "no model.safetensors"),
    ("config.json", b"{", "config.json: not readable"),
    ("config.json", b'{"model_type": "t5"}', "'t5' is not supported"),
    ("tokenizer.json", b"[]", "not a readable checkpoint"),
])
def test_wrong_model_folder_is_one_line(bag, tmp_path, name, content, message):
    gecko.save(bag, tmp_path / "m")
    (tmp_path / "m" / name).unlink()
    if content is not None:
        (tmp_path / "m" / name).write_bytes(content)
    with pytest.raises(files.InputError, match=message):
        gecko.load(tmp_path / "m")


def test_load_refuses_weights_of_another_shape(bag, layered, tmp_path):
    gecko.save(bag, tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps({**config, "vocab_size": 4000}))
    with pytest.raises(files.InputError, match="not a readable checkpoint"):
        gecko.load(tmp_path / "m")


def test_sentence_of_no_tokens_is_refused(bag):
    with pytest.raises(files.InputError, match="no tokens"):
        bag.encode(["  "])


# --------------------------------------------------------------------------------------------------
# Nothing silent


def test_tiny_loses_no_letter():
    """Letters beyond the alphabet become their bytes: other texts have other tokens, and none is unknown."""
    letters = [chr(i) for i in range(0x4E00, 0x4E00 + 1500)]
    model = gecko.tiny(["".join(letters[i:i + 10]) for i in range(0, 1500, 10)] + TEXTS, hidden_size=12)
    tokens = model.tokens([*letters, "Привет", "নমস্কার", "👋", "\x07"])
    assert len(set(map(tuple, tokens))) == len(tokens) and model.unknown == 0
    x = gecko.tiny(TEXTS, hidden_size=64).encode(["北京在哪里", "数学很难", "今天下雨"])
    assert (x @ x.T)[np.triu_indices(3, 1)].max() < 0.9


@pytest.mark.parametrize("call", [
    lambda m: m.encode("ceiling"), lambda m: m.encode_queries("ceiling"), lambda m: m.encode_passages("ceiling"),
    lambda m: m.encode_passages(["ceiling"], "T"), lambda m: m.tokens("ceiling")])
def test_one_text_is_no_list(bag, call):
    with pytest.raises(TypeError, match="give a list of texts, such as"):
        call(bag)


@pytest.mark.parametrize("number", [np.nan, np.inf, 0.0])
def test_a_vector_that_is_no_number_is_refused(number, bag):
    """With the text's name; 0 has no direction."""
    weight = bag.encoder.embeddings["LayerNorm"].weight.data
    good = weight.clone()
    try:
        weight *= number
        with pytest.raises(files.InputError, match="2 of 2 texts have no finite vector, the first: 'round"):
            bag.encode(TEXTS[:2])
    finally:
        weight.copy_(good)


@pytest.fixture
def saved(bag, tmp_path):
    gecko.save(bag, tmp_path / "m")
    return tmp_path / "m"


def test_the_commands_say_what_was_cut(saved, tmp_path, capsys):
    """search and encode, of texts that are too long; an empty passage keeps its row, and is never printed."""
    files.write_jsonl(tmp_path / "corpus.jsonl", [
        {"_id": "1", "title": "a", "text": "number " * 900}, {"_id": "2", "title": "", "text": ""},
        {"_id": "3", "title": "delete a file", "text": ""}])
    code, out, err = outcome(capsys, gecko.main, "search", "round " * 500, "--model", saved)
    assert code == 0 and "query=1 of 1 texts were cut at 256 tokens" in err
    assert "passages=1 of 2 texts were cut at 256 tokens" in err
    assert "1 of 3 passages have neither title nor text" in err and len(out.splitlines()) == 2
    code, out, err = outcome(capsys, gecko.main, "encode", tmp_path / "corpus.jsonl", tmp_path / "x.npy",
                             "--passages", "--model", saved)
    assert code == 0 and "(3, 24); 1 of 2 texts were cut at 256 tokens" in out
    assert "empty=1 passages have neither title nor text; their vectors are 0" in err
    np.testing.assert_allclose(np.linalg.norm(np.load(tmp_path / "x.npy"), axis=1), [1, 0, 1], atol=1e-6)


def test_search_encodes_a_corpus_once_and_reads_documents(saved, tmp_path, capsys):
    """The second search prints the same without a bar; a folder of documents is a corpus too; --dim cuts both."""
    (tmp_path / "docs").mkdir()
    for name, text in (("remove.md", "# Files\ndelete a file"), ("order.txt", "sort a list in place")):
        (tmp_path / "docs" / name).write_text(text)
    words = ("search", "delete a file", "--model", saved, "--corpus", tmp_path / "docs")
    first, second = (outcome(capsys, gecko.main, *words) for _ in range(2))
    assert first[0] == second[0] == 0 and first[1] == second[1]
    assert first[1].splitlines()[0].endswith("Files  delete a file")
    assert "passages: 100%" in first[2] and "passages: " not in second[2]
    score, title, _ = outcome(capsys, gecko.main, *words, "--dim", "4", "-k", "1")[1].split("  ")
    model = gecko.load(saved)
    q = model.encode_queries(["delete a file"], dim=4)
    p = model.encode_passages(["delete a file"], ["Files"], dim=4)
    assert title == "Files" and abs(float(score) - float(q[0] @ p[0])) < 1e-3


def test_a_damaged_model_writes_no_vectors(saved, tmp_path, capsys):
    model = gecko.load(saved)
    model.encoder.embeddings["word_embeddings"].weight.data[5:] = np.nan
    gecko.save(model, saved)
    files.write_jsonl(tmp_path / "in.jsonl", [{"text": "delete a file"}])
    words = ("encode", tmp_path / "in.jsonl", tmp_path / "x.npy", "--model", saved)
    code, _, err = outcome(capsys, gecko.main, *words)
    assert code == 2 and "texts have no finite vector, the first: 'task: question answering" in err
    assert not (tmp_path / "x.npy").exists()


def test_encode_writes_whole_or_not_at_all(saved, tmp_path, capsys):
    """Queries and passages, in the input's order; a row without text leaves the older output as it was."""
    rows = [{"query": t, "text": "other"} for t in TEXTS]
    files.write_jsonl(tmp_path / "in.jsonl", rows)
    words = ("encode", tmp_path / "in.jsonl", tmp_path / "x.npy", "--model", saved, "--dim", "8")
    code, out, _ = outcome(capsys, gecko.main, *words)
    assert code == 0 and out.endswith("float32 (16, 8); no text was cut\n")
    x = np.load(tmp_path / "x.npy")
    np.testing.assert_array_equal(x, gecko.load(saved).encode_queries(TEXTS, dim=8))
    files.write_jsonl(tmp_path / "in.jsonl", [*rows, {"query": " "}])
    code, _, err = outcome(capsys, gecko.main, *words)
    assert code == 2 and 'in.jsonl:17: no "query" or "text"' in err
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), x)
    assert {p.name for p in tmp_path.iterdir()} == {"in.jsonl", "m", "x.npy"}
