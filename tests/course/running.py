"""The graded tests, collected once in a process that forks for each body."""

from __future__ import annotations

import ast
import importlib
import inspect
import linecache
import math
import multiprocessing
import os
import resource
import signal
import sys
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from make_course import exercises, graders

START = multiprocessing.get_context("forkserver")
START.set_forkserver_preload(["torch", "numpy", "pytest"])
# A process that is killed leaves semaphores behind, which Python's tracker would warn of
os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker")


@dataclass
class Outcome:
    """What the tests of one exercise did."""

    tests: dict[str, tuple[bool, str]] = field(default_factory=dict)  # name -> whether it passed, what it said
    ended_early: str = ""

    @property
    def failed(self) -> list[str]:
        """What the failing tests said, and why not all of them ran."""
        early = [self.ended_early] if self.ended_early else []
        return early + [said for passed, said in self.tests.values() if not passed]


class Grader:
    """The graded tests of a solved course folder."""

    def __init__(self, folder: Path, seed: str = "") -> None:
        self.folder = folder
        self.connection, theirs = START.Pipe()
        self.process = START.Process(target=serve, args=(str(folder), seed, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def outcome(self, n: int, texts: dict[str, str], seconds: float = 60, until: str = "") -> Outcome:
        """The tests of exercise n where modules have these texts; they stop where one says `until`.

        Of a text only the bodies of exercises count, in the functions that hold them.
        """
        self.connection.send((n, texts, seconds, until))
        try:
            found: Outcome = self.connection.recv()
        except EOFError:
            raise RuntimeError("the graded tests could not be collected; run them with pytest") from None
        return found

    def solved(self, n: int) -> str:
        """The solved module of exercise n."""
        return (self.folder / exercises()[n][0]).read_text(encoding="utf-8")

    def close(self) -> None:
        self.process.kill()
        self.process.join()


def serve(folder: str, seed: str, connection: Connection) -> None:
    """In a process of its own: collect, then wait for bodies."""
    import pytest
    import torch

    null = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(null, stream)
    os.chdir(folder)
    os.environ["GRADE_SEED"] = seed
    theirs = {path.stem for path in Path(folder).rglob("*.py")} | {"engine"}
    for name in [name for name in sys.modules if name.partition(".")[0] in theirs]:
        del sys.modules[name]                           # this project's modules give way to the folder's
    sys.path[:0] = [folder, f"{folder}/tests"]
    sys.dont_write_bytecode = True
    torch.set_num_threads(1)
    exercises()                                         # kept, so that no fork reads the pages again
    files = sorted(set(sum(graders().values(), [])), key=lambda file: ("test_course" in file, file))
    options = ["-q", "--tb=native", "--capture=sys", "-p", "no:cacheprovider", "-p", "no:logging"]
    pytest.main([*options, *files], plugins=[Server(connection)])
    os._exit(0)


class Server:
    """A pytest plugin: in the place of running all tests, it runs those that it is asked for, in forks."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.reports: Any = None                        # in a fork: where to send what a test did

    def pytest_runtestloop(self, session: Any) -> bool:
        while True:
            try:
                request = self.connection.recv()
            except EOFError:
                return True
            self.connection.send(self.forked(session, *request))

    def forked(self, session: Any, n: int, texts: dict[str, str], seconds: float, until: str) -> Outcome:
        receiver, sender = multiprocessing.Pipe(duplex=False)
        child = os.fork()
        if not child:
            self.reports = sender
            limit = math.ceil(seconds)                  # of its own work, however busy the machine is
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))
            try:
                self.run_tests(session, n, texts)
                sender.send(None)
            finally:
                os._exit(0)
        sender.close()
        outcome, stopped = Outcome(), f"stopped after {seconds:g} seconds"
        end = time.monotonic() + 10 * seconds           # for what waits and does not work
        try:
            while receiver.poll(max(0.0, end - time.monotonic())):
                report = receiver.recv()
                if report is None:
                    break
                name, passed, said = report
                outcome.tests[name] = passed and outcome.tests.get(name, (True,))[0], said
                if until and not passed and until in said:
                    break
            else:
                outcome.ended_early = stopped
        except EOFError:
            outcome.ended_early = "the process ended before its tests did"
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
            outcome.ended_early = stopped
        return outcome

    def run_tests(self, session: Any, n: int, texts: dict[str, str]) -> None:
        for module, text in texts.items():
            put_bodies(module, text)
        items = [item for item in session.items if item.get_closest_marker(f"ex{n}")]
        for item, after in zip(items, [*items[1:], None], strict=True):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or not report.passed:
            passed = report.when == "call" and report.outcome == "passed" and not hasattr(report, "wasxfail")
            self.reports.send((report.nodeid, passed, str(report.longrepr or report.outcome)))


def put_bodies(module: str, text: str) -> None:
    """Give the functions of exercises in this module the code that they have in this text.

    The function objects stay, so that all who have imported them see the change.
    """
    linecache.cache[module] = len(text), None, text.splitlines(keepends=True), module   # for the tracebacks
    functions = {function for file, function, *_ in exercises().values() if file == module}
    tree = ast.parse(text)
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)} & functions
    loaded = importlib.import_module(module.removeprefix("tests/").removesuffix(".py").replace("/", "."))
    for code in compile(tree, module, "exec").co_consts:
        if inspect.iscode(code) and code.co_name in names:
            inspect.unwrap(getattr(loaded, code.co_name)).__code__ = code
