"""engine/transport.py: requests to one server.   pytest tests/test_transport.py

Invariants: what may pass is tried again, what cannot is not; a pause holds for all threads; the key goes to the
host that was named and nowhere else; nothing more is sent once a run has stopped; a stop does not wait.
"""

from __future__ import annotations

import http.client
import itertools
import shutil
import signal
import ssl
import subprocess
import threading
import time

import fake_server
import pytest
from fake_server import FakeServer, by_hand, echoing, endpoint, pairs
from test_endpoint import echoed

from engine import files, transport
from engine.transport import CallFailed, LLMError, retry_after

# --------------------------------------------------------------------------------------------------
# Tried again, or not

@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 422, 429])
def test_what_cannot_pass_is_not_tried_again(status, monkeypatch):
    """One request, no second: 429 is insufficient_quota here. The run stops, or after 20 in a row."""
    error = {"error": {"message": "insufficient_quota" if status == 429 else "no"}}
    with FakeServer("vllm") as server:
        e = echoing(server, threads=1)
        monkeypatch.setattr(server, "answer", lambda path, body: (status, error))
        with pytest.raises(LLMError, match=str(status)):
            e.log_likelihood(pairs(40))
        assert len(server.bodies) == (20 if status in (400, 404, 422) else 1)


def test_retry_after_is_a_pause_for_all_threads(monkeypatch):
    monkeypatch.setitem(fake_server.FAULTS, "429", lambda h, a: h.reply(429, b"", (("Retry-After", "0.4"),)))
    with FakeServer("vllm") as server:
        e = echoing(server)
        server.script, start = ["429"], time.monotonic()
        e.log_likelihood(pairs(1))
        waited = time.monotonic() - start
    assert 0.4 <= waited < 1.5
    assert retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) < 0 == retry_after({})
    assert retry_after({"retry-after": "1.5"}) == 1.5
    assert retry_after({"retry-after": "soon"}) == 0.0


def test_a_wait_too_long_stops_the_run(monkeypatch):
    monkeypatch.setitem(fake_server.FAULTS, "429", lambda h, a: h.reply(429, b"", (("Retry-After", "900"),)))
    with FakeServer("vllm") as server:
        server.script = ["429"]
        with pytest.raises(LLMError, match="wait 900 s"):
            echoing(server).log_likelihood(pairs(1))


def test_a_body_that_drips_meets_the_timeout(monkeypatch):
    """No single read times out, the whole does; then a sound reply is used."""
    monkeypatch.setitem(fake_server.FAULTS, "slow", lambda h, a: h.reply(200, a, slow=1.0))
    with FakeServer("vllm") as server:
        e = echoing(server, timeout=0.5)
        e.log_likelihood(pairs(2)[1:])                     # it is known to answer
        server.script = ["slow"]
        got = e.log_likelihood(pairs(1))
        assert len(server.bodies) == 3
    assert got == pytest.approx([by_hand(*pairs(1)[0])])


@pytest.mark.parametrize("reply", [b"[" * 200_000, b'{"choices": [], "usage": {"prompt_tokens": 1e999}}'], ids=len)
def test_a_reply_that_no_reader_can_hold_is_malformed(reply, monkeypatch):
    with FakeServer("vllm") as server:
        monkeypatch.setattr(server, "answer", lambda path, body: (200, reply))
        with pytest.raises(CallFailed, match="no sound reply"):
            endpoint(server).echo("a:", " b")


def test_a_reply_without_end_stops_the_run(monkeypatch):
    """Time alone would let a server fill the memory; it is not asked for the same again."""
    monkeypatch.setattr(transport, "MAX_REPLY_BYTES", 100_000)
    with FakeServer("vllm") as server:
        monkeypatch.setattr(server, "answer", lambda path, body: (200, b" " * 10 ** 7))
        with pytest.raises(LLMError, match="no end: more than 100,000 bytes"):
            echoing(server).log_likelihood(pairs(1))
        assert len(server.bodies) == 1


def test_each_request_that_is_sent_is_counted():
    """A try on a connection that had been closed is a request too: it may be paid for."""
    with FakeServer("vllm") as server:
        e = echoing(server, threads=2)
        server.script = ["", "", "", "closed", "", "closed", "500"]
        assert None not in e.log_likelihood(pairs(20))
        assert e.server.requests == len(server.bodies) == 23


def test_a_limit_that_a_probe_meets_is_not_said_to_be_the_servers_silence():
    with FakeServer("vllm") as server:
        e = endpoint(server, max_requests=1)
        with pytest.raises(LLMError, match="^stopped at --max-requests 1: "):
            e.log_likelihood(pairs(1))


# --------------------------------------------------------------------------------------------------
# Threads, connections, a stop

def test_the_window_is_bounded(monkeypatch):
    """So many threads, whatever the number of items; nothing is sent after a stop."""
    started = []
    start = threading.Thread.start
    with FakeServer("llama-cpp-python") as server:
        e = endpoint(server, threads=4)
        done: list[int] = []
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", lambda self: started.append(1) or start(self))
            e.server.map(done.append, range(1000))
        assert sorted(done) == list(range(1000)) and len(started) == 4
        e.server.stopped.set()
        with pytest.raises(LLMError, match="was stopped"):
            e.server.call("/v1/models", None, lambda answer: answer)


def test_connections_are_kept(monkeypatch):
    connects = []
    connect = http.client.HTTPConnection.connect
    monkeypatch.setattr(http.client.HTTPConnection, "connect", lambda self: connects.append(1) or connect(self))
    with FakeServer("llama-cpp-python") as server:
        echoing(server, threads=4).log_likelihood(pairs(100))
    assert len(connects) <= 4


def test_nothing_more_is_sent_once_a_run_has_stopped(monkeypatch):
    """Nor a call whose pause has ended."""
    with FakeServer("vllm") as server:
        e = echoing(server, threads=2)
        good, turn = server.answer, itertools.count()

        def answer(path, body):
            n = next(turn)
            time.sleep((0.2, 0.5)[n] if n < 2 else 0)      # the second fails when the first has stopped the run
            return [(401, {"error": "no"}), (500, {})][n] if n < 2 else good(path, body)

        monkeypatch.setattr(server, "answer", answer)
        with pytest.raises(LLMError, match="HTTP 401"):
            e.log_likelihood(pairs(32))
        assert len(server.bodies) == 2


def test_ctrl_c_while_a_stopped_run_waits_for_its_last_answers(monkeypatch):
    """It ends at once, and the threads do not take up the rest of the work behind its back."""
    with FakeServer("llama-cpp-python") as server:
        e = echoing(server, threads=4, timeout=60.0)
        released, first = threading.Event(), "".join(min(pairs(100)))

        def answer(path, body):
            if body["prompt"] != first:
                released.wait(60)
                return 500, {}
            while len(server.bodies) < 4:                  # until all threads wait
                time.sleep(0.01)
            threading.Timer(0.5, ctrl_c).start()
            return 401, {"error": "no"}

        def ctrl_c():
            pressed.append(time.monotonic())
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

        monkeypatch.setattr(server, "answer", answer)
        # subtle: a process that a shell has put in the background ignores SIGINT
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        pressed: list[float] = []
        try:
            with pytest.raises(KeyboardInterrupt):
                e.log_likelihood(pairs(100))
            assert time.monotonic() - pressed[0] < 10      # not the 60 seconds of the answers
        finally:
            signal.signal(signal.SIGINT, before)
            released.set()
        time.sleep(0.5)
        assert len(server.bodies) == 4


# --------------------------------------------------------------------------------------------------
# Addresses and the key


@pytest.mark.parametrize("url", ["ftp://h/v1", "http://", "h:80", "http://user:secret@h/v1", "http://h/v1?key=x",
                                 "http://h:abc/v1", "http://h:99999/v1", "http://[::1/v1"])
def test_bad_urls_are_refused_without_repeating_them(url):
    with pytest.raises(files.InputError, match="OPENAI_API_KEY") as error:
        transport.server_address(url)
    assert "secret" not in str(error.value)


def test_a_servers_words_are_cut_without_the_key_or_terminal_controls(monkeypatch):
    """The key is hidden before the cut, which would else leave a part of it, wherever it stands."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-do-not-show-me")
    monkeypatch.setattr(transport, "PAUSES", (0,))
    with FakeServer("vllm") as server:
        e = endpoint(server)
        for n in range(40, 220):
            words = "x" * n + "\x1b[2Jsk-do-not-show-me"
            quoting = echoed(["<s>", "a", ":", " b", "!"], [None, -1.0, -2.0, words, -0.5], "a: b")
            for reply in ((200, quoting), (400, words.encode())):
                monkeypatch.setattr(server, "answer", lambda *_, reply=reply: reply)
                with pytest.raises(CallFailed) as error:
                    e.echo("a:", " b")
                shown = str(error.value)
                assert "sk" not in shown and "\x1b" not in shown and len(shown) < 250


def test_a_key_that_no_header_can_carry_is_refused_without_showing_it(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-do\u00e9-not")
    with FakeServer() as server, pytest.raises(files.InputError, match="no HTTP header") as error:
        endpoint(server)
    assert "sk-do" not in str(error.value)


def test_a_redirection_is_not_followed(monkeypatch):
    """The key goes to the host that was named and to no other, whatever a server says."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-do-not-show-me")
    with FakeServer("vllm") as server, FakeServer("vllm") as other:
        monkeypatch.setitem(fake_server.FAULTS, "307", lambda h, a: h.reply(307, b"", (("Location", other.url),)))
        server.script = ["307"]
        with pytest.raises(LLMError, match=f"HTTP 307: {other.url}; mend the URL"):
            echoing(server).log_likelihood(pairs(1))
        assert len(server.bodies) == 1 and not other.bodies and not other.keys


@pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl to make a certificate with")
def test_https_is_checked_before_the_key_is_sent(monkeypatch, tmp_path):
    """A certificate that is not trusted: not one request; trusted: the same scores as over http."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-do-not-show-me")
    monkeypatch.setattr(transport, "PAUSES", (0,))
    pem, key = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
                    "-nodes", "-keyout", key, "-out", pem, "-days", "2", "-subj", "/CN=localhost", "-addext",
                    "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    with FakeServer("vllm") as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pem, key)
        server.server.socket = context.wrap_socket(server.server.socket, server_side=True)
        server.url = server.url.replace("http:", "https:")
        with pytest.raises(LLMError, match="does not answer: no sound reply .SSLCertVerificationError"):
            endpoint(server).log_likelihood(pairs(1))
        assert not server.bodies and not server.keys
        monkeypatch.setenv("SSL_CERT_FILE", pem)
        assert endpoint(server).log_likelihood(pairs(1)) == pytest.approx([by_hand(*pairs(1)[0])])
