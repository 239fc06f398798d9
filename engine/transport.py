"""Requests to one OpenAI-compatible server: kept connections, retries, a budget, and one pause for all threads.

A call that failed for good is CallFailed, and the run goes on without it. What no other call can mend
(a wrong key, a budget that is spent, no sound answer any more) is LLMError, and the run stops.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import SplitResult, urlsplit

from engine.files import InputError, one_line

Json = dict[str, Any]          # a request's body, or a reply

PAUSES = (0, 0.5, 1, 2, 4, 8)  # seconds before each try of one request
MAX_RETRY_AFTER = 120.0        # seconds that a server may ask to wait
MAX_REPLY_BYTES = 1 << 26      # the log-probs of a whole vocabulary take a third of it


class LLMError(InputError):
    """The LLM cannot do what was asked, or a limit was met: the run stops."""


class CallFailed(Exception):
    """One call failed for good; the run goes on without it."""


class RetryableError(Exception):
    """The server is busy, or not ready: this may pass."""


NO_REPLY = (RetryableError, OSError, http.client.HTTPException)
# or the reply is malformed
MAY_PASS = (*NO_REPLY, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)


class Connection(threading.local):
    """To one host: each thread has one of its own, which its first request opens and its end closes."""

    def __init__(self, address: SplitResult, timeout: float) -> None:
        kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
        self.http = kinds[address.scheme](address.netloc, timeout=timeout)


@dataclass
class Server:
    """One server: a kept-alive connection for each thread, retries, one pause for all threads."""

    url: str
    threads: int
    timeout: float                                                   # seconds
    max_requests: int                                                # 0: no limit

    def __post_init__(self) -> None:
        address = server_address(self.url)
        self.base = address.path.rstrip("/") or "/v1"                # of a bare host, as most servers have it
        self.root = self.base.removesuffix("/v1")                    # llama-server's own routes stand there
        self.url = f"{address.scheme}://{address.netloc}{self.base}"
        self.connection = Connection(address, self.timeout)
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not (self.key.isascii() and self.key.isprintable()):
            raise InputError("OPENAI_API_KEY holds characters that no HTTP header can carry")
        self.headers = {"Content-Type": "application/json"}
        if self.key:
            self.headers["Authorization"] = f"Bearer {self.key}"
        self.probing = False                                         # is each kind of request a trial?
        self.stopped = threading.Event()                             # set: nothing more is sent
        self.resume_at = 0.0                                         # nor before this time
        self.lock = threading.Lock()                                 # of the counts that follow
        self.requests = self.prompt_tokens = self.completion_tokens = 0

    def map(self, work: Callable[[Any], None], items: Sequence[Any]) -> None:
        """work(item) for each item, `threads` at a time; after an exception nothing more is sent."""
        self.stopped = stopped = threading.Event()
        left = iter(items)                                           # whose next() is atomic
        errors: list[Exception] = []

        def worker() -> None:
            try:
                for item in left:
                    if stopped.is_set():
                        break
                    work(item)
            except Exception as error:
                errors.append(error)
                stopped.set()

        # daemons: after Ctrl-C nobody waits for slow answers
        workers = [threading.Thread(target=worker, daemon=True) for _ in range(min(self.threads, len(items)))]
        try:
            for thread in workers:
                thread.start()
            for thread in workers:
                thread.join()
        except KeyboardInterrupt:
            stopped.set()
            raise
        if errors:
            raise errors[0]

    def call(self, path: str, body: Json | None, read: Callable[[Json], Any]) -> Any:
        """read(reply), tried again while that may help; then CallFailed, or LLMError to stop the run."""
        for tries, pause in enumerate(PAUSES, 1):
            if self.stopped.wait(max(pause, self.resume_at - time.monotonic())):
                raise LLMError("the run was stopped")
            try:
                return read(self.exchange(path, body))
            except LLMError:
                raise
            except MAY_PASS as error:
                reason = self.quoted(f"no sound reply ({type(error).__name__}: {error})")
                # a server may refuse a kind of request by a reply that is none, or by hanging up, each time
                replied = not isinstance(error, NO_REPLY) or self.prompt_tokens and isinstance(
                    error, ConnectionResetError)
                if self.probing and (isinstance(error, TimeoutError) or replied and tries > 2):
                    break
            self.connection.http.close()                             # which may be in the midst of a reply
        if replied or not self.probing:
            raise CallFailed(f"{reason}, {tries} times")
        raise LLMError(f"{self.url} does not answer: {reason}; is it busy, or loading its model? "
                       f"(--timeout {self.timeout:g})")

    def exchange(self, path: str, body: Json | None) -> Json:
        """One request: the decoded reply, or an exception that says what its status means."""
        with self.lock:                                              # counted before it is sent: it may be paid for
            if self.max_requests and self.requests >= self.max_requests:
                raise LLMError(f"stopped at --max-requests {self.max_requests}: all answers so far are in the "
                               "cache; the same command with a larger limit goes on from there")
            self.requests += 1
        status, headers, data = self.send(path, json.dumps(body) if body else None)
        if status == 200:
            answer = json.loads(data)
            if not answer.get("error"):
                self.charge(answer)
                return answer
            status = 500                                             # an error inside a 200
        text = data.decode(errors="replace")
        reason = f"HTTP {status}: {self.quoted(headers.get('location') or text)}"
        # a redirection is not followed: the key is for the host that was named
        if status in (401, 402, 403) or 300 <= status < 400 or "insufficient_quota" in text:
            raise LLMError(f"{reason}; mend the URL, the model's name, the key or the account")
        if status in (408, 409, 429) or status > 501:
            seconds = retry_after(headers)
            if seconds > MAX_RETRY_AFTER:
                raise LLMError(f"{reason}; it asks to wait {seconds:.0f} s: run the same command again later")
            self.resume_at = max(self.resume_at, time.monotonic() + seconds)  # all threads wait
            raise RetryableError(reason)
        # a server that calls a wrong request its own error will do so again
        if status == 500 and "validation error" not in text:
            raise ValueError(reason)
        raise CallFailed(reason)

    def send(self, path: str, data: str | None) -> tuple[int, Any, bytearray]:
        """Status, headers and body."""
        deadline, http = time.monotonic() + self.timeout, self.connection.http
        http.request("POST" if data else "GET", path, data, self.headers)
        reply = http.getresponse()
        text = bytearray()
        for part in iter(lambda: reply.read1(65536), b""):
            text += part
            if time.monotonic() > deadline:                          # though no single read was too slow
                raise TimeoutError("the reply came too slowly")
            if len(text) > MAX_REPLY_BYTES:
                raise LLMError(f"the reply has no end: more than {MAX_REPLY_BYTES:,} bytes")
        reply.close()                                                # or the connection takes no other request
        return reply.status, reply.headers, text

    def charge(self, answer: Json) -> None:
        """Count what the server says that it read and wrote."""
        usage = answer.get("usage") or {}
        with self.lock:                                              # llama-server's own names stand second
            self.prompt_tokens += int(usage.get("prompt_tokens") or answer.get("tokens_evaluated") or 0)
            self.completion_tokens += int(usage.get("completion_tokens") or answer.get("tokens_predicted") or 0)

    def quoted(self, text: str) -> str:
        """A server's words for the screen; they may hold the key, terminal controls, and have no end."""
        # subtle: the key goes before the cut, which could leave a part of it
        return one_line(text.replace(self.key, "[key]") if self.key else text, 200)


def server_address(url: str) -> SplitResult:
    """The parts of a server's URL; InputError, without the URL, which may hold a key."""
    with contextlib.suppress(ValueError):                            # a port or a host that can be none
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        if good and re.fullmatch("[!-~]*", url) and not parts.query and "@" not in url:
            return parts
    raise InputError("--llm: give http://HOST:PORT/v1, https://... or offline; a key goes in OPENAI_API_KEY and "
                     "nowhere else")


def retry_after(headers: Any) -> float:
    """Seconds that the server asks to wait, which it gives as such or as a date."""
    value = headers.get("retry-after", "")
    with contextlib.suppress(ValueError):                            # neither: it asks for nothing
        return float(value) if value[:1].isdigit() else parsedate_to_datetime(value).timestamp() - time.time()
    return 0.0
