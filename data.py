"""Records, training sets and the built-in corpus (Gecko, arXiv 2403.20327, sections 3.1 and 3.3).

Every training set has one format, the record of section 3.3: task, input, positive target and
negative target. This file reads, writes and checks records, makes classification data contrastive,
draws batches from a mixture, and holds a corpus that needs no download: the documentation of the
Python standard library, read from the running interpreter.

    python data.py corpus OUT.jsonl          write the built-in corpus
    python data.py check FILE                what the encoder will see of a training file
    python data.py convert nli|classification|beir|choice|pairs IN... OUT.jsonl      publishers' files

Where we fill a gap in the paper:
1. Mixture (3.3, weights not stated): a weight for each set; one set a batch, see `schedule`.
2. Unique ids (3.3, their form not stated): the number of the triple, in brackets.
3. Title-body pairs (3.1, crawled from the web): name, sentence or word span against the passage,
   a comment against the code below it, and what people write about code against the documentation
   of what that code calls.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine import pairs
from engine.corpus import builtin_corpus as builtin_corpus
from engine.files import (
    InputError,
    at_least,
    beir_file,
    check_output,
    open_text,
    read_jsonl,
    read_passages,
    run,
    write_jsonl,
)
from engine.pairs import SOURCES
from engine.search import topk
from gecko import (
    FORMATS,
    Gecko,
    format_passage,
    format_query,
    load,
)

Record = dict[str, Any]  # the row described at `record`
# A passage is {"_id", "title", "text"}; B rows in a batch.

# --------------------------------------------------------------------------------------------------
# The record (section 3.3)


def record(task: str, query: str, positive: dict[str, str], negative: dict[str, str] | None = None,
           symmetric: bool = False, **more: Any) -> Record:
    """One training row; positive and negative are {"title", "text"}, the negative may be None.

    symmetric: the targets are texts of the query's kind (similarity, classification). more: what a
    file keeps beside it, such as the candidates of a FRet row.
    """
    return {"task": task, "query": query, "positive": positive, "negative": negative,
            "symmetric": symmetric, **more}


def side(passage: dict[str, str]) -> dict[str, str]:
    """A passage as a record's positive or negative."""
    return {"title": passage["title"], "text": passage["text"]}


def text_only(text: str) -> dict[str, str]:
    """A positive or negative without a title."""
    return {"title": "", "text": text}


def formatted(row: Record, formats: dict[str, str] = FORMATS) -> tuple[str, str, str | None]:
    """The three texts that the encoder sees: input, positive and (or None) negative target.

    Symmetric rows give their targets the input's format, task and all (appendix B).

    >>> formatted(record("question answering", "who", {"title": "T", "text": "p"}))
    ('task: question answering | query: who', 'title: T | text: p', None)
    """
    def target(p: dict[str, str]) -> str:
        if row["symmetric"]:
            return format_query(p["text"], row["task"], formats)
        return format_passage(p["text"], p.get("title") or "", formats)

    negative = target(row["negative"]) if row["negative"] else None
    return format_query(row["query"], row["task"], formats), target(row["positive"]), negative


# --------------------------------------------------------------------------------------------------
# Classification made contrastive (section 3.3)


def classification_triples(texts: Sequence[str], labels: Sequence[Any], seed: int = 0,
                           task: str = "classification", unique_ids: bool = True) -> list[Record]:
    """For each x: x+ with x's label, x- with any other, on all three the triple's own id, " [0]", " [1]", ...

    Without ids, other rows of the same label stand in the batch as false negatives; with them every
    other row is told apart by its id, and what is left to learn from is x-. Rows are symmetric; an x
    of which no triple can be made is left out. InputError, "at least two labels", where there is but one.
    """
    # EXERCISE 3 (about 18 lines)
    groups: dict[Any, list[int]] = {}
    for i, label in enumerate(labels):
        groups.setdefault(label, []).append(i)
    if len(groups) < 2:
        raise InputError("classification needs at least two labels; check the label column")
    rng, rows = np.random.default_rng(seed), list[Record]()
    for i, (x, label) in enumerate(zip(texts, labels, strict=True)):
        same = drawn(rng, groups[label], lambda j: texts[j] != x)
        if same is None:
            continue                                                 # x alone with its label
        other = drawn(rng, range(len(texts)), lambda j: labels[j] != label and texts[j] not in (x, texts[same]))
        if other is None:
            continue                                                 # no text but these two
        tag = f" [{len(rows)}]" if unique_ids else ""
        rows.append(record(task, x + tag, text_only(texts[same] + tag), text_only(texts[other] + tag),
                           symmetric=True))
    return rows
    # END EXERCISE


def drawn(rng: np.random.Generator, pool: Sequence[int], good: Callable[[int], bool]) -> int | None:
    """A random one of the good members of a pool, None without any; a large pool is not gone through."""
    for _ in range(1000 * (len(pool) > 1000)):
        if good(j := pool[int(rng.integers(len(pool)))]):
            return j
    left = [j for j in pool if good(j)]
    return left[rng.integers(len(left))] if left else None


# --------------------------------------------------------------------------------------------------
# The mixture (section 3.3)


def schedule(sizes: Sequence[int], weights: Sequence[float], batch_size: int, steps: int,
             seed: int) -> list[tuple[int, np.ndarray]]:
    """For every step: which set, and the numbers of B of its rows (all of them, of a smaller set).

    A batch comes from one set, drawn by weight: its other rows are then negatives of the row's own
    kind, and symmetric and asymmetric targets, which their format alone tells apart, never meet.
    Each set is gone through in a new order each time; rows left over at its end are passed over.
    The whole schedule follows from the seed, so a resumed run continues it at any step.
    """
    which = draw_by_weight(weights, steps, seed)                     # (steps)
    plan: dict[int, tuple[int, np.ndarray]] = {}                     # step -> set, rows
    for s, size in enumerate(sizes):
        B, turns = min(batch_size, size), np.flatnonzero(which == s)
        rows = in_rounds(size, size // B * B, len(turns) * B, [seed, 1 + s]).reshape(-1, B)  # (turns, B)
        plan |= {step: (s, batch) for step, batch in zip(turns.tolist(), rows, strict=True)}
    return [plan[step] for step in range(steps)]


def mixed_schedule(groups: Sequence[np.ndarray], weights: Sequence[float], batch_size: int, steps: int,
                   seed: int) -> list[np.ndarray]:
    """For every step the row numbers, (B), of a batch whose rows come from all groups, by weight.

    groups: the row numbers of each. Symmetric and asymmetric rows may meet in a batch. Each group is gone
    through in a new order each time.
    """
    which = draw_by_weight(weights, steps * batch_size, seed)        # (steps * B)
    plan = np.empty_like(which)                                      # (steps * B)
    for g, rows in enumerate(groups):
        turns = np.flatnonzero(which == g)
        plan[turns] = rows[in_rounds(len(rows), len(rows), len(turns), [seed, 1 + g])]
    return list(plan.reshape(steps, batch_size))


def draw_by_weight(weights: Sequence[float], count: int, seed: int) -> np.ndarray:
    """(count) numbers of sets, each drawn with its share of the weights."""
    p = np.asarray(weights, float) / np.sum(weights)
    return np.random.default_rng([seed, 0]).choice(len(weights), size=count, p=p)


def in_rounds(size: int, kept: int, count: int, seed: list[int]) -> np.ndarray:
    """(count) row numbers below `size`: one permutation after another, of each the first `kept`."""
    rounds = [np.random.default_rng([*seed, r]).permutation(size)[:kept] for r in range(-(-count // kept))]
    return np.concatenate([np.empty(0, int), *rounds])[:count]


def batches(sets: Sequence[Sequence[Record]], weights: Sequence[float] | None, mix: str, batch_size: int,
            steps: int, seed: int) -> list[np.ndarray]:
    """For every step the numbers of its rows, (B), counted through all sets.

    weights: one a set; None weighs them alike. mix: "sets" is `schedule`; "mixed" draws each row of a
    batch from a set by weight; "tasks" from a task, each of all tasks alike (the paper's uniform
    sampling in its diversity table). A row of FRet has the `kind` of its task too, and is sampled by
    it: its task is free text, seldom twice the same.
    """
    sizes = [len(rows) for rows in sets]
    starts = np.cumsum([0, *sizes])[:-1]                             # (sets)
    weights = weights or [1.0] * len(sizes)
    if mix == "sets":
        return [starts[s] + rows for s, rows in schedule(sizes, weights, batch_size, steps, seed)]
    if mix == "mixed":
        groups = [np.arange(a, a + n) for a, n in zip(starts, sizes, strict=True)]
        return mixed_schedule(groups, weights, batch_size, steps, seed)
    tasks: dict[str, list[int]] = {}
    for number, row in enumerate(itertools.chain(*sets)):
        tasks.setdefault(row.get("kind") or row["task"], []).append(number)
    groups = [np.array(numbers) for numbers in tasks.values()]
    return mixed_schedule(groups, [1.0] * len(groups), batch_size, steps, seed)


# ==================================================================================================
# In practice: reading and checking, relevance judgements, the built-in corpus, the command line.
# ==================================================================================================


def read_records(path: str | Path, candidates: bool = True) -> list[Record]:
    """A training file; the first wrong row is an error that names file:line and the fix.

    Without `candidates` a mined file takes a fraction of the memory; a loss has no use for them.
    """
    rows = []
    for where, row in read_jsonl(path):
        for key in ("task", "query"):
            if not isinstance(row.get(key), str) or not row[key].strip():
                raise InputError(f'{where}: no "{key}"; a record has task, query and positive')
        for key in ("positive", "negative"):
            p = row.get(key)
            if p is None and key == "negative":
                continue
            if not (isinstance(p, dict) and isinstance(p.get("title"), str | None)
                    and isinstance(p.get("text"), str) and p["text"].strip()):
                raise InputError(f'{where}: "{key}" has no text; give {{"title": "", "text": "..."}}')
        if row.get("negative") and row["negative"]["text"] == row["positive"]["text"]:
            raise InputError(f"{where}: positive and negative are the same text; remove the negative")
        if not isinstance(row.get("kind"), str | None) or row.get("symmetric", False) not in (True, False):
            raise InputError(f'{where}: "kind" is no text, or "symmetric" neither true nor false; mend or drop it')
        if not candidates:
            row.pop("candidates", None)
        rows.append({"negative": None, "symmetric": False, **row})
    return rows


def read_qrels(path: str | Path) -> dict[str, dict[str, int]]:
    """BEIR relevance judgements, TSV with a header: {query id: {passage id: grade > 0}}.

    A query whose grades are all 0 stays, with none: trec_eval, and so BEIR, counts it as 0 in a mean.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; a BEIR folder has qrels/test.tsv")
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error}); write or copy it again") from error
    qrels: dict[str, dict[str, int]] = {}
    for number, line in enumerate(lines, 1):
        query, passage, grade = [*line.split("\t"), "", ""][:3]
        if re.fullmatch(r"\s*-?\d+\s*", grade):
            relevant = qrels.setdefault(query, {})
            if int(grade) > 0:
                relevant[passage] = int(grade)
        elif number > 1:                                             # the first line is a header
            raise InputError(f"{path}:{number}: want query-id, corpus-id, score with tabs")
    if not any(qrels.values()):
        raise InputError(f"{path}: no relevant passage; nothing to evaluate")
    return qrels


# --------------------------------------------------------------------------------------------------
# Converters: the files that publishers ship -> records. Each yields records, and counts in `left_out`
# what it leaves out, by the reason.


def table(path: str) -> Iterator[tuple[str, Any]]:
    """("file:line", row) of .jsonl, .csv or .tsv with a header, plain or .gz."""
    kind = Path(path.removesuffix(".gz")).suffix
    if kind not in (".csv", ".tsv"):
        yield from read_jsonl(path)
        return
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; check the path")
    with open_text(path) as lines:
        reader = csv.DictReader(lines) if kind == ".csv" else \
            csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        try:
            if lines.read(1) != "\ufeff":                            # the byte order mark of a spreadsheet
                lines.seek(0)
            for row in reader:
                yield f"{path}:{reader.line_num}", row
        except (csv.Error, OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
            raise InputError(f"{path}:{reader.line_num}: not {kind[1:]} ({error})") from error


def column(where: str, row: dict[str, Any], *names: str) -> Any:
    """The first of the columns that the row has and that is not blank."""
    for name in names:
        if row.get(name) is not None and str(row[name]).strip():
            return row[name]
    raise InputError(f"{where}: no {' or '.join(names)} among {', '.join(map(str, row))}; rename the column")


NLI = {"0": "entailment", "1": "neutral", "2": "contradiction"}


def convert_nli(paths: Sequence[str], left_out: Counter[str], task: str = "semantic similarity",
                ) -> Iterator[Record]:
    """SNLI, MNLI and their like: a premise, what it entails, what contradicts it. Symmetric."""
    found: dict[str, dict[str, list[str]]] = {}
    for path in paths:
        for where, row in table(path):
            label = str(column(where, row, "gold_label", "label")).strip().lower()
            label = NLI.get(label, label)
            if label not in (*NLI.values(), "-", "-1"):
                raise InputError(f"{where}: label {label!r}; want {', '.join(NLI.values())} or 0, 1, 2")
            if label in ("-", "-1"):
                left_out["rows without a gold label"] += 1
                continue
            premise = str(column(where, row, "sentence1", "premise")).strip()
            other = str(column(where, row, "sentence2", "hypothesis")).strip()
            found.setdefault(premise, {}).setdefault(label, []).append(other)
    for premise, by_label in found.items():
        against = [text for text in by_label.get("contradiction", []) if text != premise]
        for n, entailed in enumerate(dict.fromkeys(by_label.get("entailment", []))):
            negative = against[n % len(against)] if against else None
            if entailed == premise or entailed == negative:
                left_out["rows that repeat a text"] += 1
                continue
            left_out["kept without a contradiction of the premise"] += negative is None
            yield record(task, premise, text_only(entailed), text_only(negative) if negative else None,
                         symmetric=True)
        left_out["premises that entail nothing"] += "entailment" not in by_label


def read_labelled(paths: Sequence[str]) -> tuple[list[str], list[str]]:
    """Texts and their labels."""
    texts, labels = [], []
    for path in paths:
        for where, row in table(path):
            texts.append(str(column(where, row, "text", "sentence", "utterance")).strip())
            labels.append(str(column(where, row, "label", "category", "intent")).strip())
    return texts, labels


def convert_classification(paths: Sequence[str], left_out: Counter[str], task: str = "classification",
                           seed: int = 0, unique_ids: bool = True) -> Iterator[Record]:
    """Text and label: triples of the same and another label, see `classification_triples`."""
    texts, labels = read_labelled(paths)
    rows = classification_triples(texts, labels, seed, task, unique_ids)
    left_out["rows alone with their label"] += len(texts) - len(rows)
    yield from rows


def convert_choice(paths: Sequence[str], left_out: Counter[str], task: str = "question answering",
                   seed: int = 0) -> Iterator[Record]:
    """MedMCQA: question, opa..opd and cop, the right one (1 to 4; 0 to 3 where a 0 occurs)."""
    rows = [pair for path in paths for pair in table(path)]
    rng, right = np.random.default_rng(seed), []
    for where, row in rows:
        given = str(column(where, row, "cop"))
        if not re.fullmatch(r"-?\d+", given):
            raise InputError(f"{where}: cop {given!r} is no number; give that of the right option")
        right.append(int(given))
    first = 0 if 0 in right else 1
    for (where, row), answer in zip(rows, right, strict=True):
        options = [str(row.get(name) or "").strip() for name in ("opa", "opb", "opc", "opd")]
        if answer != -1 and not 0 <= answer - first < 4:
            raise InputError(f"{where}: cop {answer}; this file numbers its options {first} to {first + 3}")
        if answer == -1 or not options[answer - first]:
            left_out["questions without an answer"] += 1
            continue
        positive = options[answer - first]
        wrong = [text for text in options if text not in ("", positive)]
        yield record(task, str(column(where, row, "question")).strip(), text_only(positive),
                     text_only(wrong[rng.integers(len(wrong))]) if wrong else None)


def convert_beir(folders: Sequence[str], left_out: Counter[str], task: str = "question answering",
                 seed: int = 0, model: Gecko | None = None, depth: int = 50, split: str = "train",
                 ) -> Iterator[Record]:
    """BEIR folders: each query with each relevant passage; with a model, a hard negative too.

    It is drawn from the model's first `depth` passages without the judged ones and one of the query's
    own id (ArguAna's queries stand in their corpus). The very first are the likeliest to be relevant
    and unjudged (a false negative), so they should not be all there is.
    """
    for folder in folders:
        corpus = {p["_id"]: p for p in read_passages(beir_file(folder, "corpus.jsonl"))}
        qrels = read_qrels(Path(folder) / f"qrels/{split}.tsv")
        queries = {str(row.get("_id")): str(column(where, row, "text"))
                   for where, row in read_jsonl(beir_file(folder, "queries.jsonl")) if str(row.get("_id")) in qrels}
        near = mined(model, list(corpus.values()), queries, task, depth) if model else {}
        rng = np.random.default_rng(seed)
        for query, judged in qrels.items():
            positives = [corpus[i] for i in judged if i in corpus]
            left_out["judgements whose query or passage is not there"] += (
                len(judged) - len(positives) if query in queries else len(judged))
            texts = {p["text"] for p in positives}
            hard = [i for i in near.get(query, []) if i not in (query, *judged) and corpus[i]["text"] not in texts]
            for positive in positives if query in queries else []:
                negative = corpus[hard[rng.integers(len(hard))]] if hard else None
                yield record(task, queries[query], side(positive), side(negative) if negative else None)


def mined(model: Gecko, corpus: Sequence[dict[str, str]], queries: dict[str, str], task: str, depth: int,
          ) -> dict[str, list[str]]:
    """The model's first `depth` passages of each query, by id."""
    P = model.encode_passages([p["text"] for p in corpus], [p["title"] for p in corpus], progress="passages")
    q = model.encode_queries(list(queries.values()), task, progress="queries")
    _, nearest = topk(q, P, min(depth, len(P)))
    return {query: [corpus[i]["_id"] for i in near] for query, near in zip(queries, nearest, strict=True)}


def convert_pairs(paths: Sequence[str], left_out: Counter[str], task: str = "search result",
                  ) -> Iterator[Record]:
    """Question and answer, title and body, query and passages; negatives are kept where a file has them.

    Two sentences are symmetric; of those with a label, 0 for "not the same", only the others are pairs.
    """
    def sides(found: Any) -> list[dict[str, str]]:
        """One side or a list of them, each a text or {"title", "text"}."""
        return [{"title": str(part.get("title") or ""), "text": str(part.get("text") or "").strip()}
                if isinstance(part, dict) else text_only(str(part).strip())
                for part in (found if isinstance(found, list) else [found])]

    for path in paths:
        for where, row in table(path):
            query = str(column(where, row, "query", "question", "title", "sentence1")).strip()
            found = column(where, row, "positive", "pos", "answer", "body", "text", "passage", "sentence2")
            against = [s for s in sides(row.get("negative") or row.get("neg") or []) if s["text"]]
            if "sentence2" in row and str(row.get("label", 1)) in ("0", "0.0"):
                left_out["pairs that are labelled as different"] += 1
                continue
            for n, positive in enumerate(sides(found if found != [] else "")):
                negative = against[n % len(against)] if against else None
                texts = [query, positive["text"], *([negative["text"]] if negative else [])]
                if not positive["text"] or len(set(texts)) < len(texts):
                    left_out["pairs of a text with itself or nothing"] += 1
                else:
                    yield record(task, query, positive, negative, symmetric="sentence2" in row)


CONVERTERS = {"nli": convert_nli, "classification": convert_classification, "beir": convert_beir,
              "choice": convert_choice, "pairs": convert_pairs}


def convert(args: argparse.Namespace) -> None:
    """One converter, its counts, and the next command."""
    check_output(args.output, *args.inputs)
    at_least(0, seed=args.seed)
    left_out: Counter[str] = Counter()
    how: dict[str, Any] = {"task": args.task} if args.task else {}
    if args.kind in ("classification", "choice", "beir"):
        how["seed"] = args.seed
    if args.kind == "classification":
        how["unique_ids"] = args.ids
    if args.kind == "beir":
        how |= {"model": load(args.model) if args.model else None, "depth": args.depth, "split": args.split}
    kept: Counter[bool] = Counter()                                  # with a negative, without

    def counted() -> Iterator[Record]:
        for row in CONVERTERS[args.kind](args.inputs, left_out, **how):  # type: ignore[operator]
            kept[row["negative"] is not None] += 1
            yield row
        for reason, count in left_out.items():
            if count:
                print(f"  {count} {reason}")
        if not kept:                                                 # here, so that nothing is written
            raise InputError(f"{args.output}: no record could be made of {', '.join(args.inputs)}")

    n = write_jsonl(args.output, counted())
    print(f"wrote {args.output}: {n} records, {kept[True]} with a hard negative")
    print(f"next: python data.py check {args.output}")


# --------------------------------------------------------------------------------------------------
# Title-body pairs for pre-finetuning (section 3.1)

PAIR_TASKS = ("search result", "question answering")  # section 3.1: short strings, one a set


def builtin_pairs(corpus: Sequence[dict[str, str]], count: int, seed: int = 0,
                  sources: Sequence[str] = SOURCES) -> list[Record]:
    """`count` unlabelled pairs out of documentation and source code, each with one of section 3.1's tasks."""
    return [record(task, query, {"title": title, "text": text})
            for task, query, title, text in pairs.builtin_pairs(corpus, count, seed, PAIR_TASKS, sources)]


# --------------------------------------------------------------------------------------------------
# Command line


def check(path: str, model_dir: str | None, max_length: int | None) -> None:
    """Print what training will see of a file: texts as formatted, counts, doubtful rows."""
    if max_length is not None:
        at_least(1, max_length=max_length)
    rows = read_records(path)
    model = load(model_dir) if model_dir else None
    texts = [formatted(row, model.formats if model else FORMATS) for row in rows]
    print(f"{path}: {len(rows)} records, {sum(r['negative'] is not None for r in rows)} with a hard "
          f"negative, {sum(r['symmetric'] for r in rows)} symmetric")
    for task, n in Counter(r.get("kind") or r["task"] for r in rows).most_common(10):
        print(f"  {n:7d}  {task[:80]}")
    for name, kind in (("input", 0), ("positive", 1)):
        twice = len(texts) - len({t[kind] for t in texts})
        print(f"  {twice} repeated {name} texts (in a batch they are masked, not negatives)")
    same = sum(r["query"] == r["positive"]["text"] for r in rows)
    print(f"  {same} rows whose query is their positive (nothing to learn from)")
    for name, text in zip(("input", "positive", "negative"), texts[0], strict=True):
        print(f"  first {name}: {' '.join((text or '(none)').split())[:100]}")
    if model:
        tokens = model.tokens([t for row in texts for t in row if t], max_length)
        print(f"  {model.cut} of {len(tokens)} texts are cut at {max_length or model.max_length} tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    corpus = commands.add_parser("corpus", help="write the built-in corpus")
    corpus.add_argument("output")
    checker = commands.add_parser("check", help="what the encoder will see of a training file")
    checker.add_argument("file")
    checker.add_argument("--model", help="a model folder: also count the texts that will be cut")
    checker.add_argument("--max-length", type=int, help="as in training (default: the model's own)")
    converter = commands.add_parser("convert", help="publishers' files -> a training file")
    converter.add_argument("kind", choices=sorted(CONVERTERS), help="what the files are")
    converter.add_argument("inputs", nargs="+", help=".jsonl, .csv or .tsv, plain or .gz; beir: folders")
    converter.add_argument("output", help="the JSONL of records to write")
    converter.add_argument("--task", help="the records' task (default: the paper's for the kind)")
    converter.add_argument("--seed", type=int, default=0, help="of what is drawn (%(default)s)")
    converter.add_argument("--ids", action=argparse.BooleanOptionalAction, default=True,
                           help="classification: a unique id on the texts of a triple (section 3.3)")
    converter.add_argument("--model", help="beir: a model folder that finds hard negatives (default: none)")
    converter.add_argument("--depth", type=int, default=50, help="beir: draw from so many (%(default)s)")
    converter.add_argument("--split", default="train", help="beir: qrels/SPLIT.tsv (%(default)s)")
    args = parser.parse_args()
    if args.command == "convert":
        convert(args)
    elif args.command == "corpus":
        check_output(args.output)
        print(f"wrote {args.output}: {write_jsonl(args.output, builtin_corpus())} passages")
    else:
        check(args.file, args.model, args.max_length)


if __name__ == "__main__":
    run(main)
