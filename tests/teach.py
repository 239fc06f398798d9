"""What a grading test says: your value, the paper's, which well-known mistake gives yours, where the inputs are."""

from __future__ import annotations

import hashlib
import math
import numbers
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor


def graded_seed(n: int) -> int:
    """The seed of a grading test's inputs: n, or where GRADE_SEED is set, what only the instructor can know."""
    secret = os.environ.get("GRADE_SEED", "")
    return int(hashlib.sha256(f"{secret} {n}".encode()).hexdigest()[:8], 16) if secret else n


def close(a: Any, b: Any) -> bool:
    """Equal up to rounding: tensors, numbers, or lists of them; a list may be an array."""
    if isinstance(b, (list, tuple)) and isinstance(a, (Tensor, np.ndarray)):
        a = a.tolist()
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        a, b = a.double(), b.double()
        return a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-7 + 1e-6 * b.norm().item())
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(close, a, b))
    if isinstance(a, numbers.Real) and isinstance(b, numbers.Real):
        return math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-7)
    return type(a) is type(b) and a == b


def check(yours: Any, spec: Any, mistakes: dict[str, Any], what: str = "", drawn: bool = False) -> None:
    """yours is the spec's value; and no mistake's is, or the test could not tell them apart.

    Where inputs are drawn, a mistake may make no difference; it is then not named.
    """
    same = [why for why, value in mistakes.items() if close(spec, value)]
    assert drawn or not same, f"this test cannot tell: {same}"
    if close(yours, spec):
        return
    why = [why for why, value in mistakes.items() if close(yours, value)] or [likeness(yours, spec)]
    row, caller = "", sys._getframe(1)
    if caller.f_code is check_gradients.__code__:
        caller = sys._getframe(2)
    if isinstance(yours, Tensor) and isinstance(spec, Tensor) and yours.shape == spec.shape and spec.dim():
        i = next(i for i in range(len(spec)) if not close(yours[i], spec[i]))
        row, yours, spec = f" (row {i})", yours[i].tolist(), spec[i].tolist()
    lines = [what, f"yours{row}: {yours}", f"the paper's, in plain loops: {spec}"]
    lines += [f"why: {line}" for line in why]
    lines += [f"inputs: tests/{Path(caller.f_code.co_filename).name}:{caller.f_lineno}"]
    pytest.fail("\n".join(line for line in lines if line), pytrace=False)


def likeness(yours: Any, spec: Any) -> str:
    """What can be said of a wrong value that no known mistake gives."""
    if isinstance(spec, Tensor) and isinstance(yours, Tensor) and yours.shape != spec.shape:
        return f"yours has the shape {tuple(yours.shape)}, it must be {tuple(spec.shape)}"
    try:
        a, b = (torch.as_tensor(x, dtype=torch.float64).detach().flatten() for x in (yours, spec))
    except (TypeError, ValueError, RuntimeError):
        return UNKNOWN if type(yours) is type(spec) else f"a {type(spec).__name__} is asked for"
    if len(a) != len(b):
        return f"{len(a)} numbers, where {len(b)} are asked for"
    if not a.isfinite().all():
        return "it is not finite: e^x overflows for a large x; take logsumexp or cross_entropy, not exp and log"
    if close(a.sort().values, b.sort().values):
        return "the right values, in another order"
    ratio = (a @ b / (b @ b)).item() if b.any() else 0.0
    if ratio and close(a, ratio * b):
        return f"the right value times {ratio:.4g}"
    wrong = [i for i in range(len(a)) if not close(a[i], b[i])]
    if len(wrong) <= len(a) // 2:
        return f"right but for {len(wrong)} of {len(a)} places, the first at {wrong[0]}; what is special there?"
    return UNKNOWN


UNKNOWN = "no mistake that is known here gives this value; work it out by hand from the inputs"


def check_gradients(
    yours: Tensor,              # scalar
    spec: Tensor,               # scalar, of the same inputs
    inputs: dict[str, Tensor],  # by name; each asks for a gradient
) -> None:
    """On each input, yours has the spec's gradient: nothing is learned from a right value without one."""
    check(yours, spec, {})
    detached = "no gradient reaches it: something is detached, or computed without torch"
    for name, x in inputs.items():
        want, = torch.autograd.grad(spec, x, retain_graph=True, allow_unused=True, materialize_grads=True)
        have = None
        if yours.requires_grad:
            have, = torch.autograd.grad(yours, x, retain_graph=True, allow_unused=True)
        check(torch.zeros_like(x) if have is None else have, want, {detached: torch.zeros_like(x)},
              f"the value is right, but not its gradient on {name}:", drawn=True)
