"""How a small language model ranks a student's top 20: by query likelihood, and by relevance in four ways.

    python tests/lab/rerank_small.py MODEL RETRIEVER QUESTIONS [--first 60] [--no-relevance] [--out FILE.json]
    python tests/lab/rerank_small.py FILE.json                               the table of a finished run

MODEL is what tests/lab/fetch_model.py makes, RETRIEVER and QUESTIONS what `python train.py` writes
(runs/demo/retriever, runs/demo/questions). Relevance: log p of the best label; the expected grade over the three;
log-odds of the best label against the worst, and the same less the passage's own, with "N/A" for the query.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
from record import P_QL
from tables import points, show_file, write_results

import llm
from engine.beir import read_beir
from engine.corpus import shown
from engine.evaluate import encode_beir, ndcg, rankings
from engine.files import run
from engine.local import Local
from gecko import fill, load


def table(results: dict[str, Any]) -> list[str]:
    """The lines of a results file: nDCG@10 of each ranking, and its gain over the retriever."""
    lines = ["| ranking | nDCG@10 | points over the retriever |", "|---|---|---|"]
    first = results["ndcg@10"]["retriever"]
    for name, values in results["ndcg@10"].items():
        over = "" if name == "retriever" else points(values, first)
        lines.append(f"| {name} | {100 * np.mean(values):.1f} | {over} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model", help="what fetch_model.py makes, or a results file to show")
    parser.add_argument("retriever", nargs="?")
    parser.add_argument("questions", nargs="?", help="BEIR folder")
    parser.add_argument("--split", default="dev")
    parser.add_argument("--first", type=int, default=60, help="questions (%(default)s)")
    parser.add_argument("-N", type=int, default=20)
    parser.add_argument("--chars", type=int, default=300)
    parser.add_argument("--relevance", action=argparse.BooleanOptionalAction, default=True,
                        help="rank by relevance too, which takes four times as long as query likelihood")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", default="", help="write each question's nDCG@10 to this JSON file")
    args = parser.parse_args()
    if show_file(args.model, table):
        return
    torch.set_num_threads(args.threads)
    beir = read_beir(args.questions, args.split)
    passages = {p["_id"]: shown(p, args.chars) for p in beir.corpus}
    found = rankings(beir, *encode_beir(load(args.retriever), beir, "question answering"))
    found = {query: found[query][:args.N] for query in list(beir.queries)[:args.first]}
    pairs = [(beir.queries[query], key) for query, ids in found.items() for key in ids]
    model = Local(args.model)

    def label_log_p(asked: list[tuple[str, str]]) -> np.ndarray:             # (asked, 3)
        prompts = [fill(llm.P_RC, query=q, passage=passages[key]) for q, key in asked]
        log_p = model.log_likelihood([(prompt, label) for prompt in prompts for label in llm.LABELS])
        return np.array(log_p, float).reshape(len(asked), len(llm.LABELS))

    start = time.monotonic()
    ql = np.array(model.log_likelihood([(fill(P_QL, passage=passages[key]), " " + q) for q, key in pairs]), float)
    print(f"QL of {len(pairs)} pairs: {time.monotonic() - start:.0f} s", flush=True)
    scores: dict[str, Any] = {"retriever": -(np.arange(len(pairs)) % args.N), "QL": ql}
    if args.relevance:
        start = time.monotonic()
        rc = label_log_p(pairs)
        distinct = list(dict.fromkeys(key for _, key in pairs))
        prior = dict(zip(distinct, label_log_p([("N/A", key) for key in distinct]), strict=True))
        print(f"RC of {len(pairs)} pairs and {len(distinct)} priors: {time.monotonic() - start:.0f} s", flush=True)
        odds = rc[:, 0] - rc[:, -1]
        own = np.array([prior[key][0] - prior[key][-1] for _, key in pairs])
        scores |= {"RC: log p of the best label": rc[:, 0],
                   "RC: expected grade": [llm.expected_relevance(list(row)) for row in rc],
                   "RC: log-odds": odds, "RC: log-odds less the passage's own": odds - own}
    ranked: dict[str, list[float]] = {}
    fusions = {name: [name] for name in scores}
    fusions |= {f"QL + {name}": ["QL", name] for name in scores if name != "QL"}
    end = 0
    for query, ids in found.items():
        rows = slice(end, end + len(ids))
        end += len(ids)
        for name, parts in fusions.items():
            R = llm.rrf(*[list(np.asarray(scores[part])[rows]) for part in parts])
            order = sorted(range(len(ids)), key=lambda i: -R[i])
            ranked.setdefault(name, []).append(ndcg([ids[i] for i in order], beir.qrels[query]))
    about = {"model": str(json.loads(Path(args.model, "about.json").read_text())["model"]),
             "questions": len(found), "split": args.split, "N": args.N, "characters": args.chars}
    rounded = {name: np.round(values, 4).tolist() for name, values in ranked.items()}
    print("\n".join(table({"ndcg@10": rounded})))
    if args.out:
        write_results(args.out, about | {"ndcg@10": rounded})


if __name__ == "__main__":
    run(main)
