"""What a tuned encoder forgets: the mean of the weights before and after, measured where nothing was learned.

    python tests/lab/forgetting.py BEFORE AFTER BEIR[:SPLIT]... [--shares 1,0.75,0.5,0.25,0] [--out FILE.json]
    python tests/lab/forgetting.py FILE.json                                 the table of a finished run

BEFORE and AFTER are folders of the same encoder, such as all-MiniLM-L6-v2 and runs/minilm/gecko. One set is what
the encoder was tuned for (runs/demo/questions), the others have nothing to do with it. A share is that of BEFORE's
weights, as in `python train.py --keep`. Gains are points of nDCG@10 over BEFORE, with 95 % intervals, questions
drawn again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
from tables import points, show_file, write_results

from engine.beir import read_split
from engine.evaluate import encode_beir, rankings, retrieval_scores, short_names
from engine.files import run
from engine.mteb import table_9
from engine.results import mean_of
from gecko import load


def table(ndcg: dict[str, dict[str, list[float]]]) -> list[str]:
    """The lines of a results file: each share's nDCG@10 on each set, and its gain over the first share, BEFORE."""
    shares = list(next(iter(ndcg.values())))
    heads = [f"{name} ({len(of_shares[shares[0]])}) | over it" for name, of_shares in ndcg.items()]
    lines = [f"| share of the encoder as it came | {' | '.join(heads)} |", "|---|" + "---|---|" * len(ndcg)]
    for share in shares:
        cells = [share]
        for of_shares in ndcg.values():
            start, values = of_shares[shares[0]], of_shares[share]
            cells += [f"{100 * np.mean(values):.1f}", "" if share == shares[0] else points(values, start)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("before", help="a model folder, or a results file to show")
    parser.add_argument("after", nargs="?")
    parser.add_argument("sets", nargs="*", metavar="BEIR", help="BEIR folders, DIR or DIR:SPLIT")
    parser.add_argument("--shares", default="1,0.75,0.5,0.25,0", help="of BEFORE (%(default)s)")
    parser.add_argument("--precision", default="float32", choices=("float32", "bf16"))
    parser.add_argument("--out", default="", help="write each question's nDCG@10 to this JSON file")
    args = parser.parse_args()
    if show_file(args.before, table):
        return
    before, after = load(args.before), load(args.after)
    sets = dict(zip(short_names(args.sets), map(read_split, args.sets), strict=True))
    shares = [float(share) for share in args.shares.split(",")]
    ndcg: dict[str, dict[str, list[float]]] = {name: {} for name in sets}
    for share in shares:
        model = mean_of(before, after, share)
        for name, beir in sets.items():
            q, P = encode_beir(model, beir, table_9(name)[0], precision=args.precision, progress=name)
            values = retrieval_scores(rankings(beir, q, P), beir.qrels)["ndcg@10"]
            ndcg[name][f"{share:g}"] = np.round(values, 4).tolist()
    print("\n".join(table(ndcg)))
    if args.out:
        write_results(args.out, ndcg)
        print(f"wrote {args.out}")


if __name__ == "__main__":
    run(main)
