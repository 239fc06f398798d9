"""Adaptation without labels: FRet on SciFact's abstracts, generated, judged and trained on a CPU.

    python tests/lab/run_scifact.py SCIFACT --init MODEL --out runs/scifact

SCIFACT is the BEIR folder (corpus.jsonl, queries.jsonl, qrels/test.tsv), MODEL the folder of
all-MiniLM-L6-v2. Only the abstracts are trained on: no claim of either split, no label. Queries and
judgements are `offline`'s statistics, no LLM's. Every stage leaves a file in --out, so a stopped run
goes on. What is chosen (the settings below; how far to move from the first weights) is chosen on
tests/lab/scifact_dev.tsv: claims, some of them false, that a language model wrote from 98 random abstracts;
nothing trains on them. Test is read once a run.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import llm
import train
from data import Record
from engine import evaluate
from engine.beir import Beir, read_beir
from engine.files import file_beside, read_jsonl, read_passages, run
from engine.offline import Offline
from engine.search import topk
from gecko import Gecko, load, save

TASK = "fact checking"      # Table 9's for SciFact; an encoder without prompts ignores it
QUERIES, N = 6000, 20
SETTINGS = train.TrainConfig(batch_size=64, steps=128, lr=5e-5, tau=0.05, max_length=256, warmup=0.1,
                             precision="bf16", save_every=16, resume=True)
FROZEN, LEAF, ALPHAS = 2, 128, (1.0, 0.5)


class Cached(Gecko):
    """A model that computes in bf16 and, with a path, keeps each text's vector there."""

    def __init__(self, model: Gecko, path: Path | None = None, length: int = 256) -> None:
        super().__init__(model.encoder, model.tokenizer, length, model.formats, model.dims)
        self.path, self.vectors = path, {}
        if path and path.is_file():
            with np.load(path) as kept:
                self.vectors = dict(zip(kept["keys"].tolist(), kept["x"], strict=True))

    def encode(self, texts: Iterable[str], dim: int | None = None, **how: Any) -> np.ndarray:
        """(len(texts), d); in bf16 whatever `how` says."""
        texts = list(texts)
        keys = {t: hashlib.sha1(t.encode()).hexdigest() for t in texts}
        new = [text for text, key in keys.items() if key not in self.vectors]
        if new:
            x = super().encode(new, precision="bf16")                # (len(new), d)
            self.vectors.update(zip((keys[text] for text in new), x, strict=True))
            self.keep()
        return np.array([self.vectors[keys[t]] for t in texts])

    def keep(self) -> None:
        if self.path:
            with file_beside(self.path) as new, open(new, "wb") as out:
                np.savez(out, keys=np.array(list(self.vectors)), x=np.stack(list(self.vectors.values())))


def encoded(model: Gecko, corpus: Sequence[dict[str, str]]) -> np.ndarray:
    return model.encode_passages([p["text"] for p in corpus], [p["title"] for p in corpus])


# --------------------------------------------------------------------------------------------------
# Training: rows of like topic share a batch


def topical(x: np.ndarray, rows: np.ndarray, leaf: int = LEAF) -> list[np.ndarray]:
    """Rows in groups of about `leaf` of like topic: halved along the principal direction of x (R, d).

    A batch comes from one group (`--mix sets`), so that its in-batch negatives are hard ones.
    """
    if len(rows) < 2 * leaf:
        return [rows]
    centred = x[rows] - x[rows].mean(0)
    first = np.linalg.eigh(centred.T @ centred)[1][:, -1]            # (d)
    order = rows[np.argsort(centred @ first, kind="stable")]
    half = len(order) // 2
    return topical(x, order[:half], leaf) + topical(x, order[half:], leaf)


def fine_tuned(folder: str, rows: list[list[Record]], out: Path) -> Gecko:
    """Eq. 3 on groups of rows; the embeddings and the first layers stay, dropout is off."""
    model = load(folder)
    layers = model.encoder.encoder["layer"]
    for part in (model.encoder.embeddings, *layers[:FROZEN]):
        part.requires_grad_(False)
    for layer in layers:
        layer.dropout = layer.attention_dropout = 0.0
    kept, model.encoder.config.hidden_dropout_prob = model.encoder.config.hidden_dropout_prob, 0.0
    out.mkdir(parents=True, exist_ok=True)
    losses = train.train(model, "finetune", rows, SETTINGS, out=out)
    if len(losses) >= 20:
        print(f"  loss {np.mean(losses[:10]):.3f} -> {np.mean(losses[-10:]):.3f}")
    model.encoder.config.hidden_dropout_prob = kept
    return model


def averaged(a: Gecko, b: Gecko, alpha: float) -> Gecko:
    """Weights (1 - alpha) a + alpha b (WiSE-FT, Wortsman et al. 2022): not of the paper's method."""
    out, first = copy.deepcopy(b), a.encoder.state_dict()
    out.encoder.load_state_dict({k: (1 - alpha) * first[k] + alpha * v
                                 for k, v in b.encoder.state_dict().items()})
    return out


# --------------------------------------------------------------------------------------------------
# Measuring


def dev_set(corpus: list[dict[str, str]], first: Cached, P: np.ndarray) -> Beir:
    """The written claims against a part of the corpus: what BM25 or the embedder ranks high, and the golds."""
    lines = Path(__file__).with_name("scifact_dev.tsv").read_text(encoding="utf-8").splitlines()
    claims = dict(reversed(line.split("\t")) for line in lines)      # claim -> id
    bm25 = evaluate.bm25(corpus)
    _, near = topk(first.encode_queries(list(claims), TASK), P, 20)
    kept = set(near.flatten().tolist()) | {i for q in claims for i in np.argsort(-bm25(q))[:8].tolist()}
    part = [p for i, p in enumerate(corpus) if i in kept or p["_id"] in claims.values()]
    return Beir(part, {q: q for q in claims}, {q: {i: 1} for q, i in claims.items()})


def measure(models: dict[str, Gecko], beir: Beir, ranker: Offline) -> dict[str, Any]:
    """nDCG@10 and recall@100 of each, with the 95 % interval of the gain over the first of the models."""
    by_id = {p["_id"]: p for p in beir.corpus}
    ranked: dict[str, dict[str, list[str]]] = {"BM25": evaluate.bm25_rankings(beir)}
    for name, model in models.items():
        ranked[name] = evaluate.rankings(beir, *evaluate.encode_beir(model, beir, TASK))
        if len(ranked) == 2:                                         # the teacher: its top 100, ranked again
            pairs = {q: [(text, by_id[i]) for i in ranked[name][q]] for q, text in beir.queries.items()}
            scores = {q: llm.rrf(ranker.query_likelihood(p), ranker.relevance(p)) for q, p in pairs.items()}
            ranked["the ranker on its top 100"] = {
                q: [ranked[name][q][i] for i in np.argsort(-np.array(s), kind="stable")]
                for q, s in scores.items()}
    print(f"{len(beir.queries)} claims, {len(by_id)} abstracts: nDCG@10, recall@100, [gain over the first model]")
    table: dict[str, Any] = {}
    base = evaluate.retrieval_scores(ranked[next(iter(models))], beir.qrels)["ndcg@10"]
    for name, lists in ranked.items():
        scores = evaluate.retrieval_scores(lists, beir.qrels)
        low, high = evaluate.paired_bootstrap(base, scores["ndcg@10"])
        table[name] = {k: round(float(np.mean(scores[k])), 4) for k in ("ndcg@10", "recall@100")} | {
            "gain": [round(low, 4), round(high, 4)]}
        print(f"  {name:28} " + "  ".join(f"{table[name][k]:.4f}" for k in ("ndcg@10", "recall@100"))
              + f"  [{low:+.4f}, {high:+.4f}]")
    return table


def table_text(figures: dict[str, Any]) -> str:
    """The table of RESULTS.md: a row a system, in percent, [95 % interval of its gain over all-MiniLM-L6-v2]."""
    lines = ["| | nDCG@10 dev | nDCG@10 test | recall@100 test | gain on test, points |", "|---|---|---|---|---|"]
    for name, dev in figures["dev"].items():
        test, shown = figures["test"].get(name), ["", "", ""]
        if test:
            gain = test["ndcg@10"] - figures["test"]["all-MiniLM-L6-v2"]["ndcg@10"]
            shown = [f"{test[k]:.1%}".rstrip("%") for k in ("ndcg@10", "recall@100")] + [
                f"{100 * gain:+.1f} [{100 * test['gain'][0]:+.1f}, {100 * test['gain'][1]:+.1f}]" if gain else ""]
        lines.append(f"| {name} | {100 * dev['ndcg@10']:.1f} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# The stages


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("scifact", type=Path, help="the BEIR folder")
    parser.add_argument("--init", required=True, help="the folder of all-MiniLM-L6-v2")
    parser.add_argument("--out", type=Path, default=Path("runs/scifact"), help="(%(default)s)")
    parser.add_argument("--dev", action="store_true", help="stop before test")
    args = parser.parse_args()
    out, start = args.out, time.time()
    out.mkdir(parents=True, exist_ok=True)
    clock = out / "seconds.json"                                     # of all runs in this folder
    seconds: dict[str, float] = json.loads(clock.read_text()) if clock.is_file() else {}

    def stage(name: str) -> None:
        nonlocal start
        seconds[name], start = round(seconds.get(name, 0) + time.time() - start, 1), time.time()
        clock.write_text(json.dumps(seconds) + "\n")
        print(f"{name}: {seconds[name]:.0f} s", flush=True)

    corpus = read_passages(Path(args.scifact, "corpus.jsonl"))
    first = Cached(load(args.init), out / "vectors.npz")
    P = encoded(first, corpus)
    stage("encode the abstracts")
    ranker = Offline(corpus, first, list(llm.FREQUENT_TASKS))
    if not (out / "queries.jsonl").is_file():
        written = llm.generate(ranker, corpus, llm.seed_draws(corpus, QUERIES, 0))
        llm.write_kept(out / "queries.jsonl", written, QUERIES, "generate")
    stage("generate")
    if not (out / "mined.jsonl").is_file():
        queries = [row for _, row in read_jsonl(out / "queries.jsonl")]
        first.encode_queries([row["query"] for row in queries], TASK)
        llm.write_kept(out / "mined.jsonl", llm.mine(ranker, first, corpus, queries, N), len(queries), "mine")
    mined = [row for _, row in read_jsonl(out / "mined.jsonl")]
    at = {p["_id"]: i for i, p in enumerate(corpus)}
    rows = llm.labelled(mined, {p["_id"]: p for p in corpus}, "p1", "none")  # p- would cost near half as much again
    groups = topical(P[[at[row["positive_id"]] for row in mined]], np.arange(len(rows)))
    sets = [[rows[i] for i in group] for group in groups]
    changed = np.mean([row["positive_id"] != row["seed_id"] for row in mined])
    print(f"  p+ differs from p_seed in {changed:.1%} of {len(rows)}; {len(sets)} topics")
    stage("mine")
    tuned = fine_tuned(args.init, sets, out / "tuned")
    stage("fine-tune")
    models = {f"+ FRet, weight {a:g}": Cached(averaged(first, tuned, a), out / f"weight-{a:g}.npz")
              for a in ALPHAS}                                       # 1: the tuned model itself
    figures: dict[str, Any] = {"seconds": seconds, "queries": len(mined), "p+ differs": round(float(changed), 4)}
    figures["dev"] = measure({"all-MiniLM-L6-v2": first, **models}, dev_set(corpus, first, P), ranker)
    stage("measure on dev")
    if not args.dev:
        best = max(models, key=lambda name: figures["dev"][name]["ndcg@10"])
        save(models[best], out / "gecko")
        figures["test"] = measure({"all-MiniLM-L6-v2": first, best: models[best]},
                                  read_beir(args.scifact), ranker)
        stage("measure on test")
    with file_beside(out / "scifact.json") as new:
        new.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(table_text(figures) if "test" in figures else "", f"wrote {out / 'scifact.json'}", sep="\n")


if __name__ == "__main__":
    run(main)
