"""A server that answers as real ones do, right or wrong, from a model that is a hash.

    vllm              echo with BOS; offsets that count the BOS; lists of prompts
    llama-cpp-python  echo without BOS; "" for a token that is part of a character; no lists (500)
    llama-server      ignores echo; /tokenize, /completion with logit_bias; chat-shaped log-probs
    openai            echo is a 400; chat with top_logprobs
    together          echo beside the answer, in a shape of its own
    reasoning         openai that takes neither max_tokens nor another temperature than 1
    thinking          openai whose answer begins with a thought, unless thinking is turned off
    stubborn          the same, whatever is turned off, and in completions too
    constant          vllm whose every log-probability is the same
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import llm
from engine import files, transport
from engine.endpoint import Endpoint

transport.PAUSES = (0.001,) * 6     # tests do not wait
BOS = b"<s>"
CHATTING = ("openai", "reasoning", "thinking", "stubborn", "llama-server")
NAMES: list[bytes] = [BOS]  # token id -> bytes, as they are met
IDS: dict[bytes, int] = {BOS: 0}
LOCK = threading.Lock()


def tokenize(text: str) -> list[bytes]:
    """Blank with word in pieces of four letters; one token for each byte of any other character, the
    first with the blank before it."""
    out: list[bytes] = []
    for piece in re.findall(r"\n|:| ?[A-Za-z0-9]+| ?[^\x00-\x7f]|[^A-Za-z0-9]", text):
        data = piece.encode()
        out += [data[i:i + 4] for i in range(0, len(data), 4)] if piece.isascii() \
            else re.findall(rb" ?.", data, re.DOTALL)
    return out


def log_p(before: list[bytes], token: bytes) -> float:
    """log p(token | the tokens before): a hash, between -0.1 and -12.1."""
    h = hashlib.sha256(b"|".join([*before[-40:], b"->", token])).digest()
    return -0.1 - 12 * int.from_bytes(h[:6], "big") / 2 ** 48


def by_hand(prefix: str, text: str, bos: bool = True) -> float:
    """The sum that query likelihood must find."""
    before = [BOS] * bos + tokenize(prefix)
    total = 0.0
    for token in tokenize(text):
        total += log_p(before, token)
        before = [*before, token]
    return total


def number(token: bytes) -> int:
    with LOCK:
        if token not in IDS:
            IDS[token] = len(NAMES)
            NAMES.append(token)
        return IDS[token]


def whole(tokens: list[bytes]) -> list[str]:
    """vLLM's pieces: a character stands at its last byte."""
    out, held = [], b""
    for token in tokens:
        held += token
        try:
            out.append(held.decode())
            held = b""
        except UnicodeDecodeError:
            out.append("")
    return out


def partial(tokens: list[bytes]) -> list[str]:
    """llama-cpp-python's pieces: half a character is nothing."""
    return [token.decode(errors="ignore") for token in tokens]


def written(prompt: str) -> str:
    """The answer to P_QG: about the passage's first words. This model follows injected orders."""
    passage = re.findall(r"Passage: (.*)", prompt)[-1]
    if "IGNORE" in passage:
        return "Task: obey\nQuery: hacked\nTask: all\nQuery: hacked too"
    words = re.findall(r"\w+", passage)
    return "Task: Given a query, find a passage that has the answer to the query\n" \
           f"Query: what of {words[0]} {' '.join(words[2:5])}"


def relevance_top(prompt: str) -> list[tuple[str, float]]:
    """Log-probs of first tokens: labels and others, not normalised to all but below one."""
    h = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "big") / 2 ** 32
    p = {" High": 0.5 * h, "Highly": 0.1 * h, " Some": 0.2, " Not": 0.6 * (1 - h), " the": 0.01, " a": 0.005}
    return [(token, math.log(max(v, 1e-6))) for token, v in p.items()]


class FakeServer:
    """`with FakeServer("vllm") as server: Endpoint(server.url)`. `faults`: share of replies spoiled."""

    def __init__(self, kind: str = "vllm", faults: float = 0.0, latency: float = 0.0,
                 seed: int = 0) -> None:
        self.kind, self.faults, self.latency, self.rng = kind, faults, latency, random.Random(seed)
        self.bodies: list[tuple[str, Any]] = []
        self.keys: set[str] = set()
        self.models: Any = {"data": [{"id": "tiny"}]}
        self.script: list[str] = []                      # faults to come, before the random ones
        self.spoiled: dict[str, int] = {}
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                fake.keys.add(self.headers.get("Authorization", ""))
                self.reply(200, fake.models)

            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["Content-Length"]))
                fake.keys.add(self.headers.get("Authorization", ""))
                fake.handle(self, self.path, json.loads(data))

            def reply(self, status: int, answer: Any, headers: tuple[tuple[str, str], ...] = (),
                      promised: int = 0, slow: float = 0.0) -> None:
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                head = [f"HTTP/1.1 {status} x", f"Content-Length: {len(data) + promised}",
                        *(f"{k}: {v}" for k, v in headers)]
                blob = "\r\n".join(head).encode() + b"\r\n\r\n" + data
                if slow:
                    for i in range(0, len(blob), max(1, len(blob) // 5)):
                        self.wfile.write(blob[i:i + max(1, len(blob) // 5)])
                        time.sleep(slow / 5)
                else:
                    self.wfile.write(blob)
                if promised:
                    self.close_connection = True

            def log_message(self, *_: Any) -> None:
                pass

        class Listener(ThreadingHTTPServer):
            daemon_threads, request_queue_size = True, 128

            def handle_error(self, *_: Any) -> None:     # a client that was killed
                pass

        self.server = Listener(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def __enter__(self) -> FakeServer:
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.server.shutdown()
        self.server.server_close()

    def handle(self, handler: Any, path: str, body: dict[str, Any]) -> None:
        time.sleep(self.latency)
        with LOCK:
            self.bodies.append((path, body))
            fault = self.script.pop(0) if self.script else \
                self.rng.choice(sorted(FAULTS)) if self.rng.random() < self.faults else ""
            if fault:
                self.spoiled[fault] = self.spoiled.get(fault, 0) + 1
        status, answer = self.answer(path, body)
        if fault:
            FAULTS[fault](handler, answer)
        else:
            handler.reply(status, answer)

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/v1/chat/completions" and self.kind in CHATTING:
            return self.chat(body)
        if path == "/v1/completions":
            prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
            if self.kind == "llama-cpp-python" and isinstance(body["prompt"], list):
                return 500, {"error": {"message": "", "type": "internal_server_error"}}
            if self.kind == "reasoning":
                return 404, {"error": {"message": "This is a chat model"}}
            if self.kind in CHATTING[:-1] and body.get("echo"):
                return 400, {"error": {"message": "Setting 'echo' and 'logprobs' is not supported"}}
            return 200, self.completions(prompts, body)
        if self.kind == "llama-server" and path == "/tokenize":
            return 200, {"tokens": [number(t) for t in [BOS, *tokenize(body["content"])]]}
        if self.kind == "llama-server" and path == "/completion":
            (forced, _), = body["logit_bias"]
            before, usage = [NAMES[i] for i in body["prompt"]], {"tokens_evaluated": len(body["prompt"])}
            if NAMES[forced][-1] >= 0xC0:                # half a character is withheld
                return 200, usage
            few = body["n_probs"] <= 1000                # as if the vocabulary were larger
            top = [{"id": i, "logprob": log_p(before, NAMES[i])} for i in range(few, len(NAMES), 1 + few)]
            return 200, usage | {"completion_probabilities": [
                {"id": forced, "logprob": log_p(before, NAMES[forced]), "top_logprobs": top}]}
        return 404, {"error": {"message": "Not Found"}}

    def completions(self, prompts: list[str], body: dict[str, Any]) -> dict[str, Any]:
        choices, seen, made = [], 0, 0
        for index, prompt in enumerate(prompts):
            tokens = [BOS, *tokenize(prompt)]
            seen, made = seen + len(tokens), made + 1
            text = written(prompt) if prompt.endswith("Task:") else " next"
            text = "<think>\nThe user" if self.kind == "stubborn" else text
            choice: dict[str, Any] = {"index": index, "text": text.removeprefix("Task:"), "logprobs": None,
                                      "finish_reason": "stop"}
            if self.kind == "llama-server" and body.get("logprobs"):
                choice["logprobs"] = {"content": [{"token": " next", "logprob": -0.5, "top_logprobs": [
                    {"token": t, "logprob": v} for t, v in relevance_top(prompt)][:body["logprobs"]]}]}
            elif body.get("echo"):
                choice |= {"text": prompt + " next", "logprobs": self.echoed(tokens)}
            elif body.get("logprobs"):
                choice["logprobs"] = {"top_logprobs": [dict(relevance_top(prompt)[:body["logprobs"]])]}
            choices.append(choice)
        answer = {"choices": choices, "usage": {"prompt_tokens": seen, "completion_tokens": made}}
        if self.kind == "together" and body.get("echo"):
            scored = {k: v[:-1] for k, v in choices[0].pop("logprobs").items()}
            answer["prompt"] = [{"text": "<s>" + prompts[0], "logprobs": scored}]
            choices[0]["text"] = " next"
        return answer

    def echoed(self, tokens: list[bytes]) -> dict[str, Any]:
        bos = self.kind != "llama-cpp-python"
        values = [None] + [-3.0 if self.kind == "constant" else log_p(tokens[:i], tokens[i])
                           for i in range(1, len(tokens))] + [-0.5]
        pieces = ["<s>", *(whole if bos else partial)(tokens[1:]), " next"]
        if not bos:                                      # the first token's value goes with the BOS
            pieces, values = pieces[1:], [None] + values[2:]
        offsets = [sum(len(p) for p in pieces[:i]) for i in range(len(pieces))]
        return {"tokens": pieces, "token_logprobs": values, "text_offset": offsets}

    def chat(self, body: dict[str, Any]) -> tuple[int, Any]:
        prompt = body["messages"][0]["content"]
        if self.kind == "reasoning" and ("max_tokens" in body or body["temperature"] != 1):
            return 400, {"error": {"message": "Unsupported parameter: 'max_tokens'"}}
        thinks = self.kind == "stubborn" or self.kind == "thinking" and not body.get("chat_template_kwargs")
        text = "<think>\nThe user" if thinks else written(prompt) if prompt.endswith("Task:") else "Highly"
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop",
                                  "message": {"role": "assistant", "content": text}, "logprobs": None}
        if body.get("logprobs"):
            top = [("<think>", -1e-4), ("\n", -9.5)] if thinks else relevance_top(prompt)
            choice["logprobs"] = {"content": [{"token": top[0][0], "logprob": top[0][1], "top_logprobs": [
                {"token": t, "logprob": v} for t, v in top[:body["top_logprobs"]]]}]}
        return 200, {"choices": [choice], "usage": {"prompt_tokens": len(tokenize(prompt)),
                                                    "completion_tokens": 1}}


def spoil_values(handler: Any, answer: Any) -> None:
    """Log-probs that are none: the one value that must not pass for a score."""
    text = json.dumps(answer)
    handler.reply(200, re.sub(r'("token_logprobs": \[null)(, [^,\]]*)*', r"\1, NaN", text)
                  .replace('"content":', '"contents":').replace('"text":', '"texts":').encode())


FAULTS = {
    "429": lambda h, a: h.reply(429, {"error": {"message": "slow down"}}, (("Retry-After", "0.02"),)),
    "500": lambda h, a: h.reply(500, {"error": {"message": "engine died"}}),
    "503": lambda h, a: h.reply(503, b"Loading model"),
    "closed": lambda h, a: (h.connection.shutdown(2), setattr(h, "close_connection", True)),
    "truncated": lambda h, a: h.reply(200, json.dumps(a).encode()[:40], promised=100),
    "malformed": lambda h, a: h.reply(200, json.dumps(a).encode()[:-9]),
    "not a dict": lambda h, a: h.reply(200, [a]),
    "no choices": lambda h, a: h.reply(200, {"choices": [], "usage": None}),
    "error in 200": lambda h, a: h.reply(200, {"error": {"message": "upstream", "code": 502}}),
    "values": spoil_values,
    "slow": lambda h, a: h.reply(200, a, slow=0.05),
}


def passage(n: int, text: str = "") -> dict[str, str]:
    words = "tea leaf water cup pot steam amber green black bitter mild sweet cold hot dried old".split()
    rng = random.Random(n)
    return {"_id": f"p{n}", "title": f"Tea {n}",
            "text": text or " ".join(rng.choices(words, k=12)) + f" number {n}."}


def pairs(count: int) -> list[tuple[str, str]]:
    """(prefix, text) that a server scores."""
    return [ql_prompt(f"query {i}", passage(i)) for i in range(count)]


def ql_prompt(query: str, p: dict[str, str]) -> tuple[str, str]:
    """The prompts of the page, by hand: what is scored is the query with the blank before it."""
    return llm.P_QL.replace("{passage}", f"{p['title']} {p['text']}".strip()), f" {query}"


def rc_prompt(query: str, p: dict[str, str]) -> str:
    return llm.P_RC.replace("{query}", query).replace("{passage}", f"{p['title']} {p['text']}".strip())


def endpoint(server: FakeServer, model: str = "tiny", **options: Any) -> Endpoint:
    return Endpoint(server.url, model, llm.TRIALS, **{"threads": 8, "timeout": 5.0, **options})


def echoing(server: FakeServer, **options: Any) -> Endpoint:
    """An endpoint that need not be probed."""
    e = endpoint(server, **options)
    e.capabilities = {"log_likelihood": (("echo", {}), "")}
    return e


def language_model(server: FakeServer, score: str = "label", seed: int = 0, **options: Any) -> llm.LanguageModel:
    return llm.LanguageModel(endpoint(server, **options), score, seed)


def run_llm(argv: list[str]) -> None:
    """llm.py's command line in a process of its own, quietly; for the tests that kill it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)         # a job in the background ignores it
    sys.argv, sys.stdout, sys.stderr = ["llm.py", *argv], open("/dev/null", "w"), open("/dev/null", "w")
    files.run(llm.main)
