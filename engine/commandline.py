"""The commands of the four pages and their flags, as argparse knows them.

A page's settings come as dataclasses, of which each field is a flag (see `flag` in files.py).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from engine.files import InputError, add_flags, utf8

Arguments = argparse.Namespace


def parser_of(page: str | None, epilog: str = "") -> argparse.ArgumentParser:
    """A page's parser, which says the first paragraph of the page's docstring."""
    return argparse.ArgumentParser(description=(page or "").split("\n\n")[0], epilog=epilog)


def gecko_arguments(page: str | None, task: str) -> Arguments:
    parser = parser_of(page)
    commands = parser.add_subparsers(dest="command", required=True)
    search = commands.add_parser("search", help="the passages nearest to one query").add_argument
    search("query", type=utf8)
    search("--corpus", help="corpus.jsonl (default: beside the model), or documents")
    search("-k", type=int, default=10, help="how many (%(default)s)")
    encode = commands.add_parser("encode", help="a file of texts -> a .npy file of unit vectors").add_argument
    encode("input", help="JSONL with query or text (and title with --passages)")
    encode("output", help=".npy, float32, one row a text")
    encode("--passages", action="store_true", help="encode as passages, not as queries")
    encode("--precision", default="float32", choices=("float32", "bf16"), help="(%(default)s)")
    for add in (search, encode):
        add("--model", required=True, help="a model folder")
        add("--task", type=utf8, default=task, help="queries' task (%(default)s)")
        add("--dim", type=int, help="cut to this many dimensions (default: all)")
    return parser.parse_args()


def data_arguments(page: str | None, kinds: Iterable[str], settings: type) -> Arguments:
    parser = parser_of(page)
    commands = parser.add_subparsers(dest="command", required=True)
    corpus = commands.add_parser("corpus", help="write the built-in corpus, or a folder of .txt, .md and .rst")
    corpus.add_argument("output", help="the corpus.jsonl to write")
    corpus.add_argument("documents", nargs="?", default="", help="a folder of documents; none: the built-in corpus")
    check = commands.add_parser("check", help="what the encoder will see of a training file").add_argument
    check("file")
    check("--model", help="a model folder: also count the texts that will be cut")
    check("--max-length", type=int, help="as in training (default: the model's own)")
    convert = commands.add_parser("convert", help="publishers' files -> a training file")
    convert.add_argument("kind", choices=sorted(kinds), help="what the files are")
    convert.add_argument("inputs", nargs="+", help=".jsonl, .csv, .tsv, plain or .gz; beir: folders")
    convert.add_argument("output", help="the JSONL of records to write")
    add_flags(convert, settings)
    return parser.parse_args()


def llm_arguments(page: str | None, settings: type) -> Arguments:
    parser = parser_of(page)
    commands = parser.add_subparsers(dest="command", required=True)
    probe = commands.add_parser("probe", help="what an endpoint can do, with the evidence").add_argument
    probe("--llm", required=True, help="the endpoint's base URL; HTTP(S)_PROXY is not used")
    probe("--model", default="", help="else the first that it serves")
    probe("--timeout", type=float, default=120.0, help="seconds an answer may take (%(default)s)")
    generate = commands.add_parser("generate", help="step 1: a task and a query for passages")
    generate.add_argument("corpus")
    generate.add_argument("queries", help="JSONL to write")
    generate.add_argument("--limit", type=int, help="how many queries (default: one a passage)")
    mine = commands.add_parser("mine", help="step 2: neighbours, rankings, labels")
    mine.add_argument("corpus")
    mine.add_argument("queries", help="what generate wrote")
    mine.add_argument("fret", help="JSONL to write")
    mine.add_argument("--model-dir", required=True, help="the initial retriever's folder")
    mine.add_argument("-N", type=int, default=20, help="candidates a query (%(default)s, the paper's)")
    mine.add_argument("--negative", choices=("last", "sampled", "none"), default="last",
                      help="p_N, one of P without p+, or none (%(default)s)")
    mine.add_argument("--rank", default="ql,rc",
                      help="the rankings that R sums over, of ql, rc and retriever, with commas between; "
                           "rc alone where prompts cannot be scored (%(default)s)")
    mine.add_argument("--score", choices=("label", "expected"), default="label",
                      help="RC: log p of the top label, or the expected grade (%(default)s)")
    show = commands.add_parser("show", help="records of a FRet file as people read them").add_argument
    show("fret", help="what mine wrote")
    show("--changed", action="store_true", help="only where p+ is not p_seed")
    show("--limit", type=int, default=0, help="how many records (default: 5, of a page 10,000)")
    show("--corpus", default="", help="the candidates' texts (default: corpus.jsonl beside FRET)")
    show("--html", default="", help="write one HTML page, with search and filters, to this file")
    for command in (generate, mine):
        add_flags(command, settings)
    return parser.parse_args()


def train_arguments(page: str | None, recipe: type, settings: type) -> Arguments:
    """The command is None for the recipe."""
    parser = parser_of(page, "Without a command: the whole recipe in small.")
    parser.add_argument("--out", default="runs/demo", help="the recipe's folder (%(default)s)")
    add_flags(parser, recipe)
    commands = parser.add_subparsers(dest="command")
    for stage, what in (("prefinetune", "pairs, in-batch negatives (eq. 2)"),
                        ("finetune", "records with hard negatives (eq. 3)")):
        command = commands.add_parser(stage, help=what)
        command.add_argument("data", nargs="+", help="JSONL records, DATA or DATA:WEIGHT")
        command.add_argument("--init", required=True, help="a model folder, a hub id, or tiny")
        command.add_argument("--out", required=True, help="the folder to write")
        add_flags(command, settings)
    evaluate = commands.add_parser("evaluate", help="retrieval and similarity figures of a model").add_argument
    evaluate("--model", required=True, help="a model folder")
    evaluate("--mteb", nargs="+", default=[],
             help="names of mteb's tasks, or of a benchmark, such as 'MTEB(eng, v1)', the paper's")
    evaluate("--dim", type=int, help="cut to this many dimensions (default: all)")
    evaluate("--out", help="write the figures to this JSON file; with --mteb, to this folder")
    evaluate("--beir", action="append", default=[],
             help="a BEIR folder (ties by id, descending, as trec_eval); may be repeated")
    evaluate("--sts", action="append", default=[], help="JSONL of sentence1, sentence2, score")
    evaluate("--split", default="test", help="qrels/SPLIT.tsv (%(default)s)")
    evaluate("--task", help="the task of all sets (default: by the set's name, Table 9)")
    args = parser.parse_args()
    if args.command and sys.argv[1] != args.command:                 # argparse would drop it without a word
        raise InputError(f"{sys.argv[1]} before {args.command}: there it is the recipe's; put it after the command")
    return args


def path_and_weight(item: str) -> tuple[str, float]:
    """DATA or DATA:WEIGHT; a file's name may hold a colon."""
    path, _, weight = item.rpartition(":")
    if not path or Path(item).exists():
        return item, 1.0
    if not weight.replace(".", "", 1).isdecimal() or float(weight) == 0:
        raise InputError(f"{item}: give DATA or DATA:WEIGHT; a weight is a number above 0")
    return path, float(weight)


def checked(settings: Any) -> Any:
    """The same settings of a training; what cannot be run is one line, before anything is read or written."""
    choices = {"precision": ("float32", "bf16"), "mix": ("sets", "mixed", "tasks")}
    for name, value in vars(settings).items():
        given = f"--{name.replace('_', '-')} {value}"
        if name in choices and value not in choices[name]:
            raise InputError(f"{given}: give " + " or ".join(choices[name]))
        if name in ("tau", "batch_size", "clip", "max_length") and not 0 < value < math.inf:
            raise InputError(f"{given}: give a number above 0")
        if isinstance(value, (int, float)) and not 0 <= value < math.inf:
            raise InputError(f"{given}: give 0 or a number above it")
    return settings
