"""What a grading test says: your value, the paper's, which well-known mistake gives yours, where the inputs are."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch


def close(a: Any, b: Any) -> bool:
    """Equal up to rounding: tensors, numbers, or lists of them."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-5, atol=1e-7)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(close, a, b))
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-7)
    return type(a) is type(b) and a == b


def check(yours: Any, spec: Any, mistakes: dict[str, Any]) -> None:
    """yours is the spec's value; and no mistake's is, or the test could not tell them apart."""
    same = [why for why, value in mistakes.items() if close(spec, value)]
    assert not same, f"this test cannot tell: {same}"
    if close(yours, spec):
        return
    why = [f"why: {why}" for why, value in mistakes.items() if close(yours, value)]
    row, caller = "", sys._getframe(1)
    inputs = f"inputs: tests/{Path(caller.f_code.co_filename).name}:{caller.f_lineno}"
    if isinstance(yours, torch.Tensor) and isinstance(spec, torch.Tensor):
        if yours.shape != spec.shape:
            pytest.fail(f"yours has the shape {tuple(yours.shape)}, it must be {tuple(spec.shape)}\n{inputs}",
                        pytrace=False)
        if spec.shape:
            i = next(i for i in range(len(spec)) if not close(yours[i], spec[i]))
            row, yours, spec = f" (row {i})", yours[i].tolist(), spec[i].tolist()
    why = why or ["why: no mistake that is known here gives this value; work it out by hand from the inputs"]
    pytest.fail("\n".join([f"yours{row}: {yours}", f"the paper's, in plain loops: {spec}", *why, inputs]),
                pytrace=False)
