"""How busy the client keeps a server, and how its memory grows: a local server with a latency of its own.

    python tests/lab/bench_llm.py [--latency 0.1] [--calls 100000]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
import llm  # noqa: E402
from engine.endpoint import Endpoint  # noqa: E402


async def serve(latency: float, port: Any) -> None:
    """Echo for one prompt a request: what follows its last colon is one token."""

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                size = int(head.split("content-length:")[1].split("\r\n")[0])
                prompt = json.loads(await reader.readexactly(size))["prompt"]
                await asyncio.sleep(latency)
                at = prompt.rindex(":") + 1
                head = [prompt[i:min(i + 12, at)] for i in range(0, at, 12)]
                data = json.dumps({"choices": [{"text": prompt + "!", "logprobs": {
                    "tokens": ["<s>", *head, prompt[at:], "!"],
                    "token_logprobs": [None, *[-1.0] * len(head), -float(len(prompt)), -1.0]}}],
                    "usage": {"prompt_tokens": 2 + len(head), "completion_tokens": 1}}).encode()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(client, "127.0.0.1", 0, backlog=256)
    port.put(server.sockets[0].getsockname()[1])
    await server.serve_forever()


def run_server(latency: float, port: Any) -> None:
    asyncio.run(serve(latency, port))


def rss() -> float:
    """MiB of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2 ** 20


def language_model(url: str, threads: int, cache: Path | None = None) -> llm.LanguageModel:
    e = Endpoint(url, "tiny", llm.TRIALS, threads)
    e.capabilities = {"log_likelihood": (("echo", {}), "")}
    if cache:
        e.keep_in(cache)
    return llm.LanguageModel(e)


def calls(model: llm.LanguageModel, first: int, count: int) -> None:
    """QL for one query and `count` passages, each asked for the first time."""
    got = model.query_likelihood([("what is tea", {"title": "", "text": f"Tea number {n:09d} is a drink."})
                                  for n in range(first, first + count)])
    assert None not in got and len(got) == count


def throughput(url: str, latency: float, seconds: float = 4.0) -> list[tuple[int, float, float]]:
    """(C, calls a second, the share of C / latency) for C threads."""
    out = []
    for C in (1, 8, 64):
        e = language_model(url, C)
        count = int(C * seconds / latency)
        start, cpu = time.perf_counter(), time.process_time()
        calls(e, 0, count)
        rate = count / (time.perf_counter() - start)
        out.append((C, rate, rate * latency / C))
        print(f"{C:4d} {rate:10.1f} {C / latency:10.1f} {out[-1][2]:8.1%} "
              f"{1e3 * (time.process_time() - cpu) / count:10.2f}", flush=True)
    return out


def memory(url: str, total: int, cache: Path | None, block: int = 5120) -> list[float]:
    """MiB in memory after each block, as `mine` works through its queries."""
    e, out = language_model(url, 16, cache), []
    start = time.perf_counter()
    for a in range(0, total, block):
        calls(e, a, min(block, total - a))
        out.append(rss())
    kept = f"{cache.stat().st_size / 2 ** 20:.1f} MiB on disk" if cache else "none"
    print(f"cache {kept}: {total:,} calls in {time.perf_counter() - start:.1f} s; in memory "
          f"{out[0]:.1f} MiB after {block:,}, {out[len(out) // 2]:.1f} half way, {out[-1]:.1f} at the end")
    return out


def server_process(latency: float) -> tuple[Any, str]:
    context = multiprocessing.get_context("spawn")
    port = context.Queue()
    process = context.Process(target=run_server, args=(latency, port), daemon=True)
    process.start()
    return process, f"http://127.0.0.1:{port.get(timeout=60)}/v1"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--latency", type=float, default=0.1, help="seconds an answer takes (%(default)s)")
    parser.add_argument("--calls", type=int, default=100_000, help="for the memory (%(default)s)")
    args = parser.parse_args()
    process, url = server_process(args.latency)
    print(f"latency {args.latency} s\n   C    calls/s  C/latency    share  CPU ms/call")
    throughput(url, args.latency)
    process.kill()
    process, url = server_process(0.0)
    memory(url, args.calls, None)
    with tempfile.TemporaryDirectory() as folder:
        memory(url, args.calls, Path(folder) / "cache.jsonl")
    process.kill()


if __name__ == "__main__":
    main()
