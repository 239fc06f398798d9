"""What a newcomer does wrong, or meets.   pytest tests/test_newcomer.py

Invariants: a full disk and Ctrl-C in any stage each end in one line that
says what to do, with no traceback; what stood there before still stands, and nothing half-written does.
"""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import Command

import data
import gecko
import llm
import train
from engine import corpus as corpus_module
from engine import evaluate, files, folder, offline, results, show

ROOT = Path(__file__).parent.parent
WORDS = "red green blue stone river cloud bread salt wind fire lamp door sand moss rain".split()
MAIN = {"gecko.py": gecko.main, "data.py": data.main, "llm.py": llm.main, "train.py": train.main}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """corpus, queries, fret and a model, made by the commands' own functions."""
    folder, rng = tmp_path_factory.mktemp("project"), random.Random(0)
    corpus = [{"_id": f"p{i}", "title": f"t{i}", "text": " ".join(rng.choices(WORDS, k=12)) + f" k{i}."}
              for i in range(120)]
    files.write_jsonl(folder / "corpus.jsonl", corpus)
    model = gecko.tiny([p["text"] for p in corpus], hidden_size=64)
    gecko.save(model, folder / "retriever")
    ranker = llm.Offline(corpus, model, list(llm.FREQUENT_TASKS))
    written = llm.generate(ranker, corpus, llm.seed_draws(corpus, 300, 0))
    llm.write_kept(folder / "queries.jsonl", written, 300, "generate")
    queries = llm.read_queries(folder / "queries.jsonl", corpus)
    llm.write_kept(folder / "fret.jsonl", llm.mine(ranker, model, corpus, queries), 300, "mine")
    (folder / "beir/qrels").mkdir(parents=True)
    shutil.copy(folder / "corpus.jsonl", folder / "beir")
    (folder / "beir/qrels/test.tsv").write_text("".join(f"{q['_id']}\t{q['seed_id']}\t1\n" for q in queries))
    files.write_jsonl(folder / "beir/queries.jsonl", [{"_id": q["_id"], "text": q["query"]} for q in queries])
    return folder


COMMANDS = {
    "corpus": "data.py corpus OUT/c.jsonl",
    "convert": "data.py convert pairs IN/fret.jsonl OUT/pairs.jsonl",
    "generate": "llm.py generate IN/corpus.jsonl OUT/q.jsonl --limit 400",
    "mine": "llm.py mine IN/corpus.jsonl IN/queries.jsonl OUT/f.jsonl --model-dir IN/retriever",
    "show": "llm.py show IN/fret.jsonl --html OUT/page.html",
    "prefinetune": "train.py prefinetune IN/queries.jsonl --init tiny --out OUT/m --steps 4 --batch-size 64",
    "finetune": "train.py finetune IN/fret.jsonl --init IN/retriever --out OUT/m --steps 4 --batch-size 64",
    "encode": "gecko.py encode IN/corpus.jsonl OUT/x.npy --model IN/retriever --passages",
    "evaluate": "train.py evaluate --model IN/retriever --beir IN/beir --out OUT/scores.json",
}


def run(command, project, out, monkeypatch, capsys):
    """The command's exit code and the last line that it says on stderr."""
    words = command.replace("IN/", f"{project}/").replace("OUT/", f"{out}/").split()
    monkeypatch.setattr(sys, "argv", words)
    capsys.readouterr()
    try:
        files.run(MAIN[words[0]])
    except SystemExit as stop:
        said = stop.code if isinstance(stop.code, str) else capsys.readouterr().err
        return 1 if isinstance(stop.code, str) else stop.code, said.rstrip().splitlines()[-1]
    return 0, ""


def half_written(out):
    return [str(p) for p in out.rglob("*") if p.name.startswith(".") or p.name.endswith(".old")]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_runs(name, project, tmp_path, monkeypatch, capsys):
    """Positive control of what follows."""
    assert run(COMMANDS[name], project, tmp_path, monkeypatch, capsys) == (0, "")


@pytest.mark.parametrize("name", [n for n in COMMANDS if n != "evaluate"])
def test_a_full_disk_is_one_line(name, project, tmp_path, monkeypatch, capsys):
    """A limit on the size of a file is met as a full disk is: a write fails in the middle."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    small = {"finetune": 40_000, "prefinetune": 20_000, "corpus": 500_000}.get(name, 8_000)
    resource.setrlimit(resource.RLIMIT_FSIZE, (small, hard))
    try:
        code, said = run(COMMANDS[name], project, tmp_path, monkeypatch, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2 and said.startswith("error: "), said
    assert not half_written(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} <= {"m"}


STAGES = {
    "corpus": (corpus_module, "documentation", 0),
    "convert": (data, "record", 3),
    "generate": (offline, "templated_query", 5),
    "mine": (llm, "relabel", 3),
    "show": (show, "in_order", 3),
    "prefinetune": (train, "learning_rate", 2),
    "finetune": (train, "learning_rate", 2),
    "encode": (gecko, "truncate_dim", 0),
    "evaluate": (evaluate, "topk", 0),
}


@pytest.mark.parametrize("name", STAGES)
def test_ctrl_c_in_any_stage_is_one_line(name, project, tmp_path, monkeypatch, capsys):
    interrupt(monkeypatch, *STAGES[name])
    code, said = run(COMMANDS[name], project, tmp_path, monkeypatch, capsys)
    assert (code, said) == (1, "interrupted; run the same command again")
    assert not half_written(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} <= {"m"}


def interrupt(monkeypatch, module, name, after):
    """Ctrl-C at the call of module.name after so many others."""
    original, left = getattr(module, name), [after]

    def called(*args, **how):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return original(*args, **how)

    for where in (module, gecko, data, llm, train):                  # also where it was imported by name
        if getattr(where, name, None) is original:
            monkeypatch.setattr(where, name, called)


RECIPE = {"pre-finetuning": ("learning_rate", 1), "generate": ("templated_query", 50),
          "save": ("small_files", 0), "mine": ("relabel", 20), "results": ("write_questions", 0)}


@pytest.mark.parametrize("stage", RECIPE)
def test_ctrl_c_in_any_stage_of_the_recipe(stage, project, tmp_path, monkeypatch, capsys):
    corpus = files.read_passages(project / "corpus.jsonl")
    names = [q["answers"][0] for _, q in files.read_jsonl(ROOT / "engine/questions.jsonl")]
    corpus = [{**p, "_id": name, "title": name} for p, name in zip(corpus, dict.fromkeys(names), strict=False)]
    monkeypatch.setattr(train, "builtin_corpus", lambda: corpus)
    monkeypatch.setattr(train, "builtin_pairs", lambda *a: [
        data.record("search result", p["title"], {"title": "", "text": p["text"]}) for p in corpus])
    small = train.Sizes(pairs=100, pre_steps=3, templates=2, steps=3)
    monkeypatch.setattr(train, "Sizes", lambda: small)
    name, after = RECIPE[stage]
    module = next(m for m in (train, llm, gecko, offline, folder, results) if hasattr(m, name))
    interrupt(monkeypatch, module, name, after)
    command = "train.py --llm offline --out OUT/demo"
    assert run(command, project, tmp_path, monkeypatch, capsys) == (1, "interrupted; run the same command again")
    assert not half_written(tmp_path)


@pytest.mark.parametrize("words", ["search \udcff", "search red --task \udcff"])
def test_bytes_that_are_no_text_are_refused(words, project, tmp_path, monkeypatch, capsys):
    """As Python gives them to a program whose caller typed another encoding."""
    code, said = run(f"gecko.py {words} --model IN/retriever", project, tmp_path, monkeypatch, capsys)
    assert code == 2 and "is not UTF-8" in said


@pytest.mark.parametrize("words, message", [
    ("encode OUT/c.jsonl OUT/c.jsonl", "c.jsonl: it is an input too; name another file"),
    ("encode OUT/c.jsonl OUT", ": a folder stands there; name a file"),
    ("search red --corpus OUT/c.jsonl", 'c.jsonl:2: no "_id"; every passage needs one of its own')])
def test_a_wrong_file_is_refused_and_stays(words, message, project, tmp_path, monkeypatch, capsys):
    corpus = tmp_path / "c.jsonl"
    corpus.write_text('{"_id": 0, "text": "red"}\n{"_id": null, "text": "green"}\n')
    before = corpus.read_bytes()
    code, said = run(f"gecko.py {words} --model IN/retriever".replace("OUT ", f"{tmp_path} "), project, tmp_path,
                     monkeypatch, capsys)
    assert code == 2 and said.endswith(message)
    assert corpus.read_bytes() == before and list(tmp_path.iterdir()) == [corpus]


INPUT, FOLDER = "it is an input too; name another file", ".: a folder stands there; name a file"


@pytest.mark.parametrize("words, message", [
    ("data.py corpus .", FOLDER), ("llm.py generate OUT/c.jsonl .", FOLDER),
    ("data.py convert pairs OUT/c.jsonl OUT/c.jsonl", f"c.jsonl: {INPUT}"),
    ("llm.py generate OUT/c.jsonl OUT/c.jsonl", f"c.jsonl: {INPUT}"),
    ("llm.py generate OUT/c.jsonl OUT/q.jsonl --cache OUT/c.jsonl", f"c.jsonl: {INPUT}"),
    ("llm.py generate OUT/c.jsonl OUT/q.jsonl --cache OUT/q.jsonl", f"q.jsonl: {INPUT}"),
    ("llm.py mine OUT/c.jsonl OUT/q.jsonl OUT/q.jsonl --model-dir IN", f"q.jsonl: {INPUT}"),
    ("llm.py mine OUT/c.jsonl OUT/q.jsonl OUT/f.jsonl --model-dir IN --cache OUT/q.jsonl", f"q.jsonl: {INPUT}"),
    ("llm.py show OUT/c.jsonl --html OUT/c.jsonl", f"c.jsonl: {INPUT}"),
    ("llm.py show OUT/c.jsonl --html OUT/corpus.jsonl", f"corpus.jsonl: {INPUT}"),
    ("llm.py show .", ".: no such file; check the path")])
def test_an_output_that_is_an_input_or_a_folder_is_refused_at_once(words, message, project, tmp_path, monkeypatch,
                                                                  capsys):
    """What was paid for is not written over, nor a folder met when all is done."""
    files.write_jsonl(tmp_path / "c.jsonl", [{"_id": "1", "query": "q", "text": "red"}])
    before = (tmp_path / "c.jsonl").read_bytes()
    code, said = run(words, project, tmp_path, monkeypatch, capsys)
    assert code == 2 and said.startswith("error: ") and said.endswith(message)
    assert (tmp_path / "c.jsonl").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("output, code, last", [
    ("closed", 0, "passages: 100%"),
    ("full", 2, "error: [Errno 28] No space left on device")])
def test_output_that_nobody_takes(output, code, last, project):
    """A reader that has gone is no error, a full disk is one line; Python adds no word at its exit."""
    read, closed = os.pipe()
    os.close(read)
    with open(closed if output == "closed" else "/dev/full", "w") as stdout:
        command = [sys.executable, ROOT / "gecko.py", "search", "red", "--model", project / "retriever"]
        child = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONUNBUFFERED": ""})
    assert child.returncode == code and child.stderr.splitlines()[-1].startswith(last), child.stderr


def test_a_letter_that_the_terminal_lacks_is_escaped(project, tmp_path):
    corpus = tmp_path / "c.jsonl"
    files.write_jsonl(corpus, [{"_id": "1", "text": "a café"}])
    code, out, _ = Command(gecko.main, "search", "red", "--corpus", corpus, "--model", project / "retriever",
                           before=ascii_terminal).result()
    assert code == 0 and out.endswith("a caf\\xe9\n")


def ascii_terminal():
    sys.stdout.reconfigure(encoding="ascii")


def test_ctrl_c_in_a_process_of_its_own(project, tmp_path):
    """The bar's line ends, then one line; exit code 1."""
    rows = [json.dumps({"_id": str(i), "text": "stone river " * 50}) for i in range(30_000)]
    (tmp_path / "long.jsonl").write_text("\n".join(rows) + "\n")
    child = subprocess.Popen([sys.executable, ROOT / "gecko.py", "encode", tmp_path / "long.jsonl",
                              tmp_path / "x.npy", "--model", project / "retriever", "--passages"],
                             stderr=subprocess.PIPE, text=True)
    assert "model=" in child.stderr.readline()                       # it has begun
    time.sleep(0.2)
    child.send_signal(signal.SIGINT)
    said = child.communicate(timeout=60)[1]
    assert child.returncode == 1 and "Traceback" not in said
    assert said.splitlines()[-1] == "interrupted; run the same command again"
    assert {p.name for p in tmp_path.iterdir()} == {"long.jsonl"}
