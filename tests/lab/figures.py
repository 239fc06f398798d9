"""The project's figures.

    python tests/lab/figures.py method               README's opening figure -> tests/lab/figures/method.png
    python tests/lab/figures.py FILE.jsonl...        a chart beside each file that `tables.py` wrote
                                                 or, with --out DIR, in that folder

Needs matplotlib.
"""

import argparse
import math
import sys
from pathlib import Path

try:
    import matplotlib
except ModuleNotFoundError:
    sys.exit("figures.py needs matplotlib; install it: pip install matplotlib")

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.patches import FancyBboxPatch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import tables  # noqa: E402

import llm  # noqa: E402
from engine.files import file_beside  # noqa: E402

INK, LLM, MODEL, GOOD, BAD, PALE = "#222222", "#f3d9a4", "#b9d3ee", "#9fd3a0", "#eaa9a0", "#f4f4f4"


def write(figure, path):
    with file_beside(path) as new:
        figure.savefig(new, dpi=150, format="png", facecolor="white")
    pyplot.close(figure)
    print(f"wrote {path}")


# --------------------------------------------------------------------------------------------------
# The method


def box(axes, x, y, w, h, text, color=PALE, size=9):
    axes.add_patch(FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0,rounding_size=0.08", facecolor=color,
                                  edgecolor=INK, linewidth=0.9))
    axes.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=size, color=INK, linespacing=1.35)


def arrow(axes, a, b, text="", bend=0.0):
    axes.annotate("", b, a, arrowprops={"arrowstyle": "-|>", "color": INK, "linewidth": 1.1, "shrinkA": 0,
                                        "shrinkB": 0, "connectionstyle": f"arc3,rad={bend}"})
    if text:
        axes.text((a[0] + b[0]) / 2, (a[1] + b[1]) / 2 + 0.13, text, ha="center", fontsize=8, color=INK)


def method(path):
    """Passage, (t, q), top N, two rankings, fusion, p+ and p-, encoder. R is what llm.rrf says."""
    names = ["$p_{seed}$", "$p_b$", "$p_c$", "$p_d$", "$p_e$"]
    ql, rc = [2, 1, 3, 4, 5], [3, 2, 1, 4, 5]
    R = llm.rrf([-r for r in ql], [-r for r in rc])
    best, worst = max(range(5), key=lambda i: R[i]), min(range(5), key=lambda i: R[i])

    figure, axes = pyplot.subplots(figsize=(11, 5.1), layout="constrained")
    axes.set(xlim=(-0.05, 14.8), ylim=(0.4, 7))
    axes.axis("off")
    axes.text(0, 6.7, "1  An LLM reads a passage and writes a task and a query", fontsize=10, weight="bold")
    box(axes, 0, 5.1, 2.1, 1.1, "passage $p_{seed}$\nof a corpus $C$")
    arrow(axes, (2.1, 5.65), (3.0, 5.65))
    box(axes, 3.0, 5.1, 1.5, 1.1, "LLM\nprompt $P_{QG}$", LLM)
    arrow(axes, (4.5, 5.65), (5.4, 5.65))
    box(axes, 5.4, 5.1, 4.0, 1.1, "$(t, q)$: “find a passage that has the\nanswer”, “how do I round a number up”")

    axes.text(1.6, 4.32, "2  The same LLM ranks the query's N nearest passages twice; the ranks are fused",
              fontsize=10, weight="bold")
    box(axes, 0, 1.95, 2.1, 1.1, "initial retriever:\ntop N of $q$ in $C$", MODEL)
    axes.plot([7.4, 7.4, 1.05], [5.1, 4.8, 4.8], color=INK, linewidth=1.1)
    arrow(axes, (1.05, 4.8), (1.05, 3.05))
    for i, name in enumerate(names):
        y = 2.95 - 0.55 * i
        color = GOOD if i == best else BAD if i == worst else PALE
        box(axes, 3.0, y, 1.2, 0.47, name, color)
        for x, value in ((5.15, f"{ql[i]}"), (7.05, f"{rc[i]}"), (9.15, f"{R[i]:.2f}")):
            axes.text(x, y + 0.23, value, ha="center", va="center", fontsize=9.5, color=INK)
    arrow(axes, (2.1, 2.5), (2.9, 2.5))
    box(axes, 4.3, 3.57, 1.7, 0.45, "likelihood $r_{QL}$", LLM, 8)
    box(axes, 6.2, 3.57, 1.7, 0.45, "relevance $r_{RC}$", LLM, 8)
    axes.text(9.15, 3.79, "$R = 1/r_{QL} + 1/r_{RC}$", ha="center", va="center", fontsize=9, color=INK)
    y_best, y_worst = 3.18 - 0.55 * best, 3.18 - 0.55 * worst
    arrow(axes, (9.6, y_best), (10.5, y_best))
    arrow(axes, (9.6, y_worst), (10.5, y_worst))
    box(axes, 10.5, y_best - 0.37, 1.75, 0.75, "$p^+ = p_1$\n(not $p_{seed}$)", GOOD)
    box(axes, 10.5, y_worst - 0.37, 1.75, 0.75, "$p^- = p_N$\nhard negative", BAD)

    axes.text(13.95, 6.7, "3  Train", fontsize=10, weight="bold", ha="center")
    box(axes, 13.2, 0.5, 1.5, 5.7, "encoder M,\nmean over\ntokens\n(eq. 1)\n\n\ncosine / τ\n\n\neq. 3: against\n"
        "other rows'\n$p^+$ and $q$\nand own $p^-$\n\n\nat 768 and\n256 dims", MODEL, 8.5)
    for y, text in ((5.65, "task: $t$ | query: $q$"), (y_best, ""), (y_worst, "")):
        arrow(axes, (9.4 if text else 12.25, y), (13.2, y), text)
    axes.text(10.5, 1.65, "title: … | text: …", fontsize=8, color=INK)
    write(figure, path)


# --------------------------------------------------------------------------------------------------
# A table's chart


def chart(rows, path):
    """Points over the table's first row: the paper's, and ours with their intervals."""
    name = rows[0]["table"]
    table, first, bars = tables.TABLES[name], None, {}
    names = [row for row in table.paper if any(r["row"] == row for r in rows)]
    first, names = names[0], names[1:]
    for n, column in enumerate(table.columns):
        if table.paper[first]:
            own = [table.paper[row][n] if table.paper[row] else math.nan for row in names]
            bars[f"paper: {column}"] = [(value - table.paper[first][n], 0, 0) for value in own]
    for column in rows[0]["scores"]:
        found = [tables.gain(rows, row, first, column) for row in names]
        bars[f"here: {column}"] = [(m, m - low, high - m) for m, low, high in found]
    figure, axes = pyplot.subplots(figsize=(10, 1.2 + 0.18 * len(bars) * len(names)), layout="constrained")
    height, ours = 0.8 / len(bars), 0
    for n, (label, values) in enumerate(bars.items()):
        mean, low, high = zip(*values, strict=True)
        y = [i + n * height for i in range(len(names))]
        if label.startswith("paper"):
            axes.barh(y, mean, height * 0.9, label=label, color=("0.45", "0.65", "0.8")[n])
        else:
            axes.barh(y, mean, height * 0.9, label=label, color=f"C{ours}", xerr=(low, high), capsize=2,
                      error_kw={"linewidth": 0.9})
            ours += 1
    axes.set(yticks=[i + 0.4 - height / 2 for i in range(len(names))], yticklabels=names,
             xlabel=f"points over “{first}”; lines: 95 % intervals", title=f"{name}: {table.claim}")
    axes.title.set_fontsize(9)
    axes.invert_yaxis()
    axes.axvline(0, color=INK, linewidth=0.8)
    figure.legend(fontsize=8, loc="outside right upper")
    write(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", nargs="+", help="method, or result files")
    parser.add_argument("--out", help="folder of the figures")
    args = parser.parse_args()
    for what in args.what:
        if what == "method":
            method(Path(args.out or ROOT / "tests/lab/figures") / "method.png")
            continue
        rows = tables.whole_rows(Path(what))
        path = Path(args.out or Path(what).parent) / f"{Path(what).stem}.png"
        if "table" in rows[0]:
            chart([r for r in rows if r["key"] == rows[-1]["key"]], path)
        else:
            import study_labels
            write(study_labels.chart(rows), path)


if __name__ == "__main__":
    main()
