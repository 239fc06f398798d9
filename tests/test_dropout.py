"""engine/dropout.py: dropout by bytes, and attention with it.   pytest tests/test_dropout.py

Invariants: attention is softmax(q k^T / sqrt(d/H)) v over the tokens that are kept; dropout zeroes a share p of the
numbers, each on its own, and scales the rest so that the mean stays.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from engine.dropout import attention, dropout


def softmax_by_loops(q, k, v, keep):
    """One head of one text: q, k, v (T, e), keep a list of T -> (T, e)."""
    T = len(q)
    out = torch.zeros_like(v)
    for i in range(T):
        weights = [math.exp(float(q[i] @ k[j]) / math.sqrt(q.shape[1])) if keep[j] else 0.0 for j in range(T)]
        for j in range(T):
            out[i] += weights[j] / sum(weights) * v[j]
    return out


def toy():
    """q, k, v (2, 3, 5, 4) and keep (2, 1, 1, 5): the second text has three tokens."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 5, 4, generator=generator, dtype=torch.float64).requires_grad_()
    keep = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])[:, None, None, :]
    return q, k, v, keep


def test_attention_is_the_softmax_of_the_kept_tokens():
    q, k, v, keep = toy()
    got = attention(q, k, v, keep, 0.0)
    for b in range(2):
        for h in range(3):
            want = softmax_by_loops(*(x[b, h].detach() for x in (q, k, v)), keep[b, 0, 0].tolist())
            torch.testing.assert_close(got[b, h].detach(), want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_attention_with_dropout_that_drops_nothing_is_the_same(dtype, monkeypatch):
    """Value and gradient of the written-out softmax are those of torch's; with other scores they differ."""
    monkeypatch.setattr("engine.dropout.dropout", lambda a, p: a)
    results = []
    for p, scale in ((0.0, 1), (0.5, 1), (0.5, 2)):
        q, k, v, keep = toy()
        out = attention(scale * q.to(dtype), k.to(dtype), v.to(dtype), keep, p)
        gradients = torch.autograd.grad(out.sin().sum(), (q, k, v))
        results.append([out.detach().double(), *gradients])
    for plain, written_out, other in zip(*results, strict=True):
        torch.testing.assert_close(plain, written_out, atol=1e-5 if dtype == torch.float32 else 1e-12, rtol=0)
        assert not torch.allclose(plain, other, atol=1e-3)


def test_attention_drops_of_the_softmax_alone():
    """Its mean over many draws is the plain one; what is not kept stays out of every draw."""
    q, k, v, keep = (x.detach() for x in toy())
    v[1, :, 3:] = 1e9                                                # tokens that may not be attended to
    torch.manual_seed(0)
    draws = torch.stack([attention(q, k, v, keep, 0.25) for _ in range(4000)])
    assert draws.abs().max() < 1e6
    assert draws.std(dim=0).min() > 0.01
    torch.testing.assert_close(draws.mean(dim=0), attention(q, k, v, keep, 0.0), atol=0.08, rtol=0)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(300, 401), (7, 3, 5, 1009)])
def test_dropout_zeroes_a_share_p_and_scales_the_rest(p, shape):
    """p to the nearest 1/256 in the zeros, in every row and column alike; exact in the scale."""
    torch.manual_seed(0)
    x = torch.ones(shape, requires_grad=True)
    y = dropout(x, p)
    met, n = round(256 * p) / 256, x.numel()
    zeros = (y == 0).float()
    assert abs(float(zeros.mean()) - met) < 4 * math.sqrt(met * (1 - met) / n)
    rest = y[y != 0]
    torch.testing.assert_close(rest, torch.full_like(rest, 1 / (1 - met)))
    y.sum().backward()
    torch.testing.assert_close(x.grad, y.detach())                   # the gradient has the same mask
    for dim in range(len(shape)):                                    # neighbours are independent
        a, b = zeros.narrow(dim, 0, shape[dim] - 1), zeros.narrow(dim, 1, shape[dim] - 1)
        both, expected = float((a * b).mean()), met ** 2
        assert abs(both - expected) < 6 * math.sqrt(expected / n)


def test_dropout_is_the_seed_s():
    x = torch.randn(50, 37)
    draws = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        draws.append(dropout(x, 0.3))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("p", [0.0, 1e-4, 0.9999, 1.0])
def test_a_byte_too_coarse_for_p_is_torch_s_dropout(p):
    x = torch.randn(50, 37)
    torch.manual_seed(0)
    got = dropout(x, p)
    torch.manual_seed(0)
    assert torch.equal(got, F.dropout(x, p))


def test_bfloat16_stays():
    assert dropout(torch.ones(8, 8, dtype=torch.bfloat16), 0.5).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        q, k, v, keep = (x.to(torch.float32) if x.is_floating_point() else x for x in toy())
        assert attention(q, k, v, keep, 0.5).shape == q.shape
