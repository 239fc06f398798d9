"""The recipe in miniature, the measures and the command line.   pytest tests/test_recipe.py

Invariants: the loss falls and recall rises over the untrained encoder; the same seed writes the same
bytes; a user's mistake is one line and exit code 2, with nothing half-written.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from processes import Command

import data
import gecko
import llm
import train
from engine import files

ROOT = Path(__file__).parent.parent
TOPS = ("math", "os", "builtins", "shutil", "json", "random", "statistics", "itertools")
SIZES = train.Sizes(pairs=6000, pre_steps=40, queries=2, steps=25)


@pytest.fixture(scope="module")
def small():
    return [p for p in data.builtin_corpus() if p["title"].split(".")[0] in TOPS]


def start_recipe(out, hash_seed):
    """A process of its own, for packages that other tests import add to the docstrings of numpy and logging.

    Pairs come from the sources of numpy alone: those of all packages take longer to read than to train on.
    """
    script = ("import functools, sys; sys.path.insert(0, sys.argv[1]); import data, train\n"
              "from pathlib import Path\n"
              "train.builtin_pairs = functools.partial(data.builtin_pairs, sources=('numpy',))\n"
              f"small = [p for p in data.builtin_corpus() if p['title'].split('.')[0] in {TOPS!r}]\n"
              f"train.recipe(Path(sys.argv[2]), 0, train.{SIZES!r}, small)")
    return subprocess.Popen([sys.executable, "-c", script, str(ROOT), str(out)], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env={**os.environ, "PYTHONHASHSEED": hash_seed})


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    """Two miniature runs at a time, with two hash seeds: the folder of each and what it printed."""
    folders = [tmp_path_factory.mktemp("demo") / "demo" for _ in range(2)]
    runs = [start_recipe(folder, hash_seed) for folder, hash_seed in zip(folders, "07", strict=True)]
    try:
        said = [run.communicate(timeout=240) for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0, 0], said
    return [(folder, printed) for folder, (printed, _) in zip(folders, said, strict=True)]


@pytest.fixture(scope="module")
def demo(demos):
    """One of them: its folder, its ladder and what it printed."""
    out, printed = demos[0]
    return out, json.loads((out / "ladder.json").read_text()), printed


def bytes_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_recipe_learns(demo):
    """Pre-finetuning beats the untrained encoder, generated queries beat pre-finetuning."""
    _, table, _ = demo
    at10 = {name: row["384"]["ndcg@10"] for name, row in table.items() if "384" in row}
    assert at10["untrained"] + 0.05 < at10["pre-finetuned"] < at10["+ (q, p_seed)"]
    assert table["untrained"]["384"]["recall@100"] + 0.1 < table["+ FRet (p_1, p_20)"]["384"]["recall@100"]


def test_recipe_writes_every_stage(demo, small):
    out, _, printed = demo
    assert {p.name for p in out.iterdir()} == {
        "corpus.jsonl", "queries.jsonl", "fret.jsonl", "pre", "seed", "gecko", "questions", "ladder.json"}
    rows = data.read_records(out / "fret.jsonl")
    assert len(rows) == SIZES.queries * len(small)
    for row in rows:
        ids = [c["id"] for c in row["candidates"]]
        assert len(ids) == 20 and {row["seed_id"], row["positive_id"], row["negative_id"]} <= set(ids)
        assert row["positive"]["text"] != row["negative"]["text"]
    share = np.mean([r["positive_id"] != r["seed_id"] for r in rows])
    assert f"p+ differs from p_seed in {share:.1%}" in printed and "next: python gecko.py search" in printed


def test_same_seed_same_bytes(demos):
    """In another process, with another hash seed, every file is the same."""
    first, again = (bytes_of(out) for out, _ in demos)
    assert first.keys() == again.keys()
    assert [name for name in first if first[name] != again[name]] == []


def test_search_and_evaluate_run_on_what_was_written(demo):
    out, table, _ = demo
    found = command("gecko.py", "search", "round a number up", "--model", out / "gecko", "-k", "5")
    assert found.returncode == 0 and len(found.stdout.splitlines()) == 5
    assert "math." in found.stdout or "builtins.round" in found.stdout
    code, _, err = Command(train.main, "evaluate", "--model", out / "gecko", "--beir", out / "questions",
                           "--out", out.parent / "scores.json").result()
    assert code == 0, err
    scores = json.loads((out.parent / "scores.json").read_text())["questions"]
    assert round(scores["ndcg@10"], 4) == table["+ FRet (p_1, p_20)"]["384"]["ndcg@10"]


def test_sets_of_one_name_have_a_figure_each(demo, tmp_path, monkeypatch, capsys):
    """Two files test.jsonl, two folders `questions`: neither figure takes the other's place."""
    for name, scores in (("a", (1, 2, 3)), ("b", (3, 2, 1))):
        files.write_jsonl(tmp_path / name / "test.jsonl", [
            {"sentence1": "round a number", "sentence2": text, "score": score}
            for text, score in zip(("open a file", "the ceiling", "round up a number"), scores, strict=True)])
        shutil.copytree(demo[0] / "questions", tmp_path / name / "questions")
    (tmp_path / "b/questions/qrels/test.tsv").write_bytes((demo[0] / "questions/qrels/dev.tsv").read_bytes())
    paths = {flag: [str(tmp_path / n / file) for n in "ab"] for flag, file in (("--sts", "test.jsonl"),
                                                                                 ("--beir", "questions"))}
    more = [word for flag, of in paths.items() for path in of for word in (flag, path)]
    monkeypatch.setattr(sys, "argv", ["train.py", "evaluate", "--model", str(demo[0] / "gecko"), "--out",
                                      str(tmp_path / "scores.json"), *more])
    train.main()
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert set(scores) == {*paths["--sts"], *paths["--beir"]}
    a, b = (scores[path]["spearman"] for path in paths["--sts"])
    assert a == -b != 0 and scores[paths["--beir"][0]] != scores[paths["--beir"][1]]


def command(script, *arguments):
    return subprocess.run([sys.executable, ROOT / script, *map(str, arguments)], capture_output=True,
                          text=True, timeout=120)


def test_encode_command_writes_unit_rows(demo, tmp_path):
    out = demo[0]
    code, _, err = Command(gecko.main, "encode", out / "corpus.jsonl", tmp_path / "x.npy", "--model",
                           out / "gecko", "--passages", "--dim", "128").result()
    assert code == 0, err
    x = np.load(tmp_path / "x.npy")
    assert x.dtype == np.float32 and x.shape[1] == 128
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, atol=1e-5)


def test_finetune_command_trains_from_files(demo, tmp_path):
    out = demo[0]
    code, _, err = Command(train.main, "finetune", f"{out / 'fret.jsonl'}:2", "--init", out / "seed", "--out",
                           tmp_path / "m", "--steps", "3", "--batch-size", "64").result()
    assert code == 0, err
    assert gecko.load(tmp_path / "m").encoder.config.hidden_size == 384


MAIN = {"gecko.py": gecko.main, "data.py": data.main, "llm.py": llm.main, "train.py": train.main}


def test_a_mistake_has_no_traceback_in_a_process_of_its_own(tmp_path):
    result = command("gecko.py", "search", "q", "--model", tmp_path)
    assert result.returncode == 2 and result.stderr.strip().count("\n") == 0 and "Traceback" not in result.stderr


def bad(*parts):
    return pytest.param(parts, id=" ".join(parts)[:60])


@pytest.mark.parametrize("parts", [
    bad("gecko.py", "search", "q", "--model", "{tmp}/none"),
    bad("gecko.py", "search", " ", "--model", "{demo}/gecko"),
    bad("gecko.py", "search", "q", "--model", "{demo}/gecko", "--corpus", "{tmp}/none.jsonl"),
    bad("gecko.py", "search", "q", "--model", "{demo}/gecko", "--corpus", "{tmp}/empty.jsonl"),
    bad("gecko.py", "search", "q", "--model", "{demo}/gecko", "--corpus", "{tmp}/notext.jsonl"),
    bad("gecko.py", "search", "q", "--model", "{demo}/gecko", "--corpus", "{tmp}/broken.jsonl"),
    bad("gecko.py", "search", "q", "--model", "{demo}/gecko", "--dim", "9999"),
    bad("gecko.py", "search", "q", "--model", "{demo}/gecko", "-k", "0"),
    bad("gecko.py", "encode", "{tmp}/broken.jsonl", "{tmp}/x.npy", "--model", "{demo}/gecko"),
    bad("data.py", "check", "{tmp}/broken.jsonl"),
    bad("llm.py", "generate", "{tmp}/empty.jsonl", "{tmp}/q.jsonl"),
    bad("llm.py", "mine", "{demo}/corpus.jsonl", "{demo}/queries.jsonl", "{tmp}/f.jsonl", "--model-dir",
        "{demo}/seed", "-N", "99999"),
    bad("llm.py", "mine", "{demo}/corpus.jsonl", "{tmp}/broken.jsonl", "{tmp}/f.jsonl", "--model-dir",
        "{demo}/seed"),
    bad("train.py", "finetune", "{tmp}/none.jsonl", "--init", "tiny", "--out", "{tmp}/m"),
    bad("train.py", "finetune", "{demo}/fret.jsonl", "--init", "{tmp}/none", "--out", "{tmp}/m"),
    bad("train.py", "finetune", "{demo}/fret.jsonl", "--init", "{demo}/seed", "--out", "{tmp}/m", "--dims", "9,x"),
    bad("train.py", "finetune", "{demo}/fret.jsonl", "--init", "{demo}/seed", "--out", "{tmp}/m", "--dims", "x"),
    bad("train.py", "evaluate", "--model", "{demo}/gecko"),
    bad("train.py", "evaluate", "--model", "{demo}/gecko", "--beir", "{tmp}"),
])
def test_a_mistake_is_one_line_and_exit_2(parts, demo, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "notext.jsonl").write_text('{"_id": "1", "title": "x", "body": "y"}\n')
    (tmp_path / "broken.jsonl").write_text('{"_id": "1", "title": "x", "te\n')
    before = bytes_of(tmp_path)
    arguments = [p.format(tmp=tmp_path, demo=demo[0]) for p in parts]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stop:
        files.run(MAIN[arguments[0]])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(errors) == 1 and len(errors[0]) > 20
    assert bytes_of(tmp_path) == before, "something half-written was left behind"
