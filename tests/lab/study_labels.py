"""Where does relabelling start to pay? Table 3 with questions whose answers are known.

    python tests/lab/study_labels.py BEIR-FOLDER... --encoder MODEL --out tests/lab/results/study_labels.jsonl

Questions written by people stand for the generated ones and their gold passage for p_seed. A stated
share of the seeds is then replaced, in a simulation of a generator whose query fits another passage
better: by near neighbours of the gold passage, or (--errors lexical) by what BM25 finds first. Rankers
of different strength rank the 20 candidates; a small encoder is trained on p_seed or on each ranker's
p_1, and measured on the set's test questions. No language model takes part: the rankers are
statistics, an embedding model, and, as the ceiling, the gold itself.
"""

import argparse
import copy
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import data  # noqa: E402
import llm  # noqa: E402
import train  # noqa: E402
from engine import evaluate, runs  # noqa: E402
from engine.files import beir_file, file_beside, read_passages  # noqa: E402
from engine.pairs import chunks, title_body_pair  # noqa: E402
from engine.search import topk  # noqa: E402
from gecko import load  # noqa: E402

SHARES = (0.0, 0.15, 0.3, 0.5)
RANKERS = ("initial retriever", "QL", "BM25", "dense", "QL + dense", "gold")
N, NEIGHBOURS, PAIRS = 20, 3, 30_000
C = train.TrainConfig(batch_size=256, tau=0.1, lr=2e-3, max_length=128)


def study_set(folder, questions, passages):
    """The set's train and test questions, over a corpus of their gold passages and others, at most `passages`."""
    known, test = evaluate.read_beir(folder, "train"), evaluate.read_beir(folder, "test")
    rng = np.random.default_rng(0)

    def some(beir, n):
        ids = [list(beir.queries)[i] for i in rng.permutation(len(beir.queries))[:n]]
        beir.queries, beir.qrels = {i: beir.queries[i] for i in ids}, {i: beir.qrels[i] for i in ids}

    some(known, questions)
    some(test, 500)
    gold = {p for beir in (known, test) for judged in beir.qrels.values() for p in judged}
    corpus = read_passages(beir_file(folder, "corpus.jsonl"))
    others = [p["_id"] for p in corpus if p["_id"] not in gold]
    more = rng.permutation(len(others))[:max(0, passages - len(gold))]
    kept = gold | {others[i] for i in more}
    known.corpus = test.corpus = [p for p in corpus if p["_id"] in kept]
    return known, test


def vectors(folder, known, encoder, cache):
    """The embedding model's unit vectors of the training questions and of the corpus, from the cache if there."""
    path = cache / f"{Path(folder).resolve().name}.npz"
    if not path.is_file():
        model = load(encoder)
        model.max_length = C.max_length
        with torch.autocast("cpu", torch.bfloat16):
            q, P = evaluate.encode_beir(model, known, "question answering", progress="passages")
        with file_beside(path) as new:
            np.savez(new, q=q, P=P)
    found = np.load(path)
    return found["q"], found["P"]


def wrong_seeds(known, P, share, seed, bm25=None):
    """The seed of each question, as a row of the corpus: a gold one, or with probability `share` a wrong one.

    Wrong is one of the gold's nearest neighbours; with bm25, one of those that it ranks first for the question.
    """
    rng, place = np.random.default_rng([seed, 1]), {p["_id"]: i for i, p in enumerate(known.corpus)}
    gold = [sorted(place[i] for i in judged) for judged in known.qrels.values()]
    _, near = topk(P[[g[0] for g in gold]], P, NEIGHBOURS + 10)
    if bm25:
        near = [np.argsort(-bm25.scores(text))[:NEIGHBOURS + 10] for text in known.queries.values()]
    seeds = []
    for right, row in zip(gold, near, strict=True):
        wrong = [i for i in row if i not in right][:NEIGHBOURS]
        seeds.append(int(rng.choice(wrong)) if rng.random() < share else right[0])
    return seeds, gold


def ranker_scores(known, candidates, gold, first, q, P, bm25, offline):
    """{ranker: scores of each question's candidates}; first and q, P: vectors of two embedders."""
    out = {name: [] for name in RANKERS}
    for n, (text, row, right) in enumerate(zip(known.queries.values(), candidates, gold, strict=True)):
        lexical = bm25.scores(text)[row].tolist()
        ql = offline.query_likelihood([(text, known.corpus[i]) for i in row])
        own, dense = ((passages[row] @ queries[n]).tolist() for queries, passages in (first, (q, P)))
        for name, s in zip(RANKERS, (own, ql, lexical, dense, llm.rrf(ql, dense),
                                    [s + 9 * (i in right) for s, i in zip(dense, row, strict=True)]), strict=True):
            out[name].append(s)
    return out


def run(folder, sizes, encoder, cache, seed, out, done, steps, errors):
    """All shares of wrong seeds and all rankers on one set under one seed; each ranker is a line of `out`."""
    name = Path(folder).resolve().name + ", lexical errors" * (errors == "lexical")
    shares = SHARES[errors == "lexical":]                            # without errors both are the same
    if all((name, seed, share, ranker) in done for share in shares for ranker in RANKERS):
        return
    known, test = study_set(folder, *sizes)
    q, P = vectors(folder, known, encoder, cache)
    texts, questions = [p["text"] for p in known.corpus], list(known.queries.values())
    pairs = title_body_pairs(known.corpus, seed)
    pre = train.untrained(known.corpus, pairs, seed)
    train.train(pre, "prefinetune", [pairs], replace(C, lr=1e-2, steps=150, seed=seed), title=f"{name}: pre")
    bm25, offline = evaluate.BM25(known.corpus), llm.Offline(known.corpus, None, list(llm.TASKS))

    def trained(positives, title):
        """The encoder trained on these labels, without hard negatives, and its nDCG@10 on the test questions."""
        rows = [data.record("question answering", text, data.side(known.corpus[p]))
                for text, p in zip(questions, positives, strict=True)]
        model = copy.deepcopy(pre)
        train.train(model, "finetune", [rows], replace(C, steps=steps, seed=seed), title=title)
        ranked = evaluate.rankings(test, *evaluate.encode_beir(model, test, "question answering"))
        return model, float(np.mean(evaluate.retrieval_scores(ranked, test)["ndcg@10"]))

    for share in shares:
        if all((name, seed, share, ranker) in done for ranker in RANKERS):
            continue
        start = time.time()
        seeds, gold = wrong_seeds(known, P, share, seed, bm25 if errors == "lexical" else None)
        first, p_seed = trained(seeds, f"{name} {share:.0%} p_seed")
        own = evaluate.encode_beir(first, known, "question answering")
        _, near = topk(*own, N)
        candidates = [llm.with_seed(list(map(int, row)), s) for row, s in zip(near, seeds, strict=True)]
        for ranker, scores in ranker_scores(known, candidates, gold, own, q, P, bm25, offline).items():
            if (name, seed, share, ranker) in done:
                continue
            picked = [llm.relabel(s, [texts[i] for i in row]) for s, row in zip(scores, candidates, strict=True)]
            p_1 = [row[a] for row, (a, _) in zip(candidates, picked, strict=True)]
            order = [[row[i] for i in np.argsort(-np.array(s))] for s, row in zip(scores, candidates, strict=True)]
            quality = [evaluate.ndcg(row, dict.fromkeys(right, 1)) for row, right in zip(order, gold, strict=True)]
            row = {"set": name, "seed": seed, "wrong": share, "ranker": ranker, "questions": len(questions),
                   "ranker_ndcg": np.mean(quality),
                   "seed_right": np.mean([i in right for i, right in zip(seeds, gold, strict=True)]),
                   "p1_right": np.mean([i in right for i, right in zip(p_1, gold, strict=True)]),
                   "changed": np.mean(np.array(p_1) != np.array(seeds)), "p_seed": p_seed,
                   "p_1": trained(p_1, f"{name} {share:.0%} {ranker}")[1]}
            row = {k: round(float(v), 4) if isinstance(v, float) else v for k, v in row.items()}
            print(json.dumps(row), flush=True)
            with open(out, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        print(f"{name}, {share:.0%} wrong, seed {seed}: {time.time() - start:.0f} s", flush=True)


def title_body_pairs(corpus, seed):
    rng, pieces = np.random.default_rng(seed), [c for p in corpus for c in chunks(p)]
    made = (title_body_pair(pieces[i], rng) for i in rng.integers(len(pieces), size=PAIRS))
    return [data.record("search result", query, {"title": title, "text": text})
            for query, title, text in made if query.strip() and text.strip()]


# --------------------------------------------------------------------------------------------------
# What it says


def means(rows):
    """{(set, wrong, ranker): {measure: mean over seeds}}, with the gain of p_1 over p_seed in points."""
    groups = {}
    for r in rows:
        groups.setdefault((r["set"], r["wrong"], r["ranker"]), []).append(r)
    return {key: {**{m: float(np.mean([r[m] for r in group])) for m in ("ranker_ndcg", "seed_right", "p1_right")},
                  "gain": float(np.mean([100 * (r["p_1"] - r["p_seed"]) for r in group])),
                  "spread": float(np.std([100 * (r["p_1"] - r["p_seed"]) for r in group], ddof=1))
                  if len(group) > 1 else 0.0} for key, group in groups.items()}


def study_text(rows):
    """The study as a Markdown table: the ranker, how often it is right, and what relabelling gains."""
    found = means(rows)
    lines = ["| set | ranker | its nDCG@10 | its p_1 is right | " + " | ".join(
        f"gain, {share:.0%} wrong" for share in SHARES) + " |", "|---" * (4 + len(SHARES)) + "|"]
    for name in dict.fromkeys(s for s, _, _ in found):
        for ranker in RANKERS:
            cells = [found.get((name, share, ranker)) for share in SHARES]
            there = [c for c in cells if c]
            lines.append(f"| {name} | {ranker} | {np.mean([c['ranker_ndcg'] for c in there]):.3f} | "
                         f"{np.mean([c['p1_right'] for c in there]):.0%} | " + " | ".join(
                             f"{c['gain']:+.1f}" + f" ± {c['spread']:.1f}" * (c["spread"] > 0) if c else ""
                             for c in cells) + " |")
    return "\n".join(lines) + "\n"


def chart(rows):
    """Gain against the ranker's nDCG, and against how much more often than the seed its p_1 is right."""
    from matplotlib import pyplot

    found = means(rows)
    names = list(dict.fromkeys(s for s, _, _ in found))
    colors = dict(zip(SHARES, ("#2c7bb6", "#7fbf7b", "#fdae61", "#d7191c"), strict=True))
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.2), layout="constrained", sharey=True)
    for (name, share, _), v in found.items():
        for axis, x in zip(axes, (v["ranker_ndcg"], v["p1_right"] - v["seed_right"]), strict=True):
            axis.scatter(x, v["gain"], color=colors[share], marker="os^D"[names.index(name) % 4], s=34,
                         edgecolor="black", linewidth=0.4)
    axes[0].set(xlabel="the ranker's nDCG@10 on the candidates",
                ylabel="points of p_1 over p_seed, nDCG@10 on test")
    axes[1].set(xlabel="share of p_1 that is right, less share of seeds that is right")
    for axis in axes:
        axis.axhline(0, color="black", linewidth=0.8)
    axes[1].axvline(0, color="black", linewidth=0.8)
    for n, name in enumerate(names):
        axes[0].scatter([], [], color="white", edgecolor="black", marker="os^D"[n % 4], label=name)
    for share, color in colors.items():
        axes[0].scatter([], [], color=color, marker="s", label=f"{share:.0%} of seeds wrong")
    figure.legend(fontsize=8, loc="outside right upper")
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folders", nargs="+", help="BEIR folders with train and test")
    parser.add_argument("--encoder", required=True, help="model folder: ranker `dense`, and what is near the gold")
    parser.add_argument("--cache", default="runs/vectors", help="folder of its vectors (%(default)s)")
    parser.add_argument("--out", default="tests/lab/results/study_labels.jsonl", help="lines are added")
    parser.add_argument("--seeds", type=int, default=3, help="runs of everything (%(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="of each training (%(default)s)")
    parser.add_argument("--questions", type=int, default=3000, help="at most (%(default)s)")
    parser.add_argument("--passages", type=int, default=8000, help="of the corpus, at most, gold ones apart")
    parser.add_argument("--errors", choices=("neighbours", "lexical"), default="neighbours",
                        help="what stands for a gold seed that is replaced (%(default)s)")
    parser.add_argument("--encode-only", action="store_true", help="fill the cache and stop")
    args = parser.parse_args()
    cache, out, sizes = Path(args.cache), Path(args.out), (args.questions, args.passages)
    if args.encode_only:
        for folder in args.folders:
            q, P = vectors(folder, study_set(folder, *sizes)[0], args.encoder, cache)
            print(folder, q.shape, P.shape, flush=True)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    for seed in range(args.seeds):
        for folder in args.folders:
            done = {(r["set"], r["seed"], r["wrong"], r["ranker"]) for r in runs.whole_rows(out)}
            run(folder, sizes, args.encoder, cache, seed, out, done, args.steps, args.errors)
    print(study_text(runs.whole_rows(out)))


if __name__ == "__main__":
    main()
