"""engine/runs.py: a run's folder.   python -m pytest tests/test_runs.py

Invariants: a run that was killed and resumed writes the bytes of one that was not; a checkpoint of another run is
not continued, an unfinished run not overwritten; what is not finite stops before it spoils the weights.
"""

import itertools
import json
import math
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import START
from toys import beir_folder, bytes_of, records, small_model

import train
from engine import evaluate, runs
from engine.beir import read_beir
from engine.files import InputError, read_jsonl
from gecko import load
from train import TrainConfig

LOOP = TrainConfig(batch_size=16, epochs=2, lr=1e-2, tau=0.2, dims="8,3", max_length=32)

# --------------------------------------------------------------------------------------------------
# Stopping and going on


RESUMED = replace(LOOP, steps=60, save_every=1, micro_batch=4, resume=True)


def run_in(folder, c):
    """Train from the same start in `folder`; the model ends in folder/model.safetensors."""
    torch.set_num_threads(1)
    model = small_model(1, 0.1)
    train.train(model, "finetune", [records(40), records(30, 1)], c, [2, 1], out=Path(folder))


@pytest.mark.parametrize("kills,flags", [
    (10, {}), (3, {"steps": 40, "micro_batch": 0, "mix": "tasks", "eval": "beir"}),
    (3, {"steps": 40, "mix": "mixed", "precision": "bf16", "eval": "beir"})],
    ids=["ten", "plain-tasks", "mixed-bf16"])
def test_killed_at_random_moments_gives_the_same_bytes(tmp_path, kills, flags):
    beir_folder(tmp_path / "beir", records(20), "dev")
    c = replace(RESUMED, **{k: str(tmp_path / v) if k == "eval" else v for k, v in flags.items()})
    whole = START.Process(target=run_in, args=(tmp_path / "whole", replace(c, resume=False)))
    whole.start()
    rng, steps = random.Random(time.time_ns()), [0]
    for _ in range(kills):
        child = START.Process(target=run_in, args=(tmp_path / "killed", c))
        child.start()
        deadline = time.time() + 20
        while done_steps(tmp_path / "killed") <= steps[-1] and time.time() < deadline and child.is_alive():
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert child.exitcode == -signal.SIGKILL                     # it was running
        steps.append(done_steps(tmp_path / "killed"))
    assert 0 < steps[1] and steps[-1] < c.steps and steps == sorted(steps)
    run_in(tmp_path / "killed", c)
    whole.join(60)
    assert whole.exitcode == 0
    found = bytes_of(tmp_path / "whole")
    assert found == bytes_of(tmp_path / "killed")
    assert ("best/model.safetensors" in found) == ("eval" in flags)
    assert not list((tmp_path / "killed").glob(".*"))


def done_steps(folder):
    return max((int(p.name[-8:]) for p in Path(folder).glob("checkpoint-*")), default=0)


def test_a_checkpoint_of_other_flags_data_or_init_is_refused(tmp_path):
    c = replace(LOOP, steps=4, save_every=2)
    train.train(small_model(), "finetune", [records(40)], c, out=tmp_path)
    words = [{**row, "query": row["query"] + " red"} for row in records(40)]     # as many texts, other ones
    for stage, rows, other in (("finetune", records(40), replace(c, lr=1e-3)), ("finetune", records(39), c),
                               ("prefinetune", records(40), c), ("finetune", words, c)):
        with pytest.raises(InputError, match="other data, flags or --init"):
            train.train(small_model(), stage, [rows], replace(other, resume=True), out=tmp_path)
    for init in (small_model(seed=1), small_model(dropout=0.1)):     # other weights, or only another configuration
        with pytest.raises(InputError, match="other data, flags or --init; give the same"):
            train.train(init, "finetune", [records(40)], replace(c, resume=True), out=tmp_path)


def test_begun_anew_where_another_runs_checkpoint_stands(tmp_path):
    """`anew`, as the recipe resumes: the same run goes on, another one takes its place."""
    c = replace(LOOP, steps=4, save_every=2, resume=True)
    other = replace(c, lr=1e-3)
    train.train(small_model(), "finetune", [records(40)], c, out=tmp_path, anew=True)
    again = train.train(small_model(), "finetune", [records(40)], other, out=tmp_path, anew=True)
    assert again == train.train(small_model(), "finetune", [records(40)], replace(other, resume=False))
    before = (tmp_path / "checkpoint-00000004").stat().st_mtime_ns
    assert train.train(small_model(), "finetune", [records(40)], other, out=tmp_path, anew=True) == again
    assert (tmp_path / "checkpoint-00000004").stat().st_mtime_ns == before       # nothing was trained twice


def test_a_broken_checkpoint_is_named(tmp_path):
    c = replace(LOOP, steps=4, save_every=2)
    train.train(small_model(), "finetune", [records(40)], c, out=tmp_path)
    path = tmp_path / "checkpoint-00000004/model.safetensors"
    assert {p.name for p in path.parent.glob("*.safetensors")} == {path.name}    # finished: no moments are kept
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="00000004: not a readable checkpoint .*or remove it"):
        train.train(small_model(), "finetune", [records(40)], replace(c, resume=True), out=tmp_path)


def test_an_unfinished_run_is_not_overwritten_without_resume(tmp_path):
    c = replace(LOOP, steps=4, save_every=2)
    train.train(small_model(), "finetune", [records(40)], c, out=tmp_path)
    train.train(small_model(), "finetune", [records(40)], c, out=tmp_path)     # a finished one is replaced
    state = tmp_path / "checkpoint-00000004/state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "steps": 9}))
    with pytest.raises(InputError, match="--resume"):
        train.train(small_model(), "finetune", [records(40)], c, out=tmp_path)


def test_the_best_on_dev_is_kept(tmp_path):
    rows = records(30)
    beir_folder(tmp_path / "beir", rows, "dev")
    c = replace(LOOP, steps=30, lr=3e-2, save_every=5, eval=str(tmp_path / "beir"))
    train.train(small_model(0, 0.0), "finetune", [rows], c, out=tmp_path / "run")
    dev = [r["dev"]["ndcg@10"] for _, r in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "dev" in r]
    assert len(dev) == 6 and max(dev) > dev[0]
    beir = read_beir(tmp_path / "beir", "dev")
    best = load(tmp_path / "run/best")
    q, P = evaluate.encode_beir(best, beir, "question answering")
    score = np.mean(evaluate.retrieval_scores(evaluate.rankings(beir, q, P), beir.qrels)["ndcg@10"])
    assert score == pytest.approx(max(dev), abs=1e-4)


def test_an_infinite_loss_names_step_rows_and_checkpoint(tmp_path, monkeypatch):
    """An infinite learning rate spoils the weights at step 4 of checkpoints at 2, 4, ..."""
    monkeypatch.setattr(train, "learning_rate", lambda step, *_: 1e-2 if step < 2 else math.inf)
    wrong = r"loss is nan, .* at step 4; .*last good checkpoint: .*checkpoint-00000002$"
    with pytest.raises(InputError, match=wrong):
        train.train(small_model(), "finetune", [records(40), records(20, 1)],
                    replace(LOOP, steps=6, save_every=2), out=tmp_path)
    kept = load(tmp_path / "checkpoint-00000002")
    assert all(p.isfinite().all() for p in kept.encoder.parameters())


def test_an_infinite_gradient_stops_before_it_spoils_the_weights(tmp_path, monkeypatch):
    steps = itertools.count(1)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_",
                        lambda *_: torch.tensor(math.inf if next(steps) == 3 else 1.0))
    with pytest.raises(InputError, match=r"norm inf at step 3; .*checkpoint-00000002$"):
        train.train(small_model(), "finetune", [records(40)], replace(LOOP, save_every=1), out=tmp_path)


def test_what_a_run_did_not_write_stays(tmp_path):
    """--out may be a folder with other things in it, such as a home's .model_cache/; a kill's remains go."""
    for name in (".model_cache/x", ".checkpoint-new/y", "..checkpoint-new.abc/z"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    run_in(tmp_path, replace(LOOP, steps=2))
    assert {p.name for p in tmp_path.glob(".*")} == {".model_cache"}


def test_killed_while_an_old_checkpoint_is_removed(tmp_path, monkeypatch):
    """Nothing of it stays once the run has been resumed."""
    c = replace(LOOP, steps=4, save_every=2)

    def killed(path):
        if path.name.endswith("checkpoint-00000002"):
            (path / "model.safetensors").unlink()
            raise KeyboardInterrupt
        remove(path)

    remove = runs.remove
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runs, "remove", killed)
        run_in(tmp_path, c)
    run_in(tmp_path, replace(c, resume=True))
    assert [p.name for p in tmp_path.glob("*checkpoint-*")] == ["checkpoint-00000004"]
    assert not list(tmp_path.glob(".*"))
