"""Toy records, a small model with every part in it, and a command line in this process."""

import json
import random

import pytest
import torch

from data import record
from engine.files import run
from gecko import tiny

WORDS = "red green blue stone river cloud bread salt wind fire lamp door sand moss rain".split()


def sentence(rng, low=2, high=9):
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


def records(count, seed=0, negatives=True):
    """Rows whose positive shares a word with the query that nothing else holds."""
    rng, rows = random.Random(seed), []
    for i in range(count):
        text = {"title": "", "text": f"{sentence(rng)} k{i} {sentence(rng)}"}
        negative = {"title": "", "text": sentence(rng)} if negatives and i % 3 else None
        rows.append(record("search result", f"k{i} {sentence(rng, 1, 3)}", text, negative))
    return rows


def small_model(layers=1, dropout=0.2, seed=0):
    texts = [f"task: search result | query: {r['query']} title: none | text: {r['positive']['text']}"
             for r in records(40)]
    model = tiny(texts, seed, vocabulary=200, hidden_size=8, num_hidden_layers=layers, num_attention_heads=2,
                 intermediate_size=12, max_position_embeddings=32, layer_norm_eps=1e-6,
                 hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    generator = torch.Generator().manual_seed(seed)
    for p in model.encoder.parameters():                             # so that no part starts as the identity
        p.data += 0.3 * torch.randn(p.shape, generator=generator)
    return model


def weights_of(model):
    return b"".join(p.detach().numpy().tobytes() for p in model.encoder.parameters())


def beir_folder(folder, rows, split):
    """The rows as a retrieval set: query i is answered by passage i."""
    (folder / "qrels").mkdir(parents=True)
    lines = ["query-id\tcorpus-id\tscore"] + [f"q{i}\tp{i}\t1" for i in range(len(rows))]
    (folder / f"qrels/{split}.tsv").write_text("\n".join(lines) + "\n")
    (folder / "corpus.jsonl").write_text("".join(
        json.dumps({"_id": f"p{i}", **r["positive"]}) + "\n" for i, r in enumerate(rows)))
    (folder / "queries.jsonl").write_text("".join(
        json.dumps({"_id": f"q{i}", "text": r["query"]}) + "\n" for i, r in enumerate(rows)))


def command(main, *arguments):
    """A module's command line as from a shell; a mistake is SystemExit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["prog", *map(str, arguments)])
        run(main)


def outcome(capsys, main, *arguments):
    """What a command line does: exit code, stdout, stderr."""
    code = 0
    try:
        command(main, *arguments)
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr()
    return code, said.out, said.err


def mistake(capsys, main, *arguments):
    """The one line that a command line's mistake prints, with exit code 2."""
    code, _, error = outcome(capsys, main, *arguments)
    assert code == 2
    return error.strip()


def bytes_of(folder, without=()):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*"))
            if p.is_file() and p.name not in without}
