"""Processes that start in no time: forked from one that has imported the modules.

A fresh interpreter takes two seconds for torch, and its first optimizer one more for torch._dynamo.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from engine import files

TESTS = Path(__file__).resolve().parent
if "forkserver" in multiprocessing.get_all_start_methods():
    START = multiprocessing.get_context("forkserver")
    START.set_forkserver_preload(["torch._dynamo", "train", "fake_server", "test_scale", "test_runs"])
else:                                                                # Windows: what grades starts no process
    START = multiprocessing.get_context("spawn")
os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])


class Command:
    """A module's command line in a process of its own, after `before` was called there."""

    def __init__(self, main: Callable[[], None], *arguments: Any, before: Callable[[], None] | None = None,
                 **environment: str) -> None:
        self.said = [tempfile.NamedTemporaryFile("r", encoding="utf-8") for _ in range(2)]
        self.process = START.Process(target=command_line, daemon=True, args=(
            main, [str(a) for a in arguments], before, environment, [file.name for file in self.said]))
        self.process.start()

    def result(self) -> tuple[int | None, str, str]:
        """(exit code, stdout, stderr), when it has ended."""
        self.process.join(120)
        return self.process.exitcode, *(file.read() for file in self.said)


def command_line(main: Callable[[], None], arguments: Sequence[str], before: Callable[[], None] | None,
                 environment: dict[str, str], outputs: Sequence[str]) -> None:
    for stream, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY), stream)
    os.environ.update(environment)
    sys.argv = ["prog", *arguments]
    if before:
        before()
    files.run(main)
