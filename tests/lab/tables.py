"""The paper's tables in small: each row trains an encoder and measures it; the paper's figures stand beside.

    python tests/lab/tables.py {labels,tasks,rerank,formats,mixture,dims} [--seeds 3]
    python tests/lab/tables.py plot runs/*                  loss and dev curves of training runs, as a PNG

Rows start from the recipe's pre-finetuned encoder, or --init, train on its FRet file (`python train.py` writes
both) and are measured on its test questions. --llm offline|URL|hf:DIR makes a FRet file by another LLM, --corpus
DIR on your own passages. Finished rows are kept in --out: a stopped table goes on, and a row of other data or
settings is not used.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import hashlib
import itertools
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import llm  # noqa: E402
import train  # noqa: E402
from data import Record, builtin_pairs, converted, read_records  # noqa: E402
from engine import evaluate  # noqa: E402
from engine.beir import Beir, read_beir  # noqa: E402
from engine.commandline import Parser, parsed  # noqa: E402
from engine.convert import labelled  # noqa: E402
from engine.evaluate import short_names  # noqa: E402
from engine.files import (  # noqa: E402
    InputError,
    add_flags,
    file_beside,
    from_flags,
    read_passages,
    run,
    say,
    write_jsonl,
)
from engine.search import topk  # noqa: E402
from engine.transport import LLMError  # noqa: E402
from gecko import FORMATS, PLAIN, Gecko, fetch, is_bag, load, save, truncate_dim  # noqa: E402
from train import TrainConfig  # noqa: E402

# --------------------------------------------------------------------------------------------------
# The paper's figures (section 4) and claims


@dataclass
class Table:
    columns: tuple[str, ...]                # what the paper measures
    paper: dict[str, tuple[float, ...]]     # its figures for each of our rows; nan, or (), where it has none
    claim: str
    above: list[tuple[str, str, str]]       # (row, the row that it beats, in our columns of this name)


LABELS = [f"{p}, {n}" for p in ("p_seed", "p_1") for n in ("none", "sampled", "p_20")]
TABLES = {
    "labels": Table(
        ("BEIR", "STS"),
        {"p_seed, none": (52.33, 82.66), "p_seed, sampled": (51.37, 82.00), "p_seed, p_20": (51.96, 82.26),
         "p_1, none": (53.07, 82.88), "p_1, sampled": (52.60, 82.85), "p_1, p_20": (53.39, 83.14)},
        "the relabelled p_1 beats p_seed beside every negative, and p_20 is its best negative",
        [("p_1, none", "p_seed, none", "nDCG"), ("p_1, sampled", "p_seed, sampled", "nDCG"),
         ("p_1, p_20", "p_seed, p_20", "nDCG"), ("p_1, p_20", "p_1, none", "nDCG"),
         ("p_1, p_20", "p_1, sampled", "nDCG")]),
    "rerank": Table(
        ("BEIR",), {"retriever": (51.3,), "QL": (52.8,), "RC": (54.1,), "QL + RC": (56.8,)},
        "the fusion of the two rankings beats either alone",
        [("QL + RC", "QL", ""), ("QL + RC", "RC", ""), ("QL + RC", "retriever", "")]),
    "formats": Table(
        ("BEIR", "STS"), {"unified": (55.5, 84.9), "sentence": (54.5, 85.0), "concatenation": (54.7, 84.8),
                          "no task, no title": ()},
        "the unified format is the best for retrieval",
        [("unified", row, "nDCG") for row in ("sentence", "concatenation", "no task, no title")]),
    "tasks": Table(
        ("MTEB",), {"question answering": (60.32,), "search result": (60.17,), "fact checking": (60.56,),
                    "sentence similarity": (60.30,), "all": (60.70,), "all, uniformly": (60.87,)},
        "rows of all tasks are worth more than as many rows of one task",
        [("all, uniformly", kind, "") for kind in llm.FREQUENT_TASKS]),
    "mixture": Table(
        ("MTEB", "classification", "STS"),
        {"FRet": (62.64, 70.26, 83.14), "+ NLI": (63.24, math.nan, 84.74),
         "+ classification": (64.82, 81.00, math.nan), "full": (66.31, 81.17, 85.06)},
        "NLI raises similarity, classification raises classification",
        [("+ NLI", "FRet", "Spearman"), ("+ classification", "FRet", "accuracy")]),
    "dims": Table(
        ("MTEB at 768", "MTEB at 256"), {"without MRL": (), "with MRL": (66.31, 64.37)},
        "Matryoshka keeps the first dimensions good alone",
        [("with MRL", "without MRL", " at ")]),
}
# Table 7 gives the formats of inputs; its targets (silent) are taken to follow.
FORMS = {
    "unified": FORMATS,
    "sentence": {"query": "The task is {task}, and the query is {text}",
                 "passage": "The title is {title}, and the text is {text}"},
    "concatenation": {"query": "{task} {text}", "passage": "{title} {text}"},
    "no task, no title": PLAIN,
}

# --------------------------------------------------------------------------------------------------
# A row that trains: its training sets, and what it changes in the configuration


@dataclass
class Lab:
    """What the rows of a table are made from and measured on."""

    c: TrainConfig
    corpus: list[dict[str, str]]
    rows: list[Record]                      # FRet
    init: Gecko                             # where every row starts
    pairs: list[Record]                     # if any, each row first pre-finetunes on them (eq. 2)
    data: list[list[Record]]                # the sets of `mixture`
    beir: dict[str, Beir]
    task: str                               # of their queries
    sts: Sequence[str] = ()
    classes: Sequence[Sequence[str]] = ()   # (training file, test file)


@dataclass
class Case:
    sets: Callable[[int], list[list[Record]]]                # seed -> training sets
    changes: dict[str, Any] = field(default_factory=dict)    # of TrainConfig's fields, or "formats"


def cases(name: str, lab: Lab) -> dict[str, Case]:
    """The rows of a table that trains."""
    if name == "labels":                                     # all from one mined file
        choices = itertools.product(("seed", "p1"), ("none", "sampled", "last"))
        return {row: Case(functools.partial(labelled_set, lab, *choice))
                for row, choice in zip(LABELS, choices, strict=True)}
    if name == "tasks":
        return task_cases(lab)
    if name == "mixture":                                    # each set beside those before it
        rows = list(TABLES[name].paper) if len(lab.data) == 4 else ["FRet", "+ classification", "full"]
        return {row: Case(functools.partial(first_sets, lab, n)) for n, row in enumerate(rows, 1)}
    fret = functools.partial(fret_set, lab)
    if name == "dims":
        d = lab.init.encoder.config.hidden_size
        return {"without MRL": Case(fret, {"dims": ""}), "with MRL": Case(fret, {"dims": f"{d},{d // 3}"})}
    return {row: Case(fret, {"formats": form}) for row, form in FORMS.items()}


def labelled_set(lab: Lab, positive: str, negative: str, seed: int) -> list[list[Record]]:
    return [llm.labelled(lab.rows, {p["_id"]: p for p in lab.corpus}, positive, negative, seed)]


def fret_set(lab: Lab, seed: int) -> list[list[Record]]:
    return [lab.rows]


def first_sets(lab: Lab, n: int, seed: int) -> list[list[Record]]:
    return lab.data[:n]


def task_cases(lab: Lab) -> dict[str, Case]:
    """As many rows of one task, of all as they come, and of all alike."""
    kinds = {kind: [row for row in lab.rows if row["kind"] == kind] for kind in llm.FREQUENT_TASKS}
    n = min(map(len, kinds.values()))
    if not n:
        counts = {kind: len(rows) for kind, rows in kinds.items()}
        raise InputError(f"FRet has no rows of some task: {counts}")
    made = {kind: Case(functools.partial(drawn, [rows], n)) for kind, rows in kinds.items()}
    made["all"] = Case(functools.partial(drawn, [lab.rows], n))
    made["all, uniformly"] = Case(functools.partial(drawn, list(kinds.values()), n // len(kinds)))
    return made


def drawn(pools: Sequence[Sequence[Record]], n: int, seed: int) -> list[list[Record]]:
    """One set: n rows of each pool, at random."""
    rows: list[Record] = []
    for pool in pools:
        order = np.random.default_rng(seed).permutation(len(pool))
        rows += [pool[i] for i in order[:n]]
    return [rows]


def case_scores(lab: Lab, case: Case, title: str, dims: Sequence[int], seed: int) -> dict[str, Any]:
    """Train a row and measure it: {column: a value for each query, pair or text}."""
    model, changes = copy.deepcopy(lab.init), dict(case.changes)
    model.formats = changes.pop("formats", model.formats)
    c = replace(lab.c, seed=seed, **changes)
    if lab.pairs:
        train.train(model, "prefinetune", [lab.pairs], replace(c, lr=0.0), title=f"{title}: pre-finetune")
    train.train(model, "finetune", case.sets(seed), c, title=title)
    scores: dict[str, Any] = {}
    for name, beir in lab.beir.items():                      # encoded once, cut to each of dims
        q, P = evaluate.encode_beir(model, beir, lab.task, precision=c.precision)        # (Q, d), (P, d)
        for dim in dims:
            cut = [truncate_dim(torch.from_numpy(x), dim).numpy() for x in (q, P)]
            column = f"nDCG@10 {name} at {dim}" if dim < q.shape[1] else f"nDCG@10 {name}"
            scores[column] = evaluate.retrieval_scores(evaluate.rankings(beir, *cut), beir.qrels)["ndcg@10"]
    for name, path in zip(short_names([Path(path).resolve().parent for path in lab.sts]), lab.sts, strict=True):
        scores[f"Spearman {name}"] = evaluate.sts_terms(model, path)
    tests = short_names([Path(unknown).resolve().parent for _, unknown in lab.classes])
    for name, (known, unknown) in zip(tests, lab.classes, strict=True):
        scores[f"accuracy {name}"] = class_hits(model, known, unknown)
    return scores


def class_hits(model: Gecko, known: str, unknown: str, k: int = 5) -> np.ndarray:
    """1 for each text of `unknown` whose label most of its k nearest texts of `known` have, else 0."""
    (known_texts, labels), (texts, wanted) = labelled([known]), labelled([unknown])
    q = model.encode_queries(texts, "classification")
    P = model.encode_queries(known_texts, "classification")
    _, near = topk(q, P, min(k, len(P)))                     # (texts, k)
    hits = np.zeros(len(texts))
    for n, row in enumerate(near):
        (label, _), = Counter(labels[i] for i in row).most_common(1)
        hits[n] = label == wanted[n]
    return hits


def rerank_scores(ranker: llm.LLM, retriever: Gecko, beir: Beir, N: int, task: str,
                  precision: str = "float32") -> dict[str, list[float]]:
    """nDCG@10 of each query: the retriever's first N as they come, by QL, by RC and by their fusion."""
    by_id = {p["_id"]: p for p in beir.corpus}
    q, P = evaluate.encode_beir(retriever, beir, task, precision=precision)   # (Q, d) and (P, d)
    if isinstance(ranker, llm.Offline):
        ranker.embedder, ranker.vectors = retriever, dict(zip(by_id, P, strict=True))     # not made again
    nearest = {query: ids[:N] for query, ids in evaluate.rankings(beir, q, P).items()}
    pairs = []
    for query, ids in nearest.items():
        pairs += [(beir.queries[query], by_id[i]) for i in ids]
    QL, RC = ranker.query_likelihood(pairs), ranker.relevance(pairs)
    if None in QL or None in RC:
        raise LLMError("a score is missing: a call failed; run again, the others are in the cache")
    scores: dict[str, list[float]] = {"retriever": [], "QL": [], "RC": [], "QL + RC": []}
    start = 0
    for query, ids in nearest.items():
        relevant, end = beir.qrels[query], start + len(ids)
        ql, rc = list[Any](QL[start:end]), list[Any](RC[start:end])
        scores["retriever"].append(evaluate.ndcg(ids, relevant))
        for name, s in (("QL", ql), ("RC", rc), ("QL + RC", llm.rrf(ql, rc))):
            order = sorted(range(len(ids)), key=lambda i: -s[i])
            scores[name].append(evaluate.ndcg([ids[i] for i in order], relevant))
        start = end
    return scores


def rerank_cases(ranker: Callable[..., llm.LLM], retriever: Gecko, sets: dict[str, Beir], task: str,
                 precision: str) -> dict[str, Callable[[int], dict[str, Any]]]:
    """The rows of Table 6, the first 100 of each query ranked again; a set is ranked once for all rows."""
    @functools.cache
    def scores(name: str) -> dict[str, list[float]]:
        beir = sets[name]
        return rerank_scores(ranker(beir.corpus, retriever), retriever, beir, 100, task, precision)

    def row_scores(row: str, seed: int) -> dict[str, Any]:
        return {f"nDCG@10 {name}": scores(name)[row] for name in sets}

    return {row: functools.partial(row_scores, row) for row in TABLES["rerank"].paper}


# --------------------------------------------------------------------------------------------------
# Running the rows, each once


RunCase = Callable[[int], dict[str, Any]]                    # seed -> scores


def whole_rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a JSONL file that grows. A kill may leave half a line at its end."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return rows


def run_table(name: str, out: Path, key: str, by: str, seeds: Sequence[int], cases: dict[str, RunCase],
              ) -> list[dict[str, Any]]:
    """Run what NAME.jsonl has not; a row of another `key` (data and settings) is left alone and not used."""
    path, rows = out / f"{name}.jsonl", []
    done = whole_rows(path)
    write_jsonl(path, done)                                  # a kill may have left half a line
    for seed, row in itertools.product(seeds, cases):
        same = {"table": name, "row": row, "seed": seed, "key": key}
        found = next((r for r in done if same.items() <= r.items()), None)
        if found is None:
            start = time.time()
            values = {column: rounded(scores) for column, scores in cases[row](seed).items()}
            found = {**same, "by": by, "seconds": round(time.time() - start, 1), "cores": os.cpu_count(),
                     "scores": values}
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")
            means = "  ".join(f"{column} {np.mean(scores):.4f}" for column, scores in values.items())
            print(f"  {row}, seed {seed}: {means}  ({found['seconds']:.0f} s)", flush=True)
        rows.append(found)
    return rows


def rounded(scores: Sequence[float]) -> list[float]:
    """Three digits, and 0 and 1 without any: the files hold a score for every query."""
    return [int(x) if x in (0, 1) else x for x in np.round(scores, 3).tolist()]


def files_key(paths: Sequence[str | Path], *settings: Any) -> str:
    """What a row depends on, beside its name and seed: the bytes of its files, and settings."""
    total = hashlib.sha256(repr(settings).encode())
    for path in map(Path, paths):
        for file in sorted(p for p in (path, *path.rglob("*")) if p.is_file()):
            total.update(file.read_bytes())
    return total.hexdigest()


# --------------------------------------------------------------------------------------------------
# What a table says


def interval(gains: Sequence[np.ndarray], seed: int = 0, draws: int = 4000) -> tuple[float, float]:
    """95 % interval of a mean gain, by bootstrap: seeds and queries are drawn again, with replacement.

    gains: for each set (S, Q), paired differences of S seeds and Q queries; all sets weigh the same.
    """
    rng = np.random.default_rng(seed)
    # a draw is how often each seed and each query came up: as shares, the weights of a mean
    S = len(gains[0])
    by_seed = rng.multinomial(S, np.full(S, 1 / S), draws) / S       # (draws, S)
    means = np.zeros(draws)
    for gain in gains:
        Q = gain.shape[1]
        by_query = rng.multinomial(Q, np.full(Q, 1 / Q), draws) / Q  # (draws, Q)
        means += ((by_seed @ gain) * by_query).sum(1) / len(gains)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def points(values: Any, other: Any) -> str:
    """Mean gain of (seeds, questions) or (questions) over others, with its 95 % interval, in points."""
    gains = 100 * np.atleast_2d(np.subtract(values, other))          # (S, Q)
    low, high = interval([gains])
    return f"{gains.mean():+.1f} [{low:+.1f}, {high:+.1f}]"


def show_file(name: str, table: Callable[[Any], list[str]]) -> bool:
    """Whether a name is that of a results file, JSON on one line, whose table is then printed."""
    if not name.endswith(".json"):
        return False
    print("\n".join(table(json.loads(Path(name).read_text(encoding="utf-8")))))
    return True


def write_results(path: str, results: Any) -> None:
    with file_beside(path) as new:
        new.write_text(json.dumps(results) + "\n", encoding="utf-8")


Gain = tuple[float, float, float]                            # points, and their 95 % interval


def gain(rows: Sequence[dict[str, Any]], row: str, other: str, where: str) -> Gain | None:
    """Mean of `row` less `other`, in points: in column `where`, or in all whose name holds it."""
    scores = {(r["row"], r["seed"]): r["scores"] for r in rows}
    seeds = sorted(seed for name, seed in scores if name == row and (other, seed) in scores)
    columns = scores[row, seeds[0]] if seeds else {}
    names = [where] if where in columns else [column for column in columns if where in column]
    if not names or row == other:
        return None
    gains = []
    for name in names:
        differences = [np.subtract(scores[row, s][name], scores[other, s][name]) for s in seeds]
        gains.append(100 * np.array(differences))            # (seeds, queries)
    low, high = interval(gains, draws=1000)
    return float(np.mean([g.mean() for g in gains])), low, high


def table_text(name: str, rows: Sequence[dict[str, Any]]) -> str:
    """The table in Markdown: the paper's figures, ours (mean and spread over seeds), and what they decide."""
    table, seeds = TABLES[name], len({r["seed"] for r in rows})
    columns = {column: [column] for column in rows[0]["scores"]}
    if len(columns) > 6:                                     # too wide: the mean of each measure
        measures = dict.fromkeys(column.split()[0] for column in columns)
        columns = {measure: [c for c in columns if c.startswith(measure)] for measure in measures}
    names = [row for row in table.paper if any(r["row"] == row for r in rows)]
    head = ["row", *(f"paper: {c}" for c in table.columns), *columns, f"mean points over {names[0]}"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in names:
        paper = table.paper[row] or (math.nan,) * len(table.columns)
        cells = [row, *("" if math.isnan(p) else f"{p:.2f}" for p in paper)]
        for measured in columns.values():
            points = [100 * np.mean([np.mean(r["scores"][c]) for c in measured]) for r in rows if r["row"] == row]
            spread = f" ± {np.std(points, ddof=1):.1f}" if len(points) > 1 else ""
            cells.append(f"{np.mean(points):.1f}{spread}")
        lines.append("| " + " | ".join([*cells, points_text(gain(rows, row, names[0], ""))]) + " |")
    lines += ["", f"The paper: {table.claim}. Here:", "", *verdicts(table, rows), ""]
    what = "seeds and queries" if seeds > 1 else "queries"
    spread = "s; ± is their standard deviation" if seeds > 1 else ""
    lines.append(f"{sum(r['seconds'] for r in rows):.0f} s on {rows[0]['cores']} cores, {seeds} seed{spread}; "
                 f"[95 % interval: {what} drawn again]; {rows[0]['by']}.")
    return "\n".join(lines) + "\n"


def verdicts(table: Table, rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The paper's claim, row by row: decided only where the interval leaves out 0."""
    for row, other, where in table.above:
        found = gain(rows, row, other, where)
        if found is None:
            says = "not measured"
        elif found[1] > 0:
            says = "yes"
        elif found[2] < 0:
            says = "no, the reverse"
        else:
            says = "not decided"
        column = f" ({where.strip()})" if where else ""
        yield f"- {row} over {other}{column}: {says} {points_text(found)}".rstrip()


def points_text(found: Gain | None) -> str:
    return f"{found[0]:+.1f} [{found[1]:+.1f}, {found[2]:+.1f}]" if found else ""


# --------------------------------------------------------------------------------------------------
# The files that rows are made from


def fret_of(out: Path, corpus: Path, init: str | Path, ranker: Callable[..., llm.LLM], c: TrainConfig, count: int,
            ) -> None:
    """The recipe's steps 3.2 on a user's own corpus: queries, retriever/ and fret.jsonl in `out`, each once."""
    passages = read_passages(corpus)
    write_jsonl(out / "corpus.jsonl", passages)
    count = count or 8 * len(passages)
    if not (out / "queries.jsonl").is_file():
        queries = llm.generate(ranker(passages), passages, llm.seed_draws(passages, count, c.seed))
        llm.write_kept(out / "queries.jsonl", queries, count, "generate")
    queries = llm.read_queries(out / "queries.jsonl", passages)
    if not (out / "retriever").is_dir():
        retriever = load(init)
        train.train(retriever, "prefinetune", [queries], c, title="initial retriever")
        save(retriever, out / "retriever")
    if not (out / "fret.jsonl").is_file():
        retriever = load(out / "retriever")
        rows = llm.mine(ranker(passages, retriever), retriever, passages, queries, seed=c.seed)
        llm.write_kept(out / "fret.jsonl", rows, len(queries), "mine")


def own_modules(out: Path, corpus: Sequence[dict[str, str]]) -> tuple[str, str]:
    """Classification without labels of anybody's: documentation, and the module that it stands in."""
    rows = [{"text": p["text"][:300], "label": p["title"].split(".")[0]} for p in corpus]
    paths = [str(out / f"modules/{part}.jsonl") for part in ("train", "test")]
    write_jsonl(paths[0], rows[0::2])
    write_jsonl(paths[1], rows[1::2])
    return paths[0], paths[1]


def training_cases(args: argparse.Namespace, c: TrainConfig, model: Gecko, mined: Path, own: bool,
                   beir: dict[str, Beir]) -> dict[str, RunCase]:
    """The rows of a table that trains, from the FRet file in `mined` or the files of --data.

    `own`: the model, the corpus or the LLM is the user's, not the recipe's.
    """
    lab = Lab(c, corpus=[], rows=[], init=model, pairs=[], data=[read_records(path) for path in args.data],
              beir=beir, task=args.task, sts=args.sts, classes=args.classes)
    if not args.data:
        lab.corpus, lab.rows = read_passages(mined / "corpus.jsonl"), read_records(mined / "fret.jsonl")
    if args.table == "mixture" and not args.data:            # no NLI without files of it
        modules = own_modules(Path(args.out), lab.corpus)
        lab.classes = [modules, *args.classes]
        lab.data = [lab.rows, converted("classification", modules[:1], Counter()),
                    builtin_pairs(lab.corpus, 50_000)]
    if args.table in ("dims", "formats") and not own:        # their change concerns eq. 2 too
        # a query of no letters is a text of no tokens where the format adds none
        pairs = builtin_pairs(lab.corpus, train.Sizes().pairs)
        lab.pairs = [pair for pair in pairs if pair["query"].strip()]
        lab.init = train.untrained(lab.corpus, lab.pairs)
    d = model.encoder.config.hidden_size
    parts = (1, 3, 6, 12, 24) if args.table == "dims" else (1,)
    dims = [d // part for part in parts if part <= d]
    return {row: functools.partial(case_scores, lab, case, row, dims)
            for row, case in cases(args.table, lab).items()}


# --------------------------------------------------------------------------------------------------
# Command line


def table_command(args: argparse.Namespace) -> None:
    """Find or make the files that the rows come from, run the rows, write the table."""
    c, out = from_flags(TrainConfig, args), Path(args.out)
    home = Path(args.corpus or "runs/demo")
    for path in args.sts:                                    # a mistake shows before the LLM is paid
        evaluate.read_sts(path)
    labelled(list(itertools.chain(*args.classes)))
    if not args.corpus and not (home / "gecko").is_dir():    # the last that the recipe trains
        train.recipe(train.Recipe(), home)
    if not args.init and not (home / "pre").is_dir():
        raise InputError(f"{home}/pre: not there; --corpus needs --init, the model that each row starts from")
    folders = args.beir or [home / "questions" if (home / "questions").is_dir() else home]
    beir = {name: read_beir(folder, args.split)
            for name, folder in zip(short_names(folders), folders, strict=True)}
    init = fetch(args.init or home / "pre")
    o = llm.Options(llm=args.llm or "offline", model=args.model, seed=c.seed)
    model, mined = load(init), home
    c = replace(c, lr=c.lr or (2e-3 if is_bag(model.encoder) else 0.0))

    def ranker(corpus: list[dict[str, str]], embedder: Gecko | None = None) -> llm.LLM:
        return llm.open_llm(o, str(out / "llm.jsonl"), corpus, embedder)

    own = bool(args.llm) or not (home / "fret.jsonl").is_file()
    if own and not args.data and args.table != "rerank":
        train.read_dims(c.dims, model.encoder.config.hidden_size)
        mined = out / f"fret-{files_key([home / 'corpus.jsonl', init], o, c, args.queries)[:8]}"
        fret_of(mined, home / "corpus.jsonl", init, ranker, c, args.queries)
    files = [mined / "fret.jsonl", mined / "retriever", init, *folders, *args.sts, *args.data]
    key = files_key([*files, *itertools.chain(*args.classes)], args.table, args.split, args.task, o,
                    replace(c, seed=0))
    say(table=args.table, fret=mined, init=init, sets=", ".join(beir), llm=o.llm, key=key[:8], **vars(c))
    if args.table == "rerank":
        by = f"ranked by {o.model or o.llm}"
        retriever = model if args.init else load(home / "retriever")
        run_cases = rerank_cases(ranker, retriever, beir, args.task, c.precision)
    else:
        by = f"generated and ranked by {o.model or o.llm}" if own else f"FRet of {mined}"
        run_cases = training_cases(args, c, model, mined, own, beir)
    if args.data:
        by = f"records of {', '.join(Path(path).name for path in args.data)}"
    rows = run_table(args.table, out, key, by, range(c.seed, c.seed + args.seeds), run_cases)
    text = table_text(args.table, rows)
    with file_beside(out / f"{args.table}.md") as new:
        new.write_text(text, encoding="utf-8")
    print(f"\n{text}\nwrote {out}/{args.table}.jsonl and .md; for a chart: python tests/lab/figures.py "
          f"{out}/{args.table}.jsonl")


def plot_command(args: argparse.Namespace) -> None:
    """Loss and dev curves of runs, by their metrics.jsonl."""
    try:
        import matplotlib
    except ImportError as error:
        raise InputError("plot needs matplotlib; install it: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    runs = {folder: whole_rows(Path(folder, "metrics.jsonl")) for folder in args.runs}
    runs = {folder: rows for folder, rows in runs.items() if rows}
    if not runs:
        raise InputError(f"{args.runs[0]}: no metrics.jsonl there; give the --out folders of training runs")
    for folder, rows in runs.items():
        losses, dev = [r for r in rows if "loss" in r], [r for r in rows if "dev" in r]
        left.plot([r["step"] for r in losses], [r["loss"] for r in losses], label=folder, linewidth=1)
        right.plot([r["step"] for r in dev], [r["dev"]["ndcg@10"] for r in dev], "o-", label=folder)
    left.set(xlabel="step", ylabel="loss")
    right.set(xlabel="step", ylabel="nDCG@10 on dev")
    left.legend()
    with file_beside(args.out) as new:
        figure.savefig(new, dpi=120, format="png")
    print(f"wrote {args.out}: {len(runs)} runs")


def add_setting(command: argparse.ArgumentParser, name: str, **settings: Any) -> None:
    """A flag of training, but for those that have no meaning here."""
    if name not in ("--unified", "--eval", "--save-every", "--resume"):
        command.add_argument(name, **settings)


def main() -> None:
    parser = Parser(description=(__doc__ or "").split("\n\n")[0])
    commands = parser.add_subparsers(dest="table", required=True)
    plot = commands.add_parser("plot", help="loss and dev curves of runs, as a PNG")
    plot.add_argument("runs", nargs="+", help="--out folders of prefinetune and finetune")
    plot.add_argument("--out", default="runs/plot.png", help="the file to write (%(default)s)")
    for name, table in TABLES.items():
        command = commands.add_parser(name, help=table.claim,
                                      epilog="--lr 0 is here the recipe's for a bag of words.")
        command.set_defaults(data=[])
        if name == "mixture":
            command.add_argument("--data", nargs=4, metavar=("FRET", "NLI", "CLASSIFICATION", "REST"),
                                 help="files of records (default: FRet, docstrings by module, pairs)")
        command.add_argument("--out", default="runs/tables", help="the folder to write (%(default)s)")
        command.add_argument("--seeds", type=int, default=1, help="runs of each row, from --seed on (%(default)s)")
        command.add_argument("--corpus", help="a BEIR folder of your own (default: the recipe's, runs/demo)")
        command.add_argument("--init", help="model folder that rows start from (default: the recipe's, "
                                            "pre-finetuned)")
        command.add_argument("--llm", default="", help="offline, hf:DIR or an endpoint's URL, which makes the "
                                                       "FRet file (default: the recipe's, else offline)")
        command.add_argument("--model", default="", help="the LLM's name at the endpoint")
        command.add_argument("--queries", type=int, default=0, help="to generate; 0: as the recipe, by corpus size")
        command.add_argument("--classes", nargs=2, action="append", default=[], metavar=("TRAIN", "TEST"),
                             help="JSONL or CSV of text, label: accuracy of the nearest TRAIN texts' label")
        command.add_argument("--beir", action="append", default=[], help="a BEIR folder; may be repeated")
        command.add_argument("--sts", action="append", default=[], help="JSONL of sentence1, sentence2, score")
        command.add_argument("--split", default="test", help="qrels/SPLIT.tsv (%(default)s)")
        command.add_argument("--task", default="question answering", help="the queries' task (%(default)s)")
        add_flags(functools.partial(add_setting, command), TrainConfig)
        small = vars(replace(train.BAG, steps=train.Sizes().steps))
        command.set_defaults(**small)
    args = parsed(parser)
    if args.table == "plot":
        plot_command(args)
    else:
        table_command(args)


if __name__ == "__main__":
    run(main)
