"""Query likelihood of the same weights three ways: transformers read plainly, `hf:`, and a server; and how fast.

    python tests/lab/fetch_model.py qwen DIR
    python tests/lab/serve.py DIR/model.gguf                   in another terminal; llama-server, prints the URL
    python tests/lab/compare_llm.py DIR URL [--queries 8] [-N 5]

The pairs are the record's first questions, each with its first N candidates. A server that runs beside takes its
share of the machine only while it is asked.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch

import llm
from engine.corpus import builtin_corpus, shown
from engine.endpoint import Endpoint
from engine.files import run
from engine.local import Local
from engine.recorded import Recorded
from gecko import fill

Pairs = list[tuple[str, str]]


def plainly(model: Local, pairs: Pairs) -> list[float]:
    """One pair at a time, all of it read anew: the sum of log p of the text's tokens."""
    sums = []
    for prefix, text in pairs:
        tokens = model.tokens(prefix + text)
        start = len(model.tokens(prefix))
        with torch.inference_mode():
            logits = model.model(torch.tensor([tokens])).logits[0].float()       # (K, V)
        log_p = logits.log_softmax(dim=1)
        sums.append(sum(log_p[i - 1, tokens[i]].item() for i in range(start, len(tokens))))
    return sums


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model", help="the folder that fetch_model.py made")
    parser.add_argument("url", help="of a server with the same weights")
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("-N", type=int, default=5, help="candidates a query (%(default)s)")
    parser.add_argument("--chars", type=int, default=300)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    corpus = builtin_corpus()
    by_id = {p["_id"]: p for p in corpus}
    rows = Recorded(corpus).rows[:args.queries]
    pairs = [(fill(llm.P_QL, passage=shown(by_id[key], args.chars)), " " + row["query"])
             for row in rows for key, _ in row["ql"][:args.N]]
    model, server = Local(args.model), Endpoint(args.url, "", llm.TRIALS, threads=2)
    server.can("log_likelihood")                                                 # asked before the clock runs
    ways: dict[str, Callable[[Pairs], list[float | None]]] = {
        "transformers, plainly": lambda pairs: list(plainly(model, pairs)),
        "hf:": model.log_likelihood, "server": server.log_likelihood}
    sums, plain = {}, np.zeros(0)
    for name, way in ways.items():
        start = time.monotonic()
        sums[name] = np.array(way(pairs), float)
        seconds = time.monotonic() - start
        plain = sums["transformers, plainly"]
        off = abs(sums[name] / plain - 1)
        same = np.mean([first(sums[name], i, args.N) == first(plain, i, args.N) for i in range(len(rows))])
        print(f"{name:22} {len(pairs) / seconds:6.2f} pairs/s   off by {np.median(off):.2%}, at most "
              f"{off.max():.2%}   same p_1 in {same:.0%} of {len(rows)} queries", flush=True)


def first(sums: np.ndarray, row: int, N: int) -> int:
    """Which of a query's N candidates comes first."""
    return int(np.argmax(sums[row * N:(row + 1) * N]))


if __name__ == "__main__":
    run(main)
