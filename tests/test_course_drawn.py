"""The exercises on inputs that are drawn from GRADE_SEED, which only the instructor knows; unset, they are fixed.

    python -m pytest tests/test_course_drawn.py

Invariants: each function is its plain loops on every input that its docstring allows, the rare ones too (a text of
one token, ties, ids of 0, repeated dims, uneven micro-batches), in value and gradient; no input is changed.
Pages are imported where they are used: one that does not compile fails its own exercises alone.
"""

import copy
import random
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from teach import check, check_gradients, graded_seed

CHANGED = "an argument was changed: it is the caller's"


def source(name):
    """A generator of numbers for this test, and torch's with the same seed."""
    seed = graded_seed(name)
    return random.Random(seed), torch.Generator().manual_seed(seed)


def normal(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# --------------------------------------------------------------------------------------------------
# Eq. 1 to 3 and Matryoshka


@pytest.mark.ex1
@pytest.mark.parametrize("draw", range(3))
def test_mean_pool_drawn(draw):
    """Texts of one token to T, which may be 301; zeros among the numbers, anything where padding stands; a view."""
    import gecko

    rng, generator = source(1000 + draw)
    B, T, d = rng.randint(3, 5), [4, 6, 301][draw], rng.randint(2, 5)
    lengths = [1, T, *(rng.randint(1, T) for _ in range(B - 2))]
    mask = (torch.arange(T) < torch.tensor(lengths)[:, None]).long()
    W = normal(generator, B, d, T).relu().mT             # not contiguous
    W[mask == 0] = 1000.0
    W.requires_grad_()
    weight, kept = normal(generator, B, d), (W.detach().clone(), mask.clone())
    spec = torch.stack([W[b, :n].sum(0) / n for b, n in enumerate(lengths)])
    ours = gecko.mean_pool(W, mask)
    later = [W[b, 1:n].sum(0) / max(n - 1, 1) for b, n in enumerate(lengths)]
    check(ours, spec, {
        "this is the first token alone; eq. 1 is the mean of all real ones": W[:, 0],
        "this is the last token alone; eq. 1 is the mean of all real ones": W[range(B), mask.sum(1) - 1],
        "the first token is left out; the task's tokens are in the mean too": torch.stack(later),
        "this is the largest value, not the mean": W.masked_fill(mask[..., None] == 0, -9e9).amax(1),
        "padding's numbers are in the sum": W.sum(1) / mask.sum(1)[:, None],
        "all texts are divided by the mean length; divide by the text's own n":
            spec * mask.sum(1)[:, None] / mask.double().sum(1).mean(),
        "divided by n + 1": spec * (mask.sum(1) / (mask.sum(1) + 1))[:, None],
        "all texts are divided by the same number; divide by the text's own n": spec * mask.sum(1)[:, None] / T,
        "the sum is not divided by n": spec * mask.sum(1)[:, None],
        "it is divided by the number of values that are not 0, not by the number of real tokens":
            (W * mask[..., None]).sum(1) / ((W * mask[..., None]) != 0).sum(1).clamp(min=1),
        "padding is in the mean; only tokens with mask 1 count": W.mean(1)}, drawn=True)
    check_gradients((ours * weight).sum(), (spec * weight).sum(), {"W": W})
    assert torch.equal(W, kept[0]) and torch.equal(mask, kept[1]), CHANGED


def batch(draw, count):
    """Unit rows, the tensors that they are made of, ids with many duplicates, tau, and some of the rows.

    Draw 1: the passage of row 0 is its own query's text. Draw 2: numbers of texts among millions. Draw 3: to row 0
    all others are duplicates, and it has no hard negative.
    """
    rng, generator = source(draw)
    B, d = rng.randint(5, 9), rng.randint(3, 6)
    x = [normal(generator, B, d).requires_grad_() for _ in range(count)]
    ids = [torch.tensor([rng.randrange(low, low + B + 2) for _ in range(B)]) for low in (1, B)]  # some in both
    ids.append(torch.tensor([rng.choice([-1, 0, 3 * B + i]) for i in range(B)]))
    ids[2][:2] = torch.tensor([0, -1])
    start = rng.randint(0, B - 2)
    rows = rng.choice([slice(None), slice(start, rng.randint(start + 1, B))])
    if draw % 10 == 1:
        ids[1][0], rows = ids[0][0], slice(0, B - 1)
    if draw % 10 == 2:                                   # the first two queries are one number in float32
        ids[0][:2], ids[1][:2] = torch.tensor([4 * B, 4 * B + 1]), torch.tensor([4 * B + 2, 4 * B + 4])
        ids, rows = [torch.where(i < 0, i, (1 << 25) + (i // 2) * 256 + i % 2) for i in ids], slice(0, B)
    if draw % 10 == 3:
        rest = B - 3
        ids = [torch.tensor(i) for i in ([0, 0, 0] + rest * [1], [1, 2, 3] + rest * [0], [-1, 9, 9] + rest * [9])]
        rows = slice(0, B)
    tau = 2.0 if draw % 10 == 2 else rng.choice([0.05, 0.3, 2.0])        # at 2 every candidate weighs
    return x, [F.normalize(v, dim=1) for v in x], ids[:count], tau, rows


def check_loss(loss, spec, x, unit, ids, mistakes, tau, rows):
    """Value and gradients, of unit rows; nothing is changed."""
    kept = [v.detach().clone() for v in (*unit, *ids)]
    wanted = spec(*unit, tau, *(i.tolist() for i in ids), range(len(x[0]))[rows])
    ours = loss(*unit, tau, *ids, rows=rows)
    check(ours, wanted, mistakes, drawn=True)
    check_gradients(ours, wanted, dict(zip(("q", "p_pos", "p_neg"), x, strict=False)))
    assert all(torch.equal(v, old) for v, old in zip((*unit, *ids), kept, strict=True)), CHANGED


@pytest.mark.ex2
@pytest.mark.parametrize("draw", range(4))
def test_pre_loss_drawn(draw):
    from test_train import pre_spec

    import train

    x, unit, ids, tau, rows = batch(2000 + draw, 2)
    B, some, none = len(x[0]), range(len(x[0]))[rows], list(range(100, 100 + len(x[0])))
    q_id, p_id = (i.tolist() for i in ids)
    far = list(range(200, 200 + B))
    right = pre_spec(*unit, tau, q_id, p_id, some)
    check_loss(train.pre_loss, pre_spec, x, unit, ids, {
        "no duplicates are masked": pre_spec(*unit, tau, none, far, some),
        "half a mask: an equal query is not masked": pre_spec(*unit, tau, none, p_id, some),
        "half a mask: an equal positive is not masked": pre_spec(*unit, tau, q_id, far, some),
        "the mean is over the rows of `rows`, not over all B": right * len(some) / B,
        "`rows` is not looked at": pre_spec(*unit, tau, q_id, p_id)}, tau, rows)


@pytest.mark.ex7
@pytest.mark.parametrize("draw", range(5))
def test_main_loss_drawn(draw):
    """An id may be 0; where it is -1, p_neg holds anything."""
    from test_train import main_spec

    import train

    x, unit, ids, tau, rows = batch(7000 + draw, 3)
    B, some = len(x[0]), range(len(x[0]))[rows]
    unit[2] = torch.where(ids[2][:, None] < 0, 2 * x[2], unit[2])
    q_id, p_id, n_id = (i.tolist() for i in ids)
    none, far = list(range(100, 100 + B)), list(range(200, 200 + B))
    right = main_spec(*unit, tau, q_id, p_id, n_id, some)
    check_loss(train.main_loss, main_spec, x, unit, ids, {
        "no duplicates are masked": main_spec(*unit, tau, none, far, n_id, some),
        "half a mask: an equal query is not masked": main_spec(*unit, tau, none, p_id, n_id, some),
        "half a mask: an equal positive is not masked": main_spec(*unit, tau, q_id, far, n_id, some),
        "a hard negative of id 0 is one too; -1 alone means none":
            main_spec(*unit, tau, q_id, p_id, [n or -1 for n in n_id], some),
        "a row without a hard negative (n_id -1) has that term all the same":
            main_spec(*unit, tau, q_id, p_id, [1] * B, some),
        "the other rows' queries are missing (same-tower negatives)":
            main_spec(*unit, tau, q_id, p_id, n_id, some, leave_out="queries"),
        "all rows' hard negatives are in a row; eq. 3 has the row's own alone":
            main_spec(*unit, tau, q_id, p_id, n_id, some, every=True),
        "the mean is over the rows of `rows`, not over all B": right * len(some) / B,
        "`rows` is not looked at": main_spec(*unit, tau, q_id, p_id, n_id)}, tau, rows)


def far_apart(loss, spec, count):
    """In float32 each row sees itself alone, row 0 at -100, the others at 100: a maximum of all is none of 0."""
    from test_train import survives_float32

    q = torch.eye(4)
    p = q.clone()
    p[0] = -q[0]
    x, ids = [q.requires_grad_(), p, p][:count], [torch.zeros(4).long(), torch.arange(4) + 1, torch.full((4,), -1)]
    wanted = spec(*(v.double() for v in x), 0.01, *(i.tolist() for i in ids[:count]))
    survives_float32(loss, wanted, ids[:count], *x)


@pytest.mark.ex2
def test_pre_loss_of_rows_far_apart():
    from test_train import pre_spec

    import train
    far_apart(train.pre_loss, pre_spec, 2)


@pytest.mark.ex7
def test_main_loss_of_rows_far_apart():
    from test_train import main_spec

    import train
    far_apart(train.main_loss, main_spec, 3)


@pytest.mark.ex8
@pytest.mark.parametrize("draw", range(4))
def test_mrl_loss_drawn(draw):
    """Of one to three tensors; dims in any order, some twice; a loss that tells all tensors and columns apart."""
    import train

    rng, generator = source(8000 + draw)
    d, count = rng.randint(4, 8), 1 + draw % 3
    x = [normal(generator, 3, d).requires_grad_() for _ in range(count)]
    weights = [normal(generator, 3, d) for _ in x]
    dims, seen = [rng.randint(1, d) for _ in range(draw + 1)], []

    def loss(*units):
        seen.append([tuple(unit.shape) for unit in units])
        return sum(((u * w[:, :u.shape[1]]).sum(1) ** 3).sum() for u, w in zip(units, weights, strict=True))

    def cut(v, dim):
        return v[:, :dim] / (v[:, :dim] ** 2).sum(1, keepdim=True).sqrt()

    kept = [v.detach().clone() for v in x]
    terms = [loss(*(cut(v, dim) for v in x)) for dim in dims]
    seen.clear()
    ours = train.mrl_loss(loss, tuple(dims), *x)
    assert sorted(seen) == sorted([(3, dim)] * count for dim in dims), \
        f"for the dims {dims} the loss was called with the shapes {seen}"
    check(ours, sum(terms), {
        "normalised before the cut and not again after it":
            sum(loss(*(cut(v, d)[:, :dim] for v in x)) for dim in dims),
        "not normalised at all": sum(loss(*(v[:, :dim] for v in x)) for dim in dims),
        "this is the mean over dims; take the sum": sum(terms) / len(dims),
        "a dim that stands twice counts twice": sum(dict(zip(dims, terms, strict=True)).values())}, drawn=True)
    check_gradients(ours, sum(terms), {f"vectors[{i}]": v for i, v in enumerate(x)})
    assert all(torch.equal(v, old) for v, old in zip(x, kept, strict=True)), CHANGED


# --------------------------------------------------------------------------------------------------
# Classification triples


class Text(str):
    """A text with a hash of its own: what depends on the order of a set depends on the salt."""

    salt = 0

    def __hash__(self):
        return hash((self.salt, str(self)))


def parts(text):
    """A text and its id."""
    assert text.endswith("]") and " [" in text, f"the id goes on all three texts, x- too: {text!r} has none"
    return text[:-1].rsplit(" [", 1)


@pytest.mark.ex3
@pytest.mark.parametrize("draw", range(6))
def test_classification_triples_drawn(draw):
    """Few texts that repeat, in and across labels: a triple where one can be made, and no other."""
    import data

    rng, _ = source(3000 + draw)
    n = rng.randint(4, 12)
    texts = [rng.choice(["a", "A", "b", " b", *"cdefg"][:2 + draw]) for _ in range(n)]
    labels = [" ".join(rng.choice(["", "u v", "u w"]).split()) for _ in range(n)]     # equal ones are no one object
    labels[:2] = ["", "u v"]
    kept, seed = (list(texts), list(labels)), rng.randrange(1000)

    def can_be_made(i):
        mine = {t for t, label in zip(texts, labels, strict=True) if label == labels[i]} - {texts[i]}
        others = {t for t, label in zip(texts, labels, strict=True) if label != labels[i]} - {texts[i]}
        return any(others - {t} for t in mine)

    rows = data.classification_triples(texts, labels, seed)
    wanted = [texts[i] for i in range(n) if can_be_made(i)]
    found = [[parts(t) for t in (r["query"], r["positive"]["text"], r["negative"]["text"])] for r in rows]
    pairs = set(zip(texts, labels, strict=True))
    for (x, i), (pos, j), (neg, k) in found:
        assert i == j == k, "x, x+ and x- must share one id"
        assert len({x, pos, neg}) == 3, f"the three texts of a triple differ: {x, pos, neg}"
        mine = {label for t, label in pairs if t == x}
        assert any((pos, label) in pairs for label in mine), f"x+ must have x's label: {pos!r} for {x!r}"
        others = {label for label in ("", "u v", "u w") if mine != {label}}
        assert any((neg, label) in pairs for label in others), "x- has x's own label"
    assert len({ids[0][1] for ids in found}) == len(found), "an id stands on two triples"
    assert all(r["symmetric"] for r in rows), "rows are symmetric"
    assert [x for (x, _), *_ in found] == wanted, \
        f"{texts} with the labels {labels}: a triple can be made of {wanted} and of no other; yours {found}"
    assert (texts, labels) == kept, CHANGED


@pytest.mark.ex3
def test_classification_draws_anew_for_each_row():
    """Two labels of forty texts each: no two rows need share x+ or x-, and no order of a set decides."""
    import data

    seed = graded_seed(3100)

    def drawn(salt, seed=seed):
        Text.salt = salt
        texts, labels = [Text(f"text {i}") for i in range(80)], ["even", "odd"] * 40
        rows = data.classification_triples(texts, labels, seed, unique_ids=False)
        return [(str(r["query"]), str(r["positive"]["text"]), str(r["negative"]["text"])) for r in rows]

    rows = drawn(1)
    assert [x for x, *_ in rows] == [f"text {i}" for i in range(80)], "a triple for each x, in their order"
    assert min(len({row[k] for row in rows}) for k in (1, 2)) > 25, "x+ and x- are drawn anew for each row"
    numbers = [[int(t.split()[1]) for t in row] for row in rows]
    steps = [Counter((row[k] - row[0]) % 80 for row in numbers).most_common(1)[0][1] for k in (1, 2)]
    assert max(steps) < 20, "x+ and x- stand always at the same distance of x: they must be drawn"
    others = [drawn(1, seed + more) for more in range(1, 3)]
    assert rows != others[0] != others[1] != rows, "another seed gives the same triples"
    assert drawn(2) == rows, "the draw depends on the order of a set or of a dict's hashes, not on the seed alone"


# --------------------------------------------------------------------------------------------------
# Fusion and relabelling


@pytest.mark.ex4
@pytest.mark.parametrize("draw", range(6))
def test_rrf_drawn(draw):
    """One ranking to four, of any length, with ties, given as tuples."""
    import llm

    rng, _ = source(4000 + draw)
    rankings = [tuple(rng.choice([0, -1.5, -2, -7, 3]) for _ in range([1, 2, 5, 9, 20, 40][draw]))
                for _ in range(1 + draw % 4)]
    places = [[1 + sum(t > s or (t == s and j < i) for j, t in enumerate(scores)) for i, s in enumerate(scores)]
              for scores in rankings]
    shared = [[1 + sum(t > s for t in scores) for s in scores] for scores in rankings]
    dense = [[1 + sum(t > s for t in set(scores)) for s in scores] for scores in rankings]
    mean = [[(1 + sum((t > s) + (t >= s) for t in scores)) / 2 for s in scores] for scores in rankings]
    late = [[1 + sum(t > s or (t == s and j > i) for j, t in enumerate(scores)) for i, s in enumerate(scores)]
            for scores in rankings]

    def fused(places, ranking=slice(None)):
        return [sum(1 / r for r in of) for of in zip(*places[ranking], strict=True)]

    check(llm.rrf(*rankings), fused(places), {
        "equal scores share a rank; the first of them comes first, as in `ranks`": fused(shared),
        "equal scores share the mean of their ranks; the first of them comes first": fused(mean),
        "equal scores share a rank, and the next has the next number": fused(dense),
        "of equal scores the last comes first": fused(late),
        "only the first two rankings are in the sum": fused(places, slice(2))}, f"of the scores {rankings}:", True)
    check(llm.rrf(rankings[0], rankings[0]), fused([places[0]] * 2), {
        "two equal rankings count once": fused(places[:1])}, f"of the scores {rankings[0]} twice:", True)
    lists = [list(scores) for scores in rankings]
    llm.rrf(*lists)
    assert list(map(tuple, lists)) == rankings, CHANGED


def relabel_case(draw):
    rng, _ = source(5000 + draw)
    n = [1, 2, 3, 6, 60, 200][draw % 6]
    R = [rng.choice([2.0, 1.9999, 1.25, 0.58, -0.9999, -1.0]) for _ in range(n)]
    texts = [rng.choice(["a", "A", "ab", *"bcdefghijklmnop"][:max(2, n // 2)]) for _ in range(n)]
    answers = [set(), {"a"}, ("b", "c"), frozenset(texts[::2])][draw % 4]
    positive = [None, None, 0, None, n - 1][draw % 5]
    return rng, R, texts, answers, positive


@pytest.mark.ex5
@pytest.mark.parametrize("draw", range(12))
def test_relabel_drawn(draw):
    """Many ties, twins and answers; up to 200 candidates, where a sort that is not stable shows."""
    import llm

    rng, R, texts, answers, positive = relabel_case(draw)
    n = len(R)
    best = max(R)
    p_pos = next(i for i in range(n) if best == R[i]) if positive is None else positive
    may = [i for i in range(n) if texts[i] != texts[p_pos] and texts[i] not in answers]
    last = [i for i in may if R[i] == min(R[j] for j in may)]
    near = last[0] if last else None
    twins = [i for i in range(n) if i != p_pos and texts[i] not in answers]
    by_R = sorted(twins, key=lambda i: -R[i])
    kept = list(R), list(texts)
    what = f"of R = {R}, texts = {texts}, positive = {positive}, answers = {answers}:"
    what = what if n < 10 else f"of {n} candidates:"
    check(llm.relabel(R, texts, positive=positive, answers=answers), (p_pos, last[-1] if last else None), {
        "of equal R the nearer passage is taken for p-": (p_pos, near),
        "p- is the last candidate, not the last by R": (p_pos, may[-1] if may else None),
        "p- has the very text of p+; compare texts, not numbers": (p_pos, by_R[-1] if by_R else None),
        "of equal R the farther passage is taken for p+":
            (max(i for i in range(n) if best == R[i]), last[-1] if last else None)}, what, True)
    check(llm.relabel(R, texts, "none", positive=positive, answers=answers), (p_pos, None), {}, what)
    got = llm.relabel(R, texts, "sampled", rng, positive, answers)
    assert got[0] == p_pos and (got[1] in may if may else got[1] is None), \
        f"{what} sampled {got}, of {may or 'none'} with p+ = {p_pos}"
    assert (R, texts) == kept, CHANGED


@pytest.mark.ex5
@pytest.mark.parametrize("n", [20, 50, 100, 200, 400])
def test_relabel_among_many_ties(n):
    """A sort that is not stable shows among many."""
    import llm

    rng, _ = source(5200 + n)
    R = [0.5, 1.0, *(rng.choice([0.5, 1.0]) for _ in range(n - 2))]
    rng.shuffle(R)
    first, last = R.index(1.0), n - 1 - R[::-1].index(0.5)
    check(llm.relabel(R, list(map(str, range(n)))), (first, last), {
        "of equal R the nearer passage is taken for p-": (first, R.index(0.5)),
        "of equal R the farther passage is taken for p+": (n - 1 - R[::-1].index(1.0), last)},
        f"of {n} candidates, each of R 0.5 or 1:", True)


@pytest.mark.ex5
def test_relabel_samples_evenly():
    """Each of five others is drawn about as often, by one rng that goes on."""
    import llm

    rng, _ = source(5100)
    R, texts = [0.5, 3.0, 0.4, 2.0, 0.3, 1.0], list("abcdef")
    drawn = [llm.relabel(R, texts, "sampled", rng)[1] for _ in range(400)]
    assert len(set(drawn)) > 1, "the same rng always gives the same draw: draw from it, not from a copy or a seed"
    assert 1 not in drawn, "p+ was drawn as its own negative: sample from P without p+"
    counts = [drawn.count(i) for i in (0, 2, 3, 4, 5)]
    assert min(counts) > 40, f"each of the five others is drawn about 80 times of 400, yours {counts}"
    many = [str(i) for i in range(40)]
    drawn = {llm.relabel([-float(i) for i in range(40)], many, "sampled", rng)[1] for _ in range(700)}
    assert drawn == set(range(1, 40)), f"never drawn, of p_2 to p_40: {set(range(1, 40)) - drawn}"
    salted = []
    for Text.salt in (1, 2):
        same = random.Random(0)
        salted.append([llm.relabel(R, list(map(Text, texts)), "sampled", same)[1] for _ in range(20)])
    assert salted[0] == salted[1], "the draw depends on the order of a set of texts, not on rng alone"


# --------------------------------------------------------------------------------------------------
# Query likelihood's span


@pytest.mark.ex6
@pytest.mark.parametrize("draw", range(12))
def test_span_drawn(draw):
    """A prompt that repeats the query; tokens of one to four letters, or of half a one, which spell nothing."""
    from engine.replies import continuation_log_prob

    rng, _ = source(6000 + draw)
    text = " " + "".join(rng.choice("abé東🍵") for _ in range(rng.randint(1, 6)))
    prefix = f"Passage: {text}{text} Query:"

    def tokens_of(s):
        left, tokens = s, []
        while left:
            n = rng.randint(1, 4)
            piece, left = left[:n], left[n:]
            if draw % 3 == 0 and len(piece) == 1 and ord(piece) > 127:
                tokens += [""] * rng.randint(1, 2)
                if rng.random() < 0.5:
                    tokens[-1] = piece                   # some servers spell a character with its last token
            else:
                tokens.append(piece)
        return tokens

    head, query = ["<s>", *tokens_of(prefix)], tokens_of(text)
    values = [None] + [-round(rng.uniform(0.1, 9), 2) for _ in range(len(head) + len(query) - 1)]
    tokens, start = [*head, *query], len(head)
    reply = {"choices": [{"text": prefix + text + "!", "logprobs": {
        "tokens": [*tokens, "!"], "token_logprobs": [*values, -40.0]}}],
        "usage": {"prompt_tokens": len(tokens), "completion_tokens": 1}}
    kept, asked = copy.deepcopy(reply), []

    def head_of(string):
        asked.append(string)
        return list(head)

    def of(start, stop=None):
        return sum(values[start:stop]), len(values[start:stop])

    check(continuation_log_prob(reply, prefix, text, head_of), of(start), {
        "the whole prompt is in the sum": of(1), "the token before the query is in the sum": of(start - 1),
        "the query's first token is left out": of(start + 1),
        "the query's last token is left out": of(start, -1),
        "the token that the server generated is in the sum": (sum(values[start:]) - 40, len(query) + 1),
        "the number of letters is not the number of tokens": (sum(values[start:]), len(text)),
    }, f"of the tokens {tokens}, where the query is {text!r}:", True)
    assert set(asked) <= {prefix}, f"`head` gives the prefix's own tokens; it was asked for {asked}"
    spelled_plainly = "".join(query) == text and head[-1]
    assert not (asked and spelled_plainly), "the tokens spell the query: `head`, a server call, is not needed"
    assert reply == kept, CHANGED


@pytest.mark.ex6
def test_span_of_a_token_that_crosses_the_end():
    """": b" or "  b" belongs to both; what `head` gives is not the beginning of the list, however long it is."""
    from engine.replies import CallFailed, continuation_log_prob

    values = [None, -1.0, -2.0, -4.0, -8.0, -40.0]
    for end in (":", " "):
        tokens = ["<s>", "a", f"{end} b", " c", "d", "!"]
        reply = {"choices": [{"text": f"a{end} b cd!", "logprobs": {"tokens": tokens, "token_logprobs": values}}],
                 "usage": {"prompt_tokens": 5, "completion_tokens": 1}}
        for head in (["<s>", "a", end], ["<s>", "a"], ["<s>", "A", f"{end} b"], ["<s>a", ""], []):
            try:
                score = continuation_log_prob(reply, f"a{end}", " b cd", lambda _, head=head: list(head))
            except CallFailed:
                continue
            assert head == ["<s>", "a"], f"the prefix's own {head} do not begin {tokens}, and yet it has {score}"


# --------------------------------------------------------------------------------------------------
# Gradient caching


@pytest.mark.ex9
@pytest.mark.parametrize("draw", range(4))
def test_cached_backward_drawn(draw, monkeypatch):
    """Texts of any length, one in two rows, rows without a hard negative, micro-batches of any size, bfloat16."""
    import test_scale

    rng, generator = source(9000 + draw)
    B, S = rng.randint(3, 9), 2 + draw % 2
    texts = [[rng.randrange(60) for _ in range(rng.randint(1, 9))] for _ in range(4 * B)]
    ids = torch.tensor([[rng.randrange(4 * B) for _ in range(B)] for _ in range(S)])
    ids[-1, rng.randrange(B)] = -1
    monkeypatch.setattr(test_scale, "TEXTS", texts)
    monkeypatch.setattr(test_scale, "B", B)
    toy, one = test_scale.Toy(), test_scale.Toy()
    weight = normal(generator, S, B, test_scale.D)
    called = []

    def loss(x, rows):
        called.append(tuple(x.shape))
        x = x.detach().requires_grad_()
        value = ((x * weight).sum((0, 2)).cumsum(0) ** 2)[rows].sum() + (x ** 3).sum()
        return value.detach(), torch.autograd.grad(value, x)[0]

    there = (ids.flatten() >= 0).nonzero()[:, 0]
    x = torch.zeros(S * B, test_scale.D, dtype=torch.float64)
    x[there] = torch.stack([one.weight[texts[i]].mean(0) for i in ids.flatten()[there].tolist()])
    wanted, g = loss(x.view(S, B, -1), slice(0, B))
    spec, = torch.autograd.grad(x, one.weight, g.view_as(x))
    called.clear()
    kept = ids.clone()
    value = test_scale.caching(toy, ids, rng.randint(1, 2 * B), loss=loss)
    assert called == [(S, B, test_scale.D)], f"the loss is taken once, of all vectors (S, B, d); yours: {called}"
    check(value, wanted, {"the sign is wrong": -wanted}, "the loss:", True)
    check(toy.weight.grad, spec, {"the gradient is there twice": 2 * spec, "the sign is wrong": -spec,
                                  "no gradient reaches the parameters": 0 * spec},
          "the gradient on the parameters:", True)
    embedded = sum(toy.calls)
    assert embedded <= 2 * len(there), \
        f"{len(there)} texts are embedded twice at most; yours embeds {embedded}"
    assert torch.equal(ids, kept), CHANGED


@pytest.mark.ex9
def test_cached_backward_draws_another_dropout_for_every_process(monkeypatch):
    """Two processes whose generators stand alike: no part of one has the masks of a part of the other."""
    import test_scale

    from engine import scale

    toys = []
    for rank in range(2):
        toys.append(test_scale.Toy(0.4))
        monkeypatch.setattr(scale, "processes", lambda: (rank, 2))
        monkeypatch.setattr(scale, "all_reduce_sum", lambda x: None)
        test_scale.caching(toys[-1], test_scale.ALL_IDS, 3)
    first, second = ([masks[0] for masks in toy.drawn.values()] for toy in toys)
    assert not any(torch.equal(a, b) for a in first for b in second), \
        "two processes share their dropout: derive its seed from rank and number, not from their sum"


# --------------------------------------------------------------------------------------------------
# Exact search


@pytest.mark.ex10
@pytest.mark.parametrize("draw", range(4))
def test_certified_topk_drawn(draw, monkeypatch):
    """Whole numbers, so that ties abound; more queries than one block; few passages or many; any precision."""
    import gecko
    from engine import search

    rng = np.random.default_rng(graded_seed(10_000 + draw))
    Q, P, d = [(1, 5, 3), (1030, 40, 4), (64, 200, 2), (2049, 70, 3)][draw]
    dtype = [np.float32, np.float64, np.float16, np.float32][draw]
    q, p = (rng.integers(-3, 4, (n, d)).astype(dtype) for n in (Q, P))
    k, first, seen = [5, 3, 10, 4][draw], search.candidates, []

    def spy(x, *rest):
        seen.append(len(x))
        return first(x, *rest)

    monkeypatch.setattr(search, "candidates", spy)
    kept = q.copy(), p.copy()
    scores, indices, proven = search.certified_topk(q, p, k)
    want = gecko.nearest(torch.from_numpy(q).float(), torch.from_numpy(p).float(), k)
    check(torch.as_tensor(indices), want[1], {}, "the indices:")
    check(torch.as_tensor(scores), want[0], {}, "the scores:")
    if k == P:
        assert proven.all(), "where every passage is a candidate, all is proven"
    assert max(seen) <= search.ROWS and sum(seen) == Q, \
        f"blocks of at most {search.ROWS} queries, each query in one: yours are {seen}"
    assert (q == kept[0]).all() and (p == kept[1]).all(), CHANGED
