"""The commands of the four pages and their flags, as argparse knows them, and what a flag may be.

Where a command has many settings they are a dataclass, of which each field is a flag (see `flag` in files.py).
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from engine.convert import KINDS, Convert
from engine.files import InputError, add_flags, flag, path_and_rest
from engine.transport import server_address

Arguments = argparse.Namespace

PRECISIONS = ("float32", "bf16")
NEGATIVES = ("last", "sampled", "none")
RANKINGS = ("ql,rc", "ql", "rc", "ql,retriever", "rc,retriever", "ql,rc,retriever")


@dataclass
class Options:
    """What generate and mine share; one flag a field."""

    llm: str = flag("offline", "offline, hf:FOLDER (a causal model in this process), or an endpoint's base URL, "
                    "as http://127.0.0.1:8000/v1, asked directly: HTTP_PROXY and HTTPS_PROXY are not used")
    model: str = flag("", "the model's name at the endpoint; else the first that it serves")
    threads: int = flag(16, "requests at a time")
    timeout: float = flag(120.0, "seconds an answer may take; a slow server wants this or fewer threads")
    seed: int = flag(0, "of the draws of seeds and of sampled negatives")
    cache: str = flag("", "JSONL of the endpoint's answers, to go on from; else X.cache.jsonl beside X.jsonl")
    max_requests: int = flag(0, "stop before one more; 0 for no limit")
    chars: int = flag(4000, "characters of a passage that the LLM is shown")
    dry_run: bool = flag(False, "count calls and prompt tokens, call nothing, write nothing")

    def __post_init__(self) -> None:
        if self.llm not in ("offline", "recorded") and not self.llm.startswith("hf:"):
            server_address(self.llm)                                 # before it is printed: it may hold a key


@dataclass
class Recipe(Options):
    """The recipe's parts; a field is a flag of `python train.py`."""

    llm: str = flag("recorded", "recorded (a real model's answers for the built-in corpus), offline, hf:FOLDER or "
                    "an endpoint's URL")
    corpus: str = flag("", "your documents: a folder of .txt, .md and .rst files, a BEIR folder or a corpus.jsonl")
    init: str = flag("tiny", "the encoder: tiny, or a model folder or hub id, which is pre-finetuned already")
    unified: bool = flag(False, "appendix B's formats also for an --init that has its makers'")
    queries: int = flag(0, "to generate; 0: all that are recorded, else one a passage")
    rank: str = flag("", "the rankings that R sums over, see llm.py; empty: ql of what is recorded, else ql,rc",
                     RANKINGS)
    negative: str = flag("", "p-: the last (p_20), one of the others, or none; empty: last, but sampled for an "
                         "--init that learns from what is recorded", NEGATIVES)
    held_out: float = flag(0.2, "share of your passages whose queries are for the results alone")
    eval: str = flag("", "a BEIR folder with labels, DIR or DIR:SPLIT: its figures stand beside")
    keep: float = flag(0.0, "share of --init's own weights in a mean with the trained ones")
    precision: str = flag("float32", "of training an --init: bf16 is autocast", PRECISIONS)

    def __post_init__(self) -> None:
        recorded = self.llm == "recorded"
        if self.corpus and recorded:
            raise InputError("--corpus: name --llm too (a URL, hf:FOLDER or offline); answers are recorded for the "
                             "built-in corpus alone")
        if self.eval and not self.corpus:
            raise InputError("--eval goes with --corpus")
        if self.keep >= 1 or self.keep and self.init == "tiny":
            raise InputError(f"--keep {self.keep}: give a share below 1, and an --init that was trained before")
        self.rank = self.rank or ("ql" if recorded else "ql,rc")
        # chosen on the dev questions, as the ranking is
        self.negative = self.negative or ("sampled" if recorded and self.init != "tiny" else "last")
        if recorded and "rc" in self.rank:
            raise InputError(f"--rank {self.rank}: no relevance is recorded; give ql or ql,retriever")
        super().__post_init__()


class Parser(argparse.ArgumentParser):
    """A mistake is one line, as everywhere."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


def parsers(page: str | None, required: bool = True) -> tuple[Parser, Callable[..., Any]]:
    """A page's parser, which says the first paragraph of the page's docstring, and what makes a command of a name
    and its meaning: this gives what adds an argument to it.
    """
    parser = Parser(description=(page or "").split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=required)
    return parser, lambda name, meaning: commands.add_parser(name, help=meaning).add_argument


# Numbers that may not be 0; no other may be below 0, but for the two that say so by it
ABOVE_0 = ("k", "limit", "max_length", "threads", "chars", "batch_size", "seeds", "timeout", "tau", "clip",
           "depth")


def parsed(parser: argparse.ArgumentParser) -> Arguments:
    """The command line; InputError for a number that no command takes, before anything is read or written."""
    args = parser.parse_args()
    for name, value in vars(args).items():
        if isinstance(value, str) and re.search("[\ud800-\udfff]", value):  # as Python reads bytes that are none
            raise InputError(f"{name} {value!a} is not UTF-8; set the terminal to it")
        if not isinstance(value, int | float) or name in ("first", "positive_from"):
            continue
        if not 0 <= value < math.inf or value == 0 and name in ABOVE_0:
            least = "above 0" if name in ABOVE_0 else "of 0 or more"
            raise InputError(f"--{name.replace('_', '-')} {value}: give a number {least}")
    return args


def gecko_arguments(page: str | None, task: str) -> Arguments:
    parser, command = parsers(page)
    search = command("search", "the passages nearest to one query")
    search("query")
    search("--corpus", help="corpus.jsonl (default: beside the model), or documents")
    search("-k", type=int, default=10, help="how many (%(default)s)")
    encode = command("encode", "a file of texts -> a .npy file of unit vectors")
    encode("input", help="JSONL with query or text (and title with --passages)")
    encode("output", help=".npy, float32, one row a text")
    encode("--passages", action="store_true", help="encode as passages, not as queries")
    encode("--precision", default="float32", choices=PRECISIONS, help="(%(default)s)")
    for add in (search, encode):
        add("--model", required=True, help="a model folder")
        add("--task", default=task, help="queries' task (%(default)s)")
        add("--dim", type=int, help="cut to this many dimensions (default: all)")
    return parsed(parser)


def data_arguments(page: str | None) -> Arguments:
    parser, command = parsers(page)
    add = command("corpus", "write the built-in corpus, or a folder of .txt, .md and .rst")
    add("output", help="the corpus.jsonl to write")
    add("documents", nargs="?", default="", help="a folder of documents; none: the built-in corpus")
    add = command("check", "what the encoder will see of a training file")
    add("file")
    add("--model", help="a model folder: also count the texts that will be cut")
    add("--max-length", type=int, help="as in training (default: the model's own)")
    add = command("convert", "publishers' files -> a training file")
    add("kind", choices=sorted(KINDS), help="what the files are")
    add("inputs", nargs="+", help=".jsonl, .csv, .tsv, plain or .gz; beir: folders")
    add("output", help="the JSONL of records to write")
    add_flags(add, Convert)
    return parsed(parser)


def llm_arguments(page: str | None) -> Arguments:
    parser, command = parsers(page)
    add = command("probe", "what an endpoint can do, with the evidence")
    add("--llm", required=True, help="the endpoint's base URL; HTTP(S)_PROXY is not used")
    add("--model", default="", help="else the first that it serves")
    add("--timeout", type=float, default=120.0, help="seconds an answer may take (%(default)s)")
    add = command("generate", "step 1: a task and a query for passages")
    add("corpus")
    add("queries", help="JSONL to write")
    add("--limit", type=int, help="how many queries (default: one a passage)")
    add_flags(add, Options)
    add = command("mine", "step 2: neighbours, rankings, labels")
    add("corpus")
    add("queries", help="what generate wrote")
    add("fret", help="JSONL to write")
    add("--model-dir", required=True, help="the initial retriever's folder")
    add("-N", type=int, default=20, help="candidates a query (%(default)s, the paper's)")
    add("--negative", choices=NEGATIVES, default="last",
        help="p_N, one of P without p+, or none (%(default)s)")
    add("--rank", choices=RANKINGS, default="ql,rc",
        help="the rankings that R sums over; rc alone where prompts cannot be scored (%(default)s)")
    add("--score", choices=("label", "expected"), default="label",
        help="RC: log p of the top label, or the expected grade (%(default)s)")
    add_flags(add, Options)
    add = command("show", "records of a FRet file as people read them")
    add("fret", help="what mine wrote")
    add("--changed", action="store_true", help="only where p+ is not p_seed")
    add("--limit", type=int, help="how many records (default: 5, of a page 10,000)")
    add("--corpus", help="the candidates' texts (default: corpus.jsonl beside FRET)")
    add("--html", help="write one HTML page, with search and filters, to this file")
    return parsed(parser)


def train_arguments(page: str | None, settings: type) -> Arguments:
    """The command is None for the recipe."""
    parser, command = parsers(page, required=False)
    parser.epilog = "Without a command: the whole recipe in small."
    parser.add_argument("--out", default="runs/demo", help="the recipe's folder (%(default)s)")
    add_flags(parser.add_argument, Recipe)
    for stage, what in (("prefinetune", "pairs, in-batch negatives (eq. 2)"),
                        ("finetune", "records with hard negatives (eq. 3)")):
        add = command(stage, what)
        add("data", nargs="+", help="JSONL records, DATA or DATA:WEIGHT")
        add("--init", required=True, help="a model folder, a hub id, or tiny")
        add("--out", required=True, help="the folder to write")
        add_flags(add, settings)
    add = command("evaluate", "retrieval and similarity figures of a model")
    add("--model", required=True, help="a model folder")
    add("--mteb", nargs="+", default=[],
        help="names of mteb's tasks, or of a benchmark, such as 'MTEB(eng, v1)', the paper's")
    add("--dim", type=int, help="cut to this many dimensions (default: all)")
    add("--out", help="write the figures to this JSON file; with --mteb, to this folder")
    add("--beir", action="append", default=[],
        help="a BEIR folder (ties by id, descending, as trec_eval); may be repeated")
    add("--sts", action="append", default=[], help="JSONL of sentence1, sentence2, score")
    add("--split", default="test", help="qrels/SPLIT.tsv (%(default)s)")
    add("--task", help="the task of all sets (default: by the set's name, Table 9)")
    args = parsed(parser)
    if args.command and sys.argv[1] != args.command:                 # argparse would drop it without a word
        raise InputError(f"{sys.argv[1]} before {args.command}: there it is the recipe's; put it after the command")
    return args


def read_dims(text: str, d: int) -> list[int]:
    """"384,128" -> [384, 128]; each at most d, the model's dimension, which alone is what "" gives."""
    parts = text.split(",") if text else [str(d)]
    for part in parts:
        if not part.strip().isdecimal() or not 1 <= int(part) <= d:
            raise InputError(f"--dims {text}: give numbers from 1 to {d} with commas between")
    return [int(part) for part in parts]


def path_and_weight(item: str) -> tuple[str, float]:
    """DATA or DATA:WEIGHT."""
    path, weight = path_and_rest(item, "1")
    if not weight.replace(".", "", 1).isdecimal() or float(weight) == 0:
        raise InputError(f"{item}: give DATA or DATA:WEIGHT; a weight is a number above 0")
    return path, float(weight)
