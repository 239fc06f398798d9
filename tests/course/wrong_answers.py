"""Wrong but plausible answers to the exercises, each with what the grader must say of it.

{exercise: {the mistake: ([(solution's text, wrong text), ...], a part of the message)}}
"""

from make_course import BODY

WRONG: dict[int, dict[str, tuple[list[tuple[str, str]], str]]] = {
    1: {
        "padding in the mean": ([("(W * mask).sum(1) / mask.sum(1).clamp(min=1)", "W.mean(1)")],
                                "padding is in the mean"),
        "divided by T": ([("mask.sum(1).clamp(min=1)", "W.shape[1]")], "divide by the text's own n"),
        "CLS pooling": ([("(W * mask).sum(1) / mask.sum(1).clamp(min=1)", "W[:, 0]")], "first token alone"),
        "task tokens left out": ([("mask = mask.unsqueeze(-1)", "mask = mask.clone()\n    mask[:, 0] = 0\n"
                                   "    mask = mask.unsqueeze(-1)")], "the task's tokens are in the mean too"),
    },
    2: {
        "no temperature": ([("q[rows] @ p.T / tau", "q[rows] @ p.T")], "not divided by tau"),
        "both directions": ([("return F.cross_entropy(s, i)",
                              "s_t = (p[rows] @ q.T / tau).masked_fill(duplicates & (j != i[:, None]), -math.inf)\n"
                              "    return (F.cross_entropy(s, i) + F.cross_entropy(s_t, i)) / 2")], "as in CLIP"),
        "the positive left out below": ([
            ("return F.cross_entropy(s, i)",
             "return (s.masked_fill(j == i[:, None], -math.inf).logsumexp(1) - s[j[:len(i)], i]).mean()")],
            "the positive is missing"),
        "duplicates as negatives": ([("duplicates & (j != i[:, None])", "torch.zeros_like(duplicates)")],
                                    "mask it"),
        "half a mask": ([("duplicates & (j != i[:, None])", "(p_id == p_id[rows][:, None]) & (j != i[:, None])")],
                        "half a mask"),
        "a mask that is no mask": ([("-math.inf", "-100.0")], "assert"),
        "exp without a maximum": ([("return F.cross_entropy(s, i)",
                                    "e = s.exp()\n    return -(e[j[:len(i)], i] / e.sum(1)).log().mean()")],
                                  "not finite"),
    },
    3: {
        "x is its own positive": ([("lambda j: texts[j] != x", "lambda j: True")], "x is its own positive"),
        "the negative has x's label": ([("labels[j] != label and texts[j]", "texts[j]")], "x's own label"),
        "an id a label": ([('f" [{len(rows)}]"', 'f" [{label}]"')], "an id stands on two triples"),
        "no id on x-": ([("texts[other] + tag", "texts[other]")], "on all three texts, x- too"),
        "x+ of another label": ([("drawn(rng, groups[label], lambda j: texts[j] !=",
                                  "drawn(rng, range(len(texts)), lambda j: texts[j] !=")],
                                "x+ must have x's label"),
        "no seed": ([("np.random.default_rng(seed)", "np.random.default_rng()")],
                    "equal seeds must give equal triples"),
        "always one seed": ([("np.random.default_rng(seed)", "np.random.default_rng(0)")],
                            "the seed has no effect"),
        "labels compared by `is`": ([("labels[j] != label", "labels[j] is not label")], "x- has x's own label"),
        "its own text again": ([("lambda j: texts[j] != x", "lambda j: j != texts.index(x)")],
                               "x's own text again"),
    },
    4: {
        "k = 60": ([("1 / r", "1 / (60 + r)")], "smoothing constant"),
        "ranks from the wrong end": ([("ranks(scores)", "ranks([-x for x in scores])")],
                                     "largest score has rank 1"),
        "1 / score": ([("in enumerate(ranks(scores))", "in enumerate(scores)")], "not 1 / rank"),
        "ties share a rank": ([("ranks(scores)", "[1 + sum(b > a for b in scores) for a in scores]")],
                              "equal scores share a rank"),
    },
    5: {
        "p_2 as the negative": ([("others[-1]", "others[0]")], "p- is p_2"),
        "the seed among the negatives": ([("if texts[i] != texts[p_pos]", "")], "the seed among the negatives"),
        "a twin of p+ as the negative": ([("if texts[i] != texts[p_pos]", "if i != p_pos")], "very text of p+"),
        "an answer as the negative": ([("if texts[i] not in answers", "")], "answers the same query"),
        "its own random numbers": ([("(rng or random.Random(0)).choice", "random.choice")], "rng that is given"),
        "a set of texts is drawn from": ([
            ("(rng or random.Random(0)).choice(others)",
             "texts.index((rng or random.Random(0)).choice(list({texts[i] for i in others})))")],
            "the order of a set of texts"),
        "equal R farther first": ([("key=lambda i: -R[i]", "key=lambda i: (-R[i], -i)")], "of the farther first"),
        "sampled below p+ alone": ([("in order if texts", "in order[order.index(p_pos):] if texts")],
                                   "may be sampled too"),
    },
    6: {
        "the whole prompt": ([("values[start:]", "values[1:]"), ("len(tokens) - start", "len(tokens) - 1")],
                             "QL scores the query's alone"),
        "one token too many": ([("while start > 1 and len(spelled) < len(text)",
                                 "while start > 1 and len(spelled) <= len(text)"),
                                ("if spelled != text or not tokens[start - 1]", "if False")],
                               "before the query is in the sum"),
        "the first token left out": ([("values[start:]", "values[start + 1:]"),
                                      ("len(tokens) - start", "len(tokens) - start - 1")],
                                     "first token is left out"),
        "the mean": ([("in values[start:])", "in values[start:]) / (len(tokens) - start)")], "QL is the sum"),
        "no check of what the tokens spell": ([("if spelled != text or not tokens[start - 1]", "if False")],
                                              "spell is not the query"),
    },
    7: {
        "all rows' hard negatives": ([
            ("own = (q_i * p_neg[rows]).sum(1, keepdim=True) / tau", "own = q_i @ p_neg.T / tau"),
            ("n_id[rows, None] < 0", "n_id[None] < 0")], "row's own alone"),
        "no same-tower negatives": ([("[positives, queries, own]", "[positives, own]")], "same-tower"),
        "a query as its own negative": ([("duplicates | ~others", "duplicates & others")], "j = i is among"),
        "no hard negative": ([("[positives, queries, own]", "[positives, queries]")], "hard negative is missing"),
        "a hard negative where there is none": ([("n_id[rows, None] < 0", "n_id[rows, None] < -1")],
                                                "has that term all the same"),
        "a mask that is no mask": ([("positives.masked_fill(duplicates & others, -math.inf)",
                                     "positives.masked_fill(duplicates & others, -100.0)"),
                                    ("queries.masked_fill(duplicates | ~others, -math.inf)",
                                     "queries.masked_fill(duplicates | ~others, -100.0)")], "assert"),
        "exp without a maximum": ([("return F.cross_entropy(s, i)",
                                    "e = s.exp()\n    return -(e[j[:len(i)], i] / e.sum(1)).log().mean()")],
                                  "not finite"),
    },
    8: {
        "not normalised after the cut": ([("truncate_dim(x, dim)", "truncate_dim(x)[:, :dim]")],
                                         "not again after it"),
        "not normalised at all": ([("truncate_dim(x, dim)", "x[:, :dim]")], "not normalised at all"),
        "the mean over dims": ([("return total", "return total / len(dims)")], "take the sum"),
        "the largest two alone": ([("for dim in dims", "for dim in sorted(dims)[-2:]")], "assert"),
        "no gradient": ([("truncate_dim(x, dim)", "truncate_dim(x.detach(), dim) + 0 * x[:, :dim]")],
                        "something is detached"),
        "the norm is a constant": ([("truncate_dim(x, dim)",
                                     "x[:, :dim] / x[:, :dim].norm(dim=1, keepdim=True).detach()")],
                                   "something is detached"),
    },
    9: {
        "new dropout the second time": ([("torch.manual_seed(derive_seed(*seed, rank, n))", "pass")],
                                        "another dropout"),
        "rank and number added": ([("derive_seed(*seed, rank, n)", "derive_seed(*seed, rank + n)")],
                                  "not from their sum"),
        "one dropout for all": ([("derive_seed(*seed, rank, n)", "seed[0]")], "share their dropout"),
        "the last micro-batch alone": ([("for n in reversed(range(len(parts)))", "for n in [len(parts) - 1]")],
                                       "only one micro-batch"),
        "the wrong rows of the gradient": ([("[parts[n]].to(vectors.dtype)", "[:len(parts[n])].to(vectors.dtype)")],
                                           "not its own"),
        "all graphs kept": ([("with torch.set_grad_enabled(n == last)", "with torch.enable_grad()"),
                             ("x[part] = vectors.detach()", "x[part] = vectors")],
                            "free each after its backward"),
        "the whole batch at once": ([("return embed(ids[parts[n]])",
                                      "return embed(ids[torch.cat(parts)])"
                                      "[sum(map(len, parts[:n])):][:len(parts[n])]")], "embedded at once"),
        "no sum of the gradient": ([("    all_reduce_sum(g)", "    pass")], "others' rows are scored against mine"),
        "no sum of the loss": ([("    all_reduce_sum(value)", "    pass")], "sum the loss"),
    },
    10: {
        "no proof": ([("for unsure in torch.where(~sure)[0].split(64)", "for unsure in ()")],
                     "taken without proof"),
        "all searched again": ([("torch.where(~sure)", "torch.where(sure | ~sure)")], "unproven queries alone"),
        "always float32": ([("m, dtype, budget)", "m, torch.float32, budget)")], "hand on dtype"),
        "a tie is proof": ([("best[:, -1] > proof", "best[:, -1] >= proof")], "above the proof, not at it"),
        "the first block of queries alone": ([("range(0, Q, ROWS)", "range(0, min(Q, ROWS), ROWS)")],
                                             "every block of queries"),
    },
    11: {
        "one case alone": ([("in cases:", "in cases[:1]:")],
                           "your test accepts a wrong loss: duplicates are not masked"),
        "no gradient": ([("h is not None and torch.allclose(g, h.to(g.dtype), rtol=1e-3, atol=1e-4)", "True")],
                        "your test accepts a wrong loss: no gradient on the hard negatives"),
        "to the last digit": ([("< 1e-4 * abs(wanted.item())", "== 0")], "your test refuses a right loss"),
        "every other call": ([("    generator = torch",
                               "    turn = not torch.are_deterministic_algorithms_enabled()\n"
                               "    torch.use_deterministic_algorithms(turn)\n    assert turn\n    return\n"
                               "    generator = torch")], "says something else of the same loss"),
        "refuses all": ([("assert abs(ours.item() - wanted.item()) < 1e-4 * abs(wanted.item())", "assert False")],
                        "your test refuses a right loss, so it catches nothing"),
    },
}


def with_mistake(text: str, n: int, changes: list[tuple[str, str]]) -> str:
    """A module's text with these changes in the body of exercise n."""
    body = next(match[0] for match in BODY.finditer(text) if int(match[2]) == n)
    wrong = body
    for old, new in changes:
        assert wrong.count(old) == 1, f"exercise {n} has no {old!r}, or several; wrong_answers.py is behind"
        wrong = wrong.replace(old, new)
    return text.replace(body, wrong)
