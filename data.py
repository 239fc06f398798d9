"""Training data (Gecko, arXiv 2403.20327, sections 3.1 and 3.3): the record, classification made
contrastive, the mixture.

Every training set has one format: task, input, positive target and negative target. This file makes,
reads and checks such records, and draws batches from a mixture of sets.

    python data.py corpus OUT.jsonl [DOCS]            the built-in corpus, or a folder of documents
    python data.py convert KIND IN... OUT.jsonl       publishers' files -> records
    python data.py check FILE                         what the encoder will see of a training file

Where we fill a gap in the paper:
1. Mixture (3.3, weights not stated): a weight for each set; `batches` says how sets meet in a batch.
2. Unique ids (3.3, their form not stated): the number of the triple, in brackets.
3. Title-body pairs (3.1, crawled from the web): from documentation and code, see engine/pairs.py.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from engine import pairs
from engine.commandline import data_arguments
from engine.convert import KINDS, Convert, contrasted, text_only
from engine.corpus import Corpus, Passage, builtin_corpus
from engine.documents import read_corpus
from engine.files import InputError, check_outputs, from_flags, run, write_jsonl
from engine.show import counted, overview
from engine.table import read_records
from gecko import FORMATS, format_passage, format_query, load

Record = dict[str, Any]  # a training row, with the keys that `record` gives it
Records = Sequence[Record]
# x, x+ and x- are the three texts of a classification triple; B rows in a batch.

# --------------------------------------------------------------------------------------------------
# The record (section 3.3)


def record(
    task: str,
    query: str,
    positive: Passage,                 # {"title", "text"}
    negative: Passage | None = None,
    symmetric: bool = False,           # the targets are texts of the query's kind: similarity, classification
    **more: Any,                       # what a file keeps beside it, such as the candidates of a FRet row
) -> Record:
    """One training row."""
    return {"task": task, "query": query, "positive": positive, "negative": negative,
            "symmetric": symmetric, **more}


def side(passage: Passage) -> Passage:
    """A passage of a corpus as a record's positive or negative."""
    return {"title": passage["title"], "text": passage["text"]}


def formatted(row: Record, formats: dict[str, str] = FORMATS) -> tuple[str, str, str | None]:
    """The three texts that the encoder sees: input, positive target, and negative target or None.

    Symmetric rows give their targets the input's format, task and all (appendix B).

    >>> formatted(record("question answering", "who", {"title": "T", "text": "p"}))
    ('task: question answering | query: who', 'title: T | text: p', None)
    """
    def target(p: Passage) -> str:
        if row["symmetric"]:
            return format_query(p["text"], row["task"], formats)
        return format_passage(p["text"], p.get("title") or "", formats)

    negative = target(row["negative"]) if row["negative"] else None
    return format_query(row["query"], row["task"], formats), target(row["positive"]), negative


# --------------------------------------------------------------------------------------------------
# Classification made contrastive (section 3.3)


def classification_triples(texts: Sequence[str], labels: Sequence[Any], seed: int = 0,
                           task: str = "classification", unique_ids: bool = True) -> list[Record]:
    """For each x: x+ with x's label, x- with any other, on all three the triple's own id, " [0]", ...

    Without ids, other rows of the same label are false negatives in the batch. With them, the id
    alone tells a row from all others, and what is left to learn from is x-. The three texts differ:
    x+ is drawn from the texts of x's label, then x- from those of other labels; an x+ that leaves no
    x- is not drawn. Rows are symmetric. An x that has no such texts is left out; a single label is an InputError,
    "at least two labels".
    """
    # EXERCISE 3 (about 25 lines)
    groups: dict[Any, list[int]] = {}                                # label -> the numbers of its texts
    for i, label in enumerate(labels):
        groups.setdefault(label, []).append(i)
    if len(groups) < 2:
        raise InputError("classification needs at least two labels; check the label column")
    rng, rows = np.random.default_rng(seed), list[Record]()

    def draw_negative(x: str, label: Any, positive: str) -> int | None:
        return drawn(rng, range(len(texts)),
                     lambda j: labels[j] != label and texts[j] not in (x, positive))

    for x, label in zip(texts, labels, strict=True):
        same = drawn(rng, groups[label], lambda j: texts[j] != x)    # x+
        if same is None:
            continue                                                 # x alone with its label
        other = draw_negative(x, label, texts[same])                 # x-
        if other is None:
            # subtle: the only text that x- could be is x+ itself; any other x+ leaves it
            taken = texts[same]
            same = drawn(rng, groups[label], lambda j: texts[j] not in (x, taken))
            other = None if same is None else draw_negative(x, label, texts[same])
        if same is None or other is None:
            continue
        tag = f" [{len(rows)}]" if unique_ids else ""
        positive, negative = text_only(texts[same] + tag), text_only(texts[other] + tag)
        rows.append(record(task, x + tag, positive, negative, symmetric=True))
    return rows
    # END EXERCISE


def drawn(rng: np.random.Generator, pool: Sequence[int], good: Callable[[int], bool]) -> int | None:
    """A random one of the good members of a pool, or None."""
    if len(pool) > 1000:                         # most draws are good: do not go through it all
        for _ in range(1000):
            j = pool[int(rng.integers(len(pool)))]
            if good(j):
                return j
    left = [j for j in pool if good(j)]
    return left[rng.integers(len(left))] if left else None


# --------------------------------------------------------------------------------------------------
# The mixture (section 3.3)


def schedule(
    sizes: Sequence[int],      # of the sets
    weights: Sequence[float],  # of the sets
    batch_size: int,           # B
    steps: int,
    seed: int,
) -> list[tuple[int, np.ndarray]]:
    """For every step: a set, and the numbers of B of its rows (all rows of a smaller set).

    A batch comes from one set, drawn by weight. So the in-batch negatives of a row are of its own
    kind, and symmetric and asymmetric targets, which differ in their format, meet only within a set. Each epoch
    of a set takes its rows in a new order and skips those that fill no batch. The whole schedule
    follows from the seed, so a resumed run continues it at any step.
    """
    which = draw_by_weight(weights, steps, seed)                     # (steps)
    plan: dict[int, tuple[int, np.ndarray]] = {}                     # step -> set, its rows
    for s, size in enumerate(sizes):
        B = min(batch_size, size)
        turns = np.flatnonzero(which == s)                           # the steps of this set
        rows = epochs(size, size // B * B, len(turns) * B, [seed, 1 + s])  # (turns * B)
        for step, batch in zip(turns.tolist(), rows.reshape(-1, B), strict=True):
            plan[step] = s, batch
    return [plan[step] for step in range(steps)]


def mixed_schedule(
    groups: Sequence[np.ndarray],  # the row numbers of each
    weights: Sequence[float],      # of the groups
    batch_size: int,               # B
    steps: int,
    seed: int,
) -> list[np.ndarray]:
    """For every step the row numbers, (B), of a batch whose rows come from all groups, by weight.

    Symmetric and asymmetric rows may meet in a batch. Each epoch of a group takes its rows in a new order.
    """
    which = draw_by_weight(weights, steps * batch_size, seed)        # (steps * B)
    plan = np.empty_like(which)                                      # (steps * B)
    for g, rows in enumerate(groups):
        turns = np.flatnonzero(which == g)                           # the places of this group
        size = len(rows)
        plan[turns] = rows[epochs(size, size, len(turns), [seed, 1 + g])]
    return list(plan.reshape(steps, batch_size))


def draw_by_weight(weights: Sequence[float], count: int, seed: int) -> np.ndarray:
    """(count) numbers of sets, each drawn with its share of the weights."""
    shares = np.asarray(weights, float) / np.sum(weights)
    rng = np.random.default_rng([seed, 0])
    return rng.choice(len(weights), size=count, p=shares)


def epochs(size: int, kept: int, count: int, seed: list[int]) -> np.ndarray:
    """(count) row numbers below `size`: one permutation after another, the first `kept` of each."""
    rows = [np.empty(0, int)]
    for epoch in range(math.ceil(count / kept)):
        rng = np.random.default_rng([*seed, epoch])
        rows.append(rng.permutation(size)[:kept])
    return np.concatenate(rows)[:count]


def batches(
    sets: Sequence[Records],
    weights: Sequence[float] | None,  # of the sets; None: all alike
    mix: str,                         # "sets", "mixed" or "tasks"
    batch_size: int,                  # B
    steps: int,
    seed: int,
) -> list[np.ndarray]:
    """For every step its row numbers, (B), which count through all sets.

    mix: "sets" is `schedule`; "mixed" draws each row of a batch from a set by weight; "tasks" draws each
    from a task, all tasks with equal weight (the paper's uniform sampling, in its diversity table). A FRet
    row counts by the `kind` of its task: the task itself is free text and rarely repeats.
    """
    sizes = [len(rows) for rows in sets]
    starts = np.cumsum([0, *sizes])[:-1]                             # (sets)
    weights = weights or [1.0] * len(sizes)
    if mix == "sets":
        return [starts[s] + rows for s, rows in schedule(sizes, weights, batch_size, steps, seed)]
    if mix == "mixed":
        groups = [np.arange(start, start + size) for start, size in zip(starts, sizes, strict=True)]
        return mixed_schedule(groups, weights, batch_size, steps, seed)
    tasks: dict[str, list[int]] = {}                                 # task -> numbers of its rows
    for number, row in enumerate(itertools.chain(*sets)):
        tasks.setdefault(task_of(row), []).append(number)
    groups = [np.array(numbers) for numbers in tasks.values()]
    return mixed_schedule(groups, [1.0] * len(groups), batch_size, steps, seed)


def task_of(row: Record) -> str:
    return row.get("kind") or row["task"]


# --------------------------------------------------------------------------------------------------
# Title-body pairs for pre-finetuning (section 3.1)

PAIR_TASKS = ("search result", "question answering")  # section 3.1: short strings


def builtin_pairs(corpus: Corpus, count: int, seed: int = 0) -> list[Record]:
    """`count` unlabelled pairs out of documentation and source code, each with one of the tasks."""
    rows = []
    for task, query, title, text in pairs.builtin_pairs(corpus, count, seed, PAIR_TASKS):
        rows.append(record(task, query, {"title": title, "text": text}))
    return rows


# --------------------------------------------------------------------------------------------------
# In practice: publishers' files (engine/convert.py reads them) -> records, the command line


def converted(
    kind: str,
    paths: Sequence[str],
    left_out: Counter[str],  # gets, by the reason, how many rows gave no record
    c: Convert | None = None,  # the flags, see engine/convert.py
) -> list[Record]:
    """Records of files of one kind."""
    c = c or Convert()
    task, read = KINDS[kind]
    c = replace(c, task=c.task or task)
    if kind == "classification":
        texts, labels = read(paths)
        triples = classification_triples(texts, labels, c.seed, c.task)
        left_out["texts of which no triple can be made"] += len(texts) - len(triples)
        return triples
    rows = read(paths, left_out, c, load(c.model) if c.model else None)
    rng, records = np.random.default_rng(c.seed), []
    for row, negative in contrasted(rows, left_out, rng):
        negative = negative and side(negative)
        records.append(record(c.task, row.query, side(row.positive), negative, row.symmetric))
    return records


def convert(kind: str, inputs: Sequence[str], output: str, c: Convert) -> None:
    """One kind of files, what was left out of them, and the next command."""
    check_outputs([output], *inputs)
    left_out: Counter[str] = Counter()
    rows = converted(kind, inputs, left_out, c)
    for reason, count in left_out.items():
        if count:
            print(f"  left out: {count} {reason}")
    if not rows:
        raise InputError(f"{output}: no record could be made of {', '.join(inputs)}")
    write_jsonl(output, rows)
    print(f"wrote {output}: {counted(rows)}")
    print(f"next: python data.py check {output}")


def corpus(output: str, documents: str) -> None:
    """The built-in corpus, or documents. Run again, it has what was added; unchanged files keep their ids."""
    check_outputs([output], documents)
    passages = read_corpus(documents) if documents else builtin_corpus()
    write_jsonl(output, passages)
    print(f"wrote {output}: {len(passages)} passages")
    print(f"next: python train.py --corpus {output} --init MODEL --llm URL --out runs/mine")


def check(path: str, model_dir: str | None, max_length: int | None) -> None:
    """What training will see of a file: texts as formatted, counts, repeated texts."""
    rows = read_records(path)
    model = load(model_dir) if model_dir else None
    texts = [formatted(row, model.formats if model else FORMATS) for row in rows]
    print(f"{path}: {counted(rows)}")
    for line in overview(texts, [task_of(row) for row in rows]):
        print(f"  {line}")
    if model:
        model.tokens([text for three in texts for text in three if text], max_length)
        print(f"  {model.lost() or f'no text is cut at {model.length} tokens'}")


def main() -> None:
    args = data_arguments(__doc__)
    if args.command == "corpus":
        corpus(args.output, args.documents)
    elif args.command == "convert":
        convert(args.kind, args.inputs, args.output, from_flags(Convert, args))
    else:
        check(args.file, args.model, args.max_length)


if __name__ == "__main__":
    run(main)
