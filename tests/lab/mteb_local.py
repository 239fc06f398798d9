"""Tasks of the real mteb package from files on disk, for where there is no network.

    python tests/lab/mteb_local.py --model DIR [--dim N] [--out DIR] KIND:PATH...

    KIND            PATH (JSONL, plain or .gz)
    retrieval       a BEIR folder (its test split)
    reranking       {"query", "positive": [...], "negative": [...]}
    sts             {"sentence1", "sentence2", "score"}
    pairs           {"sentence1", "sentence2", "label": 0 or 1}
    classification  a folder of train.jsonl(.gz) and test.jsonl: {"text", "label"}
    clustering      {"text", "label"}; ten draws of at most 1,000, as mteb's own sets have splits
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
from engine.beir import read_beir  # noqa: E402
from engine.files import read_jsonl, run  # noqa: E402
from engine.mteb import ForMteb, mteb_scores, table_9  # noqa: E402
from gecko import format_query, load  # noqa: E402


def task(kind, name, data, main_score):
    """A task object of mteb's class for the kind, its data already there: {split: rows or parts}."""
    from datasets import Dataset
    from mteb import TaskMetadata, abstasks
    from mteb.abstasks.clustering_legacy import AbsTaskClusteringLegacy

    base = {"Retrieval": abstasks.AbsTaskRetrieval, "Reranking": abstasks.AbsTaskRetrieval,
            "STS": abstasks.AbsTaskSTS, "Classification": abstasks.AbsTaskClassification,
            "Clustering": AbsTaskClusteringLegacy, "PairClassification": abstasks.AbsTaskPairClassification}[kind]
    metadata = TaskMetadata(
        name=name, type=kind, main_score=main_score, description="from local files", reference=None,
        dataset={"path": "local", "revision": "1"}, category="t2t", modalities=["text"], eval_splits=["test"],
        eval_langs=["eng-Latn"], date=None, domains=None, task_subtypes=None, license=None,
        annotations_creators=None, dialect=None, sample_creation=None, bibtex_citation=None)
    made = type(name, (base,), {"metadata": metadata, "min_score": 0, "max_score": 5})()
    if base is abstasks.AbsTaskRetrieval:
        made.dataset = {"default": {"test": {**data, "corpus": Dataset.from_list(data["corpus"]),
                                             "queries": Dataset.from_list(data["queries"])}}}
    else:
        made.dataset = {split: Dataset.from_list(rows) for split, rows in data.items()}
    made.data_loaded = True
    return made


def retrieval(name, corpus, queries, qrels, top_ranked=None):
    """corpus: rows of _id, title, text; queries: {id: text}; qrels: {query: {passage: grade}}."""
    data = {"corpus": [{"id": p["_id"], "title": p["title"], "text": p["text"]} for p in corpus],
            "queries": [{"id": i, "text": text} for i, text in queries.items()],
            "relevant_docs": qrels, "top_ranked": top_ranked}
    return task("Reranking" if top_ranked else "Retrieval", name, data,
                "map_at_1000" if top_ranked else "ndcg_at_10")


def reranking(name, rows):
    ids = {text: f"d{i}" for i, text in enumerate(dict.fromkeys(
        text for r in rows for text in [*r["positive"], *r["negative"]]))}
    return retrieval(
        name, [{"_id": i, "title": "", "text": text} for text, i in ids.items()],
        {f"q{n}": r["query"] for n, r in enumerate(rows)},
        {f"q{n}": {ids[text]: 1 for text in r["positive"]} for n, r in enumerate(rows)},
        {f"q{n}": [ids[t] for t in dict.fromkeys([*r["positive"], *r["negative"]])] for n, r in enumerate(rows)})


def sts(name, rows):
    return task("STS", name, {"test": [{k: r[k] for k in ("sentence1", "sentence2", "score")} for r in rows]},
                "cosine_spearman")


def pairs(name, rows):
    return task("PairClassification", name, {"test": [
        {"sentence1": r["sentence1"], "sentence2": r["sentence2"], "labels": int(r["label"])} for r in rows]},
        "max_ap")


def classification(name, train_rows, test_rows):
    labels = {x: i for i, x in enumerate(sorted({str(r["label"]) for r in train_rows}))}
    splits = {split: [{"text": r["text"], "label": labels[str(r["label"])]} for r in rows]
              for split, rows in (("train", train_rows), ("test", test_rows))}
    return task("Classification", name, splits, "accuracy")


def clustering(name, rows, draws=10, size=1000):
    labels = {x: i for i, x in enumerate(sorted({str(r["label"]) for r in rows}))}
    rng = np.random.default_rng(0)
    parts = [[rows[i] for i in rng.permutation(len(rows))[:size]] for _ in range(draws)]
    return task("Clustering", name, {"test": [{"sentences": [r["text"] for r in part],
                                               "labels": [labels[str(r["label"])] for r in part]}
                                              for part in parts]}, "v_measure")


def from_path(item):
    """KIND:PATH -> a task, under the name of its folder."""
    kind, _, path = item.partition(":")
    path = Path(path)
    name = (path if path.is_dir() else path.parent).name

    def rows(file):
        return [row for _, row in read_jsonl(file if file.exists() else file.with_name(file.name + ".gz"))]

    if kind == "retrieval":
        beir = read_beir(path)
        return retrieval(name, beir.corpus, beir.queries, beir.qrels)
    if kind == "classification":
        return classification(name, rows(path / "train.jsonl"), rows(path / "test.jsonl"))
    return {"reranking": reranking, "sts": sts, "pairs": pairs, "clustering": clustering}[kind](name, rows(path))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", metavar="KIND:PATH")
    parser.add_argument("--model", required=True)
    parser.add_argument("--dim", type=int)
    parser.add_argument("--out")
    args = parser.parse_args()
    model = ForMteb(load(args.model), Path(args.model).resolve().name, format_query, args.dim)
    for item in args.tasks:
        made = from_path(item)
        for name, score in mteb_scores(model, [made], args.out).items():
            task_9 = table_9(name, made.metadata.type)
            print(f"{made.metadata.type:18} {name:20} {task_9[0]:20} "
                  + "  ".join(f"{k} {v:.4f}" for k, v in score.items()), flush=True)


if __name__ == "__main__":
    run(main)
