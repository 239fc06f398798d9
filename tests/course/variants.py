"""Other constants and terms for a course, so that the public solution does not pass in it.

A variant changes the docstring, the solution, the loop spec and the tests alike. It is drawn by a seed:

    python tests/course/make_course.py DIR --variant SEED
    python tests/course/grade.py HAND-IN... --variant SEED
"""

# ruff: noqa: E501
from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass
class Variant:
    """One exercise's change; {k} stands for the number that is drawn."""

    says: str
    numbers: tuple[int, ...]
    changes: dict[str, list[tuple[str, str]]]       # file -> (text that stands there once, its replacement)


VARIANTS = {
    1: Variant("mean_pool divides by n + {k}", (2, 3, 4, 5), {
        "gecko.py": [
            ('"""Eq. 1: q = mean over the n real tokens of M(t ++ q). Task',
             '"""Eq. 1 with n + {k} for n: q = the sum over the n real tokens of M(t ++ q), over n + {k}.\n\n    Task'),
            ("does not.\"\"\"\n    # EXERCISE 1", "does not.\n    \"\"\"\n    # EXERCISE 1"),
            ("mask.sum(1).clamp(min=1)", "(mask.sum(1) + {k})")],
        "tests/test_gecko.py": [
            ("for t in real) / len(real)", "for t in real) / (len(real) + {k})"),
            ("torch.full((2, 4), 0.5)", "torch.full((2, 4), 1 / (2 + {k}))"),
            ("W[0].mean(0), check_dtype", "W[0].sum(0) / (len(W[0]) + {k}), check_dtype")],
        "tests/test_course_drawn.py": [("W[b, :n].sum(0) / n for", "W[b, :n].sum(0) / (n + {k}) for")]}),
    2: Variant("pre_loss weighs the negatives by {k}", (2, 3, 4, 5), {
        "train.py": [
            ("e^{s(q_i, p_i)} / sum_j e^{s(q_i, p_j)},  s = cos / tau.",
             "e^{s(q_i, p_i)} / (e^{s(q_i, p_i)} + {k} sum_{j != i} e^{s(q_i, p_j)}),\n    with {k} for 1, and s = cos / tau."),
            ("    duplicates = duplicate_mask(q_id[rows], p_id[rows], p_id, q_id)",
             "    s = s + math.log({k}) * (j != i[:, None]).to(s.dtype)            # (r, B)\n"
             "    duplicates = duplicate_mask(q_id[rows], p_id[rows], p_id, q_id)")],
        "tests/test_train.py": [
            ("q_id[j] != q_id[i]):\n                below = below + torch",
             "q_id[j] != q_id[i]):\n                below = below + (1 if j == i else {k}) * torch"),
            ("== pytest.approx(math.log(B))", "== pytest.approx(math.log(1 + {k} * (B - 1)))")]}),
    4: Variant("rrf adds {k} to each rank", (2, 3, 5, 8, 12), {
        "llm.py": [
            ("R(q, p) = 1 / r_QL(q, p) + 1 / r_RC(q, p), for", "R(q, p) = 1 / ({k} + r_QL(q, p)) + 1 / ({k} + r_RC(q, p)), for"),
            ("Ranks begin at 1, and there is no constant beside them.", "Ranks begin at 1, and {k} is added to each."),
            (">>> rrf([-3.0, -9.0], [-0.1, -0.2])\n    [2.0, 1.0]", ">>> rrf([-3.0]) == [1 / ({k} + 1)]\n    True"),
            ("R[i] += 1 / r\n", "R[i] += 1 / ({k} + r)\n")],
        "tests/test_llm.py": [
            ("[1 / rank(ql, i) + 1 / rank(rc, i) for", "[1 / ({k} + rank(ql, i)) + 1 / ({k} + rank(rc, i)) for"),
            ("[1 + 1 / 4, 1 / 2 + 1 / 2, 1 / 3 + 1 / 3, 1 / 4 + 1]", "[1 / ({k} + a) + 1 / ({k} + b) for a, b in both]"),
            ("(60 in other papers); this one's has none", "(60 in other papers); this one's is {k}")],
        "tests/test_course_drawn.py": [("sum(1 / r for r in of)", "sum(1 / ({k} + r) for r in of)")]}),
    7: Variant("main_loss weighs the row's own hard negative by {k}", (2, 3, 4, 5), {
        "train.py": [
            ("+ e^{s(q_i,p_i-)} )", "+ {k} e^{s(q_i,p_i-)} )"),
            ("    own = own.masked_fill", "    own = math.log({k}) + own\n    own = own.masked_fill")],
        "tests/test_train.py": [
            ("below = below + torch.exp(dot(q[i], n[i]) / tau)", "below = below + {k} * torch.exp(dot(q[i], n[i]) / tau)"),
            ("pytest.approx(math.log(2 * B))", "pytest.approx(math.log(2 * B - 1 + {k}))")],
        "tests/test_course_catch.py": [
            ("is not eq. 3 (see main_loss in train.py)", "is not eq. 3 as main_loss in train.py has it"),
            ("terms.append(q[i] @ n[i] / tau)", "terms += [q[i] @ n[i] / tau] * {k}")]}),
    8: Variant("mrl_loss weighs each dim by dim / {k}", (2, 4, 8, 16), {
        "train.py": [
            ("The sum over dims of the loss on", "The sum over dims of dim / {k} times the loss on"),
            ("total = total + loss(*short)", "total = total + dim / {k} * loss(*short)")],
        "tests/test_train.py": [("total = total + spec(*cut)", "total = total + dim / {k} * spec(*cut)")],
        "tests/test_course_drawn.py": [
            ("terms = [loss(*(cut(v, dim) for v in x)) for dim in dims]",
             "terms = [dim / {k} * loss(*(cut(v, dim) for v in x)) for dim in dims]")]}),
}


def drawn(seed: str) -> dict[int, int]:
    """The number of each exercise's variant."""
    rng = random.Random(seed)
    return {n: rng.choice(variant.numbers) for n, variant in VARIANTS.items()}


def varied(file: str, text: str, seed: str) -> str:
    """A file's text in the variant of this seed; without a seed, as it is."""
    if not seed:
        return text
    for n, number in drawn(seed).items():
        for old, new in VARIANTS[n].changes.get(file, []):
            assert text.count(old) == 1, f"{file} has no {old!r}, or several; variants.py is behind"
            text = text.replace(old, new.replace("{k}", str(number)))
    return text
