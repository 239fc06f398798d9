"""What the paper's scale costs, from a dry run and from rates measured here.

    python tests/lab/scale.py runs/demo --rows 6600000 --prompt-rate 20000 --answer-rate 2000
    python tests/lab/scale.py runs/demo --model DIR        rates of another encoder than the recipe's

Calls and prompt tokens are those of `llm.py generate|mine --dry-run` on the folder's corpus, scaled; bytes
are those of its files, a row; seconds are measured, a text. --prompt-rate and --answer-rate are yours:
tokens a second that your endpoint reads and writes, all its replicas together.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
import llm  # noqa: E402
import train  # noqa: E402
from data import read_records  # noqa: E402
from engine.files import InputError, read_jsonl, read_passages, run  # noqa: E402
from gecko import load, topk  # noqa: E402

PAPER, ANSWER = 6_600_000, 40                                        # rows; tokens of a task and a query


def dry_run(*words: str) -> dict[str, tuple[int, int, int]]:
    """{step: (calls, prompt tokens, of which a prefix cache saves)} as the dry run prints them."""
    printed, sys.argv = io.StringIO(), ["llm.py", *words, "--dry-run"]
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        llm.main()
    found = re.findall(r"^(.*?): ([\d,]+) calls, about ([\d,]+) prompt tokens.*?saves ([\d,]+)",
                       printed.getvalue(), re.M)
    return {name: (int(a.replace(",", "")), int(b.replace(",", "")), int(c.replace(",", "")))
            for name, a, b, c in found}


def hours(seconds: float) -> str:
    return f"{seconds / 3600:,.0f} h" if seconds > 36000 else f"{seconds / 3600:.1f} h"


def the_llm(folder: Path, rows: int, a: argparse.Namespace) -> None:
    corpus, queries = str(folder / "corpus.jsonl"), str(folder / "queries.jsonl")
    have = sum(1 for _ in read_jsonl(queries))
    counted = dry_run("generate", corpus, queries, "--limit", str(have))
    counted |= dry_run("mine", corpus, queries, str(folder / "out.jsonl"), "--model-dir", str(folder / "retriever"))
    steps = {}
    for name, values in counted.items():
        calls, tokens, saved = (round(v * rows / have) for v in values)
        steps[name] = calls, tokens, saved
    print(f"The LLM, at {a.prompt_rate:,.0f} prompt and {a.answer_rate:,.0f} answer tokens a second")
    for name, (calls, tokens, saved) in steps.items():
        answers = calls * (ANSWER if name == "generate" else 1) / a.answer_rate
        whole, rest = (f"{n / 1e9:7.1f} G tokens {hours(n / a.prompt_rate + answers):>8}" for n in (
            tokens, tokens - saved))
        print(f"  {name:9} {calls:>12,} calls  {whole};  with a prefix cache {rest}")
    total = [sum(x) for x in zip(*steps.values(), strict=True)]
    print(f"  {'in all':9} {total[0]:>12,} calls  {total[1] / 1e9:7.1f} G tokens, of which a prefix cache saves "
          f"{total[2] / total[1]:.0%}")


def the_disk(folder: Path, rows: int, passages: int, d: int) -> None:
    print("Disk")
    for name in ("queries", "fret"):
        path = folder / f"{name}.jsonl"
        each = path.stat().st_size / sum(1 for _ in read_jsonl(path))
        print(f"  {name + '.jsonl':16} {rows * each / 1e9:8.1f} GB  ({each:,.0f} bytes a row)")
    cache = len('{"key": "", "value": [-12.345678901234567, 12]}\n') + 64
    print(f"  {'answers (cache)':16} {rows * 40 * cache / 1e9:8.1f} GB  ({cache} bytes a score)")
    print(f"  {'vectors':16} {passages * d * 4 / 1e9:8.1f} GB  (float32, {passages:,} passages of d = {d})")


def the_encoder(folder: Path, rows: int, passages: int, a: argparse.Namespace) -> None:
    model = load(a.model or folder / "gecko")
    d = model.encoder.config.hidden_size
    layers = model.encoder.config.num_hidden_layers
    corpus, B = read_passages(folder / "corpus.jsonl"), 64 if layers else 512
    corpus = corpus[::max(1, len(corpus) // (200 if layers else 2000))]
    records = read_records(folder / "fret.jsonl")[:a.steps * B]
    seconds = min(timed(lambda: model.encode_passages([p["text"] for p in corpus], [p["title"] for p in corpus]))
                  for _ in range(1 if layers else 3)) / len(corpus)
    x = np.random.default_rng(0).standard_normal((65_536, d)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    search = min(timed(lambda: topk(x[:1024], x, 20)) for _ in range(3)) / (1024 * len(x))
    c = train.TrainConfig(batch_size=B, steps=a.steps, dims=str(d))
    with contextlib.redirect_stderr(io.StringIO()):
        training = timed(lambda: train.train(model, "finetune", [records], c)) / (a.steps * B)
    print(f"The encoder here: {1 / seconds:,.0f} passages/s embedded, {1 / training:,.0f} records/s trained, "
          f"{1 / search / 1e6:,.0f} M pairs/s searched (d = {d})")
    print(f"  embed {passages:,} passages {hours(seconds * passages)}, {rows:,} queries {hours(seconds * rows)}; "
          f"search {hours(search * rows * passages)}; train one epoch {hours(training * rows)}")
    the_disk(folder, rows, passages, d)
    tracemalloc.start()
    kept = read_records(folder / "fret.jsonl", candidates=False)
    each = tracemalloc.get_traced_memory()[0] / len(kept)
    print(f"Memory: a record read for training takes {each / 1e3:.1f} kB, {rows:,} {each * rows / 1e9:,.0f} GB")


def timed(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="what `python train.py` wrote")
    parser.add_argument("--rows", type=int, default=PAPER, help="FRet rows (%(default)s, the paper's)")
    parser.add_argument("--passages", type=int, help="of the corpus (default: as many as rows)")
    parser.add_argument("--model", help="an encoder to measure (default: the folder's)")
    parser.add_argument("--steps", type=int, default=10, help="training steps measured (%(default)s)")
    parser.add_argument("--prompt-rate", type=float, default=20_000, help="tokens/s your LLM reads (%(default)s)")
    parser.add_argument("--answer-rate", type=float, default=2_000, help="tokens/s it writes (%(default)s)")
    a = parser.parse_args()
    if not (a.folder / "fret.jsonl").is_file():
        raise InputError(f"{a.folder}: no fret.jsonl there; run python train.py first")
    the_llm(a.folder, a.rows, a)
    the_encoder(a.folder, a.rows, a.passages or a.rows, a)


if __name__ == "__main__":
    run(main)
