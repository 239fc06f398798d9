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
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
from tables import whole_rows  # noqa: E402

import data  # noqa: E402
import llm  # noqa: E402
import train  # noqa: E402
from engine import evaluate  # noqa: E402
from engine.beir import read_beir  # noqa: E402
from engine.files import file_beside, read_passages  # noqa: E402
from engine.offline import Offline  # noqa: E402
from engine.pairs import chunks, title_body_pair  # noqa: E402
from engine.search import topk  # noqa: E402
from gecko import load  # noqa: E402

SHARES = (0.0, 0.15, 0.3, 0.5)
RANKERS = ("initial retriever", "QL", "BM25", "dense", "QL + dense", "gold")
TASK = "question answering"
N, NEIGHBOURS, PAIRS = 20, 3, 30_000
C = train.TrainConfig(batch_size=256, tau=0.1, lr=2e-3, max_length=128)


def study_set(folder, questions, passages):
    """The set's train and test questions, over a corpus of their gold passages and others, at most `passages`."""
    rng = np.random.default_rng(0)
    known, test = read_beir(folder, "train"), read_beir(folder, "test")
    gold = set()
    for beir, most in ((known, questions), (test, 500)):
        ids = list(beir.queries)
        ids = [ids[i] for i in rng.permutation(len(ids))[:most]]
        beir.queries = {i: beir.queries[i] for i in ids}
        beir.qrels = {i: beir.qrels[i] for i in ids}
        gold.update(*beir.qrels.values())
    corpus = read_passages(Path(folder, "corpus.jsonl"))
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
        q, P = evaluate.encode_beir(model, known, TASK, precision="bf16", progress="passages")
        with file_beside(path) as new:
            np.savez(new, q=q, P=P)
    kept = np.load(path)
    return kept["q"], kept["P"]


def title_body_pairs(corpus, seed):
    rng = np.random.default_rng(seed)
    pieces = chunks(corpus)
    pairs = []
    for i in rng.integers(len(pieces), size=PAIRS):
        query, title, text = title_body_pair(pieces[i], rng)
        if query.strip() and text.strip():
            pairs.append(data.record("search result", query, {"title": title, "text": text}))
    return pairs


class Study:
    """One set under one seed. Passages are numbers: rows of the corpus and of P."""

    def __init__(self, name, known, test, q, P, seed, steps, lexical):
        self.name, self.known, self.test, self.q, self.P = name, known, test, q, P
        self.seed, self.steps, self.lexical = seed, steps, lexical
        self.questions = list(known.queries.values())
        self.texts = [p["text"] for p in known.corpus]
        number = {p["_id"]: i for i, p in enumerate(known.corpus)}
        self.gold = [sorted(number[i] for i in judged) for judged in known.qrels.values()]
        self.bm25 = evaluate.bm25(known.corpus)
        self.offline = Offline(known.corpus, None, [TASK])
        pairs = title_body_pairs(known.corpus, seed)
        self.init = train.untrained(known.corpus, pairs, seed)
        c = replace(C, lr=1e-2, steps=150, seed=seed)
        train.train(self.init, "prefinetune", [pairs], c, title=f"{name}: pre")

    def seeds(self, share):
        """The seed of each question: a gold passage, or with probability `share` a wrong one.

        Wrong is one of the gold's nearest neighbours, or one of those that BM25 ranks first for the question.
        """
        rng = np.random.default_rng([self.seed, 1])
        _, near = topk(self.P[[right[0] for right in self.gold]], self.P, NEIGHBOURS + 10)
        seeds = []
        for question, right, row in zip(self.questions, self.gold, near, strict=True):
            if self.lexical:
                row = np.argsort(-self.bm25(question))
            wrong = [i for i in row[:NEIGHBOURS + 10] if i not in right][:NEIGHBOURS]
            seeds.append(int(rng.choice(wrong)) if rng.random() < share else right[0])
        return seeds

    def trained(self, positives, title):
        """The encoder trained on these labels, without hard negatives, and its nDCG@10 on the test questions."""
        rows = [data.record(TASK, question, data.side(self.known.corpus[p]))
                for question, p in zip(self.questions, positives, strict=True)]
        model = copy.deepcopy(self.init)
        train.train(model, "finetune", [rows], replace(C, steps=self.steps, seed=self.seed), title=title)
        ranked = evaluate.rankings(self.test, *evaluate.encode_beir(model, self.test, TASK))
        return model, float(np.mean(evaluate.retrieval_scores(ranked, self.test.qrels)["ndcg@10"]))

    def scores(self, n, candidates, retriever):
        """Each ranker's scores of question n's candidates; retriever: vectors of the questions and the corpus."""
        question, (own_q, own_P) = self.questions[n], retriever
        ql = self.offline.query_likelihood([(question, self.known.corpus[i]) for i in candidates])
        dense = (self.P[candidates] @ self.q[n]).tolist()
        gold = [s + 9 * (i in self.gold[n]) for s, i in zip(dense, candidates, strict=True)]
        return dict(zip(RANKERS, ((own_P[candidates] @ own_q[n]).tolist(), ql,
                                  self.bm25(question)[candidates].tolist(), dense,
                                  llm.rrf(ql, dense), gold), strict=True))

    def rows(self, share, skip):
        """A row of the results for each ranker that is not in `skip`."""
        seeds = self.seeds(share)
        retriever, p_seed = self.trained(seeds, f"{self.name} {share:.0%} p_seed")
        own = evaluate.encode_beir(retriever, self.known, TASK)
        _, near = topk(*own, N)
        candidates = [llm.ensure_seed(row, s) for row, s in zip(near.tolist(), seeds, strict=True)]
        scores = [self.scores(n, row, own) for n, row in enumerate(candidates)]
        for ranker in RANKERS:
            if ranker in skip:
                continue
            p_1, quality = [], []
            for row, by_ranker, right in zip(candidates, scores, self.gold, strict=True):
                first, _ = llm.relabel(by_ranker[ranker], [self.texts[i] for i in row])
                p_1.append(row[first])
                order = np.argsort(-np.array(by_ranker[ranker]))
                quality.append(evaluate.ndcg([row[i] for i in order], dict.fromkeys(right, 1)))
            _, gained = self.trained(p_1, f"{self.name} {share:.0%} {ranker}")
            figures = {
                "ranker_ndcg": np.mean(quality), "seed_right": self.right(seeds), "p1_right": self.right(p_1),
                "changed": np.mean(np.array(p_1) != np.array(seeds)), "p_seed": p_seed, "p_1": gained}
            yield {"set": self.name, "seed": self.seed, "wrong": share, "ranker": ranker,
                   "questions": len(self.questions)} | {k: round(float(v), 4) for k, v in figures.items()}

    def right(self, passages):
        """The share of the questions whose passage is a gold one."""
        return np.mean([p in gold for p, gold in zip(passages, self.gold, strict=True)])


def run(folder, args, seed):
    """All shares of wrong seeds on one set under one seed; each ranker is a line of --out, made once."""
    lexical = args.errors == "lexical"
    name, shares = Path(folder).resolve().name, SHARES
    if lexical:                                                      # without errors both kinds are the same
        name, shares = f"{name}, lexical errors", SHARES[1:]
    done = {share: set() for share in shares}
    for row in whole_rows(Path(args.out)):
        if (row["set"], row["seed"]) == (name, seed):
            done[row["wrong"]].add(row["ranker"])
    todo = [share for share in shares if done[share] != set(RANKERS)]
    if not todo:
        return
    known, test = study_set(folder, args.questions, args.passages)
    q, P = vectors(folder, known, args.encoder, Path(args.cache))
    study = Study(name, known, test, q, P, seed, args.steps, lexical)
    for share in todo:
        for row in study.rows(share, done[share]):
            print(json.dumps(row), flush=True)
            with open(args.out, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


# --------------------------------------------------------------------------------------------------
# What it says


def means(rows):
    """{(set, wrong, ranker): {measure: mean over seeds}}, with the gain of p_1 over p_seed in points."""
    groups = {}
    for row in rows:
        groups.setdefault((row["set"], row["wrong"], row["ranker"]), []).append(row)
    found = {}
    for key, group in groups.items():
        gains = [100 * (row["p_1"] - row["p_seed"]) for row in group]
        found[key] = {measure: float(np.mean([row[measure] for row in group]))
                      for measure in ("ranker_ndcg", "seed_right", "p1_right")}
        found[key]["gain"] = float(np.mean(gains))
        found[key]["spread"] = float(np.std(gains, ddof=1)) if len(gains) > 1 else 0.0
    return found


def study_text(rows):
    """The study as a Markdown table: the ranker, how often it is right, and what relabelling gains."""
    found = means(rows)
    head = ["set", "ranker", "its nDCG@10", "its p_1 is right", *(f"gain, {share:.0%} wrong" for share in SHARES)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in dict.fromkeys(name for name, _, _ in found):
        for ranker in RANKERS:
            cells = [found.get((name, share, ranker)) for share in SHARES]
            measured = [cell for cell in cells if cell]
            ndcg = np.mean([cell["ranker_ndcg"] for cell in measured])
            right = np.mean([cell["p1_right"] for cell in measured])
            row = [name, ranker, f"{ndcg:.3f}", f"{right:.0%}", *map(gain_text, cells)]
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def gain_text(cell):
    if not cell:
        return ""
    spread = f" ± {cell['spread']:.1f}" if cell["spread"] > 0 else ""
    return f"{cell['gain']:+.1f}{spread}"


RESULTS = Path(__file__).with_name("results")


def real_points(folder=RESULTS):
    """(student, ranker's nDCG@10, points of p_1 over p_seed without negatives) of the recorded language model.

    Its nDCG is that of query likelihood on dev questions by people, ten candidates each (rerank_small.json); the
    gain is the mean over seeds on the recipe's test questions (recorded_*.json).
    """
    ranked = json.loads((folder / "rerank_small.json").read_text(encoding="utf-8"))["ndcg@10"]["QL"]
    points = []
    for path in sorted(folder.glob("recorded_*.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        runs_of = [results["ndcg@10"][case] for case in ("p_1, none", "p_seed, none")]
        seeds = runs_of[0].keys() & runs_of[1].keys()
        p_1, p_seed = (np.mean([of[seed]["test"] for seed in seeds]) for of in runs_of)
        student = results["student"].replace("pre", "bag of words")     # runs/demo/pre
        points.append((student, float(np.mean(ranked)), 100 * float(p_1 - p_seed)))
    return points


def chart(rows):
    """Gain against the ranker's nDCG, and against how much more often than the seed its p_1 is right."""
    from matplotlib import pyplot

    found = means(rows)
    names = list(dict.fromkeys(name for name, _, _ in found))
    markers = dict(zip(names, "os^D", strict=False))
    colors = dict(zip(SHARES, ("#2c7bb6", "#7fbf7b", "#fdae61", "#d7191c"), strict=True))
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.2), layout="constrained", sharey=True)
    for (name, share, _), v in found.items():
        for axis, x in zip(axes, (v["ranker_ndcg"], v["p1_right"] - v["seed_right"]), strict=True):
            axis.scatter(x, v["gain"], color=colors[share], marker=markers[name], s=34, edgecolor="black",
                         linewidth=0.4)
    for (student, x, gain), marker in zip(real_points(), "*P", strict=True):
        axes[0].scatter(x, gain, color="black", marker=marker, s=90, label=f"Qwen2.5-Coder 1.5B, {student} learns")
    axes[0].set(xlabel="the ranker's nDCG@10 on the candidates",
                ylabel="points of p_1 over p_seed, nDCG@10 on test")
    axes[1].set(xlabel="share of p_1 that is right, less share of seeds that is right")
    for axis in axes:
        axis.axhline(0, color="black", linewidth=0.8)
    axes[1].axvline(0, color="black", linewidth=0.8)
    for name in names:
        axes[0].scatter([], [], color="white", edgecolor="black", marker=markers[name], label=name)
    for share, color in colors.items():
        axes[0].scatter([], [], color=color, marker="s", label=f"{share:.0%} of seeds wrong")
    figure.legend(fontsize=8, loc="outside right upper")
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folders", nargs="+", help="BEIR folders with train and test")
    parser.add_argument("--encoder", required=True, help="model folder: ranker `dense`, and what is near the gold")
    parser.add_argument("--cache", default="runs/vectors", help="folder of its vectors (%(default)s)")
    parser.add_argument("--out", default="tests/lab/results/study_labels.jsonl",
                        help="lines are added (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of everything (%(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="of each training (%(default)s)")
    parser.add_argument("--questions", type=int, default=3000, help="at most (%(default)s)")
    parser.add_argument("--passages", type=int, default=8000, help="of the corpus, at most, gold ones apart")
    parser.add_argument("--errors", choices=("neighbours", "lexical"), default="neighbours",
                        help="what stands for a gold seed that is replaced (%(default)s)")
    args = parser.parse_args()
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    for seed in range(args.seeds):
        for folder in args.folders:
            run(folder, args, seed)
    print(study_text(whole_rows(Path(args.out))))


if __name__ == "__main__":
    main()
