"""The files of a real mixture table, from public sets in a folder.

    python tests/lab/mixture_sets.py DATA OUT

DATA holds BEIR folders nq-open, wikiqa, medquad and squad; agnews-titlebody and reuters-titlebody
(query, positive); sick-e-nli; banking77, subj and sst2 (text, label); stsb and sts12. OUT gets
pre.jsonl (unlabelled pairs, for eq. 2), fret.jsonl (questions written by people with their passages:
no language model took part), nli.jsonl, classification.jsonl and rest.jsonl. A training row with a
text that an evaluation file holds too is left out and counted.
"""

import itertools
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import numpy as np  # noqa: E402

import data  # noqa: E402
from engine.files import read_jsonl, read_passages, write_jsonl  # noqa: E402
from engine.pairs import chunks, title_body_pair  # noqa: E402

CLASSES, RETRIEVAL, STS = ("banking77", "subj", "sst2"), ("nq-open", "wikiqa", "medquad"), ("stsb", "sts12")


def plain(text):
    return " ".join(text.lower().split()).strip(" .?!")


def texts_of(record):
    """A record's texts, plain and without the unique id of classification triples."""
    negative = record["negative"] or {"text": ""}
    texts = [record["query"], record["positive"]["text"], negative["text"]]
    return {plain(text.rsplit(" [", 1)[0]) for text in texts}


def main():
    if len(sys.argv) != 3:
        sys.exit((__doc__ or "").strip())
    root, out = Path(sys.argv[1]), Path(sys.argv[2])

    def file(name, part):
        return str(sorted((root / name).glob(f"{part}.jsonl*"))[0])

    held = set()                                             # texts of the evaluation files
    for name in STS:
        for part in ("train_clean", "test_clean", "dev_clean"):
            for path in (root / name).glob(f"{part}.jsonl"):
                for _, row in read_jsonl(path):
                    held |= {plain(row["sentence1"]), plain(row["sentence2"])}
    for name in CLASSES:
        held |= {plain(row["text"]) for _, row in read_jsonl(file(name, "test"))}

    def write(name, rows):
        kept = [row for row in rows if not held & texts_of(row)]
        print(f"{name}: {write_jsonl(out / name, kept)} rows, {len(rows) - len(kept)} left out")

    rng, left_out = np.random.default_rng(0), Counter()
    pieces = []
    for name in RETRIEVAL:
        pieces += chunks(read_passages(file(name, "corpus")))
    spans = []
    for i in rng.permutation(len(pieces))[:50_000]:
        query, title, text = title_body_pair(pieces[i], rng)
        if query and text:
            spans.append(data.record("search result", query, {"title": title, "text": text}))
    bodies = [file(f"{name}-titlebody", "train") for name in ("agnews", "reuters")]
    titles = data.converted("pairs", bodies, left_out)
    write("pre.jsonl", spans + titles)
    write("fret.jsonl", data.converted("beir", [str(root / name) for name in RETRIEVAL], left_out))
    write("nli.jsonl", data.converted("nli", [file("sick-e-nli", "train")], left_out))
    classes = [data.converted("classification", [file(name, "train")], left_out) for name in CLASSES]
    write("classification.jsonl", list(itertools.chain(*classes)))
    squad = next(p for p in (root / "squad", root / "squad-train-part") if p.is_dir())
    write("rest.jsonl", data.converted("beir", [str(squad)], left_out) + titles)


if __name__ == "__main__":
    main()
