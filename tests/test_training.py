"""The loop: any batch size, any number of processes, stoppable.

    python -m pytest tests/test_training.py

Invariants: micro-batches, blocks of the loss, Matryoshka and processes change memory and time, not the
gradient; a run that was killed and continued writes the bytes of one that was not.
"""

import functools
import itertools
import json
import math
import os
import random
import signal
import socket
import time
from array import array
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import START
from test_losses import main_spec, mrl_spec, pre_spec

import data
import train
from data import record
from engine import evaluate, files, runs
from engine.files import InputError, run
from engine.scale import derive_seed
from gecko import load, save, tiny
from train import TrainConfig, backward, micro_batches

WORDS = "red green blue stone river cloud bread salt wind fire lamp door sand moss rain".split()


def sentence(rng, low=2, high=9):
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


def records(count, seed=0, negatives=True):
    """Toy rows whose positive shares a word with the query that nothing else holds."""
    rng, rows = random.Random(seed), []
    for i in range(count):
        text = {"title": "", "text": f"{sentence(rng)} k{i} {sentence(rng)}"}
        negative = {"title": "", "text": sentence(rng)} if negatives and i % 3 else None
        rows.append(record("search result", f"k{i} {sentence(rng, 1, 3)}", text, negative))
    return rows


def small_model(layers=1, dropout=0.2, seed=0):
    rows = records(40)
    texts = [f"task: search result | query: {r['query']} title: none | text: {r['positive']['text']}"
             for r in rows]
    model = tiny(texts, seed, vocabulary=200, hidden_size=8, num_hidden_layers=layers, num_attention_heads=2,
                 intermediate_size=12, max_position_embeddings=32, layer_norm_eps=1e-6,
                 hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    generator = torch.Generator().manual_seed(seed)
    for p in model.encoder.parameters():                             # so that no part starts as the identity
        p.data += 0.3 * torch.randn(p.shape, generator=generator)
    return model


# --------------------------------------------------------------------------------------------------
# One gradient, whatever the machinery

B = 7
TOKENS = [array("i", [2 + (i * k) % 60 for k in range(1, 2 + i % 5)]) for i in range(40)]
IDS = {"distinct": torch.stack([torch.arange(B), torch.arange(B) + 10, torch.arange(B) + 20]),
       "duplicates": torch.tensor([[0, 1, 2, 3, 4, 2, 6], [10, 11, 12, 13, 11, 15, 3],
                                   [20, 21, 22, 23, 24, 21, 20]])}
MISSING = torch.tensor([0, 0, 1, 0, 1, 0, 0]).bool()
TAU, STEP = 0.3, 5


def text_ids(duplicates, missing):
    ids = IDS["duplicates" if duplicates else "distinct"].clone()
    ids[2, MISSING & missing] = -1
    return ids


@functools.cache
def spec_gradient(stage, dims, duplicates, missing, micro_batch, size, every=False, seed=0, leave_out=""):
    """The float64 gradient of the plain loss, one graph over everything, with the same dropout.

    Dropout is drawn where the machinery draws it (a pass of a process), so the passes are laid out
    alike; all else is the plain loss of all rows on all vectors.
    """
    model, ids = small_model(), text_ids(duplicates, missing)
    model.encoder.double().train()
    sides = ids[:2 if stage == "prefinetune" else 3]
    x = {}
    for rank in range(size):
        mine = range(B * rank // size, B * (rank + 1) // size)
        place = [(s, i) for s in range(len(sides)) for i in mine if sides[s, i] >= 0]
        texts = [TOKENS[sides[s, i]] for s, i in place]
        for n, part in enumerate(micro_batches([len(t) for t in texts], micro_batch)):
            torch.manual_seed(derive_seed(seed, STEP, rank, n))
            for k, vector in zip(part, model.embed([texts[k] for k in part]), strict=True):
                x[place[k]] = vector
    zero = torch.zeros(8, dtype=torch.float64) + 0.1
    vectors = [[x.get((s, i), zero) for i in range(B)] for s in range(len(sides))]
    lists = [row.tolist() for row in ids]
    if stage == "prefinetune":
        loss = mrl_spec(lambda q, p: pre_spec(q, p, TAU, *lists[:2]), dims, *vectors)
    else:
        loss = mrl_spec(lambda q, p, n: main_spec(q, p, n, TAU, *lists, every=every, leave_out=leave_out),
                        dims, *vectors)
    loss.backward()
    return loss.item(), flat_gradient(model)


def flat_gradient(model):
    return torch.cat([p.grad.flatten() for p in model.encoder.parameters() if p.grad is not None])


def our_gradient(stage, dims, ids, micro_batch, block, every=False):
    model = small_model()
    model.encoder.double().train()
    c = TrainConfig(tau=TAU, micro_batch=micro_batch, negatives="all" if every else "own")
    train.BLOCK, streamed = block, train.streamed_loss
    train.streamed_loss = lambda *a: streamed(*a, block=block)
    try:
        loss = backward(model, stage, c, dims, torch.autocast("cpu", enabled=False), TOKENS, ids, STEP)
    finally:
        train.streamed_loss = streamed
    return loss.item(), flat_gradient(model)


CASES = [(stage, micro_batch, block, dims, duplicates, missing)
         for stage, micro_batch, block, dims, duplicates, missing in itertools.product(
             ("prefinetune", "finetune"), (0, 2), (1, 1 << 20), ((8,), (8, 3)), (False, True), (False, True))
         if stage == "finetune" or not missing]


def close(a, b):
    return math.isclose(a[0], b[0], rel_tol=1e-9) and torch.allclose(a[1], b[1], rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)).replace(" ", ""))
def test_one_process_has_the_plain_gradient(case):
    stage, micro_batch, block, dims, duplicates, missing = case
    ours = our_gradient(stage, dims, text_ids(duplicates, missing), micro_batch, block)
    assert ours[1].abs().max() > 1e-3
    assert close(ours, spec_gradient(stage, dims, duplicates, missing, micro_batch, 1))
    # negative controls: each ingredient, when it is another, gives another gradient
    assert not close(ours, spec_gradient(stage, dims, duplicates, missing, micro_batch, 1, seed=1))   # dropout
    assert not close(ours, spec_gradient(stage, (*dims, 2), duplicates, missing, micro_batch, 1))  # Matryoshka
    assert not close(ours, spec_gradient(stage, dims, not duplicates, missing, micro_batch, 1))
    if stage == "finetune":
        assert not close(ours, spec_gradient(stage, dims, duplicates, not missing, micro_batch, 1))
        assert not close(ours, spec_gradient(stage, dims, duplicates, missing, micro_batch, 1, leave_out="queries"))


def test_all_hard_negatives_through_the_machinery():
    ours = our_gradient("finetune", (8, 3), text_ids(True, True), 2, 1, every=True)
    assert close(ours, spec_gradient("finetune", (8, 3), True, True, 2, 1, every=True))
    assert not close(ours, spec_gradient("finetune", (8, 3), True, True, 2, 1))


def test_replay_without_the_same_dropout_is_another_gradient(monkeypatch):
    seeds = itertools.count(1)
    monkeypatch.setattr(train, "derive_seed", lambda *numbers: next(seeds))
    ours = our_gradient("finetune", (8,), text_ids(False, False), 2, 1 << 20)
    monkeypatch.setattr(train, "derive_seed", derive_seed)
    assert not close(ours, our_gradient("finetune", (8,), text_ids(False, False), 2, 1 << 20))


@pytest.mark.parametrize("stage,dims,duplicates,missing", [
    (stage, dims, duplicates, missing) for stage, dims, duplicates, missing in itertools.product(
        ("prefinetune", "finetune"), ((8,), (8, 3)), (False, True), (False, True))
    if stage == "finetune" or not missing])
def test_the_loop_without_machinery_has_the_plain_gradient(monkeypatch, stage, dims, duplicates, missing):
    """One process, no micro-batches: what stands in the loop itself, with dropout on."""
    ids, model, found = text_ids(duplicates, missing), small_model(), []
    model.encoder.double()
    monkeypatch.setattr(train, "tokenised", lambda *_: (TOKENS, ids.T.numpy()))
    monkeypatch.setattr(train, "batches", lambda *_: [np.arange(B)])
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_",
                        lambda *_: found.append(flat_gradient(model)) or torch.tensor(1.0))
    c = TrainConfig(tau=TAU, steps=1, dims=",".join(map(str, dims)))
    loss = train.train(model, stage, [[{}] * B], c)

    def spec(seed, dims=dims, ids=ids):
        twin = small_model()
        twin.encoder.double().train()
        torch.manual_seed(derive_seed(seed, 0))
        q, p = (twin.embed([TOKENS[i] for i in side]) for side in ids[:2].tolist())
        lists = [row.tolist() for row in ids]
        if stage == "prefinetune":
            total = mrl_spec(lambda q, p: pre_spec(q, p, TAU, *lists[:2]), dims, q, p)
        else:
            n = torch.ones_like(q)
            n[ids[2] >= 0] = twin.embed([TOKENS[i] for i in lists[2] if i >= 0])
            total = mrl_spec(lambda q, p, n: main_spec(q, p, n, TAU, *lists), dims, q, p, n)
        total.backward()
        return total.item(), flat_gradient(twin)

    ours = loss[0], found[0]
    assert close(ours, spec(0)) and ours[1].abs().max() > 1e-3
    assert not close(ours, spec(1)) and not close(ours, spec(0, dims=(*dims, 2)))
    assert not close(ours, spec(0, ids=text_ids(not duplicates, missing)))
    assert stage == "prefinetune" or not close(ours, spec(0, ids=text_ids(duplicates, not missing)))


def one_of_two(rank, folder, cases):
    """A process of two: its gradient in every case, written to a file."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    out = [our_gradient(stage, dims, text_ids(duplicates, missing), micro_batch, block)
           for stage, micro_batch, block, dims, duplicates, missing in cases]
    torch.distributed.destroy_process_group()
    np.savez(f"{folder}/{rank}.npz", *[np.concatenate([[loss], g.numpy()]) for loss, g in out])


def test_two_processes_have_the_plain_gradient(tmp_path):
    """Seven rows, so the two have three and four; with hard negatives, the case that often fails."""
    children = [START.Process(target=one_of_two, args=(rank, tmp_path, CASES)) for rank in range(2)]
    for child in children:
        child.start()
    wanted = [spec_gradient(stage, dims, duplicates, missing, micro_batch, 2)
              for stage, micro_batch, _, dims, duplicates, missing in CASES]
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    found = [np.load(tmp_path / f"{rank}.npz") for rank in range(2)]
    for number, (stage, micro_batch, _, dims, duplicates, missing) in enumerate(CASES):
        a, b = (f[f"arr_{number}"] for f in found)
        assert a.tobytes() == b.tobytes()                            # so the weights stay the same on both
        ours = a[0], torch.from_numpy(a[1:])
        loss, gradient = wanted[number]
        assert close(ours, wanted[number]), CASES[number]
        assert not close((loss, gradient * 2), ours) and not close((loss, gradient / 2), ours)
        assert not close(ours, spec_gradient(stage, dims, duplicates, missing, micro_batch, 1))  # one's dropout


# --------------------------------------------------------------------------------------------------
# The loop


def weights_of(model):
    return b"".join(p.detach().numpy().tobytes() for p in model.encoder.parameters())


LOOP = TrainConfig(batch_size=16, epochs=2, lr=1e-2, tau=0.2, dims="8,3", max_length=32)


def one_of_two_commands(rank, folder, arguments):
    """What torchrun does for a process of two."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=(folder / "port").read_text())
    torch.set_num_threads(1)
    command(train.main, *arguments)


def test_two_processes_train_the_model_of_one(tmp_path):
    """Without dropout: the same losses and weights up to rounding, one log, one checkpoint, one best."""
    save(small_model(1, 0.0), tmp_path / "init")
    files.write_jsonl(tmp_path / "a.jsonl", records(40))
    beir_folder(tmp_path / "beir", records(20), "dev")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (tmp_path / "port").write_text(str(free.getsockname()[1]))
    arguments = ["finetune", tmp_path / "a.jsonl", "--init", tmp_path / "init", "--batch-size", "9", "--steps", "8",
                 "--micro-batch", "3", "--dims", "8,3", "--lr", "1e-2", "--save-every", "4", "--eval",
                 tmp_path / "beir", "--out"]
    command(train.main, *arguments, tmp_path / "one")
    for _ in range(2):                                               # the second time over a finished run
        children = [START.Process(target=one_of_two_commands, args=(rank, tmp_path, [*arguments, tmp_path / "two"]))
                    for rank in range(2)]
        for child in children:
            child.start()
        for child in children:
            child.join(60)
            assert child.exitcode == 0
    one, two = (runs.read_metrics(tmp_path / name) for name in ("one", "two"))
    assert [r["step"] for r in one] == [r["step"] for r in two] and len(two) == 10
    losses = [[r["loss"] for r in rows if "loss" in r] for rows in (one, two)]
    assert losses[0] != losses[1] and np.allclose(*losses, rtol=1e-4) and losses[0][-1] < 0.9 * losses[0][0]
    a, b = (load(tmp_path / name).encoder.state_dict() for name in ("one", "two"))
    start = load(tmp_path / "init").encoder.state_dict()
    # a key's bias changes no attention: its gradient is rounding, which Adam makes steps of
    assert all(torch.allclose(a[k], b[k], atol=2e-3) for k in a if not k.endswith("key.bias"))
    assert max((a[k] - start[k]).abs().max() for k in a) > 2e-2
    assert {p.name for p in (tmp_path / "one").iterdir()} == {p.name for p in (tmp_path / "two").iterdir()}


@pytest.mark.parametrize("stage", ["prefinetune", "finetune"])
def test_loss_falls_and_its_own_positive_is_found(stage):
    rows, model = records(40), small_model(0, 0.0)
    before = first_hits(model, rows)
    losses = train.train(model, stage, [rows], replace(LOOP, steps=120, lr=3e-2))
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:10])
    assert first_hits(model, rows) > before + 0.3


def first_hits(model, rows):
    q = model.encode_queries([r["query"] for r in rows], "search result")
    p = model.encode_passages([r["positive"]["text"] for r in rows])
    return float(np.mean((q @ p.T).argmax(1) == np.arange(len(rows))))


@pytest.mark.parametrize("micro_batch", [0, 4])
def test_same_seed_same_bytes(micro_batch):
    def trained(seed):
        model, c = small_model(), replace(LOOP, seed=seed, micro_batch=micro_batch)
        return train.train(model, "finetune", [records(40)], c), model

    (a, x), (b, y), (other, z) = trained(0), trained(0), trained(1)
    assert a == b and weights_of(x) == weights_of(y)
    assert a != other and weights_of(x) != weights_of(z)


def test_micro_batches_train_the_same_model_without_dropout():
    models = [small_model(1, 0.0) for _ in range(2)]
    losses = [train.train(m, "finetune", [records(40)], replace(LOOP, micro_batch=n))
              for m, n in zip(models, (0, 3), strict=True)]
    assert np.allclose(*losses, rtol=1e-4)


def test_a_text_is_not_its_own_hard_negative():
    """A symmetric row whose negative is its input has none, as the same text elsewhere in the batch is masked."""
    rows = [record("semantic similarity", "a man eats", {"text": "he eats"}, {"text": text}, symmetric=True)
            for text in ("a man eats", "he sleeps")]
    _, sides = train.tokenised(small_model(), [rows], 32)
    assert sides.tolist() == [[0, 1, -1], [0, 1, 2]]
    rows[0]["symmetric"] = False                                     # as a passage it has another format
    assert train.tokenised(small_model(), [rows[:1]], 32)[1].tolist() == [[0, 1, 2]]


def test_micro_batches_hold_like_lengths_and_like_many_tokens():
    lengths = [random.Random(i).randint(3, 60) for i in range(200)]
    parts = micro_batches(lengths, 16)
    assert sorted(i for part in parts for i in part) == list(range(200))
    most = 16 * sum(lengths) / len(lengths)
    assert all(len(part) * max(lengths[i] for i in part) <= most for part in parts)
    padded = sum(len(part) * max(lengths[i] for i in part) for part in parts)
    assert padded < 1.15 * sum(lengths)


def test_an_infinite_loss_names_step_rows_and_checkpoint(tmp_path, monkeypatch):
    """An infinite learning rate spoils the weights at step 4 of checkpoints at 2, 4, ..."""
    monkeypatch.setattr(train, "learning_rate", lambda step, *_: 1e-2 if step < 2 else math.inf)
    wrong = r"loss is nan, .* at step 4, rows [12]:\d+, .*last good checkpoint: .*checkpoint-00000002$"
    with pytest.raises(InputError, match=wrong):
        train.train(small_model(), "finetune", [records(40), records(20, 1)],
                    replace(LOOP, steps=6, save_every=2), out=tmp_path)
    kept = load(tmp_path / "checkpoint-00000002")
    assert all(p.isfinite().all() for p in kept.encoder.parameters())


def test_an_infinite_gradient_stops_before_it_spoils_the_weights(tmp_path, monkeypatch):
    steps = itertools.count(1)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_",
                        lambda *_: torch.tensor(math.inf if next(steps) == 3 else 1.0))
    with pytest.raises(InputError, match=r"norm inf at step 3, .*checkpoint-00000002$"):
        train.train(small_model(), "finetune", [records(40)], replace(LOOP, save_every=1), out=tmp_path)


# --------------------------------------------------------------------------------------------------
# Stopping and going on


RESUMED = replace(LOOP, steps=60, save_every=1, micro_batch=4, resume=True)


def run_in(folder, c):
    """Train from the same start in `folder`; the model ends in folder/model.safetensors."""
    torch.set_num_threads(1)
    model = small_model(1, 0.1)
    train.train(model, "finetune", [records(40), records(30, 1)], c, [2, 1], out=Path(folder))
    train.save_final(model, Path(folder))


def bytes_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*"))
            if p.is_file() and p.name != "metrics.jsonl"}


@pytest.mark.parametrize("kills,flags", [
    (10, {}), (3, {"micro_batch": 0, "mix": "tasks", "eval": "beir"}),
    (3, {"mix": "mixed", "precision": "bf16", "eval": "beir"})], ids=["ten", "plain-tasks", "mixed-bf16"])
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
    assert 0 < steps[1] and steps[-1] < 60 and steps == sorted(steps)
    run_in(tmp_path / "killed", c)
    whole.join(60)
    assert whole.exitcode == 0
    found = bytes_of(tmp_path / "whole")
    assert found == bytes_of(tmp_path / "killed") and ("best/model.safetensors" in found) == ("eval" in flags)
    rows = [[(r["step"], r.get("loss"), r.get("dev")) for r in runs.read_metrics(tmp_path / name)]
            for name in ("whole", "killed")]
    assert rows[0] == rows[1]
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
    dev = [r["dev"]["ndcg@10"] for r in runs.read_metrics(tmp_path / "run") if "dev" in r]
    assert len(dev) == 6 and max(dev) > dev[0]
    beir = evaluate.read_beir(tmp_path / "beir", "dev")
    best = load(tmp_path / "run/best")
    q, P = evaluate.encode_beir(best, beir, "question answering")
    score = np.mean(evaluate.retrieval_scores(evaluate.rankings(beir, q, P), beir)["ndcg@10"])
    assert score == pytest.approx(max(dev), abs=1e-4)


def beir_folder(folder, rows, split):
    (folder / "qrels").mkdir(parents=True)
    lines = ["query-id\tcorpus-id\tscore"] + [f"q{i}\tp{i}\t1" for i in range(len(rows))]
    (folder / f"qrels/{split}.tsv").write_text("\n".join(lines) + "\n")
    (folder / "corpus.jsonl").write_text("".join(
        json.dumps({"_id": f"p{i}", **r["positive"]}) + "\n" for i, r in enumerate(rows)))
    (folder / "queries.jsonl").write_text("".join(
        json.dumps({"_id": f"q{i}", "text": r["query"]}) + "\n" for i, r in enumerate(rows)))


# --------------------------------------------------------------------------------------------------
# The command line


def command(main, *arguments):
    """Run a module's command line as from a shell."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["prog", *map(str, arguments)])
        run(main)


def test_the_command_line_trains_and_resumes(tmp_path, capsys):
    files.write_jsonl(tmp_path / "a.jsonl", records(40))
    files.write_jsonl(tmp_path / "b.jsonl", records(30, 1, negatives=False))
    arguments = ["finetune", f"{tmp_path}/a.jsonl:2", f"{tmp_path}/b.jsonl:1", "--init", "tiny", "--out",
                 tmp_path / "run", "--batch-size", "8", "--steps", "6", "--micro-batch", "4",
                 "--mix", "mixed", "--save-every", "3", "--precision", "bf16"]
    command(train.main, *arguments)
    first = bytes_of(tmp_path / "run")
    command(train.main, *arguments, "--resume")                      # nothing left to do
    assert bytes_of(tmp_path / "run") == first and "6 steps" in capsys.readouterr().out
    assert load(tmp_path / "run").dims == (384,)


def test_check_and_train_count_the_texts_that_are_cut(tmp_path, capsys):
    rows = records(5)
    rows[0]["query"] = "red " * 30
    files.write_jsonl(tmp_path / "a.jsonl", rows)
    save(small_model(), tmp_path / "model")
    for flags, said in (((), "1 of 13 texts are cut at 32"),
                        (("--max-length", "20"), "2 of 13 texts are cut at 20")):
        command(data.main, "check", tmp_path / "a.jsonl", "--model", tmp_path / "model", *flags)
        assert said in capsys.readouterr().out
    command(train.main, "finetune", tmp_path / "a.jsonl", "--init", tmp_path / "model", "--out",
            tmp_path / "run", "--max-length", "20")
    assert "2 of 13 texts are cut at 20 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("flags,message", [
    (["--tau", "0"], "--tau 0.0: give a number above 0"), (["--batch-size", "0"], "--batch-size 0"),
    (["--max-length", "-1"], "--max-length -1"), (["--mix", "all"], "--mix all: give sets or mixed or tasks"),
    (["--tau", "nan"], "--tau nan: give a number above 0"), (["--steps", "-3"], "--steps -3: give 0 or a number"),
    (["--epochs", "inf"], "--epochs inf"), (["--lr", "-1"], "--lr -1.0"), (["--weight-decay", "-1"], "--weight-"),
    (["--seed", "-1"], "--seed -1"), (["--save-every", "-1"], "--save-every -1")])
def test_a_bad_flag_is_one_line(tmp_path, capsys, flags, message):
    files.write_jsonl(tmp_path / "a.jsonl", records(4))
    for path, more, wanted in ((tmp_path / "a.jsonl", flags, message),
                               (f"{tmp_path}/a.jsonl:0", [], "a weight is a number above 0")):
        with pytest.raises(SystemExit) as stop:
            command(train.main, "finetune", path, "--init", "tiny", "--out", tmp_path / "run", *more)
        error = capsys.readouterr().err.strip()
        assert stop.value.code == 2 and wanted in error and "\n" not in error
    assert not (tmp_path / "run").exists()


def test_a_flag_before_the_command_is_one_line(capsys):
    """There it would be the recipe's, and the command's own default would take its place."""
    for flags in (["--seed", "3"], ["--seed=3"], ["--out", "x"]):
        with pytest.raises(SystemExit) as stop:
            command(train.main, *flags, "finetune", "a.jsonl", "--init", "tiny", "--out", "y")
        error = capsys.readouterr().err.strip()
        assert stop.value.code == 2 and f"{flags[0]} before finetune: " in error and "\n" not in error
