"""Classification triples with and without unique ids (section 3.3); RESULTS.md shows what it printed.

    python tests/lab/ids.py DIR [--limit 2000]      a folder with train.* and test.* of text, label
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))
import train  # noqa: E402
from data import classification_triples, formatted  # noqa: E402
from engine.table import read_table  # noqa: E402
from gecko import Gecko, load, truncate_dim  # noqa: E402
from train import TrainConfig  # noqa: E402


def study(a: argparse.Namespace) -> None:
    """Fine-tune on DIR/train with each; accuracy on DIR/test: nearest neighbour and linear probe.

    Before and after, what the rows are pushed away from (`pushes`): an id is meant to take other rows out of it.
    """
    def read(name: str) -> tuple[list[str], list[str]]:
        path = next(p for p in sorted(Path(a.data).iterdir()) if p.name.startswith(name + "."))
        rows = [row for _, row in read_table(str(path))]
        rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))[:a.limit or None]]
        return [r["text"] for r in rows], [str(r["label"]) for r in rows]

    texts, labels = read("train")
    label, test = dict(zip(texts, labels, strict=True)), read("test")
    c = TrainConfig(batch_size=a.batch, steps=a.steps, micro_batch=a.micro_batch, lr=a.lr, tau=a.tau,
                    precision=a.precision)
    print(f"{len(texts)} train, {len(test[0])} test, {len(set(labels))} labels; {a.steps} steps of "
          f"{a.batch}, lr {a.lr}, tau {a.tau}")
    for seed in range(a.seeds):
        for name in ["untrained"] * (seed == 0) + ["without ids", "with ids"]:
            model = load(a.model)
            if name != "untrained":
                rows = classification_triples(texts, labels, seed, unique_ids=name == "with ids")
                before = pushes(model, rows, label, c)
                train.train(model, "finetune", [rows], replace(c, seed=seed), title=name)
                print(f"          pushed away from x-, the same label, other labels: {before}, trained "
                      f"{pushes(model, rows, label, c)}")
            near, probe = accuracies(model, (texts, labels), test)
            print(f"  seed {seed}  {name:12} nearest neighbour {near:.4f}, linear probe {probe:.4f}",
                  flush=True)


def pushes(model: Gecko, rows: list, label: dict[str, str], c: TrainConfig) -> str:
    """Of what eq. 3's gradient pushes x away from, the shares of x- and of other rows of its label or of others.

    The gradient of a negative's score is its softmax, so this is what the batch teaches; 8 batches, no dropout.
    """
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))[:8 * c.batch_size]]
    texts = [(formatted(row, model.formats), row["query"]) for row in rows]
    tokens, sides = train.tokenised(model, texts, c.max_length, [np.arange(len(texts))])
    names = [label[re.sub(r" \[\d+\]$", "", row["query"])] for row in rows]
    shares = np.zeros(4)                                             # x-, same label, other labels, x+
    for a in range(0, len(rows) - c.batch_size + 1, c.batch_size):
        part = range(a, a + c.batch_size)
        with torch.no_grad():
            q, p, n = (truncate_dim(model.embed([tokens[i] for i in side])) for side in sides[part].T)   # (B, d)
        B, same = len(q), torch.tensor([[names[i] == names[j] for j in part] for i in part])   # (B, B)
        diagonal = torch.eye(B, dtype=torch.bool)
        s = torch.cat([(q * n).sum(1, keepdim=True), q @ p.T, (q @ q.T).masked_fill(diagonal, -1e9)], 1) / c.tau
        own, positives, queries = s.softmax(1).split([1, B, B], 1)
        rest = positives.masked_fill(diagonal, 0) + queries          # (B, B)
        shares += [float(x.sum()) for x in (own, rest[same], rest[~same], positives.diagonal())]
    away = shares[:3].sum()
    return " ".join(f"{x / away:.3f}" for x in shares[:3]) + f" (all: {away / shares.sum():.3f})"


def accuracies(model: Gecko, known: tuple, test: tuple) -> tuple[float, float]:
    names = {label: i for i, label in enumerate(sorted(set(known[1])))}
    x, t = (torch.from_numpy(model.encode_queries(texts, "classification")) for texts, _ in (known, test))
    y, gold = (torch.tensor([names[label] for label in labels]) for _, labels in (known, test))
    near = y[(t @ x.T).argmax(1)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        probe = torch.nn.Linear(x.shape[1], len(names))
    optimiser = torch.optim.AdamW(probe.parameters(), lr=0.05, weight_decay=1e-4)
    for _ in range(200):
        optimiser.zero_grad()
        F.cross_entropy(probe(x) * 10, y).backward()
        optimiser.step()
    return float((near == gold).float().mean()), float((probe(t).argmax(1) == gold).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("data", help="a folder with train.* and test.* of text, label")
    parser.add_argument("--model", required=True, help="the encoder that is fine-tuned")
    parser.add_argument("--limit", type=int, default=0, help="this many rows of each file; 0: all")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--micro-batch", type=int, default=0)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=3e-5)
    parser.add_argument("--tau", type=float, default=0.05)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--precision", default="bf16", choices=("float32", "bf16"))
    study(parser.parse_args())


if __name__ == "__main__":
    main()
