"""A real language model answers for the built-in corpus, and what it says is kept: engine/recorded.jsonl.gz.

    python tests/lab/record.py run MODEL RETRIEVER LOG --queries 1500       hours on a CPU; stop it, start it again
                                                  --onto engine/recorded.jsonl.gz         where LOG is new
    python tests/lab/record.py pack LOG engine/recorded.jsonl.gz            the rows that are complete, any time

MODEL is what tests/lab/fetch_model.py makes, RETRIEVER the recipe's initial retriever (runs/demo/retriever).
LOG only grows, a line an answer, so that a kill loses a minute. Rows are completed in their order: for each
candidate of the next row, all queries of the chunk that have it are scored, since a passage is read once for all.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch

from engine.corpus import builtin_corpus, shown
from engine.files import InputError, read_json, read_jsonl, run, write_jsonl
from engine.local import Local
from engine.recorded import digest
from engine.search import topk
from gecko import Gecko, fill, format_query, load
from llm import parse_generation

Passage = dict[str, str]

# For a small model: a completion, no chat, and examples of this corpus's own domain but none of its passages.
HEAD = ("Documentation passages. For each, a search task and what a programmer types who needs the passage and "
        "does not know its name.\n\n")
EXAMPLES = [
    ("numpy.linalg.inv Compute the inverse of a matrix. Given a square matrix a, return the matrix ainv satisfying "
     "a @ ainv = eye(a.shape[0]).",
     "Given a question, find the function that answers it",
     "how do I invert a matrix"),
    ("pandas.DataFrame.dropna Remove missing values.",
     "Given a description of a problem, find the documentation that solves it",
     "my table has empty cells and I want those rows gone"),
    ("requests.Session.verify SSL Verification default. If verify is set to False, requests will accept any TLS "
     "certificate presented by the server.",
     "Given a few search words, find a documentation page",
     "ignore invalid https certificate"),
    ("torch.Tensor.is_contiguous is_contiguous(memory_format=torch.contiguous_format) -> bool Returns True if self "
     "tensor is contiguous in memory.",
     "Given a sentence about a program, find the code that does it",
     "check that all values lie one after another in memory"),
]
P_QG = (HEAD
        + "".join(f"Passage: {p}\nTask: {t}\nQuery: {q}\n\n" for p, t, q in EXAMPLES) + "Passage: {passage}\nTask:")
P_QL = (HEAD.replace("a search task and ", "")
        + "".join(f"Passage: {p}\nQuery: {q}\n\n" for p, _, q in EXAMPLES) + "Passage: {passage}\nQuery:")
STOP = ("\n\n", "\nPassage:")
MAX_WORDS = 25  # of a query; what is longer runs on


def drawn(size: int, limit: int) -> list[int]:
    """Places of the seeds in a corpus of this size: a random order of it, then another."""
    draws: list[int] = []
    while len(draws) < limit:
        draws += np.random.default_rng([0, len(draws)]).permutation(size).tolist()
    return draws[:limit]


def task_and_query(answer: str | None) -> tuple[str, str]:
    """What an answer holds; ValueError that says why it is of no use."""
    if answer is None:
        raise ValueError("the call failed")
    lines = [line for line in answer.split("\n") if line.strip()][:2]
    for mark in ("Task:", "Query:", "Passage:"):                     # a small model runs on in the same line
        lines = [line[:1] + line[1:].partition(f" {mark}")[0] for line in lines]
    task, query = parse_generation("\n".join(lines))
    for _, _, example in EXAMPLES:                                   # or most of its words
        words = set(example.lower().split())
        if len(words & set(query.lower().split())) > 0.7 * len(words):
            raise ValueError("an example's query")
    if not 2 <= len(query.split()) <= MAX_WORDS:
        raise ValueError("a single word, or it runs on")
    return task, query


class Log:
    """LOG's lines as dictionaries; what a kill cut in half is passed over, and dropped by who appends."""

    def __init__(self, path: str, append: bool = False) -> None:
        self.path = Path(path)
        self.header: dict[str, Any] = {}
        self.answers: dict[int, str | None] = {}                     # by the number of the draw
        self.candidates: dict[int, list[str]] = {}
        self.scores: dict[tuple[int, str], float] = {}
        whole = 0
        if self.path.exists():
            for line in self.path.read_bytes().splitlines(keepends=True):
                if not line.endswith(b"\n"):
                    break
                whole += len(line)
                self.take(json.loads(line))
            if append:
                os.truncate(self.path, whole)

    def take(self, row: dict[str, Any]) -> None:
        self.header = row.get("header", self.header)
        self.answers |= {int(n): answer for n, answer in row.get("answers", {}).items()}
        self.candidates |= {int(n): ids for n, ids in row.get("candidates", {}).items()}
        self.scores |= {(n, passage_id): score for n, passage_id, score in row.get("ql", [])}

    def append(self, row: dict[str, Any]) -> None:
        self.take(json.loads(json.dumps(row)))
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def unpack(log: Log, path: Path) -> None:
    """A new LOG goes on from a packed record; answers that were of no use are asked for again."""
    lines = [row for _, row in read_jsonl(path)]
    log.append({"header": lines[0]})
    log.append({"answers": {row["n"]: f" {row['task']}\nQuery: {row['query']}" for row in lines[2:]},
                "candidates": {row["n"]: [key for key, _ in row["ql"]] for row in lines[2:]},
                "ql": [[row["n"], key, score] for row in lines[2:] for key, score in row["ql"]]})


def useful(log: Log, numbers: range) -> dict[int, tuple[str, str]]:
    """Task and query of the draws whose answer is of use."""
    kept = {}
    for n in numbers:
        try:
            kept[n] = task_and_query(log.answers.get(n))
        except ValueError:
            continue
    return kept


def retrieve(log: Log, retriever: Gecko, corpus: list[Passage], C: Any, queries: dict[int, tuple[str, str]],
             seeds: dict[int, str], N: int) -> None:
    """The N nearest passages of each query, its seed in the last place where it was missed."""
    todo = [n for n in queries if len(log.candidates.get(n, [])) < N]
    if not todo:
        return
    q = retriever.encode([format_query(queries[n][1], queries[n][0], retriever.formats) for n in todo])
    _, nearest = topk(q, C, N)
    rows = {}
    for n, places in zip(todo, nearest.tolist(), strict=True):
        ids = [corpus[i]["_id"] for i in places]
        rows[n] = ids if seeds[n] in ids else ids[:-1] + [seeds[n]]
    log.append({"candidates": rows})


def score(log: Log, model: Local, passages: dict[str, Passage], queries: dict[int, tuple[str, str]],
          chars: int, at_once: int = 150) -> None:
    """QL of every candidate, in the rows' order; a passage at hand is read for all queries that have it."""
    wanted: dict[str, list[int]] = {}
    for n in queries:
        for passage_id in log.candidates[n]:
            if (n, passage_id) not in log.scores:
                wanted.setdefault(passage_id, []).append(n)
    batch: list[tuple[int, str]] = []
    total, done, start = sum(map(len, wanted.values())), 0, time.monotonic()
    for last, passage_id in enumerate(wanted, 1):                    # in the order in which rows need them
        batch += [(n, passage_id) for n in wanted[passage_id]]
        if len(batch) < at_once and last < len(wanted):
            continue
        pairs = [(fill(P_QL, passage=shown(passages[p], chars)), " " + queries[n][1]) for n, p in batch]
        values = model.log_likelihood(pairs)
        log.append({"ql": [[n, p, round(v, 2)] for (n, p), v in zip(batch, values, strict=True) if v is not None]})
        done += len(batch)
        print(f"{time.strftime('%H:%M:%S')} scored {done} of {total} pairs, "
              f"{done / (time.monotonic() - start):.2f} a second", flush=True)
        batch = []


def header(args: argparse.Namespace, prompts: str, size: int) -> dict[str, Any]:
    about = read_json(Path(args.model) / "about.json", dict)
    return {"model": about["model"], "licence": about["licence"], "weights": about, "opened in": "bfloat16",
            "prompts": prompts, "P_QG": P_QG, "P_QL": P_QL, "characters": args.chars,
            "temperature": args.temperature, "draws": f"drawn({size}, ...)", "corpus": size,
            "python": sys.version.split()[0], "date": time.strftime("%Y-%m-%d"),
            "command": "python tests/lab/record.py run"}


def record(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    corpus = builtin_corpus()
    passages = {p["_id"]: p for p in corpus}
    log = Log(args.log, append=True)
    prompts = digest(P_QG + P_QL + str(args.chars))
    if not log.header and args.onto:
        unpack(log, Path(args.onto))
    if not log.header:
        log.append({"header": header(args, prompts, len(corpus))})
    if log.header["prompts"] != prompts:
        raise InputError(f"{args.log}: begun with other prompts or another number of characters; name a new LOG")
    if log.header["corpus"] != len(corpus):
        raise InputError(f"{args.log}: begun with {log.header['corpus']} passages, here are {len(corpus)}; "
                         "use the Python that it was begun with, or name a new LOG")
    retriever = load(args.retriever)
    C = retriever.encode_passages([p["text"] for p in corpus], [p["title"] for p in corpus])
    model = Local(args.model, args.temperature, max_tokens=44, stop=STOP, rows=args.rows)
    draws = drawn(len(corpus), args.queries)
    first = 0
    while first < args.queries:
        size = args.first if first == 0 else args.chunk              # small: soon of use; large: cheaper
        numbers = range(first, min(first + size, args.queries))
        first = numbers.stop
        todo = [n for n in numbers if n not in log.answers]
        for start in range(0, len(todo), args.rows):
            some = todo[start:start + args.rows]
            texts = [shown(corpus[draws[n]], args.chars) for n in some]
            answers = model.complete([fill(P_QG, passage=text) for text in texts], some)
            log.append({"answers": dict(zip(some, answers, strict=True))})
            print(f"{time.strftime('%H:%M:%S')} wrote {some[0]} to {some[-1]}", flush=True)
        queries = useful(log, numbers)
        seeds = {n: corpus[draws[n]]["_id"] for n in queries}
        retrieve(log, retriever, corpus, C, queries, seeds, args.N)
        score(log, model, passages, queries, args.chars)


def pack(args: argparse.Namespace) -> None:
    """Complete rows of LOG, and a digest of each passage that they name."""
    log, corpus = Log(args.log), builtin_corpus()
    passages = {p["_id"]: p for p in corpus}
    draws = drawn(log.header["corpus"], max(log.answers) + 1)
    rows, reasons, named = [], Counter[str](), set()
    for n, answer in sorted(log.answers.items()):
        try:
            task, query = task_and_query(answer)
        except ValueError as error:
            reasons[str(error)] += 1
            continue
        ids = log.candidates.get(n, [])
        scored = [[passage_id, log.scores.get((n, passage_id))] for passage_id in ids]
        if not ids or any(value is None for _, value in scored):
            reasons["not scored yet"] += 1
            continue
        seed_id = corpus[draws[n]]["_id"]
        rows.append({"n": n, "seed_id": seed_id, "task": task, "query": query, "ql": scored})
        named |= {*ids, seed_id}
    texts = {name: digest(shown(passages[name], log.header["characters"])) for name in sorted(named)}
    header = log.header | {"rows": len(rows), "left out": dict(reasons)}
    write_jsonl(args.out, [header, {"digests": texts}, *rows])
    first = sum(max(row["ql"], key=lambda pair: pair[1])[0] == row["seed_id"] for row in rows)
    nearest = sum(row["ql"][0][0] == row["seed_id"] for row in rows)
    print(f"{args.out}: {len(rows)} rows, {Path(args.out).stat().st_size / 1e6:.2f} MB; left out {dict(reasons)}")
    print(f"the seed comes first by QL in {first / max(len(rows), 1):.1%}, by the retriever in "
          f"{nearest / max(len(rows), 1):.1%} of them")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    commands = parser.add_subparsers(required=True)
    runner = commands.add_parser("run", help="let MODEL answer")
    runner.add_argument("model", help="folder, as tests/lab/fetch_model.py makes it")
    runner.add_argument("retriever", help="folder of the initial retriever")
    runner.add_argument("log", help="JSONL to append to")
    runner.add_argument("--queries", type=int, default=1500)
    runner.add_argument("--first", type=int, default=200, help="passages in the first chunk (%(default)s)")
    runner.add_argument("--chunk", type=int, default=400, help="and in each other one (%(default)s)")
    runner.add_argument("-N", type=int, default=20, help="candidates a query (%(default)s)")
    runner.add_argument("--chars", type=int, default=300, help="characters of a passage that the model is shown")
    runner.add_argument("--temperature", type=float, default=0.6)
    runner.add_argument("--rows", type=int, default=64, help="queries written at a time (%(default)s)")
    runner.add_argument("--onto", default="", help="a packed record that a new LOG goes on from")
    runner.add_argument("--threads", type=int, default=2)
    runner.set_defaults(do=record)
    packer = commands.add_parser("pack", help="write the record")
    packer.add_argument("log")
    packer.add_argument("out")
    packer.set_defaults(do=pack)
    args = parser.parse_args()
    args.do(args)


if __name__ == "__main__":
    run(main)
