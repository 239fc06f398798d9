"""Questions that nothing trains on, and what the recipe prints: each stage's figures on them.

Where nobody labelled anything, the queries generated for some of the passages are held out. Their truth leans:
where the passage that a query was written for, p_seed, is taken for right, an encoder that learned p_1 is marked
wrong for finding it; where p_1 is, the other way. Both figures stand side by side.
"""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.beir import Beir, read_beir
from engine.corpus import Corpus
from engine.documents import near_equal
from engine.evaluate import Scores, bm25_rankings, encode_beir, means, paired_bootstrap, rankings, retrieval_scores
from engine.files import InputError, file_beside, read_jsonl, write_json, write_jsonl
from engine.runs import save_into

Row = dict[str, Any]
Columns = dict[str, Scores]  # a column of the table -> its scores


def write_questions(folder: Path, corpus: Sequence[Row]) -> None:
    """The hand-written questions that the corpus answers, as a BEIR folder; nothing trains on them."""
    names = {p["_id"] for p in corpus}
    queries = []
    qrels = {split: ["query-id\tcorpus-id\tscore"] for split in ("dev", "test")}
    for n, (_, row) in enumerate(read_jsonl(Path(__file__).with_name("questions.jsonl"))):
        answers = [name for name in row["answers"] if name in names]
        if answers:
            queries.append({"_id": str(n), "text": row["query"]})
            qrels[row["split"]] += [f"{n}\t{name}\t1" for name in answers]
    write_jsonl(folder / "corpus.jsonl", corpus)
    write_jsonl(folder / "queries.jsonl", queries)
    for split, lines in qrels.items():
        with file_beside(folder / f"qrels/{split}.tsv") as new:
            new.write_text("\n".join(lines) + "\n", encoding="utf-8")


def on_dev(model: Any, folder: str) -> Callable[[], dict[str, float]] | None:
    """What measures a model on the dev split of a BEIR folder; None without a folder."""
    if not folder:
        return None
    beir = read_beir(folder, "dev")
    return lambda: means(measured(model, [None], {"dev": beir})["dev"])


def cost(llm: Any, corpus: Sequence[Row], draws: Sequence[int], rank: str) -> str:
    """What a recipe will ask of an LLM, by one whose strings ask nobody and count."""
    query, N = "such as a person types who looks for", min(20, len(corpus))
    for start in range(0, len(draws), 256):                          # all prompts at once are gigabytes
        seeds = draws[start:start + 256]
        llm.generate([corpus[i] for i in seeds])
        # which passages will be found is not known yet; their number and mean length are
        pairs = [(f"{query} {i}", corpus[(i + n) % len(corpus)]) for i in seeds for n in range(N)]
        if "ql" in rank.split(","):
            llm.query_likelihood(pairs)
        if "rc" in rank.split(","):
            llm.relevance(pairs)
    minutes = llm.strings.size / 4 / 1000 / 60
    return f"{llm.strings.report()}; {minutes:,.0f} minutes at 1,000 tokens a second"


def mean_of(a: Any, b: Any, share: float) -> Any:
    """Weights share * a + (1 - share) * b (Wortsman et al. 2022): less of what `a` knew is forgotten."""
    mixed = copy.deepcopy(b)
    with torch.no_grad():
        for p, other in zip(mixed.encoder.parameters(), a.encoder.parameters(), strict=True):
            p.lerp_(other, share)
    return mixed


# --------------------------------------------------------------------------------------------------
# Held-out queries


def held_passages(seeds: Sequence[str], share: float, seed: int) -> set[str]:
    """The passages of a share of these ids, one a query, whose queries are held out.

    A passage that is added later moves hardly any other from one side to the other.
    """
    order = sorted(set(seeds), key=lambda name: random.Random(f"held out {seed} {name}").random())
    names = set(order[:round(share * len(order))])
    held = sum(name in names for name in seeds)
    if held < 2 or len(seeds) - held < 2:
        raise InputError(f"{len(seeds)} queries, {held} of them held out: two are needed on each side; give more "
                         "documents, raise --queries, or change --held-out")
    return names


def hold_out(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Queries to train on, and those of a share of the passages, which are asked and never trained on.

    Near-equal queries are left out: of two in training the second, of training and held out the former.
    """
    if not share:
        return list(rows), []
    names = held_passages([row["seed_id"] for row in rows], share, seed)
    held = [row for row in rows if row["seed_id"] in names]
    train = [row for row in rows if row["seed_id"] not in names]
    near = near_equal([row["query"] for row in train], [row["query"] for row in held])
    kept = [row for row, left_out in zip(train, near, strict=True) if not left_out]
    print(f"{len(held)} queries of {len(names)} passages are held out; {len(kept)} train, less {sum(near)} that "
          "nearly equal a held-out one or one above")
    return kept, held


def held_apart(path: Path, held: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The mined rows of a FRet file: those to train on, which then alone stand in it, and the held-out ones."""
    names = {row["_id"] for row in held}
    rows = [row for _, row in read_jsonl(path)]
    asked = [row for row in rows if row["_id"] in names]
    if held:
        rows = [row for row in rows if row["_id"] not in names]
        write_jsonl(path, rows)
        write_jsonl(path.with_name("held_out.jsonl"), asked)
    return rows, asked


def example(rows: Sequence[Row]) -> str:
    """The first record whose positive is not the passage that its query was written for."""
    moved = [row for row in rows if row["positive_id"] != row["seed_id"]]
    if not moved:
        return "p+ is p_seed in all records"
    row = moved[0]
    return (f'p+ is not p_seed in {len(moved) / len(rows):.1%} of {len(rows)} records (paper: 15 %). The first: '
            f'"{row["query"]}", written for {row["seed_id"]}, has p+ {row["positive_id"]}, p- {row["negative_id"]}')


def as_beir(corpus: Corpus, rows: Sequence[Row], right: str) -> Beir:
    """Rows as a retrieval set, in which the passage of `right` is right: "seed_id", or "positive_id" for p_1."""
    by_id = sorted(corpus, key=lambda p: p["_id"], reverse=True)     # as read_beir has it
    queries = {row["_id"]: row["query"] for row in rows}
    qrels = {row["_id"]: {row[right]: 1} for row in rows}
    return Beir(by_id, queries, qrels)


def held_out_results(path: Path, corpus: Corpus, asked: Sequence[Row],
                     stages: Mapping[str, Any], labelled: Beir | None) -> tuple[dict[str, Row], str]:
    """The table of held-out queries, and the stage that the other half of them chooses, BM25 (None) apart."""
    order = sorted(asked, key=lambda row: random.Random(row["seed_id"]).random())
    half = len(order) // 2                                           # the first half chooses
    truths = {"p_seed": as_beir(corpus, order, "seed_id"), "p_1": as_beir(corpus, order, "positive_id")}
    chosen, shown = {}, {}                                           # nDCG@10 of the stages on either half
    reported: dict[str, Columns] = {}
    for stage, model in stages.items():
        reported[stage] = {}
        by_truth = measured(model, [None], truths)
        for name, scores in by_truth.items():
            reported[stage][name] = {measure: values[half:] for measure, values in scores.items()}
        if model is not None:
            ndcg = np.array([scores["ndcg@10"] for scores in by_truth.values()])  # (truths, queries)
            chosen[stage] = ndcg[:, :half].mean()
            shown[stage] = ndcg[:, half:].mean()
        if labelled:
            reported[stage] |= measured(model, [None], {"labels": labelled})
    few = len(order) - half
    title = (f"Generated questions, held out ({few}): nDCG@10 and recall@100 where p_seed is taken for right "
             "(which favours + (q, p_seed)), and where p_1 is (+ FRet)")
    if labelled:
        title += f"; of {len(labelled.queries)} labelled questions"
    table = results_table(path, title, reported)
    if few < 200:
        # nDCG@10 of one question is 0 to 1, with a standard deviation of about 0.4 between stages
        print(f"{few} questions are few: they tell gains of {80 / few ** 0.5:.0f} points of nDCG@10 and more; "
              "for smaller ones raise --queries or give more documents")
    best = max(chosen, key=chosen.__getitem__)
    first = next(iter(chosen))
    verdict = "; no training made it better" if best == first else ""
    if shown[best] < shown[first]:
        verdict += f"; on the questions of the table it is worse: {shown[best]:.3f}, {first} {shown[first]:.3f}"
    print(f"kept: {best}, best on the other {half} held-out questions (nDCG@10 {chosen[best]:.3f}; {first} "
          f"{chosen[first]:.3f}){verdict}")
    return table, best


# --------------------------------------------------------------------------------------------------
# The table


def results(out: Path, corpus: Corpus, stages: dict[str, Any], asked: Sequence[Row], labelled: Beir | None,
            keep: float, save: Callable[[Any, Path], None]) -> dict[str, Row]:
    """The table of all stages; of your documents' the one that held-out questions choose becomes out/gecko.

    asked: the mined rows of held-out queries, none of the built-in corpus. keep: the share of the weights before
    training in a mean with those after it.
    """
    gecko = stages["+ FRet (p_1, p_20)"]
    if keep:
        stages[f"{keep:g} as it came"] = mean_of(stages["as it came"], gecko, keep)
    if asked:
        table, best = held_out_results(out / "results.json", corpus, asked, stages, labelled)
        save_into(functools.partial(save, stages[best]), out / "gecko")
        return table
    write_questions(out / "questions", corpus)
    test = read_beir(out / "questions")
    columns = {name: measured(model, gecko.dims, {"": test}) for name, model in stages.items()}
    dims = " and ".join(f"d = {dim}" for dim in gecko.dims)
    title = f"Test questions ({len(test.queries)}), nDCG@10 and recall@100 at {dims}"
    return results_table(out / "results.json", title, columns)


def measured(model: Any, dims: Sequence[int | None], truths: Mapping[str, Beir]) -> Columns:
    """A model's scores, or BM25's (None), at each dimension, against each of the truths.

    They are {name: set}, of one corpus and the same queries.
    """
    beir = next(iter(truths.values()))
    if model is None:
        ranked = {dims[0]: bm25_rankings(beir)}
    else:
        q, P = encode_beir(model, beir, "question answering")        # (Q, d) and (P, d)
        ranked = {dim: rankings(beir, cut(q, dim), cut(P, dim)) for dim in dims}
    columns = {}
    for dim, lists in ranked.items():
        for name, truth in truths.items():
            columns[name or str(dim)] = retrieval_scores(lists, truth.qrels)
    return columns


def cut(x: np.ndarray, dim: int | None) -> np.ndarray:
    """The first dimensions of (n, d), (n, dim), with length 1 again."""
    x = x[:, :dim]
    return x / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-12)


def results_table(path: Path, title: str, stages: Mapping[str, Columns]) -> dict[str, Row]:
    """Print each stage's nDCG@10 and recall@100 in every column, and write them; a stage may lack columns.

    Beside them the 95 % interval of the gain in the first column over the stage above.
    """
    print(f"\n{title}; [95 % interval of the gain over the stage above, paired bootstrap]")
    *_, last = stages.values()
    columns = list(last)                                             # BM25 has no dimensions
    table: dict[str, Row] = {}
    above: list[float] = []
    for stage, scores in stages.items():
        table[stage] = {column: means(values) for column, values in scores.items()}
        cells = []
        for column in columns:
            row = table[stage].get(column)
            cells.append(f"{row['ndcg@10']:.3f} {row['recall@100']:.3f}" if row else "-")
        ndcg = scores[columns[0]]["ndcg@10"]
        low, high = paired_bootstrap(above or ndcg, ndcg)
        table[stage]["gain"] = [round(low, 4), round(high, 4)]
        gain = f"[{low:+.3f}, {high:+.3f}]" if above else ""
        print(f"  {stage:20} {'   '.join(cells):26}   {gain}")
        above = ndcg
    write_json(path, table)
    return table
