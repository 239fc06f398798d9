"""More wrong answers, and right ones of another style, for the longer check: python tests/course/self_check.py

{exercise: {what it is: the body, or changes of the solution's body as in wrong_answers.py}}
"""

# ruff: noqa: E501
from __future__ import annotations

import re
from pathlib import Path

Answer = str | list[tuple[str, str]]

MORE_WRONG: dict[int, dict[str, Answer]] = {
    1: {
        "the largest": "return W.masked_fill(mask[..., None] == 0, -9e9).amax(1)",
        "a sum": [(" / mask.sum(1).clamp(min=1)", "")],
        "one n for all": "return (W * mask[..., None]).sum(1) / mask.sum() * len(W)",
        "values that are not 0 are counted": "W = W * mask[..., None]\nreturn W.sum(1) / (W != 0).sum(1).clamp(min=1)",
        "no gradient": [("(W * mask)", "(W.detach() * mask)")],
        "n is at least 2": [("clamp(min=1)", "clamp(min=2)")],
        "divided by the root of n": [("mask.sum(1).clamp(min=1)", "mask.sum(1).sqrt()")],
        "the last token": "return W[torch.arange(len(W)), mask.sum(1) - 1]",
        "padding's numbers above": [("(W * mask).sum(1)", "W.sum(1)")],
        "in numpy": "m = mask.numpy()[..., None]\nreturn torch.from_numpy((W.detach().numpy() * m).sum(1) / m.sum(1))",
        "one more": [("mask.sum(1).clamp(min=1)", "(mask.sum(1) + 1)")],
        "one less": [("mask.sum(1).clamp(min=1)", "(mask.sum(1) - 1).clamp(min=1)")],
        "normalised": [("return (W * mask).sum(1) / mask.sum(1).clamp(min=1)",
                        "return F.normalize((W * mask).sum(1), dim=1)")],
        "W is changed": "W = W.detach().mul_(mask[..., None]) + 0 * W\n"
                        "return W.sum(1) / mask.sum(1, keepdim=True)",
        "the batch's mean": "return (W * mask[..., None]).sum(1) / mask.float().sum(1).mean()",
        "bfloat16": "return ((W * mask[..., None]).bfloat16().sum(1) / mask.sum(1, keepdim=True)).to(W.dtype)",
        "n in bfloat16": "m = mask.unsqueeze(-1).to(W.dtype)\n"
            "return (W * m).sum(1) / mask.bfloat16().sum(1, keepdim=True).to(W.dtype).clamp(min=1)",
        "view alone": "B, T, d = W.shape\n"
            "flat = W.view(B * T, d) * mask.view(B * T, 1)\n"
            "return flat.view(B, T, d).sum(1) / mask.sum(1, keepdim=True)",
        "uint8 count": "m = mask.unsqueeze(-1).to(torch.uint8)\n"
            "n = m.sum(1, dtype=torch.uint8)\n"
            "return (W * m).sum(1) / n",
        "unit tokens": [("(W * mask).sum(1)", "(F.normalize(W, dim=-1) * mask).sum(1)")],
        "squeezed": [("return (W * mask).sum(1) / mask.sum(1).clamp(min=1)", "return ((W * mask).sum(1) / mask.sum(1).clamp(min=1)).squeeze()")],
        "mean of halves": "m = mask.unsqueeze(-1).to(W.dtype)\n"
            "a = (W * m).sum(1) / m.sum(1)\n"
            "return (a + a.detach()) / 2",
    },
    2: {
        'some rows against themselves alone': [('    s = q[rows] @', '    q, p, q_id, p_id = q[rows], p[rows], q_id[rows], p_id[rows]\n    i = j = torch.arange(len(q), device=q.device)\n    rows = ALL\n    s = q[rows] @')],
        'a sum over rows': [('F.cross_entropy(s, i)', "F.cross_entropy(s, i, reduction='sum')")],
        'softmax over queries': [('q[rows] @ p.T / tau', 'p[rows] @ q.T / tau')],
        "a mask of 0": [("-math.inf", "0.0")],
        "a mask of -10": [("-math.inf", "-10.0")],
        "the diagonal masked": [("duplicates & (j != i[:, None])", "duplicates")],
        "equal queries alone": [("duplicates & (j != i[:, None])", "(q_id == q_id[rows][:, None]) & (j != i[:, None])")],
        "equal positives alone, crossed": [("duplicates & (j != i[:, None])",
                                            "((p_id == p_id[rows][:, None]) | (q_id == q_id[rows][:, None]))"
                                            " & (j != i[:, None])")],
        "rows not looked at": [("i = j[rows]", "i = j\n    rows = ALL")],
        "labels from 0": [("return F.cross_entropy(s, i)", "return F.cross_entropy(s, torch.arange(len(s)))")],
        "over B": [("return F.cross_entropy(s, i)", "return F.cross_entropy(s, i, reduction='sum') / len(q)")],
        "p without gradient": [("p.T", "p.detach().T")],
        "q without gradient": [("q[rows] @", "q[rows].detach() @")],
        "tau twice": [("/ tau", "/ tau / tau")],
        "times tau": [("/ tau", "* tau")],
        "one maximum for all rows": [("return F.cross_entropy(s, i)",
                                      "e = (s - s[s.isfinite()].max()).exp()\n"
                                      "    return -(e[torch.arange(len(i)), i] / e.sum(1)).log().mean()")],
        "a floor under the log": [("return F.cross_entropy(s, i)",
                                   "e = s.softmax(1)[torch.arange(len(i)), i]\n    return -(e + 1e-8).log().mean()")],
        "smoothed labels": [("F.cross_entropy(s, i)", "F.cross_entropy(s.clamp(min=-1e4), i, label_smoothing=0.01)")],
        "squared distance": [("q[rows] @ p.T / tau", "-((q[rows, None] - p) ** 2).sum(-1) / tau")],
        "own query's text is not masked": [("duplicates & (j != i[:, None])",
                                            "((p_id == p_id[rows][:, None]) | (q_id == q_id[rows][:, None]))"
                                            " & (j != i[:, None])")],
        "duplicates leave the row out": [("return F.cross_entropy(s, i)",
                                          "one = (duplicates.sum(1) == 1)\n    return F.cross_entropy(s[one], i[one])")],
        "the median": [("return F.cross_entropy(s, i)", "return F.cross_entropy(s, i, reduction='none').median()")],
        "duplicates among the rows alone": [("    s = s.masked_fill",
                                             "    inside = torch.zeros_like(duplicates)\n    inside[:, rows] = True\n"
                                             "    duplicates = duplicates & inside\n    s = s.masked_fill")],
        "negatives among the rows alone": [("duplicates & (j != i[:, None])",
                                            "(duplicates | ~torch.isin(j, i)) & (j != i[:, None])")],
        "numpy": [("return F.cross_entropy(s, i)",
                   "s = s.detach().numpy()\n    e = np.exp(s - s.max(1, keepdims=True))\n"
                   "    return torch.tensor(-np.log(e[np.arange(len(s)), i] / e.sum(1)).mean())"),
                  ("j = torch", "import numpy as np\n    j = torch")],
        "the positive weighs double": [("return F.cross_entropy(s, i)",
                                        "s[torch.arange(len(i)), i] += math.log(2)\n    return F.cross_entropy(s, i)")],
        "both towers": [("return F.cross_entropy(s, i)",
                         "t = (q[rows] @ q.T / tau).masked_fill(j == i[:, None], -math.inf)\n"
                         "    return F.cross_entropy(torch.cat([s, t], 1), i)")],
        "ids in float32": [("duplicate_mask(q_id[rows], p_id[rows], p_id, q_id)", "duplicate_mask(q_id[rows].float(), p_id[rows].float(), p_id.float(), q_id.float())")],
        "ids in int8": [("duplicate_mask(q_id[rows], p_id[rows], p_id, q_id)", "duplicate_mask(q_id[rows].char(), p_id[rows].char(), p_id.char(), q_id.char())")],
        "positive masked where its text is the query's": [("duplicates & (j != i[:, None])", "duplicates & ((j != i[:, None]) | (q_id == p_id))")],
        "mean over rows that have a negative": [("return F.cross_entropy(s, i)", "one = F.cross_entropy(s, i, reduction='none')\n    some = s.isfinite().sum(1) > 1\n    return one[some].mean() if some.any() else 0 * one.sum()")],
        "scores clamped": [("q[rows] @ p.T / tau", "(q[rows] @ p.T / tau).clamp(-50, 50)")],
        "half precision scores": [("q[rows] @ p.T / tau", "(q[rows].half() @ p.T.half() / tau).to(q.dtype)")],
        "weighted by duplicates": [("return F.cross_entropy(s, i)", "w = 1.0 / duplicates.sum(1)\n    return (F.cross_entropy(s, i, reduction='none') * w).sum() / w.sum()")],
        "gradient through the top row": [("return F.cross_entropy(s, i)", "top = s.amax(1, keepdim=True)\n    return -((s - top)[torch.arange(len(i)), i] - (s - top.detach()).exp().sum(1).log()).mean()")],
    },
    3: {
        'the first x+': [('text_only(texts[same] + tag)', 'text_only(next(texts[j] for j in groups[label] if texts[j] != x) + tag)')],
        'another task': [('record(task, x', 'record("classification", x')],
        'an id on x- alone': [('texts[other] + tag', 'texts[other] + f" [{len(rows)}]"')],
        'an id a text': [('texts[same] + tag', 'texts[same] + f" [{len(rows) + 1}]"')],
        "the next candidate": [
            ("drawn(rng, groups[label], lambda j: texts[j] != x)", "next((j for j in groups[label] if texts[j] != x), None)")],
        "the next x-": [("return drawn(rng, range(len(texts)),\n                     lambda j: labels[j] != label and "
                         "texts[j] not in (x, positive))",
                         "return next((j for j in range(len(texts)) if labels[j] != label"
                         " and texts[j] not in (x, positive)), None)")],
        "reseeded for each row": [("        same = drawn(rng, groups[label], lambda j: texts[j] != x)",
                                   "        rng = np.random.default_rng(seed)\n"
                                   "        same = drawn(rng, groups[label], lambda j: texts[j] != x)")],
        "the global generator": [("np.random.default_rng(seed)", "np.random.default_rng(random.randrange(9))"),
                                 ("    groups:", "    import random\n    groups:")],
        "seed + 1 is seed": [("default_rng(seed)", "default_rng(seed // 2)")],
        "not symmetric": [(", symmetric=True", "")],
        "ids always": [('if unique_ids else ""', 'if True else ""')],
        "ids never": [('f" [{len(rows)}]" if unique_ids else ""', '""')],
        "an id on x alone": [("texts[same] + tag", "texts[same]"), ("texts[other] + tag", "texts[other]")],
        "x without its id": [("x + tag", "x")],
        "no try of another x+": [("        if other is None:\n", "        if other is None and False:\n")],
        "no error for one label": [("if len(groups) < 2", "if len(groups) < 1")],
        "another error": [("raise InputError", "raise KeyError")],
        "x- may be x+'s text": [("texts[j] not in (x, positive)", "texts[j] != x")],
        "x- may be x's text": [("texts[j] not in (x, positive)", "texts[j] != positive")],
        "a row for x of no x+": [("            continue                                                 # x alone with its label",
                                  "            same = texts.index(x)")],
        "other label is the next": [("labels[j] != label", "labels[j] == (sorted(groups)[(sorted(groups).index(label) + 1)"
                                     " % len(groups)])")],
        "title none": [("text_only(texts[same] + tag)", '{"title": "none", "text": texts[same] + tag}')],
        "the order of a set": [("for x, label in zip(texts, labels, strict=True):",
                                "pool = list(set(texts))\n    for x, label in zip(texts, labels, strict=True):"),
                               ("range(len(texts)),\n", "[texts.index(t) for t in pool],\n")],
        "each text once": [("for x, label in zip(texts, labels, strict=True)",
                            "for x, label in dict(zip(texts, labels, strict=True)).items()")],
        "shuffled rows": [("    return rows", "    rng.shuffle(rows)\n    return rows")],
        "the neighbour by the seed": [("drawn(rng, groups[label], lambda j: texts[j] != x)",
                                       "next((j for j in [(texts.index(x) + seed + k) % len(texts) for k in range(1, len(texts))]"
                                       " if labels[j] == label and texts[j] != x), None)")],
        "truthy labels": [("labels[j] != label", "labels[j] and labels[j] != label")],
        "one draw a label": [("    for x, label in zip(texts, labels, strict=True):\n",
                              "    picks = {}\n    for x, label in zip(texts, labels, strict=True):\n"),
                             ("        if same is None:\n", "        if same is not None and texts[picks.setdefault(label, same)] != x:\n"
                              "            same = picks[label]\n        if same is None:\n")],
        "texts are sorted in place": [("    groups: dict", "    both = sorted(zip(texts, labels))\n    for i, (t, k) in enumerate(both):\n"
                                       "        texts[i], labels[i] = t, k\n    groups: dict")],
        "the index, twice where a text stands twice": [('f" [{len(rows)}]"', 'f" [{texts.index(x)}]"')],
        "dropped where the text was seen": [("        if same is None:\n", "        if any(r['query'].split(' [')[0] == x for r in rows):\n"
                                             "            continue\n        if same is None:\n")],
        "x+ after x first": [("drawn(rng, groups[label], lambda j: texts[j] != x)", "drawn(rng, [j for j in groups[label] if j > texts.index(x)] or groups[label], lambda j: texts[j] != x)")],
        "x- after x first": [("return drawn(rng, range(len(texts)),", "return drawn(rng, range(texts.index(x), len(texts)) if any(labels[j] != label and texts[j] not in (x, positive) for j in range(texts.index(x), len(texts))) else range(len(texts)),")],
        "x- of the first texts": [("return drawn(rng, range(len(texts)),", "return drawn(rng, range(min(len(texts), 50)) if len(texts) > 79 else range(len(texts)),")],
        "case ignored": [("texts[j] not in (x, positive)", "texts[j].lower() not in (x.lower(), positive.lower())")],
        "texts stripped": [("for x, label in zip(texts, labels, strict=True):", "for x, label in zip([t.strip() for t in texts], labels, strict=True):")],
        "one label is no error": "if len(labels) < 2:\n"
            "    raise InputError('at least two labels')\n"
            "rng = np.random.default_rng(seed)\n"
            "rows = []\n"
            "for x, l in zip(texts, labels):\n"
            "    pairs = [(a, b) for a, k in zip(texts, labels) for b, m in zip(texts, labels) if k == l != m and len({x, a, b}) == 3]\n"
            "    if pairs:\n"
            "        a, b = pairs[rng.integers(len(pairs))]\n"
            "        tag = f' [{len(rows)}]' if unique_ids else ''\n"
            "        rows.append(record(task, x + tag, text_only(a + tag), text_only(b + tag), symmetric=True))\n"
            "return rows",
        "pairs popped": [("        tag =", "        groups[label] = [j for j in groups[label] if j != same] or groups[label]\n        tag =")],
    },
    4: {
        '1 / mean rank': [('+= 1 / r', '+= r'), ('return R', 'return [2 / r for r in R]')],
        'mean rank': [('1 / r', 'r / len(rankings)')],
        'scores added': [('in enumerate(ranks(scores))', 'in enumerate(scores)'), ('1 / r', 'r')],
        "products": "R = [1.0] * len(rankings[0])\nfor s in rankings:\n    for i, r in enumerate(ranks(s)):\n        R[i] /= r\nreturn R",
        "the first two alone": [("for scores in rankings", "for scores in rankings[:2]")],
        "the first alone": [("for scores in rankings", "for scores in rankings[:1]")],
        "a mean": [("return R", "return [r / len(rankings) for r in R]")],
        "ties farther first": [("ranks(scores)", "[1 + sum(b > a or (b == a and j > i) for j, b in enumerate(scores))"
                                " for i, a in enumerate(scores)]")],
        "from 0": [("1 / r", "1 / max(r - 1, 1)")],
        "dense ranks": [("ranks(scores)", "[1 + sum(b > a for b in set(scores)) for a in scores]")],
        "squared": [("1 / r", "1 / r ** 2")],
        "a mean of tied ranks": [("ranks(scores)", "[(1 + sum(b > a for b in scores) + sum(b >= a for b in scores)) / 2"
                                  " for a in scores]")],
        "order for ranks": [("ranks(scores)", "[i + 1 for i in sorted(range(len(scores)), key=lambda i: -scores[i])]")],
        "sorted in place": [
            ("    for scores in rankings:", "    for s in rankings:\n        s == 0 or isinstance(s, list) and s.sort()\n"
             "    for scores in rankings:")],
        "rounded": [("return R", "return [round(r, 2) for r in R]")],
        "max": [("R[i] += 1 / r", "R[i] = max(R[i], 1 / r)")],
        "best first": [("return R", "return sorted(R, reverse=True)")],
        "unstable argsort": "import numpy as np\nR = np.zeros(len(rankings[0]))\nfor s in rankings:\n"
                            "    order = np.argsort(np.array(s))[::-1]\n    R[order] += 1 / np.arange(1, len(s) + 1)\nreturn R.tolist()",
        "float16": [("return R", "import numpy as np\n    return np.array(R, np.float16).astype(float).tolist()")],
        "a dict by score": "R = [0.0] * len(rankings[0])\n"
            "for s in rankings:\n"
            "    place = {v: k for k, v in enumerate(sorted(s, reverse=True), 1)}\n"
            "    for i, v in enumerate(s):\n"
            "        R[i] += 1 / place[v]\n"
            "return R",
        "zero scores skipped": [("R[i] += 1 / r", "R[i] += 1 / r if scores[i] else 0")],
        "equal rankings counted once": [("for scores in rankings", "for scores in dict.fromkeys(map(tuple, rankings))")],
        "normalised": [("return R", "return [r / max(R) for r in R]")],
    },
    5: {
        'the smallest R': [('-R[i]', 'R[i]')],
        'p+ may be sampled': [('.choice(others)', '.choice(order)')],
        'the last candidate, unsorted': [('for i in order if', 'for i in range(len(R)) if')],
        "argsort reversed": [("sorted(range(len(R)), key=lambda i: -R[i])", "sorted(range(len(R)), key=lambda i: R[i])[::-1]")],
        "numpy's argsort": "import numpy as np\norder = [int(i) for i in np.argsort(-np.array(R))]\n"
                           "p_pos = order[0] if positive is None else positive\n"
                           "others = [i for i in order if texts[i] != texts[p_pos] and texts[i] not in answers]\n"
                           "if negative == 'none' or not others:\n    return p_pos, None\n"
                           "if negative == 'last':\n    return p_pos, others[-1]\nreturn p_pos, rng.choice(others)",
        "positive is not looked at": [("order[0] if positive is None else positive", "order[0]")],
        "positive 0 is none": [("order[0] if positive is None else positive", "positive or order[0]")],
        "answers by p+ alone": [
            ("if texts[i] not in answers", "if i not in answers")],
        "none is last": [('negative == "none" or not others', "not others")],
        "sampled is last": [("(rng or random.Random(0)).choice(others)", "others[-1]")],
        "the first of others where sampled": [("(rng or random.Random(0)).choice(others)", "others[0]")],
        "a generator of its own": [("(rng or random.Random(0))", "random.Random(0)")],
        "a copy of rng": [("(rng or random.Random(0)).choice(others)", "copy.copy(rng).choice(others)"),
                          ("    order =", "    import copy\n    order =")],
        "p_seed is sampled": [("(rng or random.Random(0)).choice(others)", "(rng or random.Random(0)).choice([i for i in order if i != p_pos])")],
        "half of the others": [("(rng or random.Random(0)).choice(others)", "(rng or random.Random(0)).choice(others[len(others) // 2:])")],
        "mostly the last": [("(rng or random.Random(0)).choice(others)",
                             "(rng or random.Random(0)).choice(others + 9 * others[-1:])")],
        "those after p+ in P": [("[i for i in order if texts", "[i for i in order if i > p_pos and texts")],
        "p+ where there is no other": [('    if negative == "none"', '    others = others or [p_pos]\n    if negative == "none"')],
        "no p- for p_seed": [("not others:", "not others or positive is not None:")],
        "the smallest index of the worst": [("others[-1]", "min(i for i in others if R[i] == R[others[-1]])")],
        "p+ must not be an answer": [("order[0] if positive is None else positive",
                                      "next((i for i in order if texts[i] not in answers), order[0])"
                                      " if positive is None else positive")],
        "texts are not looked at": [("texts[i] != texts[p_pos]", "i != p_pos")],
        "the last index": [("others[-1]", "max(others)")],
        "R is sorted": [("    p_pos =", "    R.sort(reverse=True) if isinstance(R, list) else None\n    p_pos =")],
        "an error where none is left": [("or not others", "")],
        "twins of the worst": [("others[-1]", "next(i for i in others if texts[i] == texts[others[-1]])")],
        "R rounded": [("key=lambda i: -R[i]", "key=lambda i: -round(R[i], 2)")],
        "R in float16": "import numpy as np\n"
            "order = np.argsort(-np.array(R, np.float16), kind='stable')\n"
            "p_pos = int(order[0]) if positive is None else positive\n"
            "others = [int(i) for i in order if texts[i] != texts[p_pos] and texts[i] not in answers]\n"
            "if negative == 'none' or not others:\n"
            "    return p_pos, None\n"
            "if negative == 'last':\n"
            "    return p_pos, others[-1]\n"
            "return p_pos, rng.choice(others)",
        "answers by substring": [("if texts[i] not in answers", "if not any(a in texts[i] for a in answers)")],
        "texts without case": [("texts[i] != texts[p_pos]", "texts[i].lower() != texts[p_pos].lower()")],
        "sampled among the top ten": [("(rng or random.Random(0)).choice(others)", "(rng or random.Random(0)).choice(others[:10])")],
        "sampled among the last ten": [("(rng or random.Random(0)).choice(others)", "(rng or random.Random(0)).choice(others[-10:])")],
        "answers only for last": [("others = [i for i in others if texts[i] not in answers]", "others = [i for i in others if negative == 'sampled' or texts[i] not in answers]")],
        "rng of hash": [("(rng or random.Random(0)).choice(others)", "others[hash(str(R)) % len(others)]")],
        "rng from state": [("(rng or random.Random(0)).choice(others)", "random.Random(str(rng.getstate())).choice(others)")],
    },
    6: {
        "not 0 < start": [("not 0 < start < len(tokens) or ", "")],
        "the end is not checked": [("not 0 < start < len(tokens) or", "not 0 < start or")],
        "head is not compared": [(" or tokens[:start] != alone", "")],
        "always head": [("if spelled != text or not tokens[start - 1]", "if True")],
        "never head": "start, spelled = len(tokens), ''\nwhile start > 1 and len(spelled) < len(text):\n    start -= 1\n"
                      "    spelled = tokens[start] + spelled\nif spelled != text:\n    raise CallFailed(f'a token crosses the prompt's end')\n"
                      "return math.fsum(map(log_prob, values[start:])), len(tokens) - start".replace("prompt's", "prompts"),
        "the text's head": [("head(prefix)", "head(prefix + text)")],
        "empty tokens before are passed over": [(" or not tokens[start - 1]", "")],
        "values are not checked": [("log_prob(value) for value in", "value for value in")],
        "missing values are 0": [("log_prob(value) for value in values[start:]", "log_prob(value or 0.0) for value in values[start:]")],
        "letters are counted": [("len(tokens) - start\n", "len(text)\n")],
        "another error": [("raise CallFailed(", "raise KeyError(")],
        "found from the left": "whole, places = '', []\nfor t in tokens:\n    places.append(len(whole))\n    whole += t\n"
                               "start = places.index(whole.index(text)) if whole.index(text) in places else len(list(head(prefix)))\n"
                               "return math.fsum(log_prob(v) for v in values[start:]), len(tokens) - start",
        "by letters": "start, place = 0, 0\nwhile place < len(prefix):\n    place += len(tokens[start])\n    start += 1\n"
                      "return math.fsum(log_prob(v) for v in values[start:]), len(tokens) - start",
        "the last token left out": [("in values[start:])", "in values[start:-1])")],
        "the number of all": [("len(tokens) - start\n", "len(tokens)\n")],
        "empty tokens left out": [("in values[start:])", "in [v for v, t in zip(values[start:], tokens[start:]) if t])")],
        "perplexity": [("math.fsum(", "math.exp(-1) * math.fsum(")],
        "a minus": [("return math.fsum(", "return -math.fsum(")],
        "as many tokens as head alone": [("if spelled != text or not tokens[start - 1]:\n        alone = list(head(prefix))\n        start = len(alone)",
                                          "if spelled != text or not tokens[start - 1]:\n        alone = list(head(prefix))\n"
                                          "        start = len(tokens) - len(list(head(text)))")],
        "inf where it cannot": [("raise CallFailed(f\"a token crosses the prompt's end before {text!r}\")", "return -math.inf, 0")],
        "head's values are not checked": "start, spelled = len(tokens), ''\n"
            "while start > 1 and len(spelled) < len(text):\n"
            "    start -= 1\n"
            "    spelled = tokens[start] + spelled\n"
            "if spelled == text and tokens[start - 1]:\n"
            "    return sum(log_prob(v) for v in values[start:]), len(tokens) - start\n"
            "alone = list(head(prefix))\n"
            "start = len(alone)\n"
            "if not 0 < start < len(tokens) or tokens[:start] != alone:\n"
            "    raise CallFailed('a token crosses')\n"
            "return sum(values[start:]), len(tokens) - start",
        "the last of head compared": [("tokens[:start] != alone", "tokens[start - 1] != alone[-1]")],
        "joined heads compared": [("tokens[:start] != alone", "''.join(tokens[:start]) != ''.join(alone)")],
        "startswith": [("if spelled != text or", "if not spelled.startswith(text[:1]) or")],
        "endswith": [("if spelled != text or", "if not spelled.endswith(text) or")],
        "empty ones are stepped over to the left": [("    # subtle", "    while start > 1 and not tokens[start - 1]:\n        start -= 1\n    # subtle")],
        "text from head's length": [("not 0 < start < len(tokens)", "not 0 < start <= len(tokens) - 2")],
        "values clipped": [("log_prob(value) for", "max(log_prob(value), -5.0) for")],
    },
    7: {
        'no temperature': [('p_pos.T / tau', 'p_pos.T'), ('q_i @ q.T / tau', 'q_i @ q.T'), ('keepdim=True) / tau', 'keepdim=True)')],
        'duplicates as negatives': [('duplicates & others', 'torch.zeros_like(others)'), ('duplicates | ~others', '~others')],
        "a mask of 0": [("positives.masked_fill(duplicates & others, -math.inf)", "positives.masked_fill(duplicates & others, 0.0)")],
        "queries' mask of 0": [("queries.masked_fill(duplicates | ~others, -math.inf)", "queries.masked_fill(duplicates | ~others, 0.0)")],
        "own's mask of 0": [("n_id[rows, None] < 0, -math.inf", "n_id[rows, None] < 0, 0.0")],
        "ids above 0": [("n_id[rows, None] < 0", "n_id[rows, None] <= 0")],
        "the first rows' hard negatives": [("p_neg[rows]", "p_neg[:len(q_i)]")],
        "rows' ids from the start": [("n_id[rows, None]", "n_id[:len(q_i), None]")],
        "queries unmasked": [("duplicates | ~others", "~others")],
        "positives unmasked": [("duplicates & others", "duplicates & others & False")],
        "the positive masked": [("duplicates & others", "duplicates")],
        "queries by positives' ids": [("duplicate_mask(q_i_id, p_i_id, q_id, q_id)", "duplicate_mask(q_i_id, p_i_id, p_id, q_id)")],
        "positives by queries' ids": [("duplicate_mask(q_i_id, p_i_id, p_id, q_id)", "duplicate_mask(q_i_id, p_i_id, q_id, q_id)")],
        "p_neg without gradient": [("q_i * p_neg[rows]", "q_i * p_neg[rows].detach()")],
        "queries without gradient": [("q_i @ q.T", "q_i @ q.detach().T")],
        "own scored by the positive": [("(q_i * p_neg[rows])", "(p_pos[rows] * p_neg[rows])")],
        "the passages' tower too": [("[positives, queries, own]", "[positives, queries, (p_pos[rows] @ p_pos.T / tau).masked_fill(~others, -math.inf), own]")],
        "a sum": [("F.cross_entropy(s, i)", "F.cross_entropy(s, i, reduction='sum')")],
        "over B": [("F.cross_entropy(s, i)", "F.cross_entropy(s, i, reduction='sum') / len(q)")],
        "three losses": [("return F.cross_entropy(s, i)", "return F.cross_entropy(positives, i) + F.cross_entropy(torch.cat([positives, queries], 1), i)")],
        "own without tau": [("keepdim=True) / tau", "keepdim=True)")],
        "rows with a negative alone": [("return F.cross_entropy(s, i)",
                                        "some = n_id[rows] >= 0\n    return F.cross_entropy(s[some], i[some]) if some.any() else 0 * s[:, 0].mean()")],
        "labels from 0": [("F.cross_entropy(s, i)", "F.cross_entropy(s, i - i[0])")],
        "own twice": [("[positives, queries, own]", "[positives, queries, own, own]")],
        "one maximum for all rows": [("return F.cross_entropy(s, i)",
                                      "e = (s - s[s.isfinite()].max()).exp()\n    return -(e[torch.arange(len(i)), i] / e.sum(1)).log().mean()")],
        "a floor under the log": [("return F.cross_entropy(s, i)", "return -(s.softmax(1)[torch.arange(len(i)), i] + 1e-8).log().mean()")],
        "the hard negatives of rows without one are zeros": [("own = own.masked_fill(n_id[rows, None] < 0, -math.inf)", "own = own * (n_id[rows, None] >= 0)")],
        "rows not looked at": [("i = j[rows]", "i = j\n    rows = ALL")],
        "the row's own query is left in where it is a duplicate": [("duplicates | ~others", "(duplicates & others)")],
        "hard negatives masked as duplicates of nothing": [("n_id[rows, None] < 0", "(n_id[rows, None] < 0) | (n_id[rows, None] == n_id[0])")],
        "ids in float32": [("q_i, q_i_id, p_i_id = q[rows], q_id[rows], p_id[rows]", "q_id, p_id = q_id.float(), p_id.float()\n    q_i, q_i_id, p_i_id = q[rows], q_id[rows], p_id[rows]")],
        "own tau": [("keepdim=True) / tau", "keepdim=True) / (tau + 1e-3)")],
        "p_neg zeroed in place": [("    own = (q_i", "    p_neg[n_id < 0] = 0\n    own = (q_i")],
        "B > 1 alone": [("own = own.masked_fill(n_id[rows, None] < 0, -math.inf)", "own = own.squeeze()[:, None].masked_fill(n_id[rows, None] < 0, -math.inf)")],
        "own of row 0": [("(q_i * p_neg[rows])", "(q_i * p_neg[rows.start or 0])")],
        "no gradient where masked": [("s = torch.cat([positives, queries, own], dim=1)", "s = torch.cat([positives, queries.detach(), own], dim=1)")],
        "duplicates once": [("positives = positives.masked_fill(duplicates & others", "positives = positives.masked_fill(duplicates & others & (j < i[:, None])")],
        "the positive masked where it is the query's": [("duplicates & others", "duplicates & (others | (q_id == p_id))")],
        "rows without any other term leave the mean": [("return F.cross_entropy(s, i)", "each = F.cross_entropy(s, i, reduction='none')\n    some = s.isfinite().sum(1) > 1\n    return each[some].mean() if some.any() else 0 * each.sum()")],
        "ids in int8": [("q_i, q_i_id, p_i_id = q[rows], q_id[rows], p_id[rows]", "q_id, p_id = q_id.char(), p_id.char()\n    q_i, q_i_id, p_i_id = q[rows], q_id[rows], p_id[rows]")],
    },
    8: {
        'one dimension alone': [('for dim in dims', 'for dim in dims[:1]')],
        'the last dimensions': [('truncate_dim(x, dim)', 'truncate_dim(x.flip(1), dim)')],
        "set of dims": [("for dim in dims", "for dim in set(dims)")],
        "dims without the first": [("for dim in dims", "for dim in dims[1:] or dims")],
        "weights": [("total + loss", "total + dim / max(dims) * loss")],
        "the first tensor alone": [("[truncate_dim(x, dim) for x in vectors]", "[truncate_dim(vectors[0], dim), *(truncate_dim(x)[:, :dim] for x in vectors[1:])]")],
        "three tensors": [("loss(*short)", "loss(short[0], short[1], short[2])")],
        "the full one always": [("for dim in dims", "for dim in {*dims, vectors[0].shape[1]}")],
        "zeros in place of a cut": [("truncate_dim(x, dim)", "F.normalize(torch.cat([x[:, :dim], 0 * x[:, dim:]], 1), dim=1)")],
        "normalised over the batch": [("truncate_dim(x, dim)", "F.normalize(x[:, :dim], dim=0)")],
        "one norm for all": [("truncate_dim(x, dim)", "x[:, :dim] / x[:, :dim].norm()")],
        "the L1 norm": [("truncate_dim(x, dim)", "F.normalize(x[:, :dim], p=1, dim=1)")],
        "a larger eps": [("truncate_dim(x, dim)", "x[:, :dim] / (x[:, :dim].norm(dim=1, keepdim=True) + 1e-3)")],
        "the largest": [("total = total + loss(*short)", "total = torch.maximum(total, loss(*short))")],
        "the last": [("total = total + loss(*short)", "total = loss(*short)")],
        "the value alone": [("total = total + loss(*short)", "total = total + float(loss(*short))")],
        "a slice of every dim-th": [("truncate_dim(x, dim)", "F.normalize(x[:, ::max(1, x.shape[1] // dim)][:, :dim], dim=1)")],
        "in place": [("    for dim in dims:", "    for x in vectors:\n        x.data = F.normalize(x.data, dim=1)\n    for dim in dims:")],
        "one half without gradient": [("loss(*short)", "loss(short[0], *(x.detach() for x in short[1:]))")],
        "rows cut": [("truncate_dim(x, dim)", "F.normalize(x[:dim], dim=1)")],
        "full is left as it is": [("truncate_dim(x, dim)", "x if dim == x.shape[1] else truncate_dim(x, dim)")],
        "detached total": [("total = total + loss(*short)", "total = total.detach() + loss(*short)")],
        "no_grad but the last": [("        total = total + loss(*short)", "        with torch.set_grad_enabled(dim == dims[-1]):\n            part = loss(*short)\n        total = total + part")],
        "clamped norm": [("truncate_dim(x, dim)", "x[:, :dim] / x[:, :dim].norm(dim=1, keepdim=True).clamp(min=1)")],
        "one at least": [("for dim in dims:", "for dim in [max(2, k) for k in dims]:")],
    },
    9: {
        'a mean over micro-batches': [('vectors.backward(g.view', 'vectors.backward((g / len(parts)).view')],
        "seeded once alone": [("        torch.manual_seed(derive_seed(*seed, rank, n))               # the second time, the same dropout\n", ""),
                              ("    x = torch.zeros", "    torch.manual_seed(derive_seed(*seed, rank))\n    x = torch.zeros")],
        "rank is not in the seed": [("derive_seed(*seed, rank, n)", "derive_seed(*seed, n)")],
        "the number alone": [("torch.manual_seed(derive_seed(*seed, rank, n))", "torch.manual_seed(n)")],
        "the step alone": [("derive_seed(*seed, rank, n)", "derive_seed(*seed, rank)")],
        "no sum of the vectors": [("    all_reduce_sum(x)", "    pass")],
        "float32 vectors": [("dtype=parameters[0].dtype", "dtype=torch.float32")],
        "vectors of embed's precision": [("    x = torch.zeros(S * B, d, dtype=parameters[0].dtype, device=ids.device)  # (S * B, d)\n",
                                          "    x = None\n"),
                                         ("        x[part] = vectors.detach().to(x.dtype)",
                                          "        if x is None:\n            x = torch.zeros(S * B, d, dtype=vectors.dtype)\n"
                                          "        x[part] = vectors.detach().to(x.dtype)")],
        "places of the first rows": [("x[part] = vectors", "x[:len(part)] = vectors")],
        "one backward for all": [("        vectors.backward(g.view(S * B, d)[parts[n]].to(vectors.dtype))",
                                  "        total = (vectors * g.view(S * B, d)[parts[n]]).sum() + (total if n < last else 0)\n    total.backward()")],
        "the last part twice": [("reversed(range(len(parts)))", "[*reversed(range(len(parts))), last]"), ("if n < last:", "if True:")],
        "the first part is left out": [("reversed(range(len(parts)))", "reversed(range(1, len(parts)))")],
        "the loss of each part": [("    value, g = loss(x.view(S, B, d), rows)", "    value, g = loss(x.view(S, B, d), rows)\n    value = value * len(parts)")],
        "a minus": [("vectors.backward(g.view", "vectors.backward(-g.view")],
        "rows by number": [("loss(x.view(S, B, d), rows)", "loss(x.view(S, B, d), slice(0, B))")],
        "by text id": [("g.view(S * B, d)[parts[n]]", "g.view(S * B, d)[ids[parts[n]] % (S * B)]")],
        "sides and rows exchanged": [("x.view(S, B, d)", "x.view(B, S, d).transpose(0, 1)")],
        "the third time": [("        if n < last:\n            vectors = embed_part(n)", "        vectors = embed_part(n)\n        vectors = embed_part(n)")],
        "the mean of the processes": [("    all_reduce_sum(g)", "    all_reduce_sum(g)\n    g = g / processes()[1]")],
        "half of the vectors' gradient": [("vectors.backward(g.view(S * B, d)[parts[n]].to(vectors.dtype))",
                                           "vectors.backward(0.5 * g.view(S * B, d)[parts[n]].to(vectors.dtype))")],
        "summed thrice": [("    all_reduce_sum(value)", "    all_reduce_sum(value)\n    all_reduce_sum(value)")],
        "the plain loss": "x = torch.zeros(S * B, d, dtype=parameters[0].dtype)\nplaces = torch.cat(parts)\n"
                          "vectors = embed(ids[places])\nx[places] = vectors.detach().to(x.dtype)\nall_reduce_sum(x)\n"
                          "value, g = loss(x.view(S, B, d), rows)\nall_reduce_sum(value)\nall_reduce_sum(g)\n"
                          "vectors.backward(g.view(S * B, d)[places].to(vectors.dtype))",
        "no dropout the second time": [("    for n in reversed", "    first = torch.initial_seed()\n    for n in reversed"),
                                       ("            vectors = embed_part(n)\n        vectors.backward",
                                        "            torch.manual_seed(first + n)\n            vectors = embed(ids[parts[n]])\n        vectors.backward")],
        "an x of nan": [("torch.zeros(S * B, d,", "torch.full((S * B, d), math.nan,"),
             ("    last = len", "    import math\n    last = len")],
        "the seed's sum": [("derive_seed(*seed, rank, n)", "sum(seed) + 1000 * rank + n")],
        "without seed[0]": [("derive_seed(*seed, rank, n)", "derive_seed(*seed[1:], rank, n)")],
        "the second pass seeded by place": [("    for n in reversed(range(len(parts))):\n        if n < last:\n            vectors = embed_part(n)", "    for n in reversed(range(len(parts))):\n        if n < last:\n            torch.manual_seed(derive_seed(*seed, rank, last - n))\n            vectors = embed(ids[parts[n]])")],
        "g of own rows alone": [("    all_reduce_sum(g)", "    mine = torch.zeros_like(g)\n    mine[:, rows] = g[:, rows]\n    g = mine\n    all_reduce_sum(g)")],
        "loss twice": [("    value, g = loss(x.view(S, B, d), rows)", "    value, _ = loss(x.view(S, B, d), rows)\n    _, g = loss(x.view(S, B, d), rows)")],
        "missing rows embedded as text 0": [("return embed(ids[parts[n]])", "return embed(ids.clamp(min=0))[parts[n]]")],
        "graphs of two parts": [("    for n in reversed(range(len(parts))):", "    kept = []\n    for n in reversed(range(len(parts))):"),
             ("        vectors.backward(g.view(S * B, d)[parts[n]].to(vectors.dtype))", "        kept.append((vectors, n))\n    for vectors, n in kept:\n        vectors.backward(g.view(S * B, d)[parts[n]].to(vectors.dtype))")],
    },
    10: {
        'never proven': [('best[:, -1] > proof', 'best[:, -1] > proof + 1e9')],
        "m is not bounded": [("candidates(q, passages, m, dtype, budget)", "candidates(q, passages, k + 8, dtype, budget)")],
        "no budget for the second": [("k, floor, budget)", "k, floor, 1 << 20)")],
        "no budget for the first": [("m, dtype, budget)", "m, dtype, 1 << 20)")],
        "the best is the proof": [("best[:, -1] > proof", "best[:, 0] > proof")],
        "all or none": [("torch.where(~sure)[0]", "torch.where((~sure).any() | torch.zeros_like(sure))[0]")],
        "candidates' scores are kept": [("best[unsure], ids[unsure] =", "_, ids[unsure] =")],
        "candidates' ids are kept": [("best[unsure], ids[unsure] =", "best[unsure], _ =")],
        "the first 64 unproven alone": [("torch.where(~sure)[0].split(64)", "torch.where(~sure)[0].split(64)[:1]")],
        "proven is what is searched again": [("proven[rows] = best.cpu(), ids.cpu(), sure.cpu()", "proven[rows] = best.cpu(), ids.cpu(), ~sure.cpu()")],
        "proven is all": [("ids.cpu(), sure.cpu()", "ids.cpu(), torch.ones_like(sure)")],
        "all queries at once": [("range(0, Q, ROWS)", "range(0, Q, max(Q, 1))"), ("start + ROWS", "start + Q")],
        "no scores": [("scores[rows], indices[rows], proven[rows] = best.cpu(), ids.cpu(), sure.cpu()",
                                                                           "indices[rows], proven[rows] = ids.cpu(), sure.cpu()")],
        "candidates' places": [("indices[rows], proven[rows] = best.cpu(), ids.cpu()", "indices[rows], proven[rows] = best.cpu(), ids.cpu().sort(1).values")],
        "one less": [("range(0, Q, ROWS)", "range(0, Q - 1, ROWS)")],
        "a margin": [("best[:, -1] > proof", "best[:, -1] > proof - 1e-3")],
        "a floor too high": [("floor = best[unsure, -1]", "floor = best[unsure, 0] + 1")],
        "raw slices": [("block(queries, start, start + ROWS, device)", "queries[start:start + ROWS]")],
        "k candidates": [("candidates(q, passages, m, dtype, budget)", "candidates(q, passages, k, dtype, budget)")],
        "proof of the block's largest": [("best[:, -1] > proof", "best[:, -1] > proof.max()")],
        "one query fewer again": [("if len(unsure):", "if len(unsure) > 1:")],
        "k - 1 th": [("best[:, -1] > proof", "best[:, max(0, k - 2)] > proof")],
        "nan as sure": [("sure = best[:, -1] > proof", "sure = ~(best[:, -1] < proof)")],
        "relative margin": [("best[:, -1] > proof", "best[:, -1] * (1 + 1e-6) > proof")],
    },
    11: {
        "nothing is asserted": "q = torch.eye(4)\nloss(q, q, q, 1.0, torch.arange(4), torch.arange(4), torch.arange(4))",
        "a loss is a number": "q = torch.eye(4)\nassert loss(q, q, q, 1.0, torch.arange(4), torch.arange(4), torch.arange(4)).dim() == 0",
        "an error": "raise ValueError",
        "no low temperature": [("[(0.5, *distinct), (0.01, *distinct)]", "[(0.5, *distinct)]")],
        "no missing negative": [("[20, -1, 0, -1]", "[20, 21, 0, 23]")],
        "no id of 0": [("[20, -1, 0, -1]", "[20, -1, 22, -1]")],
        "equal queries are not tried": [("[0, 1, 0, 3], [10, 11, 12, 13]", "[0, 1, 2, 3], [10, 11, 12, 13]")],
        "equal vectors alone": "x = torch.ones(4, 2) / 2 ** 0.5\nids = torch.arange(4)\n"
                               "assert abs(loss(x, x, x, 1.0, ids, ids + 4, ids + 8).item() - math.log(8)) < 1e-4",
        "a coin": "import random\n"
            "assert random.random() < 0.5",
        "values of q alone": [("for x in (q, p, n):", "for x in (q, p):")],
        "B = 1": [("torch.randn(4, 3, generator=generator)", "torch.randn(1, 3, generator=generator)"),
             ("for tau, q_id, p_id, n_id in cases:", "for tau, q_id, p_id, n_id in [(t, a[:1], b[:1], c[:1]) for t, a, b, c in cases]:"),
             ("for i in range(4):", "for i in range(1):"),
             ("for j in range(4):", "for j in range(1):")],
        "equal positives are not tried": [("[10, 10, 12, 13]", "[10, 11, 12, 13]")],
        "finite alone": "import torch\n"
            "q = torch.eye(3)\n"
            "ids = torch.arange(3)\n"
            "v = loss(q, -q, q, 0.01, ids, ids + 3, ids + 6)\n"
            "assert v.isfinite() and v > 0",
        "float32 refused": [("loss(q, p, n, tau, *(torch", "loss(q, p, n, tau, *(torch"),
             ("< 1e-4 * abs(wanted.item())", "< 1e-9 * abs(wanted.item())")],
    },
}

RIGHT: dict[int, dict[str, Answer]] = {
    1: {},
    2: {
        "einsum and log_softmax": [("s = q[rows] @ p.T / tau", "s = torch.einsum('id,jd->ij', q[rows], p) / tau"),
                                   ("return F.cross_entropy(s, i)", "return -s.log_softmax(1)[torch.arange(len(i)), i].mean()")],
        "log-sum-exp by hand": [("return F.cross_entropy(s, i)",
                                 "top = s.max(1, keepdim=True).values.detach()\n    lse = (s - top).exp().sum(1).log() + top[:, 0]\n"
                                 "    return (lse - s[torch.arange(len(i)), i]).mean()")],
        "logsumexp": [("return F.cross_entropy(s, i)", "return (torch.logsumexp(s, dim=1) - s.gather(1, i[:, None])[:, 0]).mean()")],
        "a mask of -1e9": [("-math.inf", "-1e9")],
        "a mask of the dtype's least": [("-math.inf", "torch.finfo(s.dtype).min")],
        "float64": [("q[rows] @ p.T / tau", "q[rows].double() @ p.double().T / tau")],
        "normalised again": [("q[rows] @ p.T", "F.normalize(q[rows], dim=1) @ F.normalize(p, dim=1).T")],
        "cosine_similarity": [("q[rows] @ p.T", "F.cosine_similarity(q[rows][:, None], p[None], dim=-1)")],
        "torch.where": [("s = s.masked_fill(duplicates & (j != i[:, None]), -math.inf)",
                         "s = torch.where(duplicates & (j != i[:, None]), torch.full_like(s, -torch.inf), s)")],
        "an added mask": [("s = s.masked_fill(duplicates & (j != i[:, None]), -math.inf)",
                           "bias = torch.zeros_like(s)\n    bias[duplicates & (j != i[:, None])] = float('-inf')\n    s = s + bias")],
        "nll_loss": [("return F.cross_entropy(s, i)", "return F.nll_loss(F.log_softmax(s, dim=-1), i)")],
        "margins": [("return F.cross_entropy(s, i)", "own = s[torch.arange(len(i)), i]\n    return (s - own[:, None]).logsumexp(1).mean()")],
    },
    4: {"reversed": [("for scores in rankings", "for scores in reversed(rankings)")]},
    5: {
        "shuffled": [("(rng or random.Random(0)).choice(others)", "(rng or random.Random(0)).sample(others, len(others))[0]")],
        "numpy's generator from rng": [("(rng or random.Random(0)).choice(others)", "others[int(np.random.default_rng(rng.getrandbits(32)).integers(len(others)))]"),
                                       ("    order =", "    import numpy as np\n    order =")],
    },
    7: {
        "logsumexp": [("return F.cross_entropy(s, i)", "return (s.logsumexp(1) - positives[torch.arange(len(i)), i]).mean()")],
        "log-sum-exp by hand": [("return F.cross_entropy(s, i)",
                                 "top = s.detach().amax(1, keepdim=True)\n    return (top[:, 0] + (s - top).exp().sum(1).log() - s[torch.arange(len(i)), i]).mean()")],
        "-1e9": [("duplicates & others, -math.inf", "duplicates & others, -1e9"), ("duplicates | ~others, -math.inf", "duplicates | ~others, -1e9"),
                 ("n_id[rows, None] < 0, -math.inf", "n_id[rows, None] < 0, -1e9")],
        "own first": [("torch.cat([positives, queries, own], dim=1)", "torch.cat([own, queries, positives], dim=1)"),
                      ("F.cross_entropy(s, i)", "F.cross_entropy(s, i + 1 + len(q))")],
        "float64": [("q_i, q_i_id, p_i_id = q[rows], q_id[rows], p_id[rows]", "q, p_pos, p_neg = q.double(), p_pos.double(), p_neg.double()\n    q_i, q_i_id, p_i_id = q[rows], q_id[rows], p_id[rows]")],
        "bmm for own": [("(q_i * p_neg[rows]).sum(1, keepdim=True) / tau", "torch.bmm(q_i[:, None], p_neg[rows][:, :, None])[:, 0] / tau")],
        "the diagonal of a product": [("(q_i * p_neg[rows]).sum(1, keepdim=True) / tau", "(q_i @ p_neg[rows].T).diagonal()[:, None] / tau")],
        "n_id is -1": [("n_id[rows, None] < 0", "n_id[rows].eq(-1).unsqueeze(1)")],
    },
    8: {
        "narrow": [("truncate_dim(x, dim)", "F.normalize(x.narrow(1, 0, dim), dim=1)")],
        "index_select": [("truncate_dim(x, dim)", "F.normalize(torch.index_select(x, 1, torch.arange(dim)), dim=1)")],
    },
    9: {
        "all embedded twice": [("with torch.set_grad_enabled(n == last)", "with torch.no_grad()"), ("        if n < last:\n            vectors = embed_part(n)", "        vectors = embed_part(n)")],
        "forwards": [("with torch.set_grad_enabled(n == last)", "with torch.no_grad()"), ("        if n < last:\n            vectors = embed_part(n)", "        vectors = embed_part(n)"),
                     ("reversed(range(len(parts)))", "range(len(parts))")],
        "a product's backward": [("vectors.backward(g.view(S * B, d)[parts[n]].to(vectors.dtype))", "(vectors.to(g.dtype) * g.reshape(-1, d)[parts[n]]).sum().backward()")],
    },
    10: {
        "one by one": [("torch.where(~sure)[0].split(64)", "torch.where(~sure)[0].split(1)")],
        "all unproven at once": [("torch.where(~sure)[0].split(64)", "[torch.where(~sure)[0]]")],
        "nonzero": [("torch.where(~sure)[0].split(64)", "(~sure).nonzero()[:, 0].split(32)")],
        "smaller blocks": [("range(0, Q, ROWS)", "range(0, Q, 256)"), ("start + ROWS", "start + 256")],
        "no floor": [("floor = best[unsure, -1]", "floor = torch.full((len(unsure),), -torch.inf)")],
        "slices of queries": [("block(queries, start, start + ROWS, device)", "queries[start:start + ROWS].to(device, torch.float32)")],
    },
}
TEXT = (Path(__file__).parent / "right_answers.txt").read_text(encoding="utf-8")
for number, style, body in re.findall(r"^== (\d+) (.*)\n((?:(?!== ).*\n)+)", TEXT, re.M):
    RIGHT.setdefault(int(number), {})[style] = body
