"""engine/search.py: `topk` against `nearest` on the page.   pytest tests/test_search.py

Invariants: the same scores and indices as `nearest`, bit for bit, whatever the blocks, the precision of
the first product and the vectors; a certificate is given only where the first search was right.
"""

import numpy as np
import pytest
import torch
from teach import check, graded_seed

import gecko
from engine import files, search

DTYPES = [torch.float32] + [torch.bfloat16] * search.has_bfloat16(torch.device("cpu"))


def gaussian(rng, n, d):
    return rng.standard_normal((n, d)).astype(np.float32)


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def cases():
    """Name -> queries, passages: what an approximate search gets wrong."""
    rng = np.random.default_rng(0)
    q, p = gaussian(rng, 9, 24), gaussian(rng, 1500, 24)
    one = unit(gaussian(rng, 1, 24))
    near = (one + 1e-6 * gaussian(rng, 1500, 24)).astype(np.float32)
    return {
        "unit": (unit(q), unit(p)),
        "near-duplicates": (unit(q), near),
        "one vector 1,500 times": (unit(q), np.repeat(one, 1500, 0)),
        "many ties": (np.sign(q), np.sign(p)),
        "best last": (unit(q[:1]), p[np.argsort(p @ unit(q[:1])[0])]),
        "best first": (unit(q[:1]), p[np.argsort(-p @ unit(q[:1])[0])]),
        "lengths from 1e-9 to 1e9": (q, p * (10 ** rng.uniform(-9, 9, (1500, 1))).astype(np.float32)),
        "tiny": (q * np.float32(1e-25), p * np.float32(1e-15)),
        "all negative": (np.abs(q), -np.abs(p)),
        "zeros": (q, p * 0),
        "one far longer": (q, np.concatenate([p[:-1] * np.float32(1e-3), p[-1:] * np.float32(1e3)])),
        "one dimension": (q[:, :1], p[:, :1]),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", cases())
def test_topk_is_nearest_bit_for_bit(name, dtype):
    """In blocks of several sizes, one of them not a multiple of the group, and for k = 1, 10, all."""
    q, p = cases()[name]
    for k in (1, 10, 1500):
        want = [x.numpy() for x in gecko.nearest(torch.from_numpy(q), torch.from_numpy(p), k)]
        for budget in (1, 9 * 4 * 352, 1 << 20):
            scores, indices, _ = search.certified_topk(q, p, k, budget, dtype)
            np.testing.assert_array_equal(indices, want[1])
            np.testing.assert_array_equal(scores, want[0])


@pytest.mark.ex10
def test_search_by_its_steps(monkeypatch):
    """A first search that is blind to odd passages, but says truly what they reach: proven, or searched again."""
    rng, k = np.random.default_rng(graded_seed(2)), 3
    q, p = (torch.from_numpy(rng.integers(-2, 3, (n, 4)).astype(np.float32)) for n in (1100, 60))

    def half_blind(x, passages, m, dtype, budget):
        s = x @ p.T
        return 2 * s[:, ::2].topk(m, dim=1).indices, s[:, 1::2].amax(1)

    monkeypatch.setattr(search, "candidates", half_blind)
    scores, indices, proven = (torch.from_numpy(x) for x in search.certified_topk(q, p, k))
    want, (seen, half) = gecko.nearest(q, p, k), gecko.nearest(q, p[::2], k)
    reach = (q @ p[1::2].T).amax(1)
    sure, loose = seen[:, -1] > reach, seen[:, -1] >= reach
    assert sure.any() and (loose & ~sure).any()
    check(indices, want[1], {
        "the first search's best are taken without proof; where it fails, search again": 2 * half,
        "a passage that reaches the same score may stand before yours: the k-th must be above the proof, not at it":
            torch.where(loose[:, None], 2 * half, want[1]),
        "the scores are not in the order of `nearest`": want[1].flip(1),
        "only the first of the blocks is searched; go over every block of queries":
            want[1] * (torch.arange(1100) < search.ROWS)[:, None]})
    check(scores, want[0], {"these are the candidates' scores where they were not proven": seen,
                            "no scores are written": 0 * seen})
    check(proven.tolist(), sure.tolist(), {
        "every query is searched again: then the first search is for nothing": [False] * 1100,
        "proven are those that were searched again": (~sure).tolist(),
        "all are called proven, but only the first search's proof makes a query so": [True] * 1100})


@pytest.mark.ex10
@pytest.mark.parametrize("P", [1, 3, 20])
def test_search_of_few_passages(P):
    """As many neighbours as there are passages, and fewer passages than candidates are asked for."""
    rng = np.random.default_rng(graded_seed(3))
    q, p = unit(gaussian(rng, 4, 8)), unit(gaussian(rng, P, 8))
    for k in {1, P}:
        want = gecko.nearest(torch.from_numpy(q), torch.from_numpy(p), k)
        np.testing.assert_array_equal(search.certified_topk(q, p, k)[1], want[1].numpy())


@pytest.mark.ex10
def test_search_hands_on_what_it_is_given(monkeypatch):
    """Precision and budget to the first search; the budget, and the unproven queries alone, to the second."""
    rng = np.random.default_rng(graded_seed(4))
    q, p = unit(gaussian(rng, 6, 8)), unit(gaussian(rng, 40, 8))
    q[2:] = 0                                                        # all scores are equal: never proven
    first, second, asked = search.candidates, search.search_again, []

    def spy_first(x, passages, m, dtype, budget):
        asked.append(("first", len(x), dtype, budget))
        return first(x, passages, m, dtype, budget)

    def spy_second(x, passages, k, floor, budget):
        asked.append(("second", len(x), budget))
        return second(x, passages, k, floor, budget)

    monkeypatch.setattr(search, "candidates", spy_first)
    monkeypatch.setattr(search, "search_again", spy_second)
    for dtype in (torch.float32, torch.bfloat16):                    # also where a CPU only emulates it
        asked.clear()
        proven = search.certified_topk(q, p, 3, 4321, dtype)[2]
        assert proven.tolist() == [True, True, False, False, False, False]
        assert asked[0] == ("first", 6, dtype, 4321) and sum(n for _, n, *_ in asked[1:]) == 4 \
            and {budget for *_, budget in asked} == {4321}, \
            "hand on dtype and budget as they are given, and search again for the unproven queries alone"


@pytest.mark.ex10
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_certificate_is_given_and_withheld(dtype):
    """Spread vectors are proven by the first search; equal ones never, so the second one is what answers."""
    for name, share in (("unit", 1), ("one vector 1,500 times", 0), ("near-duplicates", 0)):
        q, p = cases()[name]
        assert search.certified_topk(q, p, 5, 1 << 20, dtype)[2].mean() == share, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_bound_holds_and_is_not_idle(dtype):
    """No product is off by more than the bound; at a tenth of the bound some are, so it is no formality."""
    for name in ("unit", "lengths from 1e-9 to 1e9", "all negative", "tiny", "one dimension"):
        q, p = (torch.from_numpy(x) for x in cases()[name])
        q_norm, p_norm = search.norms(q), search.norms(p)
        s = search.product(q.to(dtype), p.to(dtype)).float()
        off = q.double() @ p.double().T - s
        bound = search.error_bound(q_norm[:, None], p_norm, s, q.shape[1], dtype)    # of every pair
        assert (off <= bound).all()
        if dtype == torch.bfloat16 and name == "one dimension":
            assert (off > bound / 10).any()


def test_without_a_certificate_bfloat16_is_wrong(monkeypatch):
    """The negative control: with a bound of nothing, near-duplicates come out in another order."""
    if torch.bfloat16 not in DTYPES:
        pytest.skip("no bfloat16 product on this CPU")
    q, p = cases()["near-duplicates"]
    want = gecko.nearest(torch.from_numpy(q), torch.from_numpy(p), 10)[1].numpy()
    monkeypatch.setattr(search, "error_bound", lambda *a: torch.full((len(q),), -torch.inf))
    assert (search.certified_topk(q, p, 10, 1 << 20, torch.bfloat16)[1] != want).any()


def test_scores_do_not_depend_on_place_or_company():
    """The same vectors at another address, in another block, beside others: the same bits."""
    rng = np.random.default_rng(1)
    q, p = unit(gaussian(rng, 40, 96)), unit(gaussian(rng, 300, 96))
    scores, indices = search.topk(q, p, 7)
    shifted = np.empty(p.size + 3, np.float32)[3:].reshape(p.shape)  # not where a vector register starts
    shifted[:] = p
    for some in (slice(0, 40), slice(5, 6), slice(13, 40)):
        again = search.topk(q[some].copy(), shifted, 7)
        np.testing.assert_array_equal(again[0], scores[some])
        np.testing.assert_array_equal(again[1], indices[some])


def test_memory_map_read_only_and_float64_are_searched(tmp_path, recwarn):
    rng = np.random.default_rng(2)
    q, p = gaussian(rng, 3, 8), gaussian(rng, 100, 8)
    np.save(tmp_path / "p.npy", p)
    mapped = np.load(tmp_path / "p.npy", mmap_mode="r")
    want = search.topk(q, p, 4)
    pairs = ((q, mapped), (q.astype(np.float64), p.astype(np.float64)), (torch.tensor(q), torch.tensor(p)))
    for queries, passages in pairs:
        for x, y in zip(search.topk(queries, passages, 4), want, strict=True):
            np.testing.assert_array_equal(x, y)
    assert not recwarn.list


def test_vectors_of_other_dimensions_are_refused_and_gradients_are_not_asked_for():
    with pytest.raises(AssertionError, match=r"\(3, 4\), \(5, 6\)"):
        search.topk(np.ones((3, 4), np.float32), np.ones((5, 6), np.float32), 1)
    assert search.topk(torch.eye(3, requires_grad=True), torch.eye(3), 1)[1].tolist() == [[0], [1], [2]]


def test_no_queries_have_no_neighbours():
    assert [x.shape for x in search.topk(np.empty((0, 3)), np.eye(3), 2)] == [(0, 2), (0, 2)]


@pytest.mark.parametrize("number", [np.nan, np.inf, 1e30])
def test_vectors_that_cannot_be_compared_are_refused(number):
    q, p = np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32)
    p[1, 2] = number
    for queries, passages in ((q, p), (p, q)):
        with pytest.raises(files.InputError, match="not finite, or too long to be compared"):
            search.topk(queries, passages, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("lowest", [-1.0, -0.0, 0.5])
def test_above_finds_all_above_a_floor_of_any_sign(dtype, lowest):
    """In order of rows; on whole groups of columns and on others; a floor of -0 is one of 0."""
    s = torch.randn(5, 3 * search.GROUP + 7, generator=torch.Generator().manual_seed(1)).to(dtype)
    s[0, :4] = torch.tensor([0.0, -0.0, 1e-30, -1e-30])
    floor = torch.tensor([lowest, 0.0, 1.0, 2.0, 0.25], dtype=dtype)
    for part in (s[:, :3 * search.GROUP], s):
        row, column = search.above(part.T.contiguous(), floor)
        assert row.tolist() == sorted(row.tolist())
        want = [(i, j) for i in range(5) for j in range(part.shape[1]) if part[i, j] > floor[i]]
        assert sorted(zip(row.tolist(), column.tolist(), strict=True)) == want


@pytest.mark.parametrize("budget", [4 * 7 * 3, 4 * 7 * 11, 1 << 20])
@pytest.mark.parametrize("k", [1, 5, 29])
def test_topk_equals_a_full_stable_sort(budget, k):
    """Equal scores, which small integers make many of, come by lower index in every blocking."""
    rng = np.random.default_rng(0)
    q, p = rng.integers(-1, 2, (7, 3)).astype(np.float32), rng.integers(-1, 2, (29, 3)).astype(np.float32)
    scores, indices, _ = search.certified_topk(q, p, k, budget)
    for i in range(7):
        s = [sum(float(x * y) for x, y in zip(q[i], row, strict=True)) for row in p]
        want = sorted(range(29), key=lambda j: (-s[j], j))[:k]
        assert indices[i].tolist() == want
        assert scores[i].tolist() == [s[j] for j in want]


def test_topk_refuses_k_above_the_corpus():
    with pytest.raises(gecko.InputError, match="k = 4 neighbours of 3"):
        search.topk(np.eye(3), np.eye(3), 4)
