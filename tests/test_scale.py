"""engine/scale.py: any batch size and any number of processes have the gradient of the plain loss.

    python -m pytest tests/test_scale.py

Invariants: micro-batches, blocks of rows, Matryoshka and processes change memory and time, not the value nor
the gradient, in every combination, with dropout on; no graph is kept longer than its micro-batch.
"""

import functools
import itertools
import math
import os
import random
import socket
import threading
import weakref
from array import array

import numpy as np
import pytest
import torch
from processes import START
from teach import check, graded_seed
from test_train import IDS, TAU, gradients, lists, main_spec, mrl_spec, pre_spec, vectors
from toys import beir_folder, command, records, small_model

import train
from engine import files, scale
from engine.scale import blockwise_loss, cached_backward, derive_seed, own_parts
from gecko import load, save, truncate_dim
from train import TrainConfig

# --------------------------------------------------------------------------------------------------
# The loss in blocks of rows, against the plain loops of test_train.py


@pytest.mark.parametrize("stage", ["prefinetune", "finetune"])
@pytest.mark.parametrize("dims", [(5,), (5, 2), (2, 5)])
@pytest.mark.parametrize("block", [1, 7 * 8 * 2, 1 << 20], ids=["a row", "two rows", "whole"])
def test_blockwise_loss_is_the_loop_at_any_block(stage, dims, block):
    S, ids = 2 if stage == "prefinetune" else 3, IDS["duplicates"]
    x = vectors(S, 7, 5, 5)

    def spec(q, p, *n):
        return main_spec(q, p, *n, TAU, *lists(ids)) if n else pre_spec(q, p, TAU, *lists(ids[:2]))

    wanted = mrl_spec(spec, dims, *x)
    value, g = blockwise_loss(train.batch_loss(stage, TAU, torch.stack(ids)), truncate_dim, dims,
                              torch.stack(x).detach(), slice(0, 7), block)
    assert torch.allclose(value, wanted, rtol=1e-10)
    assert torch.allclose(g, torch.stack(gradients(wanted, x)), rtol=1e-7, atol=1e-10)
    wrong, _ = blockwise_loss(train.batch_loss(stage, TAU, torch.stack(IDS["distinct"])), truncate_dim, dims,
                              torch.stack(x).detach(), slice(0, 7), block)
    assert not torch.allclose(wrong, wanted, rtol=1e-4)              # without the masks


def test_blockwise_loss_of_parts_adds_up_to_the_whole():
    """As several processes share the rows out; one may have none."""
    x = torch.stack(vectors(3, 7, 5, 6)).detach()
    loss = train.batch_loss("finetune", TAU, torch.stack(IDS["duplicates"]))
    whole, g = blockwise_loss(loss, truncate_dim, (5, 2), x, slice(0, 7))
    parts = [blockwise_loss(loss, truncate_dim, (5, 2), x, slice(a, b)) for a, b in ((0, 3), (3, 3), (3, 7))]
    assert torch.allclose(sum(p[0] for p in parts), whole) and torch.allclose(sum(p[1] for p in parts), g)
    assert not torch.allclose(parts[0][1], g)


def test_blockwise_loss_normalises_once_a_dimension():
    """Not once a block: that would cost as much as the products."""
    cut = []
    loss = train.batch_loss("prefinetune", TAU, torch.stack(IDS["distinct"]))
    blockwise_loss(loss, lambda x, dim: cut.append(dim) or truncate_dim(x, dim), (5, 2),
                   torch.stack(vectors(2, 7, 5, 6)).detach(), slice(0, 7), 1)
    assert len(cut) == 2 * 2 * 2                                     # 2 sides, 2 dims, forth and back


def test_every_tensor_is_made_on_the_device_of_the_vectors():
    """With another default device, as on a GPU, where a forgotten `device=` stops a run."""
    x, loss = vectors(3, 7, 5, 13), train.batch_loss("finetune", TAU, torch.stack(IDS["duplicates"]))
    with torch.device("meta"):
        blockwise_loss(loss, truncate_dim, (5, 2), torch.stack(x).detach(), slice(0, 7), 200)


def test_micro_batches_hold_like_lengths_and_like_many_tokens():
    lengths = [random.Random(i).randint(3, 60) for i in range(200)]
    ids, tokens = torch.arange(200)[None], [range(length) for length in lengths]
    parts = own_parts(ids, slice(0, 200), tokens, 16)
    assert sorted(torch.cat(parts).tolist()) == list(range(200))
    padded = [len(part) * max(lengths[i] for i in part) for part in parts]
    assert max(padded) <= 16 * np.mean(lengths) and sum(padded) < 1.15 * sum(lengths)
    assert len(own_parts(ids, slice(0, 200), tokens, 0)) == 1 and own_parts(ids, slice(0, 0), tokens, 16) == []
    ids = torch.tensor([[0, 1, 2, 3], [4, -1, 6, 7]])                # of rows 1 and 2 one text is missing
    assert sorted(torch.cat(own_parts(ids, slice(1, 3), tokens, 1)).tolist()) == [1, 2, 6]


# --------------------------------------------------------------------------------------------------
# Gradient caching (exercise 9), with a model and a loss of its own

B, D = 7, 8
TEXTS = [[n, n + 21] + [45 + n % 3] * (n % 4) for n in range(3 * B)]     # tokens of each text
ALL_IDS = torch.arange(3 * B).view(3, B)
SOME_IDS = ALL_IDS.clone()
SOME_IDS[2, [0, 3, 6]] = -1                                          # rows without a hard negative


class Graph(torch.autograd.Function):
    """Passes on what it is given, and is alive as long as its graph is."""

    @staticmethod
    def forward(ctx, x, token):
        ctx.token = token
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g, None


class Token:
    pass


class Toy:
    """A bag of words with dropout: what gradient caching asks of a model, and no more."""

    def __init__(self, dropout=0.0, dtype=torch.float64):
        self.weight = torch.nn.Parameter(torch.randn(60, D, dtype=torch.float64,
                                                     generator=torch.Generator().manual_seed(graded_seed(9))))
        self.dropout, self.dtype, self.drawn, self.calls, self.graphs, self.most = dropout, dtype, {}, [], [], 0

    def embed(self, ids):
        """(n, D); keeps what dropout drew for each text, and counts the texts whose graph is alive."""
        assert len(ids) and min(ids.tolist()) >= 0, "a row without a hard negative has no text there to embed"
        keep = 1 + self.dropout * torch.randn(len(ids), D, dtype=torch.float64)      # Gaussian dropout
        for i, mask in zip(ids.tolist(), keep, strict=True):
            self.drawn.setdefault(i, []).append(mask)
        x = keep * torch.stack([self.weight[TEXTS[i]].mean(0) for i in ids.tolist()])
        self.calls.append(len(ids))
        if x.requires_grad:
            token = Token()
            self.graphs.append((weakref.ref(token), len(ids)))
            x = Graph.apply(x, token)
            del token
            self.most = max(self.most, sum(n for ref, n in self.graphs if ref() is not None))
        return x.to(self.dtype)


def toy_loss(x, rows):
    """Every text of every row matters to each of the rows: (S, B, D) -> these rows' share, its gradient."""
    x = x.detach().requires_grad_()
    q, *targets = x
    value = sum(torch.logsumexp(q[rows] @ t.T + q[rows] @ q.T, 1).sum() for t in targets) / B
    return value.detach(), torch.autograd.grad(value, x)[0]


def caching(toy, ids, micro_batch, seed=(0, 2), loss=toy_loss):
    return cached_backward(toy.embed, loss, ids, TEXTS, micro_batch, D, [toy.weight], seed)


def parts_of(ids, micro_batch):
    """The texts of each micro-batch, by their places in ids."""
    return own_parts(ids, slice(0, B), TEXTS, micro_batch)


@pytest.mark.ex9
@pytest.mark.parametrize("ids", [ALL_IDS[:2], ALL_IDS, SOME_IDS], ids=["eq2", "eq3", "some without a negative"])
@pytest.mark.parametrize("micro_batch", [1, 3, 8, 0])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradient_caching_has_the_gradient_of_one_large_batch(ids, micro_batch, dropout):
    """A batch of seven in micro-batches: the gradient is that of one graph over all, with the same dropout."""
    toy = Toy(dropout)
    value = caching(toy, ids, micro_batch)
    for drawn in toy.drawn.values():
        assert all(torch.equal(mask, drawn[0]) for mask in drawn), \
            "another dropout when a text is embedded again: the cached gradient belongs to other vectors"
    there = ids.flatten() >= 0
    x = torch.zeros(ids.numel(), D, dtype=torch.float64)             # one graph over all
    x[there] = torch.stack([toy.drawn[i][-1] * toy.weight[TEXTS[i]].mean(0) for i in ids.flatten()[there].tolist()])
    wanted, g = toy_loss(x.view(*ids.shape, D), slice(0, B))
    assert value.item() == pytest.approx(wanted.item()), "the loss of other vectors"
    g, parts = g.flatten(0, 1), parts_of(ids, micro_batch)

    def through(*pairs):
        return sum(torch.autograd.grad(x[places], toy.weight, g[of], retain_graph=True)[0] for places, of in pairs)

    right = through(*zip(parts, parts, strict=True))
    many = {} if len(parts) == 1 else {
        "only one micro-batch hands its gradient on": through((parts[-1], parts[-1])),
        "only the first micro-batch hands its gradient on": through((parts[0], parts[0])),
        "the gradient is divided by the number of micro-batches": right / len(parts),
        "each micro-batch is handed the first rows' gradient, not its own":
            through(*((part, torch.arange(len(part))) for part in parts))}
    check(toy.weight.grad, right, many)


@pytest.mark.ex9
def test_gradient_caching_keeps_few_texts_in_memory():
    """The point of it: of 21 texts no more are embedded at a time than a micro-batch has, nor graphs kept."""
    toy, largest = Toy(), max(map(len, parts_of(ALL_IDS, 2)))
    caching(toy, ALL_IDS, 2)
    assert max(toy.calls) <= largest, "the whole batch is embedded at once"
    assert toy.most <= 2 * largest, f"the graphs of {toy.most} texts are kept; free each after its backward"


@pytest.mark.ex9
def test_gradient_caching_draws_another_dropout_for_every_part_and_step():
    toys = [Toy(0.4) for _ in range(3)]
    for toy, seed in zip(toys, ((0, 0), (0, 1), (1, 0)), strict=True):
        caching(toy, ALL_IDS, 3, seed=seed)
    first = [[toy.drawn[int(ALL_IDS.flatten()[part[0]])][0] for part in parts_of(ALL_IDS, 3)] for toy in toys]
    masks = sum(first, [])
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(masks, 2)), \
        "two micro-batches, two steps or two runs share their dropout: derive its seed from seed, rank and number"


@pytest.mark.ex9
def test_gradient_caching_keeps_vectors_in_the_precision_of_the_parameters():
    """Under autocast `embed` gives bfloat16; the loss is taken in the weights' own precision."""
    toy, seen = Toy(dtype=torch.bfloat16), []
    caching(toy, ALL_IDS, 3, loss=lambda x, rows: seen.append(x.dtype) or toy_loss(x, rows))
    exact = Toy()
    caching(exact, ALL_IDS, 3)
    assert seen == [torch.float64] and torch.allclose(toy.weight.grad, exact.weight.grad, rtol=0.05, atol=0.05)


@pytest.mark.ex9
@pytest.mark.parametrize("size", [2, 3])
def test_gradient_caching_on_several_processes_is_that_of_one(monkeypatch, size):
    """Threads in the place of processes: each embeds and scores its rows; sums make the loss and gradient whole."""
    one, toys, here = Toy(), [Toy() for _ in range(size)], threading.local()
    wanted = caching(one, SOME_IDS, 2)
    meeting, given, values, errors = threading.Barrier(size, timeout=60), {}, {}, []

    def add(x):
        given[here.rank] = x.clone()
        meeting.wait()
        total = sum(given[rank] for rank in range(size))
        meeting.wait()
        x.copy_(total)

    def work(rank):
        here.rank = rank
        try:
            values[rank] = caching(toys[rank], SOME_IDS, 2)
        except threading.BrokenBarrierError:
            pass                                                     # another one failed, or sums less often
        except Exception as error:
            errors.append(error)
            meeting.abort()                                          # or the others wait for this one

    monkeypatch.setattr(scale, "processes", lambda: (here.rank, size))
    monkeypatch.setattr(scale, "all_reduce_sum", add)
    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    assert len(values) == size, "the processes do not sum as often as each other"
    embedded = [set(toy.drawn) for toy in toys]
    assert not set.intersection(*embedded), "each process embeds its own rows alone"
    for rank in range(size):
        assert values[rank].item() == pytest.approx(wanted.item()), "sum the loss over the processes"
        assert torch.allclose(toys[rank].weight.grad, one.weight.grad), \
            "the gradient on the vectors is a sum over the processes too: others' rows are scored against mine"


# --------------------------------------------------------------------------------------------------
# The whole machinery on a real encoder: one gradient, whatever the combination

TOKENS = [array("i", [2 + (i * k) % 60 for k in range(1, 2 + i % 5)]) for i in range(40)]
MISSING = torch.tensor([0, 0, 1, 0, 1, 0, 0]).bool()
LOW_TAU, STEP = 0.3, 5


def text_ids(duplicates, missing):
    ids = torch.tensor([[0, 1, 2, 3, 4, 2, 6], [10, 11, 12, 13, 11, 15, 3], [20, 21, 22, 23, 24, 21, 20]])
    if not duplicates:
        ids = torch.stack([torch.arange(B), torch.arange(B) + 10, torch.arange(B) + 20])
    ids[2, MISSING & missing] = -1
    return ids


def flat_gradient(model):
    return torch.cat([p.grad.flatten() for p in model.encoder.parameters() if p.grad is not None])


@functools.cache
def spec_gradient(stage, dims, duplicates, missing, micro_batch, size, seed=0, leave_out=""):
    """The float64 gradient of the plain loss, one graph over everything, with the same dropout.

    Dropout is drawn where the machinery draws it (a pass of a process), so the passes are laid out
    alike; all else is the plain loss of all rows on all vectors.
    """
    model, ids = small_model(), text_ids(duplicates, missing)
    model.encoder.double().train()
    sides = ids[:2 if stage == "prefinetune" else 3]
    x = {}
    for rank in range(size):
        mine = slice(B * rank // size, B * (rank + 1) // size)
        for n, part in enumerate(own_parts(sides, mine, TOKENS, micro_batch)):
            torch.manual_seed(derive_seed(seed, STEP, rank, n))
            vectors = model.embed([TOKENS[i] for i in sides.flatten()[part].tolist()])
            for place, vector in zip(part.tolist(), vectors, strict=True):
                x[divmod(place, B)] = vector                         # of side and row
    assert len(x) == (sides >= 0).sum()
    zero = torch.zeros(8, dtype=torch.float64) + 0.1
    rows = [[x.get((s, i), zero) for i in range(B)] for s in range(len(sides))]
    if stage == "prefinetune":
        loss = mrl_spec(lambda q, p: pre_spec(q, p, LOW_TAU, *lists(ids[:2])), dims, *rows)
    else:
        loss = mrl_spec(lambda q, p, n: main_spec(q, p, n, LOW_TAU, *lists(ids), leave_out=leave_out), dims, *rows)
    loss.backward()
    return loss.item(), flat_gradient(model)


def our_gradient(stage, dims, ids, micro_batch, block):
    model = small_model()
    model.encoder.double().train()
    loss = functools.partial(blockwise_loss, train.batch_loss(stage, LOW_TAU, ids), truncate_dim, dims, block=block)
    sides = ids[:2 if stage == "prefinetune" else 3]
    value = cached_backward(lambda i: model.embed([TOKENS[k] for k in i.tolist()]), loss, sides,
                            TOKENS, micro_batch, 8,
                            [p for p in model.encoder.parameters() if p.requires_grad], (0, STEP))
    return value.item(), flat_gradient(model)


CASES = [case for case in itertools.product(
    ("prefinetune", "finetune"), (0, 2), (1, 1 << 20), ((8,), (8, 3)), (False, True), (False, True))
    if case[0] == "finetune" or not case[-1]]


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


def test_replay_without_the_same_dropout_is_another_gradient(monkeypatch):
    seeds = itertools.count(1)
    monkeypatch.setattr(scale, "derive_seed", lambda *numbers: next(seeds))
    ours = our_gradient("finetune", (8,), text_ids(False, False), 2, 1 << 20)
    monkeypatch.setattr(scale, "derive_seed", derive_seed)
    assert not close(ours, our_gradient("finetune", (8,), text_ids(False, False), 2, 1 << 20))


@pytest.mark.parametrize("stage,dims,duplicates,missing", dict.fromkeys((c[0], *c[3:]) for c in CASES))
def test_the_loop_without_machinery_has_the_plain_gradient(monkeypatch, stage, dims, duplicates, missing):
    """One process, no micro-batches: what stands in the loop itself, with dropout on."""
    ids, model, found = text_ids(duplicates, missing), small_model(), []
    model.encoder.double()
    monkeypatch.setattr(train, "tokenised", lambda *_: (TOKENS, ids.T.numpy()))
    monkeypatch.setattr(train, "batches", lambda *_: [np.arange(B)])
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_",
                        lambda *_: found.append(flat_gradient(model)) or torch.tensor(1.0))
    loss = train.train(model, stage, [[{}] * B], TrainConfig(tau=LOW_TAU, steps=1, dims=",".join(map(str, dims))))

    def spec(seed, dims=dims, ids=ids):
        twin = small_model()
        twin.encoder.double().train()
        torch.manual_seed(derive_seed(seed, 0))
        q, p = (twin.embed([TOKENS[i] for i in side]) for side in ids[:2].tolist())
        if stage == "prefinetune":
            total = mrl_spec(lambda q, p: pre_spec(q, p, LOW_TAU, *lists(ids[:2])), dims, q, p)
        else:
            n = torch.ones_like(q)
            n[ids[2] >= 0] = twin.embed([TOKENS[i] for i in ids[2].tolist() if i >= 0])
            total = mrl_spec(lambda q, p, n: main_spec(q, p, n, LOW_TAU, *lists(ids)), dims, q, p, n)
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
    one, two = ([row for _, row in files.read_jsonl(tmp_path / name / "metrics.jsonl")] for name in ("one", "two"))
    assert [r["step"] for r in one] == [r["step"] for r in two] and len(two) == 10
    losses = [[r["loss"] for r in rows if "loss" in r] for rows in (one, two)]
    assert losses[0] != losses[1] and np.allclose(*losses, rtol=1e-4) and losses[0][-1] < 0.97 * losses[0][0]
    a, b = (load(tmp_path / name).encoder.state_dict() for name in ("one", "two"))
    start = load(tmp_path / "init").encoder.state_dict()
    # a key's bias changes no attention: its gradient is rounding, which Adam makes steps of
    assert all(torch.allclose(a[k], b[k], atol=2e-3) for k in a if not k.endswith("key.bias"))
    assert max((a[k] - start[k]).abs().max() for k in a) > 2e-2
    assert {p.name for p in (tmp_path / "one").iterdir()} == {p.name for p in (tmp_path / "two").iterdir()}
