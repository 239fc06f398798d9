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
from fake_server import ql_prompt, rc_prompt

import llm
from engine.endpoint import MODES, Endpoint
from engine.transport import CallFailed

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


def endpoint(url, model=""):
    return Endpoint(url, model, llm.TRIALS)


def test_probe_refuses_echo_and_finds_forced_decoding(server):
    e = endpoint(server)
    assert e.can("complete") and e.require("log_likelihood") == ("forced", {})
    with pytest.raises(CallFailed, match="200 but did not score the prompt: 1 log-probs"):
        endpoint(server).echo(*ql_prompt("what is tea", TEA))


@pytest.mark.parametrize("query", QUERIES)
def test_ql_is_what_the_weights_give(server, tok, query):
    """log p(query | passage) of the server and of the equations in numpy: within 0.2%."""
    got = llm.LanguageModel(endpoint(server)).query_likelihood([(query, TEA), (query, BOOK)])
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
    got = llm.LanguageModel(endpoint(server)).relevance(pairs)
    assert got == pytest.approx([row[0] for row in rows], rel=0.002)
    expected = llm.LanguageModel(endpoint(server), "expected").relevance(pairs)
    assert expected == pytest.approx([llm.expected_relevance(row) for row in rows], abs=0.02)


@pytest.mark.parametrize("mode", [MODES["top_tokens"][0], *MODES["top_tokens"][-2:]])
def test_top_tokens_are_the_models(server, tok, mode):
    """The first token's log-probs that RC falls back to, from chat and from completions."""
    e, prompt = endpoint(server, "tiny"), rc_prompt("what is tea", TEA)
    top = e.one_top_tokens(mode, prompt)
    row = tiny_llama.log_probs([1, *tok.encode(prompt).ids], tok.get_vocab_size())[-1]
    assert len(top) == mode[1].get("logprobs", 20)
    assert [v for _, v in top] == pytest.approx(sorted(row, reverse=True)[:len(top)], abs=0.05)


def test_completions_are_seeded_texts(server):
    """The answers are text, the same for the same seed; another seed gives another."""
    e, prompt = endpoint(server), llm.TRIALS.prompt
    e.capabilities["complete"] = MODES["complete"][3], ""
    # one after another, behind one that fills the cache: a prompt read in other parts differs in its last digits
    answers = []
    for seed in (1, 1, 1, 2):
        e.answers.clear()
        answers += e.complete([prompt], [seed])
    _, one, two, other = answers
    assert one == two != other and isinstance(one, str)
    assert len(llm.LanguageModel(endpoint(server)).generate([TEA, BOOK])) == 2
