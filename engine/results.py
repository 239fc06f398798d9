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
from engine.evaluate import (
    Rankings,
    Scores,
    bm25_rankings,
    encode_beir,
    means,
    paired_bootstrap,
    rankings,
    retrieval_scores,
)
from engine.files import InputError, file_beside, read_jsonl, write_json, write_jsonl
from engine.runs import save_into

Row = dict[str, Any]
Columns = dict[str, Scores]  # a column of the table -> its scores


def write_questions(folder: Path, corpus: Sequence[Row]) -> None:
    """The hand-written questions that the corpus answers, as a BEIR folder; nothing trains on them."""
    names = {p["_id"] for p in corpus}
    queries = []
    qrels = {"dev": "", "test": ""}
    for n, (_, row) in enumerate(read_jsonl(Path(__file__).with_name("questions.jsonl"))):
        queries.append({"_id": str(n), "text": row["query"]})        # one without answers is not judged
        for name in row["answers"]:
            if name in names:
                qrels[row["split"]] += f"{n}\t{name}\t1\n"
    write_jsonl(folder / "corpus.jsonl", corpus)
    write_jsonl(folder / "queries.jsonl", queries)
    for split, lines in qrels.items():
        with file_beside(folder / f"qrels/{split}.tsv") as new:
            new.write_text("query-id\tcorpus-id\tscore\n" + lines, encoding="utf-8")


def on_dev(model: Any, folder: str) -> Callable[[], dict[str, float]] | None:
    """What measures a model on the dev split of a BEIR folder; None without a folder."""
    if not folder:
        return None
    beir = read_beir(folder, "dev")
    return lambda: means(retrieval_scores(found(model, beir)[None], beir.qrels))


def cost(llm: Any, corpus: Sequence[Row], draws: Sequence[int], rank: str) -> str:
    """What a recipe will ask of an LLM, by one whose strings ask nobody and count."""
    N = min(20, len(corpus))
    for start in range(0, len(draws), 256):                          # all prompts at once are gigabytes
        seeds = draws[start:start + 256]
        llm.generate([corpus[i] for i in seeds])
        # which passages will be found is not known yet; their number and mean length are
        pairs = [(f"such as a person types who looks for {i}", corpus[(i + n) % len(corpus)])
                 for i in seeds for n in range(N)]
        if "ql" in rank:
            llm.query_likelihood(pairs)
        if "rc" in rank:
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
    held = round(share * len(order))
    if not 2 <= held <= len(order) - 2:
        raise InputError(f"{len(order)} passages to ask about, {held} of them held out: two are needed on each "
                         "side; give more documents, raise --queries, or change --held-out")
    return set(order[:held])


def hold_out(rows: Sequence[Row], names: set[str]) -> tuple[list[Row], list[Row]]:
    """Queries to train on, and those of the passages of these names, which are asked and never trained on.

    Near-equal queries are left out: of two in training the second, of training and held out the former.
    """
    if not names:                                                    # the built-in corpus has questions of its own
        return list(rows), []
    held = [row for row in rows if row["seed_id"] in names]
    train = [row for row in rows if row["seed_id"] not in names]
    near = near_equal([row["query"] for row in train], [row["query"] for row in held])
    print(f"{len(held)} queries of {len(names)} passages are held out; {len(near) - sum(near)} train, less "
          f"{sum(near)} that nearly equal a held-out one or one above")
    if len(held) < 2 or all(near):                                   # where the LLM failed, or repeats itself
        raise InputError("no query is left to train on, or not two to hold out; give more documents, or change "
                         "--held-out or --seed")
    return [row for row, left_out in zip(train, near, strict=True) if not left_out], held


def held_apart(path: Path, held: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The mined rows of a FRet file: those to train on, which then alone stand in it, and the held-out ones."""
    names = {row["_id"] for row in held}
    mined = [row for _, row in read_jsonl(path)]
    rows = [row for row in mined if row["_id"] not in names]
    asked = [row for row in mined if row["_id"] in names]
    if held:
        write_jsonl(path, rows)
        write_jsonl(path.with_name("held_out.jsonl"), asked)
    return rows, asked


def example(rows: Sequence[Row]) -> str:
    """The first record whose positive is not the passage that its query was written for."""
    for row in rows:
        if row["positive_id"] != row["seed_id"]:
            return (f'the first: "{row["query"]}", written for {row["seed_id"]}, has p+ {row["positive_id"]}, '
                    f'p- {row["negative_id"]}')
    return "p+ is p_seed in all records"


def held_out_results(path: Path, corpus: Corpus, asked: Sequence[Row],
                     stages: Mapping[str, Any], labelled: Beir | None) -> str:
    """Print the table of held-out queries; the stage that the other half of them chooses, BM25 (None) apart."""
    order = sorted(asked, key=lambda row: random.Random(row["seed_id"]).random())
    half = len(order) // 2                                           # the first half chooses
    few = len(order) - half
    by_id = sorted(corpus, key=lambda p: p["_id"], reverse=True)     # as read_beir has it
    p_seed = {row["_id"]: {row["seed_id"]: 1} for row in order}
    p_1 = {row["_id"]: {row["positive_id"]: 1} for row in order}
    both = {query: p_seed[query] | p_1[query] for query in p_seed}
    beir = Beir(by_id, {row["_id"]: row["query"] for row in order}, both)
    columns: dict[str, Columns] = {}
    chosen, shown = {}, {}                                           # nDCG@10 of either half, with both right
    for stage, model in stages.items():
        ranked = found(model, beir)[None]
        ndcg = retrieval_scores(ranked, both)["ndcg@10"]
        if model is not None:
            chosen[stage], shown[stage] = np.mean(ndcg[:half]), np.mean(ndcg[half:])
        second = dict(list(ranked.items())[half:])
        columns[stage] = {"p_seed": retrieval_scores(second, p_seed), "p_1": retrieval_scores(second, p_1)}
        if labelled:
            columns[stage]["labels"] = retrieval_scores(found(model, labelled)[None], labelled.qrels)
    title = (f"Generated questions, held out ({few}): nDCG@10 and recall@100 where p_seed is taken for right "
             "(which favours + (q, p_seed)), and where p_1 is (+ FRet)")
    if labelled:
        title += f"; of {len(labelled.queries)} labelled questions"
    results_table(path, title, columns)
    if few < 200:
        # nDCG@10 of one question is 0 to 1, with a standard deviation of about 0.4 between stages
        print(f"{few} questions are few: they tell gains of {80 / few ** 0.5:.0f} points of nDCG@10 and more; "
              "for smaller ones raise --queries or give more documents")
    best = max(chosen, key=chosen.__getitem__)
    start = next(iter(chosen))
    print(f"kept: {best}, best on the other {half} held-out questions (nDCG@10 with both right {chosen[best]:.3f}; "
          f"{start} {chosen[start]:.3f})")
    if shown[best] < shown[start]:
        print(f"on the questions of the table it is worse: {shown[best]:.3f}, {start} {shown[start]:.3f}")
    return best


# --------------------------------------------------------------------------------------------------
# The table


def results(out: Path, corpus: Corpus, stages: dict[str, Any], asked: Sequence[Row], labelled: Beir | None,
            keep: float, save: Callable[[Any, Path], None]) -> None:
    """The table of all stages; of your documents' the one that held-out questions choose becomes out/gecko.

    asked: the mined rows of held-out queries, none of the built-in corpus. keep: the share of the weights before
    training in a mean with those after it.
    """
    *_, gecko = stages.values()
    if keep:
        stages[f"{keep:g} as it came"] = mean_of(stages["as it came"], gecko, keep)
    if asked:
        best = held_out_results(out / "results.json", corpus, asked, stages, labelled)
        save_into(functools.partial(save, stages[best]), out / "gecko")
        return
    write_questions(out / "questions", corpus)
    test = read_beir(out / "questions")
    columns = {}
    for stage, model in stages.items():
        ranked = found(model, test, gecko.dims)
        columns[stage] = {str(dim): retrieval_scores(lists, test.qrels) for dim, lists in ranked.items()}
    dims = " and ".join(f"d = {dim}" for dim in gecko.dims)
    results_table(out / "results.json", f"Test questions ({len(test.queries)}), nDCG@10 and recall@100 at {dims}",
                  columns)


def found(model: Any, beir: Beir, dims: Sequence[Any] = (None,)) -> dict[Any, Rankings]:
    """What a model finds by its first dimensions, for each of dims (None: all); BM25 (None) has none."""
    if model is None:
        return dict.fromkeys(dims, bm25_rankings(beir))
    q, P = encode_beir(model, beir, "question answering")            # (Q, d) and (P, d)
    ranked = {}
    for dim in dims:
        norms = np.linalg.norm(P[:, :dim], axis=1, keepdims=True)    # (P, 1)
        ranked[dim] = rankings(beir, q[:, :dim], P[:, :dim] / norms)  # the length of q orders nothing
    return ranked


def results_table(path: Path, title: str, stages: Mapping[str, Columns]) -> None:
    """Print each stage's nDCG@10 and recall@100 in every column, and write them.

    Beside them the 95 % interval of the gain in the first column over the stage above.
    """
    print(f"\n{title}; [95 % interval of the gain over the stage above, paired bootstrap]")
    table: dict[str, Row] = {}
    above: list[float] = []
    for stage, columns in stages.items():
        table[stage] = {name: means(scores) for name, scores in columns.items()}
        cells = [f"{row['ndcg@10']:.3f} {row['recall@100']:.3f}" for row in table[stage].values()]
        ndcg = next(iter(columns.values()))["ndcg@10"]
        low, high = paired_bootstrap(above or ndcg, ndcg)
        table[stage]["gain"] = [round(low, 4), round(high, 4)]
        gain = f"[{low:+.3f}, {high:+.3f}]" if above else ""
        print(f"  {stage:22} {'   '.join(cells):26}   {gain}")
        above = ndcg
    write_json(path, table)
