"""A training run's folder: metrics.jsonl, checkpoint-STEP/, best/ and, at the end, the model's files.

Dropout is seeded by the step, the order of the data by the seed alone. So weights, optimiser and losses are
the whole state of a run: killed at any byte and resumed, it writes the bytes of a run without a stop.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from engine.files import InputError, folder_beside, read_json
from engine.folder import readable
from engine.scale import barrier, blocks, processes
from engine.tokens import TokenIds

METRICS = "metrics.jsonl"
HALF_WRITTEN = (".*checkpoint-*", ".best.*")                  # what a kill may leave


@dataclass
class Run:
    """What a run leaves behind. Only the first process writes, and nothing without a folder."""

    out: Path | None
    encoder: torch.nn.Module
    optimiser: torch.optim.Optimizer
    steps: int
    key: str                                                  # the `run_key` of all that the run depends on
    save: Callable[[Path], None]                              # writes the model into a new folder
    measure: Callable[[], dict[str, float]] | None = None     # on dev, with an "ndcg@10"
    best: float = -1.0                                        # of these

    @property
    def own(self) -> Path | None:
        """Where this process writes: the folder, if it is the first."""
        return self.out if processes()[0] == 0 else None

    def last(self) -> Path | None:
        """The last checkpoint. A folder has its name only once it is whole."""
        return max(self.out.glob("checkpoint-*"), default=None) if self.out else None

    def resume(self, wanted: bool, anew: bool) -> list[float]:
        """The losses of the steps that are done already: none, or if wanted the last checkpoint's.

        Another run's checkpoint is refused, or with `anew` removed.
        """
        last = self.last()
        losses: list[float] = []
        if last:
            state = read_json(last / "state.json", dict)
            if wanted and state["key"] == self.key:
                losses, self.best = state["losses"], state["best"]
                with readable(last):
                    self.encoder.load_state_dict(load_file(last / "model.safetensors"))
                    if len(losses) < self.steps:
                        take_moments(self.optimiser, load_file(last / "optimiser.safetensors"))
            elif wanted and not anew:
                raise InputError(f"{last} is of other data, flags or --init; give the same ones, or another --out")
            elif not wanted and len(state["losses"]) < state["steps"]:
                raise InputError(f"{last}: an unfinished run stands there; --resume continues it, or remove it")
        barrier()                                             # all have read what the first process now removes
        if self.own:
            self.own.mkdir(parents=True, exist_ok=True)
            for pattern in HALF_WRITTEN if losses else (*HALF_WRITTEN, "checkpoint-*", "best", METRICS):
                for path in self.own.glob(pattern):
                    remove(path)
            if last and losses:
                shutil.copy(last / METRICS, self.own)         # without the steps that are done again
        return losses

    def log(self, **row: Any) -> None:
        """One more line of the metrics, {step, loss, lr} or {step, dev}."""
        if self.own:
            with open(self.own / METRICS, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def check_finite(self, step: int, loss: float, norm: float) -> None:
        """Before the optimiser takes the gradient, so that the weights are still good."""
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise InputError(f"the loss is {loss}, its gradient's norm {norm} at step {step}; lower --lr or raise "
                             f"--tau; last good checkpoint: {self.last() or 'none'}")

    def checkpoint(self, losses: list[float]) -> None:
        """Measure on dev, keep the best model, write the checkpoint, then remove those before it."""
        if self.own:
            if self.measure:
                dev = self.measure()
                self.log(step=len(losses), dev=dev)
                say_first(f"step {len(losses)}: dev {dev}")
                if dev["ndcg@10"] > self.best:
                    self.best = dev["ndcg@10"]
                    self.save(self.own / "best")
            state = {"losses": losses, "steps": self.steps, "best": self.best, "key": self.key}
            with folder_beside(self.own / f"checkpoint-{len(losses):08d}") as new:
                self.save(new)
                shutil.copy(self.own / METRICS, new)
                if len(losses) < self.steps:
                    save_file(moments(self.optimiser), new / "optimiser.safetensors")
                (new / "state.json").write_text(json.dumps(state) + "\n", encoding="utf-8")
            for path in sorted(self.own.glob("checkpoint-*"))[:-1]:
                remove(path.rename(self.own / f".{path.name}"))   # hidden: a kill may leave it half removed
        barrier()

    def finish(self) -> None:
        """The model's files, beside the checkpoint."""
        if self.own:
            save_into(self.save, self.own)


def moments(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's tensors, named PARAMETER.MOMENT, such as 3.exp_avg."""
    named = {}
    for number, tensors in optimiser.state_dict()["state"].items():
        named.update({f"{number}.{name}": value for name, value in tensors.items()})
    return named


def take_moments(optimiser: torch.optim.Optimizer, named: dict[str, Tensor]) -> None:
    """What `moments` gave, into an optimiser of the same parameters."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in named.items():
        number, moment = name.split(".")
        state.setdefault(int(number), {})[moment] = value
    optimiser.load_state_dict({**optimiser.state_dict(), "state": state})


# --------------------------------------------------------------------------------------------------
# The data of a run: tokens, and integer ids of texts, which the losses mask duplicates by


def tokenised(model: Any, rows: Iterable[tuple[Sequence[str | None], str]], max_length: int,
              plan: Sequence[np.ndarray]) -> tuple[TokenIds, np.ndarray]:
    """The tokens of every distinct text in the plan's rows, and the ids of the texts of all rows, (rows, 3).

    A row is its input, positive and hard negative (or None) as the encoder sees them, and its query alone. Equal
    texts have equal ids, their places among the tokens; -1: none. A hard negative that is its row's own query, or
    a positive of the same query in any row, is left out here: eq. 3 never meets one.
    """
    ids: dict[str, int] = {}                                         # of formatted texts
    table, queries = [], []
    answers = set()                                                  # (query, id of a positive) of all rows
    for texts, query in rows:
        row = [-1 if text is None else ids.setdefault(text, len(ids)) for text in texts]
        table.append(row)
        queries.append(query)
        answers.add((query, row[1]))
    hard = left_out = 0
    for row, query in zip(table, queries, strict=True):
        hard += row[2] >= 0
        if row[2] == row[0] or (query, row[2]) in answers:
            row[2] = -1
            left_out += 1
    if left_out:
        say_first(f"{left_out} of {hard} hard negatives are left out: each answers its query or is it")
    text_ids = np.array(table)                                       # (rows, 3)
    used = np.unique(text_ids[np.concatenate(plan)])
    used = used[used >= 0]
    texts = list(ids)
    tokens = [array("i")] * len(texts)                               # of a text in no batch: none
    for i, row in zip(used, model.tokens([texts[i] for i in used], max_length), strict=True):
        tokens[i] = row
    if model.lost():
        say_first(model.lost())
    return tokens, text_ids


def say_first(line: str) -> None:
    """To stderr, once for all processes."""
    if processes()[0] == 0:
        tqdm.write(line, file=sys.stderr)


def check_negatives(loss_of: Callable[[Tensor], Callable[..., Tensor]], sides: int, text_ids: np.ndarray,
                    plan: Sequence[np.ndarray]) -> None:
    """Where no row of a batch has a negative, its loss is 0: an InputError if no batch has one, else a warning.

    With all vectors equal, a row's loss is log(1 + its negatives), and so 0 exactly where it has none.
    """
    idle = 0
    for rows in plan:
        loss = loss_of(torch.from_numpy(text_ids[rows]).T)
        ones = [torch.ones(len(rows), 1)] * sides                    # each (B, 1)
        some = blocks(slice(0, len(rows)), 64)                       # the first of them decide, as a rule
        idle += all(loss(*ones, rows=part) == 0 for part in some)
    what = (f"in {idle} of {len(plan)} steps no row has a negative, so nothing is learned: give rows of other "
            "queries and positives, a larger --batch-size, or --mix mixed")
    if idle == len(plan):
        raise InputError(what)
    if idle:
        say_first(what)


# --------------------------------------------------------------------------------------------------
# What a run is, and where its model goes


def run_key(settings: str, arrays: Iterable[Any]) -> str:
    """What a run is: flags, data and first weights. A checkpoint of another run is not continued."""
    total = hashlib.blake2b(settings.encode())
    for values in arrays:
        if isinstance(values, Tensor):
            values = values.detach().cpu().numpy()
        total.update(f" {len(values)} ".encode() + values.tobytes())
    return total.hexdigest()


def save_into(save: Callable[[Path], None], out: Path) -> None:
    """The model's files into a folder that holds the run's others too, each by one rename."""
    new = out / ".checkpoint-new"
    save(new)
    for path in sorted(new.iterdir()):
        remove(out / path.name)
        os.replace(path, out / path.name)
    new.rmdir()


def remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
