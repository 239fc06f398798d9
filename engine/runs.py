"""A training run's folder: metrics.jsonl, checkpoint-STEP/, best/ and, at the end, the model's files.

Dropout is seeded by the step, the order of the data by the seed alone. So weights, optimiser and losses are
the whole state of a run: killed at any byte and resumed, it writes the bytes of a run without a stop.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import sys
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from engine.files import InputError, folder_beside, read_json, write_jsonl
from engine.scale import barrier, processes

HALF_WRITTEN = (".*checkpoint-*", ".best.*", ".*model*", ".*.metrics.jsonl")   # what a kill may leave


@dataclass
class Run:
    """What a run leaves behind. Only the first process writes, and nothing without a folder."""

    out: Path | None
    encoder: torch.nn.Module
    optimiser: torch.optim.Optimizer
    steps: int
    key: str                                                  # the `digest` of all that the run depends on
    save: Callable[[Path], None]                              # writes the model into a new folder
    measure: Callable[[], dict[str, float]] | None = None     # on dev, with an "ndcg@10"
    best: float = -1.0                                        # of these

    def last(self) -> Path | None:
        """The last checkpoint. A folder has its name only once it is whole."""
        return max(self.out.glob("checkpoint-*"), default=None) if self.out else None

    def resume(self, wanted: bool) -> list[float]:
        """The losses of the steps that are done already: none, or if wanted the last checkpoint's."""
        last = self.last()
        losses: list[float] = []
        if last:
            state = read_json(last / "state.json", dict)
            if wanted and state["key"] != self.key:
                raise InputError(f"{last} is of other data, flags or --init; give the same ones, or another --out")
            if wanted:
                read_checkpoint(last, self.encoder, self.optimiser)
                losses, self.best = state["losses"], state["best"]
            elif len(state["losses"]) < state["steps"]:
                raise InputError(f"{last}: an unfinished run stands there; --resume continues it, or remove it")
        barrier()                                             # all have read what the first process now removes
        if self.out and processes()[0] == 0:
            for pattern in HALF_WRITTEN if wanted else (*HALF_WRITTEN, "checkpoint-*", "best"):
                for path in self.out.glob(pattern):
                    remove(path)
            metrics = self.out / "metrics.jsonl"              # of rows {step, loss, lr} and {step, dev}
            write_jsonl(metrics, [row for row in whole_rows(metrics) if row["step"] <= len(losses)])
        return losses

    def log(self, **row: Any) -> None:
        """One more line of metrics.jsonl."""
        if self.out and processes()[0] == 0:
            with open(self.out / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def check_finite(self, step: int, loss: float, norm: float) -> None:
        """Before the optimiser takes the gradient, so that the weights are still good."""
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise InputError(f"the loss is {loss}, its gradient's norm {norm} at step {step}; lower --lr or raise "
                             f"--tau; last good checkpoint: {self.last() or 'none'}")

    def checkpoint(self, losses: list[float]) -> None:
        """Measure on dev, keep the best model, write the checkpoint, then remove those before it."""
        if self.out and processes()[0] == 0:
            if self.measure:
                dev = self.measure()
                self.log(step=len(losses), dev=dev)
                tqdm.write(f"step {len(losses)}: dev {dev}", file=sys.stderr)
                if dev["ndcg@10"] > self.best:
                    self.best = dev["ndcg@10"]
                    self.save(self.out / "best")
            state = {"losses": losses, "steps": self.steps, "best": self.best, "key": self.key}
            with folder_beside(self.out / f"checkpoint-{len(losses):08d}") as new:
                self.save(new)
                save_file(moments(self.optimiser), str(new / "optimiser.safetensors"))
                (new / "state.json").write_text(json.dumps(state) + "\n", encoding="utf-8")
            for path in sorted(self.out.glob("checkpoint-*"))[:-1]:
                remove(path)
        barrier()


def moments(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's tensors, named PARAMETER.MOMENT, such as 3.exp_avg."""
    named = {}
    for number, tensors in optimiser.state_dict()["state"].items():
        for name, value in tensors.items():
            named[f"{number}.{name}"] = value.cpu()
    return named


def read_checkpoint(folder: Path, encoder: torch.nn.Module, optimiser: torch.optim.Optimizer) -> None:
    """What `Run.checkpoint` wrote, into the encoder and the optimiser."""
    try:
        encoder.load_state_dict(load_file(str(folder / "model.safetensors")))
        named = load_file(str(folder / "optimiser.safetensors"))
    except (SafetensorError, OSError) as error:
        raise InputError(f"{folder}: not a readable checkpoint ({error}); remove it or change --out") from error
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in named.items():
        number, moment = name.split(".")
        state.setdefault(int(number), {})[moment] = value
    optimiser.load_state_dict({**optimiser.state_dict(), "state": state})


def digest(settings: str, arrays: Iterable[np.ndarray | Tensor | array[int]]) -> str:
    """What a run is: flags, data and first weights. A checkpoint of another run is not continued."""
    total = hashlib.sha256(settings.encode())
    for values in arrays:
        if isinstance(values, Tensor):
            values = values.detach().cpu().numpy()
        total.update(f" {len(values)} ".encode() + values.tobytes())
    return total.hexdigest()


def whole_rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a JSONL file that grows. A kill may leave half a line at its end."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def save_into(save: Callable[[Path], None], out: Path) -> None:
    """The model's files into a folder that holds the run's others too, each by one rename."""
    save(out / ".model")
    for path in sorted((out / ".model").iterdir()):
        remove(out / path.name)
        os.replace(path, out / path.name)
    (out / ".model").rmdir()


def remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
