"""train.py: eq. 2, eq. 3 and Matryoshka against plain Python loops; the loop; the recipe; the command line.

    python -m pytest tests/test_train.py

Invariants: a loss is its equation, term for term, in value and gradient; a row sees its own hard negative and
no other's; no text is a negative of its equal; a Matryoshka term sends no gradient beyond its slice; the loss
falls and recall rises; the same seed writes the same bytes; a mistake is one line and exit code 2.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from processes import Command
from teach import check, graded_seed
from toys import bytes_of, command, mistake, records, small_model, weights_of

import data
import gecko
import llm
import train
from engine import files, tokens
from engine.commandline import Recipe
from engine.files import InputError
from train import TrainConfig, main_loss, mrl_loss, pre_loss

TAU = 0.5

# --------------------------------------------------------------------------------------------------
# The equations, as the paper writes them. x[i] are plain lists of tensors, so that autograd can follow.


def dot(x, y):
    return sum(a * b for a, b in zip(x, y, strict=True))


def pre_spec(q, p, tau, q_id, p_id, rows=None):
    total, rows = 0.0, range(len(q)) if rows is None else rows
    for i in rows:
        below = 0.0
        for j in range(len(q)):
            if j == i or (p_id[j] not in (p_id[i], q_id[i]) and q_id[j] != q_id[i]):
                below = below + torch.exp(dot(q[i], p[j]) / tau)
        total = total - torch.log(torch.exp(dot(q[i], p[i]) / tau) / below)
    return total / len(rows)


def main_spec(q, p, n, tau, q_id, p_id, n_id, rows=None, leave_out="", every=False, itself=False):
    """Eq. 3; leave_out drops one of its terms, every and itself add one: for the negative controls."""
    total, rows = 0.0, range(len(q)) if rows is None else rows
    for i in rows:
        below = torch.exp(dot(q[i], p[i]) / tau)
        for j in range(len(q)):
            mine = (q_id[i], p_id[i])
            if j != i and p_id[j] not in mine and q_id[j] != q_id[i] and leave_out != "positives":
                below = below + torch.exp(dot(q[i], p[j]) / tau)
            if j != i and q_id[j] not in mine and leave_out != "queries":
                below = below + torch.exp(dot(q[i], q[j]) / tau)
            if j == i and n_id[i] >= 0 and leave_out != "own":
                below = below + torch.exp(dot(q[i], n[i]) / tau)
            if j == i and itself:
                below = below + torch.exp(dot(q[i], q[i]) / tau)
            if j != i and every and n_id[j] >= 0 and n_id[j] not in mine:
                below = below + torch.exp(dot(q[i], n[j]) / tau)
        total = total - torch.log(torch.exp(dot(q[i], p[i]) / tau) / below)
    return total / len(rows)


def mrl_spec(spec, dims, *vectors):
    total = 0.0
    for dim in dims:
        cut = [[[a / torch.sqrt(sum(b * b for b in row[:dim])) for a in row[:dim]] for row in x]
               for x in vectors]
        total = total + spec(*cut)
    return total


def vectors(count, B, d, seed):
    generator = torch.Generator().manual_seed(graded_seed(seed))
    return [torch.randn(B, d, generator=generator, dtype=torch.float64).requires_grad_()
            for _ in range(count)]


def gradients(loss, x):
    return torch.autograd.grad(loss, x, retain_graph=True, allow_unused=True, materialize_grads=True)


def same(ours, spec, x, rtol=1e-6):
    """Value and gradients, and that there is a gradient to compare. The bound lets a student's float32 pass."""
    a, b = gradients(ours, x), gradients(spec, x)
    assert any(g.abs().max() > 1e-6 for g in (*a, *b))
    return torch.allclose(ours.double(), spec, rtol=rtol, atol=1e-12) and all(
        torch.allclose(u, v, rtol=100 * rtol, atol=rtol) for u, v in zip(a, b, strict=True))


def unit(*x):
    return [F.normalize(v, dim=1) for v in x]


# Ids of 7 rows. Rows 1, 4: the same positive. 2, 5: the same query. 3's query is 6's positive. -1: none.
Q = torch.tensor([0, 1, 2, 3, 4, 2, 6])
P = torch.tensor([10, 11, 12, 13, 11, 15, 3])
N = torch.tensor([20, -1, 22, 23, 24, -1, 20])
IDS = {"distinct": (torch.arange(7), torch.arange(7) + 10, torch.arange(7) + 20), "duplicates": (Q, P, N)}
DISTINCT = IDS["distinct"]
SHAPES = pytest.mark.parametrize("B,d,seed", [(1, 3, 0), (3, 5, 1), (7, 4, 2)])
OF_IDS = pytest.mark.parametrize("ids", ["distinct", "duplicates"])
OF_ROWS = pytest.mark.parametrize("rows", [slice(2, 5), slice(6, 7), slice(0, 7)])


def lists(ids):
    return [i.tolist() for i in ids]


# --------------------------------------------------------------------------------------------------
# Eq. 2


@pytest.mark.ex2
def test_eq2_by_its_terms():
    q, p = unit(*(v.detach() for v in vectors(2, 7, 4, 20)))
    distinct = lists(DISTINCT[:2])
    away = torch.stack([torch.logsumexp(torch.stack([q[i] @ p[j] / TAU for j in range(7) if j != i]), 0)
                        - q[i] @ p[i] / TAU for i in range(7)]).mean()
    right = pre_spec(q, p, TAU, *distinct)
    check(pre_loss(q, p, TAU, *DISTINCT[:2]), right, {
        "s is not divided by tau": pre_spec(q, p, 1.0, *distinct),
        "s is multiplied by tau": pre_spec(q, p, 1 / TAU, *distinct),
        "the softmax runs over the queries; it runs over the passages p_j of a row": pre_spec(p, q, TAU, *distinct),
        "the mean of both directions, as in CLIP; eq. 2 has q -> p alone":
            (right + pre_spec(p, q, TAU, *distinct)) / 2,
        "the positive is missing from the sum below": away,
        "this is the sum over rows; the equation takes the mean": 7 * right,
        "the sign: -log": -right})
    one_way = [*range(7)], [10, 11, 12, 13, 11, 15, 16]              # only equal positives
    check(pre_loss(q, p, TAU, Q, P), pre_spec(q, p, TAU, *lists((Q, P))), {
        "a duplicate of the row's own text stands as its negative; mask it": right,
        "half a mask: an equal positive is masked, an equal query is not": pre_spec(q, p, TAU, *one_way)})


@pytest.mark.ex2
@OF_IDS
@SHAPES
def test_eq2_is_its_loop(B, d, seed, ids):
    x, (q_id, p_id) = vectors(2, B, d, seed), [i[:B] for i in IDS[ids][:2]]
    ours = pre_loss(*unit(*x), TAU, q_id, p_id)
    if B == 1:
        assert ours.item() == 0
        return
    assert same(ours, pre_spec(*unit(*x), TAU, q_id.tolist(), p_id.tolist()), x)
    assert not same(ours, pre_spec(*unit(*x), TAU * 1.01, q_id.tolist(), p_id.tolist()), x)


@pytest.mark.ex2
@OF_IDS
@OF_ROWS
def test_eq2_of_some_rows_is_their_mean_against_all(rows, ids):
    x, numbers = vectors(2, 7, 4, 14), range(7)[rows]
    ours = pre_loss(*unit(*x), TAU, *IDS[ids][:2], rows=rows)
    assert same(ours, pre_spec(*unit(*x), TAU, *lists(IDS[ids][:2]), numbers), x)


@pytest.mark.ex2
@pytest.mark.parametrize("B", [1, 2, 9])
def test_eq2_of_equal_vectors_is_log_B(B):
    x = torch.ones(B, 4, dtype=torch.float64) / 2
    assert pre_loss(x, x, TAU, torch.arange(B), torch.arange(B) + B).item() == pytest.approx(math.log(B))


def survives_float32(loss, spec, ids, *x):
    """The loss of x in float32 at tau = 0.01 is the spec's, and its gradient on the queries is finite."""
    low = [v.float() for v in x]
    ours = loss(*low, 0.01, *ids)
    g, = torch.autograd.grad(ours, low[0], retain_graph=True)
    assert g.isfinite().all(), "the gradient is not finite"
    assert ours.item() == pytest.approx(spec.item(), rel=1e-4, abs=1e-6)


@pytest.mark.ex2
@pytest.mark.parametrize("ids", [(Q, P), (torch.zeros(7).long(), torch.arange(7) + 1)], ids=["some", "all masked"])
def test_eq2_in_float32_at_a_low_temperature(ids):
    """At tau = 0.01 scores reach 100, which exp does not survive; a mask of -100 is then no mask."""
    q, _ = unit(*vectors(2, 7, 4, 24))
    p = -q                                                           # the row's own passage is the worst
    spec = pre_spec(q, p, 0.01, *lists(ids))
    survives_float32(pre_loss, spec, ids, q, p)


# --------------------------------------------------------------------------------------------------
# Eq. 3


@pytest.mark.ex7
def test_eq3_by_its_terms():
    q, p, n = unit(*(v.detach() for v in vectors(3, 7, 4, 21)))
    ids, distinct = (Q, P, N), lists(DISTINCT)
    right = main_spec(q, p, n, TAU, *distinct)
    mistakes = {
        "s is not divided by tau": main_spec(q, p, n, 1.0, *distinct),
        "all rows' hard negatives are in a row; eq. 3 has the row's own alone":
            main_spec(q, p, n, TAU, *distinct, every=True),
        "the other rows' queries are missing (same-tower negatives)":
            main_spec(q, p, n, TAU, *distinct, leave_out="queries"),
        "the row's own hard negative is missing": main_spec(q, p, n, TAU, *distinct, leave_out="own"),
        "the other rows' positives are missing": main_spec(q, p, n, TAU, *distinct, leave_out="positives"),
        "j = i is among the queries: s(q_i, q_i) is 1 / tau whatever is learned":
            main_spec(q, p, n, TAU, *distinct, itself=True),
        "this is the sum over rows; the equation takes the mean": 7 * right}
    check(main_loss(q, p, n, TAU, *DISTINCT), right, mistakes)
    unmasked = [[*range(7)], [*range(10, 17)], N.tolist()]
    check(main_loss(q, p, n, TAU, *ids), main_spec(q, p, n, TAU, *lists(ids)), {
        "a duplicate of the row's own text stands as its negative; mask it": main_spec(q, p, n, TAU, *unmasked),
        "a row without a hard negative (n_id -1) has that term all the same":
            main_spec(q, p, n, TAU, *lists(ids)[:2], N.abs().tolist())})


@pytest.mark.ex7
@OF_IDS
@SHAPES
def test_eq3_is_its_loop(B, d, seed, ids):
    x, ids = vectors(3, B, d, seed), [i[:B] for i in IDS[ids]]
    ours = main_loss(*unit(*x), TAU, *ids)
    assert same(ours, main_spec(*unit(*x), TAU, *lists(ids)), x)
    for term in ("positives", "queries", "own") if B > 1 else ("own",):
        assert not same(ours, main_spec(*unit(*x), TAU, *lists(ids), leave_out=term), x), term


@pytest.mark.ex7
@OF_IDS
@OF_ROWS
def test_eq3_of_some_rows_is_their_mean_against_all(rows, ids):
    x, numbers = vectors(3, 7, 4, 15), range(7)[rows]
    ours = main_loss(*unit(*x), TAU, *IDS[ids], rows=rows)
    assert same(ours, main_spec(*unit(*x), TAU, *lists(IDS[ids]), numbers), x)


@pytest.mark.ex7
@pytest.mark.parametrize("B", [1, 2, 9])
def test_eq3_of_equal_vectors_is_log_of_the_number_of_terms(B):
    x = torch.ones(B, 4, dtype=torch.float64) / 2
    q_id, p_id, n_id = torch.arange(B), torch.arange(B) + B, torch.arange(B) + 2 * B
    assert main_loss(x, x, x, TAU, q_id, p_id, n_id).item() == pytest.approx(math.log(2 * B))
    assert main_loss(x, x, x, TAU, q_id, p_id, n_id * 0 - 1).item() == pytest.approx(math.log(2 * B - 1))


@pytest.mark.ex7
@pytest.mark.parametrize("ids", [(Q, P, N), (torch.zeros(7).long(), torch.arange(7) + 1, torch.full((7,), -1))],
                         ids=["some", "all masked"])
def test_eq3_in_float32_at_a_low_temperature(ids):
    q, n = unit(*vectors(2, 7, 4, 25))
    spec = main_spec(q, -q, n, 0.01, *lists(ids))
    survives_float32(main_loss, spec, ids, q, -q, n)


@pytest.mark.ex7
def test_eq3_has_no_term_of_a_query_with_itself():
    """s(q_i, q_i) is 1 / tau whatever q is; with it, this loss could not come near 0."""
    q, none = torch.eye(4, dtype=torch.float64), torch.full((4,), -1)
    assert main_loss(q, q, q, 0.02, torch.arange(4), torch.arange(4) + 4, none).item() < 1e-9


def rows_of_loss(q, p, n, ids):
    return [main_loss(q, p, n, TAU, *ids, rows=slice(i, i + 1)).item() for i in range(len(q))]


def test_eq3_row_ignores_other_hard_negatives():
    q, p, n = unit(*(v.detach() for v in vectors(3, 7, 4, 7)))
    before = rows_of_loss(q, p, n, DISTINCT)
    n[2] = -n[2]
    after = rows_of_loss(q, p, n, DISTINCT)
    assert [a == b for a, b in zip(before, after, strict=True)] == [i != 2 for i in range(7)]
    assert main_loss(q, p, n, TAU, *DISTINCT).item() == pytest.approx(sum(after) / 7)


def test_eq3_without_its_extras_is_eq2():
    (q, p, n), none = unit(*(v.detach() for v in vectors(3, 6, 4, 8))), torch.full((6,), -1)
    ids = torch.arange(6), torch.arange(6) + 6
    eq2 = pre_loss(q, p, TAU, *ids).item()
    assert main_spec(q, p, n, TAU, *lists((*ids, none)), leave_out="queries").item() == pytest.approx(eq2)
    assert main_loss(q, p, n, TAU, *ids, none).item() > 1.01 * eq2   # the same-tower negatives


def test_missing_negative_leaves_its_term_out_whatever_its_vector():
    q, p, n = unit(*(v.detach() for v in vectors(3, 7, 4, 11)))
    other = torch.where((N < 0)[:, None], 0 * n, n)
    assert main_loss(q, p, n, TAU, Q, P, N) == main_loss(q, p, other, TAU, Q, P, N)
    assert main_loss(q, p, n, TAU, Q, P, N) != main_loss(q, p, other, TAU, Q, P, N.abs() + 30)


@pytest.mark.parametrize("who", ["positive", "query", "symmetric"])
def test_duplicates_are_masked(who):
    """A row's equal elsewhere in the batch does not change the row's loss; as another text it does."""
    q, p, n = unit(*(v.detach() for v in vectors(3, 5, 4, 12)))
    ids = [torch.arange(5), torch.arange(5) + 10, torch.arange(5) + 20]
    distinct = rows_of_loss(q, p, n, ids)
    if who == "positive":
        ids[1][3] = ids[1][0]
    elif who == "query":
        ids[0][3] = ids[0][0]
    else:
        ids[0][3] = ids[1][0]                                        # row 3 asks with row 0's positive
    masked = rows_of_loss(q, p, n, ids)
    assert masked[0] < distinct[0] and masked[1] == distinct[1]


def test_losses_do_not_depend_on_the_order_of_rows():
    (q, p, n), order = unit(*(v.detach() for v in vectors(3, 7, 4, 9))), torch.tensor([3, 0, 6, 1, 5, 2, 4])
    for loss, x, ids in ((pre_loss, (q, p), (Q, P)), (main_loss, (q, p, n), (Q, P, N))):
        moved = loss(*(v[order] for v in x), TAU, *(i[order] for i in ids))
        assert moved.item() == pytest.approx(loss(*x, TAU, *ids).item(), rel=1e-12)


# --------------------------------------------------------------------------------------------------
# Matryoshka


def main_of_lists(q, p, n):
    return main_spec(q, p, n, TAU, *lists((Q, P, N)))


@pytest.mark.ex8
def test_mrl_by_its_terms():
    x = [v.detach() for v in vectors(3, 7, 5, 22)]
    terms = [mrl_spec(main_of_lists, [dim], *x) for dim in (5, 2)]
    check(mrl_loss(main_of_lists, (5, 2), *x), sum(terms), {
        "normalised before the cut and not again after it": sum(
            main_of_lists(*(v[:, :dim] for v in unit(*x))) for dim in (5, 2)),
        "not normalised at all": sum(main_of_lists(*(v[:, :dim] for v in x)) for dim in (5, 2)),
        "the last dimensions are taken, not the first": sum(
            mrl_spec(main_of_lists, [dim], *(v.flip(1) for v in x)) for dim in (5, 2)),
        "this is the mean over dims; take the sum": sum(terms) / 2,
        "only the full dimension": terms[0], "only the smallest dimension": terms[1]})


@pytest.mark.ex8
@pytest.mark.parametrize("dims", [(5,), (5, 2), (2, 5), (4, 3, 1), (1, 4), (2,)])
def test_mrl_is_its_loop(dims):
    """In any order, with or without the full dimension; the gradient goes through the normalisation too."""
    x = vectors(3, 7, 5, 4)
    ours = mrl_loss(main_of_lists, dims, *x)
    wanted = mrl_spec(main_of_lists, dims, *x)
    assert ours.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert same(ours, wanted, x), "the value is right and the gradient wrong: something is detached"
    assert not same(ours, mrl_spec(main_of_lists, (*dims, 3), *x), x)


@OF_IDS
@OF_ROWS
def test_the_pages_losses_are_their_loops_to_the_last_digits(rows, ids):
    """What is graded lets float32 pass; the page's own losses do not lose a digit of float64."""
    x, ids, numbers = vectors(3, 7, 5, 4), IDS[ids], range(7)[rows]
    ours = pre_loss(*unit(*x[:2]), TAU, *ids[:2], rows=rows)
    assert same(ours, pre_spec(*unit(*x[:2]), TAU, *lists(ids[:2]), numbers), x[:2], rtol=1e-9)
    ours = main_loss(*unit(*x), TAU, *ids, rows=rows)
    assert same(ours, main_spec(*unit(*x), TAU, *lists(ids), rows=numbers), x, rtol=1e-9)
    ours, wanted = mrl_loss(main_of_lists, (5, 2), *x), mrl_spec(main_of_lists, (5, 2), *x)
    assert same(ours, wanted, x, rtol=1e-9)
    assert not same(ours, wanted * (1 + 1e-8), x, rtol=1e-9)         # negative control: float32 would be worse


@pytest.mark.ex8
def test_small_mrl_term_sends_no_gradient_beyond_its_slice():
    x = vectors(2, 5, 6, 10)
    ids = lists((torch.arange(5), torch.arange(5) + 5))
    for g in gradients(mrl_loss(lambda q, p: pre_spec(q, p, TAU, *ids), [2], *x), x):
        assert g[:, 2:].abs().max() < 1e-12 and g[:, :2].abs().min() > 0


def test_mrl_of_the_losses_is_that_of_their_specs():
    x = vectors(3, 7, 5, 4)
    ours = mrl_loss(lambda q, p, n: main_loss(q, p, n, TAU, Q, P, N), (5, 2), *x)
    assert same(ours, mrl_spec(main_of_lists, (5, 2), *x), x)


def test_every_tensor_is_made_on_the_device_of_the_vectors():
    """With another default device, as on a GPU, where a forgotten `device=` stops a run; a control forgets it."""
    x, ids = [v.detach() for v in vectors(3, 7, 5, 13)], (Q, P, N)
    with torch.device("meta"):
        mrl_loss(lambda q, p, n: main_loss(q, p, n, TAU, *ids, rows=slice(2, 5)), (5, 2), *x)
        mrl_loss(lambda q, p: pre_loss(q, p, TAU, *ids[:2]), (5, 2), *x[:2])
        with pytest.raises((RuntimeError, NotImplementedError)):
            x[0] + torch.zeros(7, 5)


# --------------------------------------------------------------------------------------------------
# The loop

LOOP = TrainConfig(batch_size=16, epochs=2, lr=1e-2, tau=0.2, dims="8,3", max_length=32)


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


def tokenised(model, sets, max_length):
    rows = [(data.formatted(row, model.formats), row["query"]) for rows in sets for row in rows]
    return train.tokenised(model, rows, max_length, [np.arange(len(rows))])


def test_micro_batches_train_the_same_model_without_dropout():
    models = [small_model(1, 0.0) for _ in range(2)]
    losses = [train.train(m, "finetune", [records(40)], replace(LOOP, micro_batch=n))
              for m, n in zip(models, (0, 3), strict=True)]
    assert np.allclose(*losses, rtol=1e-4)


def test_a_hard_negative_is_never_the_query_nor_an_answer_to_it(capsys):
    """It is left out when the texts are tokenised, so that no loss meets it: of any row, in any set."""
    def row(query, positive, negative, task="semantic similarity", symmetric=True):
        return data.record(task, query, {"text": positive}, {"text": negative}, symmetric)

    rows = [row("a man eats", "he eats", "a man eats"), row("a man eats", "he sleeps", "a dog")]
    _, ids = tokenised(small_model(), [rows], 32)
    assert ids.tolist() == [[0, 1, -1], [0, 2, 3]]
    rows[0]["symmetric"] = False                                     # as a passage it has another format
    assert tokenised(small_model(), [rows[:1]], 32)[1].tolist() == [[0, 1, 2]]
    capsys.readouterr()
    sets = [[row("who", "red", "green"), row("why", "red", "blue")], [row("who", "green", "sand"),
                                                                      row("who", "moss", "red")]]
    _, ids = tokenised(small_model(), sets, 32)
    assert (ids[:, 2] >= 0).tolist() == [False, True, True, False]
    assert "2 of 4 hard negatives are left out" in capsys.readouterr().err
    other = [[row("who", "red", "green", task="one"), row("who", "green", "sand", task="two", symmetric=False)]]
    other[0][0]["symmetric"] = False
    _, ids = tokenised(small_model(), other, 32)
    assert (ids[:, 2] >= 0).tolist() == [False, True]                # the same query, whatever its task


def test_texts_are_tokenised_in_parts(monkeypatch, capsys):
    rows = records(30)
    whole = tokenised(small_model(), [rows], 12)
    said = capsys.readouterr().err
    monkeypatch.setattr(tokens, "TEXTS_AT_ONCE", 7)
    parts = tokenised(small_model(), [rows], 12)
    assert parts[0] == whole[0] and (parts[1] == whole[1]).all()
    assert capsys.readouterr().err == said and "texts were cut at 12 tokens" in said


def test_what_no_batch_holds_is_not_tokenised():
    """Its id stands, and what it says of others' hard negatives; the tokens of those drawn are the same."""
    rows = [(data.formatted(row, data.FORMATS), row["query"]) for row in records(6)]
    all_tokens, all_ids = train.tokenised(small_model(), rows, 12, [np.arange(6)])
    some, ids = train.tokenised(small_model(), rows, 12, [np.array([1, 2]), np.array([2, 4])])
    assert (ids == all_ids).all()
    used = set(ids[[1, 2, 4]].ravel().tolist()) - {-1}
    for i, row in enumerate(some):
        assert list(row) == (list(all_tokens[i]) if i in used else [])


def no_negatives():
    row = {"text": "red stone", "title": ""}
    return {
        "a batch of one": ([records(3, negatives=False)], {"batch_size": 1}),
        "one query": ([[data.record("t", "who", {"text": f"k{i}"}) for i in range(5)]], {}),
        "one positive, eq. 2": ([[data.record("t", f"k{i}", row) for i in range(5)]], {"stage": "prefinetune"}),
        "one record twice": ([[data.record("t", "who", row)] * 2], {}),
        "hard negatives, which eq. 2 has not": ([records(3)[1:2]], {"stage": "prefinetune"}),
        "sets of one": ([records(1, negatives=False), records(1, 1, negatives=False)], {}),
        "the answer is the query": ([[data.record("t", f"k{i % 2}", {"text": f"k{1 - i % 2}"}, symmetric=True)
                                      for i in range(4)]], {})}


@pytest.mark.parametrize("why", no_negatives())
def test_rows_that_never_have_a_negative_are_an_error(why):
    sets, settings = no_negatives()[why]
    stage = settings.pop("stage", "finetune")
    with pytest.raises(InputError, match="no row has a negative, so nothing is learned"):
        train.train(small_model(), stage, sets, replace(LOOP, **settings))


def test_steps_without_a_negative_are_counted(capsys):
    """The set of one row teaches nothing in batches of one set; with a hard negative, or mixed, it does."""
    sets = [records(20), records(1, negatives=False)]
    train.train(small_model(), "finetune", sets, replace(LOOP, steps=20))
    assert " of 20 steps no row has a negative" in capsys.readouterr().err
    one_positive = [data.record("t", f"k{i}", {"text": "red"}) for i in range(5)]   # but queries, in eq. 3
    for change, of in (({"mix": "mixed"}, sets), ({}, [records(20)]), ({"batch_size": 1}, [records(2)[1:]]),
                       ({}, [one_positive])):
        train.train(small_model(), "finetune", of, replace(LOOP, **{"steps": 9, **change}))
        assert "negative" not in capsys.readouterr().err


def test_training_that_cannot_learn_is_one_line(tmp_path, capsys):
    files.write_jsonl(tmp_path / "a.jsonl", records(3, negatives=False))
    error = mistake(capsys, train.main, "finetune", tmp_path / "a.jsonl", "--init", "tiny", "--out",
                    tmp_path / "run", "--batch-size", "1")
    assert "in 3 of 3 steps no row has a negative, so nothing is learned: give rows of other" in error
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------------------
# The command line


def test_the_command_line_trains_and_resumes(tmp_path, capsys):
    files.write_jsonl(tmp_path / "a.jsonl", records(40))
    files.write_jsonl(tmp_path / "b.jsonl", records(30, 1, negatives=False))
    arguments = ["finetune", f"{tmp_path}/a.jsonl:2", f"{tmp_path}/b.jsonl:1", "--init", "tiny", "--out",
                 tmp_path / "run", "--batch-size", "8", "--steps", "6", "--micro-batch", "4",
                 "--mix", "mixed", "--save-every", "3", "--precision", "bf16"]
    command(train.main, *arguments)
    said = capsys.readouterr().err
    assert "rows=[40, 30]  init=tiny" in said and "micro_batch=4" in said
    assert "llm=" not in said, "a flag that is the recipe's alone"
    first = bytes_of(tmp_path / "run")
    command(train.main, *arguments, "--resume")                      # nothing left to do
    assert bytes_of(tmp_path / "run") == first and "6 steps" in capsys.readouterr().out
    assert gecko.load(tmp_path / "run").dims == (384,)


def test_check_and_train_count_the_texts_that_are_cut(tmp_path, capsys):
    rows = records(5)
    rows[0]["query"] = "red " * 30
    files.write_jsonl(tmp_path / "a.jsonl", rows)
    gecko.save(small_model(), tmp_path / "model")
    for flags, said in (((), "1 of 13 texts were cut at 32 tokens"),
                        (("--max-length", "99"), "1 of 13 texts were cut at 32 tokens"),
                        (("--max-length", "20"), "2 of 13 texts were cut at 20 tokens")):
        command(data.main, "check", tmp_path / "a.jsonl", "--model", tmp_path / "model", *flags)
        assert said in capsys.readouterr().out
    command(train.main, "finetune", tmp_path / "a.jsonl", "--init", tmp_path / "model", "--out",
            tmp_path / "run", "--max-length", "20")
    assert "2 of 13 texts were cut at 20 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("flags,message", [
    (["--tau", "0"], "--tau 0.0: give a number above 0"), (["--batch-size", "0"], "--batch-size 0"),
    (["--max-length", "-1"], "--max-length -1"), (["--mix", "all"], "argument --mix: invalid choice: 'all'"),
    (["--tau", "nan"], "--tau nan: give a number above 0"), (["--steps", "-3"], "give a number of 0 or more"),
    (["--epochs", "inf"], "--epochs inf"), (["--lr", "-1"], "--lr -1.0"), (["--weight-decay", "-1"], "--weight-"),
    (["--seed", "-1"], "--seed -1"), (["--save-every", "-1"], "--save-every -1")])
def test_a_bad_flag_is_one_line(tmp_path, capsys, flags, message):
    files.write_jsonl(tmp_path / "a.jsonl", records(4))
    for path, more, wanted in ((tmp_path / "a.jsonl", flags, message),
                               (f"{tmp_path}/a.jsonl:0", [], "a weight is a number above 0")):
        error = mistake(capsys, train.main, "finetune", path, "--init", "tiny", "--out", tmp_path / "run", *more)
        assert wanted in error and "\n" not in error
    assert not (tmp_path / "run").exists()


def test_without_a_command_the_recipe_runs_and_names_what_to_type_next(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "recipe", lambda o, out: print(f"recipe {out.name} {o.seed}"))
    command(train.main, "--out", tmp_path / "demo", "--seed", "3")
    first, seconds, *following = capsys.readouterr().out.splitlines()
    assert first == "recipe demo 3" and " s; " in seconds
    assert "next: python gecko.py search" in following[0] and "fret.jsonl --changed" in following[1]


def test_a_flag_before_the_command_is_one_line(capsys):
    """There it would be the recipe's, and the command's own default would take its place."""
    for flags in (["--seed", "3"], ["--seed=3"], ["--out", "x"]):
        error = mistake(capsys, train.main, *flags, "finetune", "a.jsonl", "--init", "tiny", "--out", "y")
        assert f"{flags[0]} before finetune: " in error and "\n" not in error


# --------------------------------------------------------------------------------------------------
# The recipe in miniature

ROOT = Path(__file__).parent.parent
TOPS = ("math", "os", "builtins", "shutil", "json", "random", "statistics", "itertools")
SIZES = train.Sizes(pairs=6000, templates=2, pre_steps=60, steps=25)


@pytest.fixture(scope="module")
def small():
    return [p for p in data.builtin_corpus() if p["title"].split(".")[0] in TOPS]


def start_recipe(out, hash_seed):
    """A process of its own, for packages that other tests import add to the docstrings of numpy and logging.

    Pairs come from the sources of numpy alone: those of all packages take longer to read than to train on.
    """
    script = ("import sys; sys.path.insert(0, sys.argv[1]); import data, train\n"
              "from pathlib import Path\n"
              "data.pairs.SOURCES = ('numpy',)\n"
              f"small = [p for p in data.builtin_corpus() if p['title'].split('.')[0] in {TOPS!r}]\n"
              f"train.recipe(train.Recipe(llm='offline'), Path(sys.argv[2]), train.{SIZES!r}, small)")
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
    """One of them: its folder, its results and what it printed."""
    out, printed = demos[0]
    return out, json.loads((out / "results.json").read_text()), printed


def test_recipe_learns(demo):
    """Pre-finetuning beats the untrained encoder, generated queries beat pre-finetuning."""
    _, table, _ = demo
    at10 = {name: row["384"]["ndcg@10"] for name, row in table.items() if "384" in row}
    assert at10["untrained"] + 0.05 < at10["pre-finetuned"] < at10["+ (q, p_seed)"] + 0.02
    assert table["untrained"]["384"]["recall@100"] + 0.1 < table["+ FRet (p_1, p_20)"]["384"]["recall@100"]


def test_recipe_writes_every_stage(demo, small):
    out, _, printed = demo
    assert {p.name for p in out.iterdir()} == {
        "corpus.jsonl", "queries.jsonl", "fret.jsonl", "pre", "retriever", "gecko", "questions", "results.json"}
    rows = data.read_records(out / "fret.jsonl")
    assert len(rows) == len(small)
    for row in rows:
        ids = [c["id"] for c in row["candidates"]]
        assert len(ids) == 20 and {row["seed_id"], row["positive_id"], row["negative_id"]} <= set(ids)
        assert row["positive"]["text"] != row["negative"]["text"]
    first = np.mean([r["candidates"][0]["id"] == r["seed_id"] for r in rows])
    assert f"by retriever {first:.1%} [" in printed and "by chance 5.0%" in printed


def test_the_recipe_writes_the_same_bytes_with_the_same_seed(demos):
    """In another process, with another hash seed, every file is the same."""
    first, again = (bytes_of(out) for out, _ in demos)
    assert first.keys() == again.keys()
    assert [name for name in first if first[name] != again[name]] == []


def test_search_and_evaluate_run_on_what_was_written(demo):
    out, table, _ = demo
    found = script("gecko.py", "search", "round a number up", "--model", out / "gecko", "-k", "5")
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


def script(name, *arguments):
    return subprocess.run([sys.executable, ROOT / name, *map(str, arguments)], capture_output=True,
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
    code, _, err = Command(train.main, "finetune", f"{out / 'fret.jsonl'}:2", "--init", out / "retriever", "--out",
                           tmp_path / "m", "--steps", "3", "--batch-size", "64").result()
    assert code == 0, err
    assert gecko.load(tmp_path / "m").encoder.config.hidden_size == 384


MAIN = {"gecko.py": gecko.main, "data.py": data.main, "llm.py": llm.main, "train.py": train.main}


def test_a_mistake_has_no_traceback_in_a_process_of_its_own(tmp_path):
    result = script("gecko.py", "search", "q", "--model", tmp_path)
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
        "{demo}/retriever", "-N", "99999"),
    bad("llm.py", "mine", "{demo}/corpus.jsonl", "{tmp}/broken.jsonl", "{tmp}/f.jsonl", "--model-dir",
        "{demo}/retriever"),
    bad("train.py", "finetune", "{tmp}/none.jsonl", "--init", "tiny", "--out", "{tmp}/m"),
    bad("train.py", "finetune", "{demo}/fret.jsonl", "--init", "{tmp}/none", "--out", "{tmp}/m"),
    bad("train.py", "finetune", "{demo}/fret.jsonl", "--init", "{demo}/retriever", "--out", "{tmp}/m",
        "--dims", "9,x"),
    bad("train.py", "finetune", "{demo}/fret.jsonl", "--init", "{demo}/retriever", "--out", "{tmp}/m",
        "--dims", "x"),
    bad("train.py", "evaluate", "--model", "{demo}/gecko"),
    bad("train.py", "evaluate", "--model", "{demo}/gecko", "--beir", "{tmp}"),
    bad("train.py", "evaluate", "--model", "{demo}/gecko", "--sts", "{tmp}/empty.jsonl",
        "--out", "{tmp}/empty.jsonl"),
    bad("train.py", "--rank", "ql,rc", "--out", "{tmp}/m"),           # no relevance is recorded
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


# --------------------------------------------------------------------------------------------------
# The recipe on one's own documents, and from a pre-trained encoder

NOUNS = "kettle lantern anchor ladder violin compass basket hammer mirror saddle candle pillow".split()
VERBS = "polish repair carry paint weigh borrow".split()


@pytest.fixture
def documents(tmp_path):
    """Three documents of 24 sections each."""
    for n in range(3):
        parts = [f"# Book {n}"]
        for noun in NOUNS:
            for verb in VERBS[2 * n:2 * n + 2]:
                parts.append(f"## How to {verb} a {noun}\n\nYou {verb} the {noun} slowly, on a table, with a soft "
                             f"cloth. Every {noun} that you {verb} lasts for years, as those say who know it well.")
        (tmp_path / "docs" / f"book{n}.md").parent.mkdir(exist_ok=True)
        (tmp_path / "docs" / f"book{n}.md").write_text("\n\n".join(parts))
    gecko.save(small_model(), tmp_path / "encoder")
    return tmp_path


def own(folder, *more):
    return Command(train.main, "--corpus", folder / "docs", "--init", folder / "encoder", "--llm", "offline",
                   "--out", folder / "out", "--held-out", "0.3", *more).result()


def test_the_recipe_on_own_documents_from_a_pretrained_encoder(documents):
    """Held-out queries train nothing; a second run trains nothing again; what is kept is what the line says."""
    code, said, err = own(documents, "--keep", "0.5")
    assert code == 0, err
    assert "Pre-finetuning is left out" in said and "22 queries of 22 passages are held out" in said
    out = documents / "out"
    table = json.loads((out / "results.json").read_text())
    assert list(table) == ["BM25", "as it came", "+ (q, p_seed)", "+ FRet (p_1, p_20)", "0.5 as it came"]
    assert all(set(row) == {"p_seed", "p_1", "gain"} for row in table.values())
    fret, held = (data.read_records(out / name) for name in ("fret.jsonl", "held_out.jsonl"))
    assert len(held) == 22 and not {r["seed_id"] for r in held} & {r["seed_id"] for r in fret}
    kept = re.search(r"kept: (.*), best on", said)[1]
    same = {"as it came": documents / "encoder", "+ (q, p_seed)": out / "retriever"}.get(kept)
    if same:
        assert weights_of(gecko.load(out / "gecko")) == weights_of(gecko.load(same))
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/checkpoint-*")}
    assert len(before) == 2 and own(documents, "--keep", "0.5")[1].splitlines()[:-3] == said.splitlines()[:-3]
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("*/checkpoint-*")}


def test_the_recipes_hard_negative_is_last_or_sampled(documents):
    """From one file of candidates; the table names the negative; the initial retriever, which has none, stays."""
    assert Recipe().negative == Recipe(init="m", corpus="d", llm="offline").negative == "last"
    assert Recipe(init="m").negative == "sampled" and Recipe(init="m", negative="last").negative == "last"
    negatives, retrievers = [], []
    for name, stage in (("last", "+ FRet (p_1, p_20)"), ("sampled", "+ FRet (p_1, sampled)")):
        code, _, err = own(documents, "--negative", name)
        assert code == 0, err
        assert list(json.loads((documents / "out/results.json").read_text()))[-1] == stage
        rows = data.read_records(documents / "out/fret.jsonl")
        assert all(row["negative_id"] != row["positive_id"] for row in rows)
        negatives.append([row["negative_id"] for row in rows])
        retrievers.append(weights_of(gecko.load(documents / "out/retriever")))
    assert sum(a != b for a, b in zip(*negatives, strict=True)) > 0.7 * len(rows) and retrievers[0] == retrievers[1]


def test_tiny_learns_from_the_documents_own_headings(documents):
    code, said, err = Command(train.main, "--corpus", documents / "docs", "--llm", "offline", "--out",
                              documents / "out").result()
    assert code == 0, err
    table = json.loads((documents / "out/results.json").read_text())
    assert list(table)[:3] == ["untrained", "BM25", "pre-finetuned"] and "questions are few" in said
    first, *_, last = [row["loss"] for _, row in files.read_jsonl(documents / "out/pre/metrics.jsonl")]
    assert last < 0.8 * first


def test_a_dry_run_says_what_would_be_asked_and_writes_nothing(documents):
    code, said, err = own(documents, "--llm", "http://127.0.0.1:9/v1", "--dry-run")
    assert code == 0, err
    assert "asked of http://127.0.0.1:9/v1: " in said and f"{72 + 72 * 40:,} calls" in said
    assert not (documents / "out").exists()


@pytest.mark.parametrize("words, message", [
    (["--corpus", "DOCS"], "--corpus: name --llm too"),
    (["--corpus", "DOCS/none", "--llm", "offline"], "none"),
    (["--keep", "1", "--init", "DOCS"], "--keep 1.0: give a share below 1"),
    (["--keep", "0.5"], "--keep 0.5: give a share below 1, and an --init"),
    (["--eval", "DOCS"], "--eval goes with --corpus"),
    (["--corpus", "DOCS", "--llm", "offline", "--eval", "DOCS"], "docs"),
    (["--corpus", "DOCS", "--llm", "offline", "--held-out", "0.01"], "two are needed on each side"),
    (["--corpus", "DOCS", "--llm", "offline", "--held-out", "2"], "two are needed on each side"),
    (["--rank", "retriever"], "argument --rank: invalid choice")])
def test_what_the_recipe_cannot_do_is_one_line_and_writes_nothing(words, message, documents, tmp_path, capsys):
    words = [str(documents / "docs") if w == "DOCS" else w.replace("DOCS", str(documents / "docs")) for w in words]
    assert message in mistake(capsys, train.main, "--out", tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()
