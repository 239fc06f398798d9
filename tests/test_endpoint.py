"""engine/endpoint.py: strings from servers of every kind.   pytest tests/test_endpoint.py

Invariants: log_likelihood is the sum of log p that the server's own model gives to the text's tokens alone,
or None; a reply that is not what was asked for is never a number; what a server cannot do is said with numbers.
"""

from __future__ import annotations

import math
import re
import sys

import fake_server
import pytest
from fake_server import FakeServer, by_hand, echoing, endpoint, language_model, passage, ql_prompt, rc_prompt
from teach import check

import llm
from engine import transport
from engine.endpoint import CHATS, MODES
from engine.replies import (
    answer_text,
    continuation_log_prob,
    first_token_log_prob,
    forced_log_prob,
    listed_tokens,
)
from engine.transport import CallFailed, LLMError, Server

TEXTS = {
    "ascii": "how long does green tea steep",
    "accents": "où boire un thé à la crème brûlée, señor Müller",
    "cjk": "東京で一番おいしいお茶はどこですか",
    "emoji": "best tea 🍵 for a 👩‍🚀 at night 🌙",
}
ECHO, FORCED = ("echo", {}), ("forced", {})


# --------------------------------------------------------------------------------------------------
# log_likelihood

@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("kind", ["vllm", "llama-cpp-python", "llama-server", "together"])
def test_log_likelihood_is_the_sum_over_the_text_alone(kind, text):
    """By echo, with or without BOS and whole tokens, and by forced decoding, it is the sum by hand."""
    p = passage(1, "Thé vert 緑茶 🍵 is tea.")
    with FakeServer(kind) as server:
        e = endpoint(server)
        got = e.log_likelihood([ql_prompt(text, p), ql_prompt("other", p)])
        assert e.capabilities["log_likelihood"][0] == (FORCED if kind == "llama-server" else ECHO)
    assert got == pytest.approx([by_hand(*ql_prompt(text, p)), by_hand(*ql_prompt("other", p))], abs=1e-9)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_text_offset_would_give_another_sum(text):
    """Negative control: the span that vLLM's text_offset gives takes tokens of the prompt too."""
    prefix, continuation = ql_prompt(text, passage(1))
    with FakeServer("vllm") as server:
        _, answer = server.answer("/v1/completions", {"prompt": prefix + continuation, "echo": True,
                                                      "logprobs": 1})
    scored = answer["choices"][0]["logprobs"]
    n = len(scored["tokens"]) - 1
    wrong = sum(v for v, at in zip(scored["token_logprobs"][:n], scored["text_offset"], strict=False)
                if at >= len(prefix))
    right = continuation_log_prob(answer, prefix, continuation, head=lambda _: scored["tokens"][:1 + len(
        fake_server.tokenize(prefix))])[0]
    assert right == pytest.approx(by_hand(prefix, continuation), abs=1e-9)
    assert abs(wrong - right) > 0.1


def echoed(tokens, values, prompt, **usage):
    return {"choices": [{"text": prompt + "!", "logprobs": {"tokens": tokens, "token_logprobs": values}}],
            "usage": {"prompt_tokens": len(tokens) - 1, "completion_tokens": 1} | usage}


@pytest.mark.ex6
@pytest.mark.parametrize("query", [[" tea", " time"], [" caf", "é"], [" ", "🍵"]], ids=ascii)
def test_span_is_the_query_alone(query):
    """The query's tokens are found from the right, by what they spell: offsets are in characters or bytes."""
    head, values = ["<s>", "Thé", " vert", ":"], [None, -9.0, -7.0, -5.0, -0.5, -0.25]
    prefix, text = "Thé vert:", "".join(query)
    reply = echoed([*head, *query, "!"], [*values, -40.0], prefix + text)
    check(continuation_log_prob(reply, prefix, text, list), (-0.75, 2), {
        "the prompt's tokens are in the sum; QL scores the query's alone": (-21.75, 5),
        "the token before the query is in the sum": (-5.75, 3),
        "the query's first token is left out": (-0.25, 1),
        "the token that the server generated is in the sum": (-40.75, 3),
        "this is the mean; QL is the sum of log p": (-0.375, 2)})


@pytest.mark.ex6
def test_span_asks_for_the_prefix_where_tokens_do_not_spell_it():
    """Half a character a token: spelled as nothing by some servers; the prefix's own tokens then end it."""
    tokens, values = ["<s>", "a", ":", " ", "", "", "!"], [None, -1.0, -2.0, -3.0, -4.0, -5.0, -0.5]
    reply, asked = echoed(tokens, values, "a: é"), []

    def head(prefix):
        asked.append(prefix)
        return ["<s>", "a", ":"]

    check(continuation_log_prob(reply, "a:", " é", head), (-12.0, 3), {
        "tokens that spell nothing are left out; they are the query's": (-3.0, 1),
        "what the tokens spell is not the query: one of the prompt's is in the sum; ask `head`": (-14.0, 4),
        "the whole prompt is in the sum": (-15.0, 5)})
    assert asked == ["a:"]


@pytest.mark.ex6
def test_span_refuses_what_it_cannot_be_sure_of():
    """Each broken reply is an error, not a number: the sound one beside it is a number."""
    tokens, values = ["<s>", "a", ":", " b", "!"], [None, -1.0, -2.0, -3.0, -0.5]
    assert tuple(continuation_log_prob(echoed(tokens, values, "a: b"), "a:", " b", list)) == (-3.0, 1)
    merged = echoed(["<s>", "a", ": b", "!"], [None, -1.0, -2.0, -0.5], "a: b")
    with pytest.raises(CallFailed, match="crosses"):
        continuation_log_prob(merged, "a:", " b", head=lambda _: ["<s>", "a", ":"])
    with pytest.raises(CallFailed, match="crosses"):       # nothing is left: a sum of 0 is no score
        continuation_log_prob(merged, "a:", " b", head=lambda _: ["<s>", "a", ": b"])
    for spoiled in ([None, -1.0, -2.0, None, -0.5], [None, -1.0, -2.0, float("nan"), -0.5],
                    [None, -1.0, -2.0, 3.0, -0.5], [None, -1.0, -2.0, "-3", -0.5], values[:-1]):
        with pytest.raises(ValueError):
            continuation_log_prob(echoed(tokens, spoiled, "a: b"), "a:", " b", list)
    with pytest.raises(ValueError):                        # nor where `head` had to be asked
        continuation_log_prob(echoed(["<s>", "a", ":", "", "", "!"], [None, -1.0, -2.0, 3.0, -4.0, -0.5], "a: é"),
                              "a:", " é", lambda _: ["<s>", "a", ":"])
    with pytest.raises(CallFailed, match="4 log-probs for a 9-token prompt"):
        continuation_log_prob(echoed(tokens, values, "a: b", prompt_tokens=9), "a:", " b", list)
    with pytest.raises(CallFailed, match="4 log-probs for a 0-token prompt"):
        uncounted = echoed(tokens, values, "a: b") | {"usage": {"completion_tokens": 1}}
        continuation_log_prob(uncounted, "a:", " b", list)
    with pytest.raises(CallFailed, match="did not score"):
        continuation_log_prob(echoed(tokens, values, "other"), "a:", " b", list)


@pytest.mark.ex6
def test_an_empty_token_before_the_span_is_not_passed_over():
    """Real vLLM names the first half of " 東" "": spelling alone would leave its log-prob out."""
    tokens, values = ["<s>", "a", ":", "", " 東", "!"], [None, -1.0, -2.0, -4.0, -3.0, -0.5]
    reply = echoed(tokens, values, "a: 東")
    assert tuple(continuation_log_prob(reply, "a:", " 東", lambda _: ["<s>", "a", ":"])) == (-7.0, 2)
    tokens[3] = ","                                        # negative control: here it is the prefix's own
    assert tuple(continuation_log_prob(echoed(tokens, values, "a:, 東"), "a:,", " 東", list)) == (-3.0, 1)
    reply = echoed(["<s>", "a", "", "", " b", "!"], values, "a é b")  # and here both halves are
    check(continuation_log_prob(reply, "a é", " b", lambda _: ["<s>", "a", "", ""]), (-3.0, 1), {
        "the empty tokens are the prefix's own: `head` says so": (-9.0, 3)})


def test_a_prompt_whose_beginning_was_cut_off_is_no_score():
    """A server that keeps the last tokens alone scores them all, after another context."""
    with FakeServer("vllm") as server:
        e = endpoint(server)
        assert e.echo(*ql_prompt("tea", passage(1)))
        completions = server.completions
        server.completions = lambda prompts, body: completions(prompts, body) | {"choices": [
            c | {"text": p} for p, c in zip(prompts, completions([p[-200:] for p in prompts], body)["choices"],
                                            strict=True)], "usage": completions(
                                                [p[-200:] for p in prompts], body)["usage"]}
        with pytest.raises(CallFailed, match="beginning was cut off"):
            e.echo(*ql_prompt("tea", passage(1)))
    token = {"id": 7, "logprob": -1.0, "top_logprobs": []}
    assert forced_log_prob({"completion_probabilities": [token]}, 7) == -1.0
    assert forced_log_prob({"completion_probabilities": [token]}, 8) is None
    with pytest.raises(CallFailed, match="cut off"):
        forced_log_prob({"completion_probabilities": [token], "truncated": True}, 7)


@pytest.mark.ex6
def test_generated_eos_does_not_shift_the_span():
    """llama-cpp-python lists no EOS and counts none; vLLM lists and counts it."""
    tokens, values = ["a", ":", " b"], [None, -2.0, -3.0]
    reply = echoed(tokens, values, "a: b", completion_tokens=0, prompt_tokens=4)
    assert tuple(continuation_log_prob(reply, "a:", " b", list)) == (-3.0, 1)


def test_a_server_that_lists_few_tokens_scores_what_it_can(monkeypatch):
    """Half a character is found in a long list alone: where that is capped, the call failed, not the run."""
    with FakeServer("llama-server") as server:
        answer = server.answer
        monkeypatch.setattr(server, "answer", lambda path, body: answer(
            path, body | {"n_probs": min(body.get("n_probs", 0), 1000)}))
        e = endpoint(server)
        pairs = [ql_prompt(TEXTS[name], passage(1)) for name in ("ascii", "cjk")]
        assert e.log_likelihood(pairs) == [pytest.approx(by_hand(*pairs[0])), None]
    assert "does it cap n_probs" in e.failures[-1]


# --------------------------------------------------------------------------------------------------
# top_tokens and labels

@pytest.mark.parametrize("kind", ["openai", "thinking", "reasoning"])
def test_top_tokens_are_those_of_the_answer(kind):
    """A label's first token counts, " High" and "Highly" together; thinking is turned off."""
    prompts = [rc_prompt("is tea mild", passage(i)) for i in range(4)]
    with FakeServer(kind) as server:
        e = endpoint(server)
        got = e.top_tokens(prompts)
    assert e.capabilities["top_tokens"][0] == CHATS[{"openai": 0, "thinking": 1, "reasoning": 3}[kind]]
    for prompt, top in zip(prompts, got, strict=True):
        assert top == fake_server.relevance_top(prompt)
        p = {token: math.exp(value) for token, value in top}
        value, listed = first_token_log_prob(top, llm.LABELS[0])
        assert listed and value == pytest.approx(math.log(p[" High"] + p["Highly"]))


def test_a_label_that_is_not_listed_is_bounded():
    """It gets the smallest listed value, which its own cannot exceed."""
    top = [{"token": " Not", "logprob": -0.1}, {"token": " the", "logprob": -3.0}]
    answer = {"choices": [{"logprobs": {"content": [{"top_logprobs": top}]}}]}
    got = [first_token_log_prob(listed_tokens(answer, llm.LABELS), label) for label in llm.LABELS]
    assert got == [(-3.0, False), (-3.0, False), (-0.1, True)]


def test_a_token_without_others_beside_it_is_no_list():
    with pytest.raises(CallFailed, match="sent no top_logprobs"):
        listed_tokens({"choices": [{"logprobs": {"content": [{"token": "High", "logprob": -1}]}}]}, llm.LABELS)


def test_fewer_top_tokens_are_asked_for_where_twenty_are_refused(monkeypatch):
    with FakeServer("openai") as server:
        chat = server.chat
        monkeypatch.setattr(server, "chat", lambda body: (
            (400, {"error": "at most 5"}) if body.get("top_logprobs", 0) > 5 else chat(body)))
        e = endpoint(server)
        assert len(e.top_tokens([rc_prompt("is tea mild", passage(1))])[0]) == 5
    assert e.capabilities["top_tokens"][0] == ("chat", {"top_logprobs": 5})


@pytest.mark.parametrize("reason, text, kept", [
    ("stop", "Task: t\nQuery: whole", "Task: t\nQuery: whole"), ("length", "Task: t\nQuery: ha", "Task: t"),
    ("content_filter", "Task: t\nQuery: ha", "Task: t"), ("error", "Task: t\nQuery: ha", "Task: t"),
    ("stop", "Task: t\nQuery: \ud83d", None),
    ("length", "", None), ("stop", None, None)])
def test_a_text_that_was_cut_off_is_no_query(reason, text, kept):
    answer = {"choices": [{"finish_reason": reason, "message": {"content": text}}]}
    if kept is None:
        with pytest.raises((CallFailed, ValueError)):
            answer_text(answer)
    else:
        assert answer_text(answer) == kept


# --------------------------------------------------------------------------------------------------
# probe

@pytest.mark.parametrize("kind, complete, log_likelihood, top_tokens", [
    ("vllm", "completions", "echo", "completions"), ("llama-cpp-python", "completions", "echo", "completions"),
    ("llama-server", "chat", "forced", "chat"), ("openai", "chat", None, "chat"),
    ("thinking", "chat", None, "chat"), ("reasoning", "chat", None, "chat"),
    ("together", "completions", "echo", "completions"), ("constant", "completions", None, "completions")])
def test_probe_says_what_works_with_numbers(kind, complete, log_likelihood, top_tokens, monkeypatch, capsys):
    with FakeServer(kind) as server:
        monkeypatch.setattr(sys, "argv", ["llm.py", "probe", "--llm", server.url])
        llm.main()
        e = endpoint(server)
        for call in MODES:
            e.can(call)
        assert e.server.requests <= 40                      # seconds, also where an error is a 500
    assert [mode and mode[0] for mode, _ in e.capabilities.values()] == [complete, log_likelihood, top_tokens]
    out = capsys.readouterr().out
    for call in MODES:
        assert re.search(rf"  {call} +{'yes' if e.can(call) else 'NO '}  ", out) and e.capabilities[call][1] in out
    if log_likelihood:
        assert re.search(r": -\d+\.\d\d over \d+ tokens, -\d+\.\d\d over \d+", e.capabilities["log_likelihood"][1])
    if kind == "thinking":
        assert "enable_thinking" in e.capabilities["top_tokens"][1]


def test_no_likelihood_is_said_with_the_way_out():
    """A server that answers 200 and ignores echo is told from one that scores."""
    with FakeServer("openai") as server:
        with pytest.raises(LLMError, match=r"cannot do log_likelihood.*echo.*--rank rc"):
            endpoint(server).log_likelihood([("a:", " b")])
    with FakeServer("llama-server") as server:
        with pytest.raises(CallFailed, match="200 but did not score the prompt: 1 log-probs for a"):
            endpoint(server).echo("a:", " b")


def test_thinking_that_cannot_be_turned_off_is_refused(monkeypatch):
    with FakeServer("stubborn") as server:
        monkeypatch.setitem(MODES, "top_tokens", CHATS)
        with pytest.raises(LLMError, match="cannot do top_tokens.*<think>.*thinking off"):
            endpoint(server).top_tokens(["Relevance:"])
        with pytest.raises(LLMError, match="cannot do complete.*<think>.*without thinking"):
            endpoint(server).complete(["Task:"], [1])


def test_an_answer_that_follows_no_form_is_an_answer(monkeypatch):
    """A model too small for the form still answers: what cannot be used is counted later."""
    monkeypatch.setattr(fake_server, "written", lambda prompt: "Tea is a drink.")
    with FakeServer("openai") as server:
        assert endpoint(server).complete(["Task:"], [1]) == ["Tea is a drink."]


def test_a_model_that_copies_an_example_in_chat_is_asked_to_complete(monkeypatch):
    """As a small instruct model does, whose chats all say the same; what the chat template hides, P_QG shows."""
    copied = "Task: find an answer\nQuery: What part of a cell produces its energy?"
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": copied}}
    chats = []

    def chat(self, body):
        chats.append(body)
        return 200, {"choices": [choice]}

    monkeypatch.setattr(FakeServer, "chat", chat)
    with FakeServer("llama-server") as server:
        assert endpoint(server).require("complete") == MODES["complete"][3]
    assert len(chats) == 3


def test_what_was_found_is_said_before_a_run(capsys):
    with FakeServer("vllm") as server:
        endpoint(server).log_likelihood([("a:", " b")])
    assert re.search(r"  log_likelihood yes  echo: -\d+\.\d\d over \d+ tokens", capsys.readouterr().out)


@pytest.mark.parametrize("status, message", [(503, "HTTP 503"), (401, "HTTP 401"), (307, "HTTP 307: http://to")])
def test_a_server_that_is_not_ready_is_not_said_to_be_unable(status, message, monkeypatch):
    monkeypatch.setattr(transport, "PAUSES", (0, 0))
    monkeypatch.setattr(Server, "send", lambda *_: (status, {"location": "http://to/x"} if status == 307 else {},
                                                    b"{}"))
    for model in ("", "tiny"):
        with FakeServer() as server, pytest.raises(LLMError, match=message):
            endpoint(server, model).complete(["Task:"], [1])


@pytest.mark.parametrize("status, reply", [(500, {}), (200, b"<html>"), (200, {"error": "Unexpected endpoint"})])
def test_a_refusal_that_looks_like_a_fault_costs_a_probe_few_tries(status, reply, monkeypatch):
    """Two modes, three tries each; in a run the same is tried as often as any fault."""
    with FakeServer("openai") as server:
        monkeypatch.setattr(server, "answer", lambda *_: (status, reply))
        e = endpoint(server)
        assert not e.can("log_likelihood") and len(server.bodies) == 6
        with pytest.raises(CallFailed, match=f"{len(transport.PAUSES)} times"):
            e.echo("a:", " b")


def test_a_busy_server_is_not_said_to_be_unable(monkeypatch):
    """It has answered before; a mode that is given up for it would change what scores mean."""
    with FakeServer("vllm") as server:
        e = endpoint(server)
        assert e.can("complete")
        monkeypatch.setattr(server, "answer", lambda *_: (429, {}))
        with pytest.raises(LLMError, match="does not answer: no sound reply .RetryableError: HTTP 429"):
            e.can("log_likelihood")


def test_a_server_that_hangs_up_on_one_kind_of_request_is_asked_otherwise(monkeypatch):
    """Some crash on what they cannot do. One that hangs up before its first answer is loading its model."""
    with FakeServer("vllm") as server:
        handle = server.handle

        def hanging_up(handler, path, body):
            if body.get("echo"):
                return fake_server.FAULTS["closed"](handler, {})
            return handle(handler, path, body)

        monkeypatch.setattr(server, "handle", hanging_up)
        e = endpoint(server)
        assert e.can("complete") and not e.can("log_likelihood") and e.can("top_tokens")
        assert "RemoteDisconnected" in e.capabilities["log_likelihood"][1]
        with pytest.raises(LLMError, match="does not answer"):
            endpoint(server).can("log_likelihood")


def test_a_server_that_takes_no_seed_is_asked_without(monkeypatch):
    with FakeServer("openai") as server:
        answer = server.answer
        monkeypatch.setattr(server, "answer", lambda path, body: (
            (422, {"detail": "extra_forbidden: seed"}) if "seed" in body else answer(path, body)))
        e = endpoint(server)
        assert e.complete([llm.TRIALS.prompt], [1])[0] and e.require("complete") == ("chat", {"seed": None})


def test_nobody_there_is_one_line(monkeypatch):
    monkeypatch.setattr(transport, "PAUSES", (0, 0))
    with FakeServer() as server:
        pass
    for model in ("", "tiny"):
        with pytest.raises(LLMError, match="does not answer: no sound reply .ConnectionRefused"):
            endpoint(server, model).complete(["Task:"], [1])


# --------------------------------------------------------------------------------------------------
# Faults

@pytest.mark.parametrize("kind", ["vllm", "llama-cpp-python", "llama-server"])
def test_every_score_is_right_or_none_through_faults(kind):
    """A fifth of the replies is spoiled, in eleven ways: no value is wrong."""
    texts = [*TEXTS.values(), *["mild tea"] * 20]
    count = 80 if kind == "llama-server" else 240                        # one request a token there
    pairs = [(f"{texts[i % len(texts)]} {i}", passage(i)) for i in range(count)]
    with FakeServer(kind, faults=0.2, seed=3) as server:
        model = language_model(server, threads=16)
        ql = model.query_likelihood(pairs)
        pairs_rc = pairs[:count // 2]
        rc, answers = model.relevance(pairs_rc), model.generate([p for _, p in pairs_rc])
    assert set(server.spoiled) == set(fake_server.FAULTS)
    assert sum(server.spoiled.values()) > 0.15 * len(server.bodies)
    for (q, p), a in zip(pairs, ql, strict=True):
        assert a is None or a == pytest.approx(by_hand(*ql_prompt(q, p)), abs=1e-9)
    for (q, p), b, text in zip(pairs_rc, rc, answers, strict=True):
        assert b is None or b == pytest.approx(by_hand(rc_prompt(q, p), llm.LABELS[0]), abs=1e-9)
        assert text is None or llm.parse_generation(text)[1].startswith("what of Tea")
    missing = sum(x is None for x in [*ql, *rc, *answers])
    server = model.strings.server
    assert missing == len(model.strings.failures) <= 9
    assert server.prompt_tokens > 0 and server.completion_tokens > 0


def test_failed_calls_are_none_and_counted(monkeypatch):
    """With one try a call, the spoiled fifth is missing, counted, and nothing else is."""
    monkeypatch.setattr(transport, "PAUSES", (0,))
    with FakeServer("vllm") as server:
        e = echoing(server, threads=4)
        e.log_likelihood(fake_server.pairs(1))             # it is known to answer
        server.faults = 0.2
        got = e.log_likelihood(fake_server.pairs(300))
    lost = sum(server.spoiled.values()) - server.spoiled.get("slow", 0)
    assert got.count(None) == len(e.failures) == lost > 20
    for value, pair in zip(got, fake_server.pairs(300), strict=True):
        assert value is None or value == pytest.approx(by_hand(*pair), abs=1e-9)


# --------------------------------------------------------------------------------------------------
# What servers do in silence


@pytest.mark.parametrize("value", [None, -math.inf, math.nan, "-inf"])
def test_what_is_not_a_number_beside_a_token_that_is_no_label_is_no_matter(value, monkeypatch):
    """Only what is used is validated; beside a label it spoils the reply, which is asked for again."""
    prompt = rc_prompt("is tea mild", passage(1))
    top = fake_server.relevance_top(prompt)
    for spoiled, failed in ((" the", False), (" High", True)):
        monkeypatch.setattr(fake_server, "relevance_top", lambda _, spoiled=spoiled: [
            (token, value if token == spoiled else log_p) for token, log_p in top])
        with FakeServer("openai") as server:
            e = endpoint(server)
            e.capabilities = {"top_tokens": (CHATS[0], "")}
            got, = e.top_tokens([prompt])
        assert got == (None if failed else [(token, log_p) for token, log_p in top if token != spoiled])
        assert len(server.bodies) == (len(transport.PAUSES) if failed else 1)


def test_what_is_not_a_number_beside_a_token_of_the_prefix_is_no_matter():
    """Only the text's own tokens are summed."""
    tokens = ["<s>", "a", ":", " b", "!"]
    for values, good in (([None, None, -math.inf, -3.0, -0.5], True), ([None, -1.0, -2.0, -math.inf, -0.5], False)):
        if good:
            assert continuation_log_prob(echoed(tokens, values, "a: b"), "a:", " b", list) == (-3.0, 1)
        else:
            with pytest.raises(ValueError, match="-inf is no log-probability"):
                continuation_log_prob(echoed(tokens, values, "a: b"), "a:", " b", list)


@pytest.mark.parametrize("kind, call", [("openai", "complete"), ("openai", "top_tokens"),
                                        ("vllm", "log_likelihood"), ("vllm", "complete")])
def test_a_prompt_that_was_cut_in_silence_is_a_failed_call(kind, call, monkeypatch):
    """`usage` gives it away: fewer tokens than any tokenizer makes of so many characters."""
    prompts = [llm.TRIALS.prompt + "x" * 99, llm.TRIALS.prompt]
    with FakeServer(kind) as server:
        e = endpoint(server)
        e.require(call)
        answer = server.answer

        def cut(path, body):
            status, reply = answer(path, body)
            if "x" * 99 in str(body):
                reply["usage"]["prompt_tokens"] = 20
            return status, reply

        monkeypatch.setattr(server, "answer", cut)
        if call == "complete":
            got = e.complete(prompts, [1, 1])
        elif call == "top_tokens":
            got = e.top_tokens(prompts)
        else:
            got = e.log_likelihood([(prompt, " tea") for prompt in prompts])
    assert got[0] is None and got[1] is not None
    assert "the server read 20 tokens of a prompt of" in e.failures[-1] and len(e.failures) == 1


@pytest.mark.parametrize("base, asked", [
    ("", "/v1"), ("/", "/v1"), ("/v1", "/v1"), ("/v1/", "/v1"), ("/v1beta/openai", "/v1beta/openai"),
    ("/v1/openai/", "/v1/openai"), ("/api/v3", "/api/v3"), ("/inference/v1", "/inference/v1"),
    ("/openai", "/openai")])
def test_a_base_url_is_taken_as_openais_client_takes_it(base, asked, monkeypatch, capsys):
    """Only a bare host gets /v1; any other path stays as it is."""
    with FakeServer("openai") as server:
        answer, seen = server.answer, []

        def strict(path, body):
            seen.append(path)
            return answer(path.replace(asked, "/v1", 1), body) if path.startswith(asked) else (404, {"error": path})

        monkeypatch.setattr(server, "answer", strict)
        host = server.url.removesuffix("/v1")
        e = endpoint(server)
        monkeypatch.setattr(sys, "argv", ["llm.py", "probe", "--llm", host + base])
        llm.main()
    assert capsys.readouterr().out.startswith(f"{host}{asked} (model ") and f"{asked}/chat/completions" in seen
    assert e.name == f"{host}/v1"


def test_a_probe_of_a_server_that_never_answers_says_that_it_waits_and_waits_once(monkeypatch, capsys):
    """One line while it waits, one at the end, and no second try of what took the whole --timeout."""
    for silent in ("do_GET", "do_POST"):
        with FakeServer("openai") as server:
            released = fake_server.threading.Event()
            monkeypatch.setattr(server.server.RequestHandlerClass, silent, lambda self: released.wait(30))
            monkeypatch.setattr(sys, "argv", ["llm.py", "probe", "--llm", server.url, "--timeout", "0.5"])
            start = fake_server.time.monotonic()
            with pytest.raises(LLMError, match=rf"^{server.url} does not answer: .*timed out.*--timeout 0.5"):
                llm.main()
            assert fake_server.time.monotonic() - start < 3
            released.set()
        assert f"waiting for {server.url}: up to 0.5 s" in capsys.readouterr().err


def test_a_cache_that_two_servers_share_gives_each_its_own_answers(tmp_path):
    """Neither lists its models: the base URL tells them apart."""
    got = []
    for n in range(2):
        with FakeServer("openai") as server:
            server.chat = lambda body, n=n: (200, {"choices": [{"message": {"content": f"Task: t\nQuery: q{n}"}}]})
            cached = endpoint(server, model="")
            cached.keep_in(tmp_path / "c.jsonl")
            got += cached.complete(["Task:"], [1]) + cached.complete(["Task:"], [1])
            assert cached.found == 1 and f"1 answers of {server.url} from" in cached.report()
    assert got == ["Task: t\nQuery: q0"] * 2 + ["Task: t\nQuery: q1"] * 2


def test_that_proxies_are_not_used_is_said(monkeypatch, capsys):
    for command in ("probe", "generate", "mine"):
        monkeypatch.setattr(sys, "argv", ["llm.py", command, "--help"])
        with pytest.raises(SystemExit):
            llm.main()
        assert re.search(r"HTTPS?.*_PROXY\s+(and\s+HTTPS_PROXY\s+are|is)\s+not\s+used", capsys.readouterr().out)


@pytest.mark.parametrize("models", [{"data": []}, [], b"<html>"], ids=["empty", "bare", "html"])
def test_a_list_of_models_that_is_none_stops_nothing(models, monkeypatch):
    """It answers, so it is there; the model's name stays empty."""
    monkeypatch.setattr(transport, "PAUSES", (0, 0))
    with FakeServer("vllm") as server:
        server.models = models
        model = endpoint(server, model="")
        assert model.can("complete") and model.model == ""
