"""SciFact without labels: RESULTS.md's table, and how rows are grouped.   pytest tests/lab/test_scifact.py"""

import json
from pathlib import Path

import numpy as np
from run_scifact import table_text, topical

HERE = Path(__file__).parent


def test_results_show_scifacts_file():
    figures = json.loads((HERE / "results/scifact.json").read_text(encoding="utf-8"))
    assert table_text(figures) in (HERE / "RESULTS.md").read_text(encoding="utf-8")


def test_topical_groups_hold_every_row_once_and_neighbours_together():
    x = np.concatenate([np.random.default_rng(0).normal(c, 0.1, (40, 4)) for c in (-3, 3)])  # two topics
    groups = topical(x, np.arange(80), leaf=40)
    assert sorted(map(sorted, (g.tolist() for g in groups))) == [list(range(40)), list(range(40, 80))]
