"""A training run's folder: metrics.jsonl, checkpoint-STEP/, best/ and, at the end, the model's files.

Dropout is seeded by the step, the order of the data by the seed alone. So weights, optimiser and step are
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
import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from engine.files import InputError, first_line, folder_beside, read_json, write_jsonl
from engine.scale import barrier, processes

HALF_WRITTEN = (".*checkpoint-*", ".best.*", ".*model*", ".*.metrics.jsonl")   # what a kill may leave


class Run:
    """What a run leaves behind. Only the first process writes, and nothing without a folder."""

    def __init__(
        self,
        out: Path | None,
        encoder: torch.nn.Module,
        optimiser: torch.optim.Optimizer,
        steps: int,
        key: str,                                    # the `digest` of data, flags and first weights
        save: Callable[[Path], None],                # writes the model into a new folder
        measure: Callable[[], dict[str, float]] | None = None,   # the model on dev, with an "ndcg@10"
    ) -> None:
        self.out, self.encoder, self.optimiser = out, encoder, optimiser
        self.steps, self.key, self.save, self.measure = steps, key, save, measure
        self.writes = out is not None and processes()[0] == 0
        self.best, self.clock = -1.0, time.time()

    def last(self) -> Path | None:
        """The last checkpoint. A folder has its name only once it is whole."""
        return max(self.out.glob("checkpoint-*"), default=None) if self.out else None

    def resume(self, wanted: bool) -> list[float]:
        """The losses of the steps that are done already: none, or if wanted the last checkpoint's."""
        last, done = self.last(), 0
        if last:
            state = read_json(last / "state.json", dict)
            if wanted:
                if state["key"] != self.key:
                    raise InputError(f"{last} is of other data, flags or --init; give the same ones, "
                                     "or another --out")
                read_checkpoint(last, self.encoder, self.optimiser)
                done, self.best = state["step"], state["best"]
            elif state["step"] < state["steps"]:
                raise InputError(f"{last}: an unfinished run stands there; --resume continues it, or remove it")
        barrier()                                    # all have read what the first process now removes
        if not self.out or not self.writes:
            return [math.nan] * done
        for pattern in HALF_WRITTEN if wanted else (*HALF_WRITTEN, "checkpoint-*", "best"):
            for path in self.out.glob(pattern):
                remove(path)
        rows = [row for row in read_metrics(self.out) if row["step"] <= done] if done else []
        write_jsonl(self.out / "metrics.jsonl", rows)
        losses = [row["loss"] for row in rows if "loss" in row]
        return losses + [math.nan] * (done - len(losses))            # someone may have removed the log

    def write_row(self, **values: Any) -> None:
        """One more line of metrics.jsonl."""
        if self.out and self.writes:
            with open(self.out / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")

    def log(self, bar: Any, losses: Sequence[float], examples: int) -> None:
        """The line of a step, and the numbers beside the progress bar."""
        lr = self.optimiser.param_groups[0]["lr"]
        rate = examples / max(1e-9, time.time() - self.clock)
        self.clock = time.time()
        shown = f"{np.mean(losses[-20:]):.3f}"
        bar.set_postfix(loss=shown, lr=f"{lr:.1e}", examples_s=f"{rate:.0f}", refresh=False)
        self.write_row(step=len(losses), loss=losses[-1], lr=lr, examples_s=round(rate, 1))

    def check_finite(self, step: int, loss: float, norm: float, rows: np.ndarray, sizes: Sequence[int]) -> None:
        """Before the optimiser takes the gradient, so that the weights are still good."""
        if math.isfinite(loss) and math.isfinite(norm):
            return
        starts, places = np.cumsum([0, *sizes]), []
        for row in rows[:5].tolist():                # counted through all sets
            which = int(np.searchsorted(starts, row, side="right"))
            places.append(f"{which}:{row - starts[which - 1] + 1}")
        raise InputError(f"the loss is {loss}, its gradient's norm {norm} at step {step + 1}, "
                         f"rows {', '.join(places)}, ... (set:row); lower --lr or raise --tau; "
                         f"last good checkpoint: {self.last() or 'none'}")

    def checkpoint(self, step: int) -> None:
        """Measure on dev, keep the best model, write the checkpoint, then remove those before it."""
        if self.out and self.writes:
            if self.measure:
                dev = self.measure()
                self.write_row(step=step, dev=dev)
                tqdm.write(f"step {step}: dev {dev}", file=sys.stderr)
                if dev["ndcg@10"] > self.best:
                    self.best = dev["ndcg@10"]
                    self.save(self.out / "best")
            state = {"step": step, "steps": self.steps, "best": self.best, "key": self.key}
            with folder_beside(self.out / f"checkpoint-{step:08d}") as new:
                self.save(new)
                save_file(moments(self.optimiser), str(new / "optimiser.safetensors"))
                (new / "state.json").write_text(json.dumps(state) + "\n", encoding="utf-8")
            for path in self.out.glob("checkpoint-*"):
                if path != self.last():
                    shutil.rmtree(path)
        barrier()
        self.clock = time.time()


def moments(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's tensors, named PARAMETER.MOMENT, such as 3.exp_avg."""
    named = {}
    for number, tensors in optimiser.state_dict()["state"].items():
        for name, value in tensors.items():
            named[f"{number}.{name}"] = value.detach().cpu().contiguous()
    return named


def read_checkpoint(folder: Path, encoder: torch.nn.Module, optimiser: torch.optim.Optimizer) -> None:
    """What `Run.checkpoint` wrote, into the encoder and the optimiser."""
    try:
        encoder.load_state_dict(load_file(str(folder / "model.safetensors")))
        named = load_file(str(folder / "optimiser.safetensors"))
    except (SafetensorError, OSError, RuntimeError) as error:
        raise InputError(f"{folder}: not a readable checkpoint ({first_line(error)}); use another --out") from error
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in named.items():
        number, _, moment = name.partition(".")
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


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows {step, loss, lr, examples_s} and {step, dev} of a run."""
    return whole_rows(folder / "metrics.jsonl")


def whole_rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a JSONL file that grows. A kill may leave half a line at its end."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").split("\n"):
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return rows


def save_into(save: Callable[[Path], None], out: Path) -> None:
    """The model's files into a folder that holds the run's others too, each by one rename."""
    new = out / ".model"
    save(new)
    for path in sorted(new.iterdir()):
        if (out / path.name).is_dir():
            shutil.rmtree(out / path.name)
        os.replace(path, out / path.name)
    new.rmdir()


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
