"""A real llama-server and a model small enough to compute by hand: the scores are the model's own.

    python -m pytest tests/test_llama_server.py
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import llm
from llm import CallFailed, Endpoint, ql_prompt, rc_prompt

pytest.importorskip("xllamacpp", reason="no llama-server: pip install xllamacpp")
pytest.importorskip("gguf", reason="no way to write the model: pip install gguf")

import tiny_llama  # noqa: E402
from tiny_llama import BOOK, TEA  # noqa: E402

QUERIES = [*tiny_llama.QUERIES.values(), "<s> is not a token here"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The URL of a llama-server of its own process."""
    model = tmp_path_factory.mktemp("model") / "tiny.gguf"
    tiny_llama.write_gguf(model)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # what the server says of itself goes to stderr
    command = [sys.executable, str(Path(tiny_llama.__file__)), "serve", str(model), str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                               env=os.environ | {"PYTHONPATH": ""})
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("listening"):
                break
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def tok():
    return tiny_llama.tokenizer()


def test_probe_refuses_echo_and_finds_forced_decoding(server):
    e = Endpoint(server)
    llm.probe(e)
    assert e.can["generate"][0] and e.can["ql"][0] == e.can["rc"][0] == ("forced", {})
    with pytest.raises(CallFailed, match="200 but did not score the prompt: 1 log-probs"):
        Endpoint(server).echo([ql_prompt("what is tea", TEA)])


@pytest.mark.parametrize("query", QUERIES)
def test_ql_is_what_the_weights_give(server, tok, query):
    """log p(query | passage) of the server and of the equations in numpy: within 0.2%."""
    got = Endpoint(server).query_likelihood([(query, TEA), (query, BOOK)])
    each = [tiny_llama.reference(tok, *ql_prompt(query, p)) for p in (TEA, BOOK)]
    want = [sum(values) for values in each]
    assert got == pytest.approx(want, rel=0.002)
    # negative controls: the tolerance tells a token too few, at either end
    assert got[0] != pytest.approx(sum(each[0][1:]), rel=0.002)
    assert got[0] != pytest.approx(sum(each[0][:-1]), rel=0.002)


def test_rc_is_what_the_weights_give(server, tok):
    """log p(label | query, passage), and the expected grade of the three labels."""
    pairs = [("what is tea", TEA), ("what is tea", BOOK)]
    rows = [[sum(tiny_llama.reference(tok, rc_prompt(q, p), label)) for label in llm.LABELS]
            for q, p in pairs]
    assert Endpoint(server).relevance(pairs) == pytest.approx([row[0] for row in rows], rel=0.002)
    expected = Endpoint(server, score="expected").relevance(pairs)
    assert expected == pytest.approx([llm.graded(row) for row in rows], abs=0.02)


@pytest.mark.parametrize("way", [llm.TOPS[0], *llm.TOPS[-2:]])
def test_top_tokens_are_the_models(server, tok, way):
    """The first token's log-probs that RC falls back to, from chat and from completions."""
    e, prompt = Endpoint(server, "tiny"), rc_prompt("what is tea", TEA)
    top = e.server.call(*e.top(way, prompt), llm.top_tokens)
    row = tiny_llama.log_probs([1, *tok.encode(prompt).ids], tok.get_vocab_size())[-1]
    assert len(top) == way[1].get("logprobs", 20)
    assert [v for _, v in top] == pytest.approx(sorted(row, reverse=True)[:len(top)], abs=0.05)


def test_generation_is_seeded_text(server):
    """The answers are text, the same for the same seed; a passage drawn again is drawn anew."""
    e, again = Endpoint(server), Endpoint(server)
    prompt = llm.fill(llm.P_QG, passage=llm.as_text(TEA))
    one, two, other = (x.server.call(*x.generation(("completions", {}), prompt, seed),
                                     lambda answer: answer["choices"][0]["text"])
                       for x, seed in ((e, 1), (again, 1), (e, 2)))
    assert one == two != other and isinstance(one, str)
    assert len(e.generate([TEA, BOOK])) == 2
