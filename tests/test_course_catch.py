"""Exercise 11: write a test of eq. 3. It accepts right losses and catches wrong ones.

    python -m pytest tests/test_course_catch.py

Invariants: a test that refuses everything, or accepts everything, earns nothing.
"""

import functools
import random

import pytest
import torch
import torch.nn.functional as F
from teach import graded_seed


def check_main_loss(loss) -> None:
    """Raise an AssertionError where `loss` is not eq. 3 (see main_loss in train.py), by your own assert statements.

    It is called as main_loss is, without `rows`: loss(q, p_pos, p_neg, tau, q_id, p_id, n_id), with a tau of 0.005
    or more. Every way to compute eq. 3 is right, in float32 too, where only rounding differs. The wrong ones are
    named in WRONG below.
    """
    # EXERCISE 11 (about 28 lines)
    generator = torch.Generator().manual_seed(0)
    q, p, n = (F.normalize(torch.randn(4, 3, generator=generator), dim=1).requires_grad_() for _ in range(3))
    distinct = [0, 1, 2, 3], [10, 11, 12, 13], [20, 21, 22, 23]
    cases = [(0.5, *distinct), (0.01, *distinct)]
    cases.append((0.5, [0, 1, 2, 3], [10, 10, 12, 13], [20, 21, 22, 23]))    # equal positives
    cases.append((0.5, [0, 1, 0, 3], [10, 11, 12, 13], [20, 21, 22, 23]))    # equal queries
    cases.append((0.5, [0, 1, 2, 10], [10, 11, 12, 13], [20, 21, 22, 23]))   # a query that is another's positive
    cases.append((0.5, [0, 1, 2, 3], [10, 11, 12, 13], [20, -1, 0, -1]))     # two rows have no hard negative
    for tau, q_id, p_id, n_id in cases:
        rows = []
        for i in range(4):
            mine, terms = (q_id[i], p_id[i]), [q[i] @ p[i] / tau]
            for j in range(4):
                other = j != i and q_id[j] != q_id[i]
                if other and p_id[j] not in mine:
                    terms.append(q[i] @ p[j] / tau)
                if other and q_id[j] not in mine:
                    terms.append(q[i] @ q[j] / tau)
            if n_id[i] >= 0:
                terms.append(q[i] @ n[i] / tau)
            rows.append(torch.stack(terms).logsumexp(0) - terms[0])
        wanted = torch.stack(rows).mean()
        ours = loss(q, p, n, tau, *(torch.tensor(ids) for ids in (q_id, p_id, n_id)))
        assert abs(ours.item() - wanted.item()) < 1e-4 * abs(wanted.item()), (q_id, p_id, n_id, tau)
        for x in (q, p, n):
            g, = torch.autograd.grad(wanted, x, retain_graph=True)
            h, = torch.autograd.grad(ours, x, retain_graph=True, allow_unused=True)
            assert h is not None and torch.allclose(g, h.to(g.dtype), rtol=1e-3, atol=1e-4), "the gradient"
    # END EXERCISE


# --------------------------------------------------------------------------------------------------
# Losses: eq. 3 in plain loops, and what is changed in it


def loops(change=lambda *x: x, factor=1.0, dtype=torch.float64, **terms):
    """A loss; `change` is made to its arguments, `terms` to the equation (see main_spec in test_train.py)."""
    def loss(q, p_pos, p_neg, tau, q_id, p_id, n_id):
        from test_train import main_spec

        q, p_pos, p_neg, tau, *ids = change(q.to(dtype), p_pos.to(dtype), p_neg.to(dtype), tau, q_id, p_id, n_id)
        return factor * main_spec(q, p_pos, p_neg, tau, *(i.tolist() for i in ids), **terms)
    return loss


def other_order(q, p, n, tau, *ids):
    order = torch.arange(len(q)).flip(0)
    return q[order], p[order], n[order], tau, *(i[order] for i in ids)


def distinct(q, p, n, tau, q_id, p_id, n_id):
    return q, p, n, tau, torch.arange(len(q)), torch.arange(len(q)) + len(q), n_id


def first_alone(ids):
    """An id that was there before is another one."""
    return torch.tensor([99 + i if ids[i] in ids[:i] else int(ids[i]) for i in range(len(ids))])


def queries_differ(q, p, n, tau, q_id, p_id, n_id):
    return q, p, n, tau, first_alone(q_id), p_id, n_id


def positives_differ(q, p, n, tau, q_id, p_id, n_id):
    return q, p, n, tau, q_id, first_alone(p_id), n_id


def sides_differ(q, p, n, tau, q_id, p_id, n_id):
    return q, p, n, tau, q_id, p_id + 9999, n_id


def rounded(q, p, n, tau, *ids):
    return q * (1 + 1e-7), p * (1 - 1e-7), n, tau, *ids


RNG = random.Random(graded_seed(11_000))
MORE = RNG.uniform(1.3, 2)
RIGHT = {"in loops": loops(), "rows in another order": loops(other_order), "rounded as in float32": loops(rounded)}
WRONG = {
    "the other rows' queries are left out": loops(leave_out="queries"),
    "the other rows' positives are left out": loops(leave_out="positives"),
    "the row's own hard negative is left out": loops(leave_out="own"),
    "all rows' hard negatives are in every row": loops(every=True),
    "the row's own query is in the sum": loops(itself=True),
    "the sum over rows, not the mean": loops(factor=RNG.uniform(2, 9)),
    "tau is larger": loops(lambda q, p, n, tau, *ids: (q, p, n, tau * MORE, *ids)),
    "duplicates are not masked": loops(distinct),
    "equal queries are not masked": loops(queries_differ),
    "equal positives are not masked": loops(positives_differ),
    "a query that is another row's positive is not masked": loops(sides_differ),
    "a row without a hard negative has one": loops(lambda *x: (*x[:-1], x[-1].abs())),
    "a hard negative of id 0 is none": loops(lambda *x: (*x[:-1], torch.where(x[-1] == 0, -1, x[-1]))),
    "no gradient on the hard negatives": loops(lambda q, p, n, *x: (q, p, n.detach(), *x)),
    "e^x overflows in float32": loops(dtype=torch.float32),
    "always 1": lambda q, *x: 0 * q.sum() + 1,
}


UNSTEADY = "asked again, your test says something else of the same loss: look at what it computes alone"


def verdict(loss):
    """What check_main_loss says against it, or nothing."""
    try:
        check_main_loss(loss)
    except AssertionError as error:
        return str(error) or "an assert without a message"
    return ""


@functools.cache
def steady():
    """Whether a loss has the same verdict whenever it is asked for: the order is random."""
    order = RNG.choices((True, False), k=8)
    return order == [not verdict(RIGHT["in loops"] if right else WRONG["always 1"]) for right in order]


@pytest.mark.ex11
@pytest.mark.parametrize("name", RIGHT)
def test_a_right_loss_is_accepted(name):
    said = verdict(RIGHT[name])
    assert not said, f"your test refuses a right loss ({name}): {said}"
    assert verdict(WRONG["always 1"]), "your test accepts a loss that is always 1"
    assert steady(), UNSTEADY


@pytest.mark.ex11
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_loss_is_caught(name):
    assert not verdict(RIGHT["in loops"]), "your test refuses a right loss, so it catches nothing"
    assert verdict(WRONG[name]), f"your test accepts a wrong loss: {name}"
    assert steady(), UNSTEADY
