"""MTEB by the package mteb: the paper's Table 9 (each set's task), and a model as mteb wants it.

    pip install mteb; python train.py evaluate --model DIR --mteb SciFact STS12 --out runs/mteb
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.beir import read_beir
from engine.evaluate import encode_beir, rankings, retrieval_scores, short_names, sts_terms
from engine.files import InputError, check_outputs, say, write_json
from engine.vectors import model_key

# --------------------------------------------------------------------------------------------------
# Table 9: the task of each set, and whether it is symmetric (targets have the format of inputs)


def bare(name: str) -> str:
    """A set's name without version, digits, punctuation and the words that mteb adds."""
    return re.sub(r"\.v\d+$|HardNegatives|Retrieval|[\W\d_]", "", name, flags=re.IGNORECASE).lower()


# The first names of a row are kinds of set: a set that the table does not name has what most of its kind have.
TABLE_9: dict[str, tuple[str, bool]] = {}
for task, symmetric, names in (
    ("classification", True,
     """Classification MultilabelClassification
        AmazonCounterfactualClassification AmazonPolarityClassification AmazonReviewsClassification
        Banking77Classification EmotionClassification ImdbClassification MassiveIntentClassification
        MassiveScenarioClassification MTOPDomainClassification MTOPIntentClassification
        ToxicConversationsClassification TweetSentimentExtractionClassification"""),
    ("semantic similarity", True,
     """STS PairClassification BitextMining
        BIOSSES SICK-R STS12 STS13 STS14 STS15 STS16 STS17 STS22 STSBenchmark SprintDuplicateQuestions
        TwitterSemEval2015 TwitterURLCorpus"""),
    ("search result", True,
     """Clustering
        ArxivClusteringP2P ArxivClusteringS2S BiorxivClusteringP2P BiorxivClusteringS2S
        MedrxivClusteringP2P MedrxivClusteringS2S RedditClustering RedditClusteringP2P
        StackExchangeClustering StackExchangeClusteringP2P TwentyNewsgroupsClustering QuoraRetrieval"""),
    ("search result", False,
     """Summarization
        StackOverflowDupQuestions ClimateFEVER FEVER HotpotQA TRECCOVID SummEval"""),
    ("question answering", False,
     """AskUbuntuDupQuestions SciDocsRR CQADupstackRetrieval DBPedia FiQA2018 MSMARCO NQ SCIDOCS
        Touche2020"""),
    ("semantic similarity", False, "MindSmallReranking ArguAna"),
    ("fact checking", False, "NFCorpus SciFact"),
):
    TABLE_9.update(dict.fromkeys(map(bare, names.split()), (task, symmetric)))


def table_9(name: str, kind: str = "Retrieval") -> tuple[str, bool]:
    """The task and symmetry of a set, by mteb's name or its folder's (scifact, trec-covid).

    >>> table_9("trec-covid"), table_9("my-questions"), table_9("FEVERHardNegatives")
    (('search result', False), ('question answering', False), ('search result', False))
    """
    by_kind = TABLE_9.get(bare(kind), ("question answering", False))
    return TABLE_9.get(bare(name), by_kind)


# --------------------------------------------------------------------------------------------------
# A model as mteb's EncoderProtocol asks for it


class ForMteb:
    """float32 vectors in the model's own formats, with Table 9's tasks (or `task` for all sets)."""

    def __init__(
        self,
        model: Any,
        name: str,
        format_query: Callable[..., str],         # of a text, its task and the model's formats
        dim: int | None = None,                   # None: all
        task: str | None = None,                  # None: Table 9's
    ) -> None:
        from mteb.models.model_meta import ModelMeta

        self.model, self.format_query, self.dim, self.task = model, format_query, dim, task
        # mteb keeps results by name and revision: what changes them changes the revision
        settings = repr((model.formats, dim, task)).encode()
        revision = hashlib.blake2b(settings, digest_size=8, key=model_key(model)).hexdigest()
        self.mteb_model_meta = ModelMeta.create_empty({"name": f"gecko/{name}", "revision": revision})

    def encode(self, inputs: Any, *, task_metadata: Any, prompt_type: Any = None, **_: Any,
               ) -> np.ndarray:
        """inputs: batches {"text": [...]}; passages have "title" and "body" too -> (texts, dim)."""
        task, symmetric = table_9(task_metadata.name, task_metadata.type)
        columns: dict[str, list[str]] = defaultdict(list)
        for batch in inputs:
            for key, values in batch.items():
                columns[key] += values
        if prompt_type == "document" and not symmetric:
            return self.model.encode_passages(columns["body"], columns.get("title"), dim=self.dim)
        # not encode_queries, which refuses empty texts: some of mteb's sets have them
        formats, task = self.model.formats, self.task or task
        texts = [self.format_query(text, task, formats) for text in columns["text"]]
        return self.model.encode(texts, dim=self.dim)

    def similarity(self, x: Any, y: Any) -> Any:
        return x @ y.T                                               # (B, C)

    def similarity_pairwise(self, x: Any, y: Any) -> Any:
        return (x * y).sum(-1)                                       # (B)


# --------------------------------------------------------------------------------------------------
# mteb's protocol


def mteb_tasks(names: Sequence[str]) -> list[Any]:
    """mteb's tasks by name, or all of a benchmark's; the paper's 56 in English, as its benchmark has them."""
    try:
        import mteb
    except ImportError as error:
        raise InputError("--mteb needs the package mteb; install it: pip install mteb") from error
    known = {benchmark.name: benchmark.tasks for benchmark in mteb.get_benchmarks()}
    for task in known["MTEB(eng, v1)"]:
        known[task.metadata.name] = [task]
    tasks: list[Any] = []
    for name in names:
        try:
            tasks.extend(known.get(name) or [mteb.get_task(name)])
        except KeyError as error:
            raise InputError(f"--mteb: {error.args[0]}") from error
    return tasks


def mteb_scores(model: ForMteb, tasks: Sequence[Any], out: str | None = None,
                ) -> dict[str, dict[str, float]]:
    """Each task's main score; mteb's own JSON goes under `out`, where a second run goes on."""
    import mteb

    cache = mteb.ResultCache(out) if out else None
    results = mteb.evaluate(model, tasks, cache=cache, co2_tracker=False)
    measures = {task.metadata.name: task.metadata.main_score for task in tasks}
    scores = {}
    for result in results.task_results:
        name = result.task_name
        scores[name] = {measures[name]: float(result.get_score())}
    return scores


# --------------------------------------------------------------------------------------------------
# A user's own sets, and the command


def evaluate_command(args: Any, load: Callable[[str], Any], format_query: Callable[..., str]) -> None:
    """`train.py evaluate`: the figures of a model on all sets that are named."""
    if not (args.beir or args.sts or args.mteb):
        raise InputError("nothing to evaluate on; give --beir DIR, --sts FILE or --mteb TASK")
    out = f"{args.out}/scores.json" if args.out and args.mteb else args.out
    check_outputs([out], *args.sts)
    tasks = mteb_tasks(args.mteb) if args.mteb else []               # before the model: a name may be wrong
    say(model=args.model, dim=args.dim or "all", split=args.split, task=args.task or "by Table 9")
    model = load(args.model)
    results: dict[str, dict[str, float]] = defaultdict(dict)         # two sets of one name have other measures
    for name, folder in zip(short_names(args.beir), args.beir, strict=True):
        task, symmetric = table_9(Path(name).name)
        beir = read_beir(folder, args.split)
        q, P = encode_beir(model, beir, args.task or task, symmetric, "passages", dim=args.dim)
        scores = retrieval_scores(rankings(beir, q, P), beir.qrels)
        results[name] |= {measure: float(np.mean(values)) for measure, values in scores.items()}
    for name, path in zip(short_names(args.sts), args.sts, strict=True):
        task, _ = table_9(Path(name).stem, "STS")
        terms = sts_terms(model, path, args.dim, args.task or task)
        results[name] |= {"spearman": float(terms.mean())}
    if tasks:
        adapter = ForMteb(model, Path(args.model).resolve().name, format_query, args.dim, args.task)
        for name, values in mteb_scores(adapter, tasks, args.out).items():
            results[name] |= values
    for name, values in results.items():
        print(name, "  ".join(f"{measure} {value:.4f}" for measure, value in values.items()))
    if out:
        write_json(Path(out), results)
        print(f"wrote {out}")
