"""Eq. 2, eq. 3 and Matryoshka against plain Python loops: values and gradients, in float64.

    python -m pytest tests/test_losses.py

Invariants: a loss is its equation, term for term; a row sees its own hard negative and no other's; no
text is a negative of itself or of its equal; a Matryoshka term sends no gradient beyond its slice.
"""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from teach import check

from train import TrainConfig, backward, main_loss, micro_batches, mrl_loss, pre_loss, streamed_loss

TAU = 0.5


# The equations, as the paper writes them. x[i] are plain lists of tensors, so that autograd can follow.


def dot(x, y):
    return sum(a * b for a, b in zip(x, y, strict=True))


def pre_spec(q, p, tau, q_id, p_id):
    total = 0.0
    for i in range(len(q)):
        below = 0.0
        for j in range(len(q)):
            if j == i or (p_id[j] not in (p_id[i], q_id[i]) and q_id[j] != q_id[i]):
                below = below + torch.exp(dot(q[i], p[j]) / tau)
        total = total - torch.log(torch.exp(dot(q[i], p[i]) / tau) / below)
    return total / len(q)


def main_spec(q, p, n, tau, q_id, p_id, n_id, leave_out="", every=False, itself=False):
    """Eq. 3; leave_out drops one of its terms, every and itself add one: for the negative controls."""
    total = 0.0
    for i in range(len(q)):
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
    return total / len(q)


def mrl_spec(spec, dims, *vectors):
    total = 0.0
    for dim in dims:
        cut = [[[a / torch.sqrt(sum(b * b for b in row[:dim])) for a in row[:dim]] for row in x]
               for x in vectors]
        total = total + spec(*cut)
    return total


def vectors(count, B, d, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, d, generator=generator, dtype=torch.float64).requires_grad_()
            for _ in range(count)]


def gradients(loss, x):
    return torch.autograd.grad(loss, x, retain_graph=True, allow_unused=True, materialize_grads=True)


def same(ours, spec, x):
    """Value and gradients, and that there is a gradient to compare."""
    a, b = gradients(ours, x), gradients(spec, x)
    assert any(g.abs().max() > 1e-6 for g in a)
    return torch.allclose(ours, spec, rtol=1e-9, atol=1e-12) and all(
        torch.allclose(u, v, rtol=1e-7, atol=1e-10) for u, v in zip(a, b, strict=True))


def unit(*x):
    return [F.normalize(v, dim=1) for v in x]


# Ids of 7 rows. Rows 1, 4: the same positive. 2, 5: the same query. 3's query is 6's positive. -1: none.
Q = torch.tensor([0, 1, 2, 3, 4, 2, 6])
P = torch.tensor([10, 11, 12, 13, 11, 15, 3])
N = torch.tensor([20, -1, 22, 23, 24, -1, 20])
DISTINCT = torch.arange(7), torch.arange(7) + 10, torch.arange(7) + 20


@pytest.mark.ex2
def test_eq2_by_its_terms():
    q, p = unit(*(v.detach() for v in vectors(2, 7, 4, 20)))
    lists, distinct = [Q.tolist(), P.tolist()], [DISTINCT[0].tolist(), DISTINCT[1].tolist()]
    away = torch.stack([torch.logsumexp(torch.stack([q[i] @ p[j] / TAU for j in range(7) if j != i]), 0)
                        - q[i] @ p[i] / TAU for i in range(7)]).mean()
    right = pre_spec(q, p, TAU, *distinct)
    check(pre_loss(q, p, TAU, *DISTINCT[:2]), right, {
        "s is not divided by tau": pre_spec(q, p, 1.0, *distinct),
        "s is multiplied by tau": pre_spec(q, p, 1 / TAU, *distinct),
        "the softmax runs over the queries; it runs over the passages p_j of a row": pre_spec(p, q, TAU, *distinct),
        "the positive is missing from the sum below": away,
        "this is the sum over rows; the equation takes the mean": 7 * right,
        "the sign: -log": -right})
    check(pre_loss(q, p, TAU, Q, P), pre_spec(q, p, TAU, *lists), {
        "a duplicate of the row's own text stands as its negative; mask it": right})


@pytest.mark.ex7
def test_eq3_by_its_terms():
    q, p, n = unit(*(v.detach() for v in vectors(3, 7, 4, 21)))
    ids, lists = (Q, P, N), [i.tolist() for i in (Q, P, N)]
    distinct = [i.tolist() for i in DISTINCT]
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
    check(main_loss(q, p, n, TAU, *ids), main_spec(q, p, n, TAU, *lists), {
        "a duplicate of the row's own text stands as its negative; mask it": main_spec(q, p, n, TAU, *unmasked),
        "a row without a hard negative (n_id -1) has that term all the same":
            main_spec(q, p, n, TAU, *lists[:2], N.abs().tolist())})


@pytest.mark.ex8
def test_mrl_by_its_terms():
    x, lists = [v.detach() for v in vectors(3, 7, 5, 22)], [i.tolist() for i in (Q, P, N)]

    def spec(q, p, n):
        return main_spec(q, p, n, TAU, *lists)

    terms = [mrl_spec(spec, [dim], *x) for dim in (5, 2)]
    check(mrl_loss(lambda q, p, n: main_spec(q, p, n, TAU, *lists), (5, 2), *x), sum(terms), {
        "normalised before the cut and not again after it": sum(
            spec(*(v[:, :dim] for v in unit(*x))) for dim in (5, 2)),
        "not normalised at all": sum(spec(*(v[:, :dim] for v in x)) for dim in (5, 2)),
        "the last dimensions are taken, not the first": sum(mrl_spec(spec, [dim], *(v.flip(1) for v in x))
                                                            for dim in (5, 2)),
        "this is the mean over dims; take the sum": sum(terms) / 2,
        "only the full dimension": terms[0], "only the smallest dimension": terms[1]})


@pytest.mark.ex2
@pytest.mark.parametrize("ids", [DISTINCT, (Q, P, N)], ids=["distinct", "duplicates"])
@pytest.mark.parametrize("B,d,seed", [(1, 3, 0), (3, 5, 1), (7, 4, 2)])
def test_eq2_is_its_loop(B, d, seed, ids):
    x, (q_id, p_id) = vectors(2, B, d, seed), (ids[0][:B], ids[1][:B])
    ours = pre_loss(*unit(*x), TAU, q_id, p_id)
    if B == 1:
        assert ours.item() == 0
        return
    assert same(ours, pre_spec(*unit(*x), TAU, q_id.tolist(), p_id.tolist()), x)
    wrong = pre_spec(*unit(*x), TAU * 1.01, q_id.tolist(), p_id.tolist())
    assert not same(ours, wrong, x)


@pytest.mark.ex7
@pytest.mark.parametrize("ids", [DISTINCT, (Q, P, N)], ids=["distinct", "duplicates"])
@pytest.mark.parametrize("B,d,seed", [(1, 3, 0), (3, 5, 1), (7, 4, 2)])
def test_eq3_is_its_loop(B, d, seed, ids):
    x, ids = vectors(3, B, d, seed), [i[:B] for i in ids]
    ours = main_loss(*unit(*x), TAU, *ids)
    lists = [i.tolist() for i in ids]
    assert same(ours, main_spec(*unit(*x), TAU, *lists), x)
    for term in ("positives", "queries", "own") if B > 1 else ("own",):
        assert not same(ours, main_spec(*unit(*x), TAU, *lists, leave_out=term), x), term


@pytest.mark.ex7
@pytest.mark.parametrize("ids", [DISTINCT, (Q, P, N)], ids=["distinct", "duplicates"])
def test_all_hard_negatives_is_a_switch_and_not_eq3(ids):
    x, lists = vectors(3, 7, 4, 3), [i.tolist() for i in ids]
    ours = main_loss(*unit(*x), TAU, *ids, every=True)
    assert same(ours, main_spec(*unit(*x), TAU, *lists, every=True), x)
    assert not same(ours, main_spec(*unit(*x), TAU, *lists), x)


@pytest.mark.parametrize("dims", [(5,), (5, 2), (4, 3, 1)])
def test_mrl_is_its_loop(dims):
    x, lists = vectors(3, 7, 5, 4), [i.tolist() for i in (Q, P, N)]

    def spec(q, p, n):
        return main_spec(q, p, n, TAU, *lists)

    ours = mrl_loss(lambda q, p, n: main_loss(q, p, n, TAU, Q, P, N), dims, *x)
    assert same(ours, mrl_spec(spec, dims, *x), x)
    assert not same(ours, mrl_spec(spec, (*dims, 2), *x), x)
    not_again = sum(spec(*(v[:, :dim] for v in unit(*x))) for dim in dims)   # cut, not normalised again
    assert dims == (5,) or not same(ours, not_again, x)


@pytest.mark.parametrize("stage", ["eq2", "eq3", "every"])
@pytest.mark.parametrize("dims", [(5,), (5, 2)])
@pytest.mark.parametrize("block", [1, 7 * 8 * 2 * 2, 1 << 20], ids=["a row", "a few rows", "whole"])
def test_streamed_loss_is_the_loop_at_any_block(stage, dims, block):
    x, ids, main = vectors(2 if stage == "eq2" else 3, 7, 5, 5), (Q, P, N), stage != "eq2"
    lists = [i.tolist() for i in ids]

    def spec(q, p, *n):
        return main_spec(q, p, *n, TAU, *lists, every=stage == "every") if main else \
            pre_spec(q, p, TAU, *lists[:2])

    wanted = mrl_spec(spec, dims, *x)
    loss, g = streamed_loss(torch.stack(x).detach(), TAU, dims, torch.stack(ids), slice(0, 7), main,
                            stage == "every", block)
    assert torch.allclose(loss, wanted, rtol=1e-10)
    assert torch.allclose(g, torch.stack(gradients(wanted, x)), rtol=1e-7, atol=1e-10)
    wrong, _ = streamed_loss(torch.stack(x).detach(), TAU, dims, torch.stack(DISTINCT), slice(0, 7), main,
                             stage == "every", block)
    assert not torch.allclose(wrong, wanted, rtol=1e-4)              # without the masks


def test_streamed_loss_of_parts_adds_up_to_the_whole():
    x, ids = torch.stack(vectors(3, 7, 5, 6)).detach(), torch.stack((Q, P, N))
    whole, g = streamed_loss(x, TAU, (5, 2), ids, slice(0, 7), True)
    parts = [streamed_loss(x, TAU, (5, 2), ids, rows, True) for rows in (slice(0, 3), slice(3, 7))]
    assert torch.allclose(sum(p[0] for p in parts), whole) and torch.allclose(sum(p[1] for p in parts), g)
    assert not torch.allclose(parts[0][1], g)


# Properties


@pytest.mark.ex2
@pytest.mark.parametrize("B", [1, 2, 9])
def test_eq2_of_equal_vectors_is_log_B(B):
    x = torch.ones(B, 4, dtype=torch.float64) / 2
    assert pre_loss(x, x, TAU, torch.arange(B), torch.arange(B) + B).item() == pytest.approx(math.log(B))


@pytest.mark.ex7
@pytest.mark.parametrize("B", [1, 2, 9])
def test_eq3_of_equal_vectors_is_log_of_the_number_of_terms(B):
    x = torch.ones(B, 4, dtype=torch.float64) / 2
    q_id, p_id, n_id = torch.arange(B), torch.arange(B) + B, torch.arange(B) + 2 * B
    assert main_loss(x, x, x, TAU, q_id, p_id, n_id).item() == pytest.approx(math.log(2 * B))
    assert main_loss(x, x, x, TAU, q_id, p_id, n_id * 0 - 1).item() == pytest.approx(math.log(2 * B - 1))


def rows_of_loss(q, p, n, ids):
    """The loss of each row alone: B * d loss / d (its share), by leaving the others' targets constant."""
    B = len(q)
    return [streamed_loss(torch.stack([q, p, n]), TAU, (q.shape[1],), torch.stack(ids), slice(i, i + 1),
                          True)[0].item() * B for i in range(B)]


def test_eq3_row_ignores_other_hard_negatives():
    q, p, n = unit(*(v.detach() for v in vectors(3, 7, 4, 7)))
    before = rows_of_loss(q, p, n, DISTINCT)
    n[2] = -n[2]
    after = rows_of_loss(q, p, n, DISTINCT)
    assert [a == b for a, b in zip(before, after, strict=True)] == [i != 2 for i in range(7)]
    assert main_loss(q, p, n, TAU, *DISTINCT).item() == pytest.approx(sum(after) / 7)


@pytest.mark.ex7
def test_eq3_has_no_term_of_a_query_with_itself():
    """s(q_i, q_i) is 1 / tau whatever q is; with it, this loss could not come near 0."""
    q = torch.eye(4, dtype=torch.float64)
    none = torch.full((4,), -1)
    assert main_loss(q, q, q, 0.02, torch.arange(4), torch.arange(4) + 4, none).item() < 1e-9


def test_eq3_without_its_extras_is_eq2():
    (q, p, n), none = unit(*(v.detach() for v in vectors(3, 6, 4, 8))), torch.full((6,), -1)
    ids = torch.arange(6), torch.arange(6) + 6
    eq2 = pre_loss(q, p, TAU, *ids).item()
    lists = [i.tolist() for i in (*ids, none)]
    assert main_spec(q, p, n, TAU, *lists, leave_out="queries").item() == pytest.approx(eq2)
    assert main_loss(q, p, n, TAU, *ids, none).item() > 1.01 * eq2   # the same-tower negatives


def test_losses_do_not_depend_on_the_order_of_rows():
    (q, p, n), order = unit(*(v.detach() for v in vectors(3, 7, 4, 9))), torch.tensor([3, 0, 6, 1, 5, 2, 4])
    for loss, x, ids in ((pre_loss, (q, p), (Q, P)), (main_loss, (q, p, n), (Q, P, N))):
        moved = loss(*(v[order] for v in x), TAU, *(i[order] for i in ids))
        assert moved.item() == pytest.approx(loss(*x, TAU, *ids).item(), rel=1e-12)


def test_small_mrl_term_sends_no_gradient_beyond_its_slice():
    x = vectors(2, 5, 6, 10)
    ids = torch.arange(5), torch.arange(5) + 5
    for g in gradients(mrl_loss(lambda q, p: pre_loss(q, p, TAU, *ids), [2], *x), x):
        assert g[:, 2:].abs().max() == 0 and g[:, :2].abs().min() > 0


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


def test_every_tensor_is_made_on_the_device_of_the_vectors():
    """With another default device, as on a GPU, where a forgotten `device=` stops a run; a control forgets it."""
    x, ids = torch.stack(vectors(3, 7, 5, 13)).detach(), torch.stack((Q, P, N))
    with torch.device("meta"):
        for every in (False, True):
            mrl_loss(lambda q, p, n, every=every: main_loss(q, p, n, TAU, *ids, every=every), (5, 2), *x)
            streamed_loss(x, TAU, (5, 2), ids, slice(0, 7), True, every, 200)
        mrl_loss(lambda q, p: pre_loss(q, p, TAU, *ids[:2]), (5, 2), *x[:2])
        streamed_loss(x[:2], TAU, (5, 2), ids, slice(0, 7), False)
        with pytest.raises((RuntimeError, NotImplementedError)):
            x[0] + torch.zeros(7, 5)


# Gradient caching


class Toy:
    """A bag of words with dropout: what gradient caching asks of a model, and no more."""

    def __init__(self, dropout):
        self.encoder, self.dropout, self.drawn = torch.nn.Embedding(60, 8, dtype=torch.float64), dropout, {}
        torch.nn.init.normal_(self.encoder.weight, generator=torch.Generator().manual_seed(0))
        self.encoder.config = SimpleNamespace(hidden_size=8)

    def embed(self, tokens):
        """One row a text; keeps what dropout drew for it, each time."""
        keep = 1 + self.dropout * torch.randn(len(tokens), 8, dtype=torch.float64)   # Gaussian dropout
        for ids, mask in zip(tokens, keep, strict=True):
            self.drawn.setdefault(tuple(ids), []).append(mask)
        return keep * torch.stack([self.encoder.weight[list(ids)].mean(0) for ids in tokens])


@pytest.mark.ex9
@pytest.mark.parametrize("stage", ["prefinetune", "finetune"])
@pytest.mark.parametrize("micro_batch", [1, 3, 8, 0])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradient_caching_has_the_gradient_of_one_large_batch(stage, micro_batch, dropout):
    """A batch of seven in micro-batches: the gradient is that of one graph over all, with the same dropout."""
    model, sides, tokens = Toy(dropout), 2 if stage == "prefinetune" else 3, {}
    for n, i in enumerate(torch.cat(DISTINCT).tolist()):
        tokens[i] = [n, n + 21] + [45 + n % 3] * (n % 4)
    tokens = [tokens.get(i, [0]) for i in range(27)]
    texts = [tokens[i] for i in torch.cat(DISTINCT[:sides]).tolist()]
    backward(model, stage, TrainConfig(tau=TAU, micro_batch=micro_batch), [8, 3],
             torch.autocast("cpu", enabled=False), tokens, torch.stack(DISTINCT), step=2)
    for drawn in model.drawn.values():
        assert all(torch.equal(mask, drawn[0]) for mask in drawn), \
            "another dropout when a text is embedded again: the cached gradient belongs to other vectors"
    masks = torch.stack([model.drawn[tuple(ids)][0] for ids in texts])
    x = masks * torch.stack([model.encoder.weight[ids].mean(0) for ids in texts])
    ids = [i.tolist() for i in DISTINCT]
    loss = mrl_spec(lambda q, p, *n: main_spec(q, p, *n, TAU, *ids) if n else pre_spec(q, p, TAU, *ids[:2]),
                    (8, 3), *x.view(sides, 7, 8))
    g, = torch.autograd.grad(loss, x, retain_graph=True)
    parts = micro_batches([len(t) for t in texts], micro_batch)

    def through(*pairs):
        return sum(torch.autograd.grad(x[rows], model.encoder.weight, g[of], retain_graph=True)[0]
                   for rows, of in pairs)

    many = {} if len(parts) == 1 else {
        "only one micro-batch hands its gradient on": through((parts[-1], parts[-1])),
        "only the first micro-batch hands its gradient on": through((parts[0], parts[0])),
        "the gradient is divided by the number of micro-batches":
            through(*zip(parts, parts, strict=True)) / len(parts),
        "each micro-batch is handed the first rows' gradient, not its own":
            through(*((part, list(range(len(part)))) for part in parts))}
    check(model.encoder.weight.grad, through(*zip(parts, parts, strict=True)), many)
