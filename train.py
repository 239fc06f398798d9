"""Losses, the training loop and the whole recipe (Gecko, arXiv 2403.20327, sections 3.1 to 3.3).

Eq. 2 pre-finetunes on pairs with in-batch negatives. Eq. 3 fine-tunes on records with the row's own hard
negative and same-tower negatives, and is repeated on the first dimensions (Matryoshka).

    python train.py                                       the whole recipe in small -> runs/demo/
    python train.py --init MODEL [--corpus DOCS --llm URL|hf:DIR|offline] --out OUT
    python train.py prefinetune|finetune DATA[:WEIGHT]... --init DIR|HUB-ID|tiny --out DIR
    torchrun --nproc-per-node N train.py finetune ...     the same gradient on N processes
    python train.py evaluate --model DIR --beir DIR

Where we differ from the paper, or fill a gap in it:
1. tau, optimiser, learning rate, batch size, steps, weight of the Matryoshka terms (3.3, silent): the
   fields of TrainConfig; AdamW, linear warm-up and decay; all dimensions weigh the same.
2. Duplicates (silent): no equal text, nor one of an equal query, is a negative: `duplicate_mask`, engine/runs.py.
3. A row without a hard negative leaves that term of eq. 3 out.
4. Batches (3.3, silent): from one set at a time; `--mix` has the other choices, see data.py.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import llm
from data import Record, Records, batches, builtin_corpus, builtin_pairs, formatted, read_records, record
from engine.beir import read_split
from engine.cache import DryRun
from engine.commandline import PRECISIONS, Arguments, Recipe, path_and_weight, read_dims, train_arguments
from engine.corpus import Corpus
from engine.documents import heading_pairs, read_corpus
from engine.files import flag, from_flags, run, say, write_jsonl
from engine.kept import read_queries, write_kept
from engine.mteb import evaluate_command
from engine.offline import Offline
from engine.packed import autocast
from engine.recorded import Recorded
from engine.results import cost, example, held_apart, held_passages, hold_out, on_dev, results
from engine.runs import Run, check_negatives, run_key, tokenised
from engine.scale import blockwise_loss, cached_backward, derive_seed, processes, start_processes, stop_processes
from gecko import FORMATS, Gecko, format_query, is_bag, load, save, tiny, truncate_dim

# B rows in a batch, d the model's dimension, tau the temperature, s = cos / tau. The vectors of a loss,
# q, p_pos and p_neg, are (B, d) with rows of length 1, so that a cosine is an inner product.
# `rows` are those whose loss is taken, r of the B; each is scored against the texts of all B.

ALL = slice(None)

# --------------------------------------------------------------------------------------------------
# Equal texts are no negatives of each other (gap 2)


def duplicate_mask(
    q_id: Tensor,       # (r) integer ids of the rows' query texts
    p_id: Tensor,       # (r) integer ids of the rows' positive texts
    text_id: Tensor,    # (B) integer ids of the candidate negatives
    asked_id: Tensor,   # (B) integer ids of the queries that they belong to
) -> Tensor:            # (r, B)
    """True where candidate j is row i's own query or positive, or belongs to the same query.

    That includes j = i. Below, rows 0 and 1 ask 5 and 6 and share the positive 8, row 2 asks 7 and has 9; the
    candidates are the rows' positives (for the rows' queries text_id would be q_id):

    >>> q_id, p_id = torch.tensor([5, 6, 7]), torch.tensor([8, 8, 9])
    >>> duplicate_mask(q_id, p_id, text_id=p_id, asked_id=q_id).tolist()
    [[True, True, False], [True, True, False], [False, False, True]]
    """
    own_positive = text_id == p_id[:, None]                          # (r, B)
    own_query = text_id == q_id[:, None]                             # (r, B)
    same_query = asked_id == q_id[:, None]                           # (r, B)
    return own_positive | own_query | same_query


# --------------------------------------------------------------------------------------------------
# Pre-finetuning (section 3.1, eq. 2)


def pre_loss(
    q: Tensor,      # (B, d) queries, unit rows
    p: Tensor,      # (B, d) passages, unit rows
    tau: float,
    q_id: Tensor,   # (B) integer ids of the query texts
    p_id: Tensor,   # (B) integer ids of the passage texts
    rows: slice = ALL,
) -> Tensor:        # scalar
    """Eq. 2: L_pre = mean_i -log  e^{s(q_i, p_i)} / sum_j e^{s(q_i, p_j)},  s = cos / tau.

    The other rows' passages are the negatives, less the duplicates; there are no hard ones. The mean is
    over the rows i of `rows`; j runs over all B.
    """
    # EXERCISE 2 (about 6 lines)
    j = torch.arange(len(q), device=q.device)                        # (B)
    i = j[rows]                                                      # (r)
    s = q[rows] @ p.T / tau                                          # (r, B)
    duplicates = duplicate_mask(q_id[rows], p_id[rows], p_id, q_id)  # (r, B)
    s = s.masked_fill(duplicates & (j != i[:, None]), -math.inf)     # (r, B) the positive itself stays
    return F.cross_entropy(s, i)
    # END EXERCISE


# --------------------------------------------------------------------------------------------------
# Fine-tuning (section 3.3, eq. 3)


def main_loss(
    q: Tensor,      # (B, d) inputs, unit rows
    p_pos: Tensor,  # (B, d) positive targets, unit rows
    p_neg: Tensor,  # (B, d) hard negative targets, unit rows (ignored where n_id is -1)
    tau: float,
    q_id: Tensor,   # (B) integer ids of the input texts
    p_id: Tensor,   # (B) integer ids of the positive texts
    n_id: Tensor,   # (B) integer ids of the hard negative texts, -1 where the row has none
    rows: slice = ALL,
) -> Tensor:        # scalar
    """Eq. 3, with s = cos / tau:

    L_main = mean_i -log e^{s(q_i,p_i+)} / ( sum_j [e^{s(q_i,p_j+)} + 1[j!=i] e^{s(q_i,q_j)}]
                                             + e^{s(q_i,p_i-)} )

    The negatives: other rows' positives and queries (same-tower), less the duplicates, and the row's own
    hard negative, if it has one (gap 3). s(q_i, q_i) is left out: it is 1 / tau whatever is learned. The
    mean is over the rows i of `rows`; j runs over all B.
    """
    # EXERCISE 7 (about 15 lines)
    j = torch.arange(len(q), device=q.device)                        # (B)
    i = j[rows]                                                      # (r)
    others = j != i[:, None]                                         # (r, B) 1[j != i]
    q_i, q_i_id, p_i_id = q[rows], q_id[rows], p_id[rows]            # (r, d), (r), (r)

    positives = q_i @ p_pos.T / tau                                  # (r, B) s(q_i, p_j+)
    duplicates = duplicate_mask(q_i_id, p_i_id, p_id, q_id)          # (r, B)
    positives = positives.masked_fill(duplicates & others, -math.inf)

    queries = q_i @ q.T / tau                                        # (r, B) s(q_i, q_j)
    duplicates = duplicate_mask(q_i_id, p_i_id, q_id, q_id)          # (r, B)
    queries = queries.masked_fill(duplicates | ~others, -math.inf)

    own = (q_i * p_neg[rows]).sum(1, keepdim=True) / tau             # (r, 1) s(q_i, p_i-), no other row's
    own = own.masked_fill(n_id[rows, None] < 0, -math.inf)

    s = torch.cat([positives, queries, own], dim=1)                  # (r, 2B + 1)
    return F.cross_entropy(s, i)
    # END EXERCISE


# --------------------------------------------------------------------------------------------------
# Matryoshka (section 3.3, MRL)


def mrl_loss(
    loss: Callable[..., Tensor],  # of as many tensors as there are `vectors`, unit rows
    dims: Sequence[int],          # such as 768, 256
    *vectors: Tensor,             # each (B, d), not yet of length 1
) -> Tensor:                      # scalar
    """The sum over dims of the loss on the first dim dimensions, normalised again after the cut."""
    # EXERCISE 8 (about 5 lines)
    total = torch.zeros((), device=vectors[0].device)
    for dim in dims:
        short = [truncate_dim(x, dim) for x in vectors]              # each (B, dim)
        total = total + loss(*short)
    return total
    # END EXERCISE


# --------------------------------------------------------------------------------------------------
# The loop, for both stages


@dataclass
class TrainConfig:
    """A field is a flag of `prefinetune` and `finetune`; the paper states no value but dims, 768 and 256."""

    batch_size: int = flag(256, "rows a step; the others give a row its in-batch negatives")
    epochs: float = flag(1.0, "times through the data")
    steps: int = flag(0, "number of steps; 0: as many as the epochs hold")
    lr: float = flag(0.0, "peak learning rate; 0: 1e-2 for a bag of words, 3e-5 for layers")
    warmup: float = flag(0.05, "share of the steps in which the learning rate rises")
    weight_decay: float = flag(0.0, "AdamW's")
    clip: float = flag(1.0, "largest norm of the gradient")
    tau: float = flag(0.05, "temperature: similarities are cosine / tau")
    dims: str = flag("", "Matryoshka dimensions, such as 384,128; empty: the full one alone")
    max_length: int = flag(64, "tokens of a text in training; the rest is cut")
    seed: int = flag(0, "of the order of the data and of dropout")
    precision: str = flag("float32", "bf16: autocast", PRECISIONS)
    micro_batch: int = flag(0, "texts of mean length in memory at a time (gradient caching); 0: all")
    mix: str = flag("sets", "a batch holds rows of one of the sets, or mixed ones, or of all tasks alike",
                    ("sets", "mixed", "tasks"))
    unified: bool = flag(False, "appendix B's formats also for an --init that has its makers' (see README)")
    eval: str = flag("", "BEIR folder: nDCG@10 of its dev split at each save, the best kept in OUT/best")
    save_every: int = flag(0, "steps from one checkpoint to the next; 0: one at the end")
    resume: bool = flag(False, "continue from OUT's last checkpoint: the same bytes as without a stop")


def learning_rate(step: int, steps: int, max_lr: float, warmup: float) -> float:
    """Linear warm-up to max_lr over the share `warmup` of the steps, then linear decay to 0."""
    warmup_steps = max(1.0, warmup * steps)
    rising = (step + 1) / warmup_steps
    falling = (steps - step) / max(1.0, steps - warmup_steps)
    return max_lr * min(rising, falling, 1.0)


def batch_loss(
    stage: str,     # "prefinetune" (eq. 2) or "finetune" (eq. 3)
    tau: float,
    ids: Tensor,    # (3, B) ids of the rows' inputs, positives and hard negatives (-1: none)
) -> Callable[..., Tensor]:
    """The stage's loss of one batch, as a function of its vectors."""
    q_id, p_id, n_id = ids
    if stage == "prefinetune":
        return functools.partial(pre_loss, tau=tau, q_id=q_id, p_id=p_id)
    return functools.partial(main_loss, tau=tau, q_id=q_id, p_id=p_id, n_id=n_id)


def train(
    model: Gecko,                            # changed in place
    stage: str,                              # "prefinetune" (eq. 2) or "finetune" (eq. 3)
    sets: Sequence[Records],                 # the mixture of section 3.3
    c: TrainConfig,
    weights: Sequence[float] | None = None,  # of the sets; None: all alike
    title: str = "",                         # of the progress bar
    out: Path | None = None,                 # the folder for the model, metrics.jsonl and checkpoints
    anew: bool = False,                      # resume begins anew where another run's checkpoint stands
) -> list[float]:                            # the loss of each step
    """Train on batches of the mixture. A loss or gradient that is not finite is an InputError."""
    # the data: tokens, text ids, and which rows each step has
    d = model.encoder.config.hidden_size
    dims = read_dims(c.dims, d)
    S = 2 if stage == "prefinetune" else 3                           # sides of a row: eq. 2 has no hard negative
    steps = c.steps or max(1, int(c.epochs * sum(map(len, sets)) / c.batch_size))
    plan = batches(sets, weights, c.mix, c.batch_size, steps, c.seed)  # row numbers of every step
    rows = ((formatted(row, model.formats), row["query"]) for row in itertools.chain(*sets))
    tokens, text_ids = tokenised(model, rows, c.max_length, plan)    # text_ids: (rows, 3)
    check_negatives(functools.partial(batch_loss, stage, 1.0), S, text_ids, plan)  # else nothing is learned

    # the optimiser, and the run's folder; `key` holds all that decides the result, so that nothing else resumes it
    max_lr = c.lr or (1e-2 if is_bag(model.encoder) else 3e-5)
    parameters = [p for p in model.encoder.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=max_lr, weight_decay=c.weight_decay, fused=True)
    in_precision = autocast(model.device, c.precision)
    model.dims = tuple(dims)
    settings = f"{stage} {replace(c, eval='', save_every=0, resume=False)} {model.encoder.config}"
    key = run_key(settings, itertools.chain([text_ids], plan, model.encoder.parameters(), tokens))
    save_model, measure = functools.partial(save, model), on_dev(model, c.eval)
    this_run = Run(out, model.encoder, optimiser, steps, key, save_model, measure)
    losses = this_run.resume(c.resume, anew)                         # of the steps that are done already
    bar = tqdm(range(len(losses), steps), desc=title or stage, unit="step", initial=len(losses),
               total=steps, disable=processes()[0] > 0)              # `processes`: (rank, how many)

    def embed(ids: Tensor) -> Tensor:                                # (n) -> (n, d), 0 where there is no text
        x = torch.zeros(len(ids), d, dtype=parameters[0].dtype, device=model.device)
        there = ids >= 0                                             # (n)
        if there.any():
            with in_precision:
                vectors = model.embed([tokens[i] for i in ids[there].tolist()])
            x[there] = vectors.to(x.dtype)
        return x

    for step in bar:
        model.encoder.train()
        torch.manual_seed(derive_seed(c.seed, step))                 # the same dropout in a resumed run
        lr = learning_rate(step, steps, max_lr, c.warmup)
        for group in optimiser.param_groups:
            group["lr"] = lr
        ids = torch.from_numpy(text_ids[plan[step]]).T.to(model.device)   # (3, B)
        loss_of = batch_loss(stage, c.tau, ids)
        optimiser.zero_grad(set_to_none=True)
        if c.micro_batch == 0 and processes()[1] == 1:
            vectors = [embed(side) for side in ids[:S]]              # q, p_pos (eq. 3: p_neg), each (B, d)
            loss = mrl_loss(loss_of, dims, *vectors)
            loss.backward()
        else:                                                        # the same in parts: many rows, or processes
            in_blocks = functools.partial(blockwise_loss, loss_of, truncate_dim, dims)
            loss = cached_backward(embed, in_blocks, ids[:S], tokens, c.micro_batch, d, parameters, (c.seed, step))
        norm = torch.nn.utils.clip_grad_norm_(parameters, c.clip)
        this_run.check_finite(step + 1, loss.item(), norm.item())
        optimiser.step()
        losses.append(loss.item())
        done = step + 1
        this_run.log(step=done, loss=losses[-1], lr=lr)
        bar.set_postfix(loss=f"{np.mean(losses[-20:]):.3f}", refresh=False)
        if done == steps or c.save_every and done % c.save_every == 0:
            this_run.checkpoint(losses)
    model.encoder.eval()
    this_run.finish()
    return losses


# --------------------------------------------------------------------------------------------------
# The recipe: the paper's section 3, top to bottom


@dataclass
class Sizes:
    """How much of everything the recipe does for `tiny`; chosen on the dev questions."""

    pairs: int = 600_000        # title-body pairs of the built-in corpus
    templates: int = 8          # templated queries for each of its passages
    pre_steps: int = 1500       # of pre-finetuning, at most
    steps: int = 100            # of each training on generated queries, at most


BAG = TrainConfig(batch_size=512, tau=0.1, dims="384,128", mix="mixed")              # for `tiny`
LAYERS = TrainConfig(batch_size=64, tau=0.05, lr=5e-5, epochs=3)                     # for a pre-trained encoder


def recipe(o: Recipe, out: Path, sizes: Sizes | None = None,
           corpus: Corpus | None = None) -> None:
    """Pre-finetune, generate, mine, fine-tune, evaluate: on the built-in corpus or on your documents.

    `o` holds the flags (engine/commandline.py). A run of the same flags and data goes on from where it was, and
    asks no LLM twice.
    """
    sizes = sizes or Sizes()
    corpus = corpus or (read_corpus(o.corpus) if o.corpus else builtin_corpus())
    labelled = read_split(o.eval) if o.eval else None                # before an LLM is opened, which may be large
    author = llm.open_llm(o, str(out / "llm.jsonl"), corpus)          # writes the queries, and ranks the passages
    if isinstance(author, Recorded):
        draws = author.draws()[:o.queries or None]
    else:
        draws = llm.seed_draws(corpus, o.queries or len(corpus), o.seed)
    names = set[str]()                                               # of passages whose queries are held out
    if o.corpus:                                                     # an error now, before anything is spent
        names = held_passages([corpus[i]["_id"] for i in draws], o.held_out, o.seed)
    print(f"{len(corpus):,} passages, {len(draws):,} queries; LLM {o.llm}, encoder {o.init}")
    if isinstance(author, llm.LanguageModel):
        author.strings.scored_by(o.rank, author.score)               # an error now where it cannot rank
        counting = llm.LanguageModel(DryRun(), chars=o.chars)
        print(f"asked of {o.llm}: {cost(counting, corpus, draws, o.rank)}")
    if o.dry_run:
        return
    write_jsonl(out / "corpus.jsonl", corpus)

    start, pre, pairs, c = pre_finetuned(o, corpus, sizes, out)

    print("3.2  FRet, step 1: the LLM gives a task and a query for passages")
    write_kept(out / "queries.jsonl", llm.generate(author, corpus, draws), len(draws), "generate", author)
    queries, held = hold_out(read_queries(out / "queries.jsonl", corpus), names)

    print("3.2  The initial retriever, trained on (q, p_seed), beside the pairs of 3.1 if there are any")
    retriever = trained(pre, "prefinetune", [queries, *pairs], WEIGHTS, c, out / "retriever")

    print(f"3.2  FRet, step 2: each query's candidates, ranked by {o.rank}, relabelled")
    if isinstance(author, Offline):
        author.embedder = retriever                                  # its second ranking
    known = author.candidates if isinstance(author, Recorded) else None    # in the place of those found
    N = min(20, len(corpus))
    mined = llm.mine(author, retriever, corpus, [*queries, *held], N, o.negative, o.rank, o.seed, choose=known)
    write_kept(out / "fret.jsonl", mined, len(queries) + len(held), "mine", author)
    rows, asked = held_apart(out / "fret.jsonl", held)                # to train on, and held out
    print(example(rows))

    print("3.3  Fine-tuning on the mixture of FRet and pairs (eq. 3, Matryoshka)")
    gecko = trained(pre, "finetune", [rows, *pairs], WEIGHTS, c, out / "gecko")  # from pre again

    stages = {"BM25": None, "as it came": pre}
    if start is not pre:
        stages = {"untrained": start, "BM25": None, "pre-finetuned": pre}
    p_neg = {"last": "p_20"}.get(o.negative, o.negative)
    stages |= {"+ (q, p_seed)": retriever, f"+ FRet (p_1, {p_neg})": gecko}
    results(out, corpus, stages, asked, labelled, o.keep, save)


def pre_finetuned(o: Recipe, corpus: Corpus, sizes: Sizes, out: Path,
                  ) -> tuple[Gecko, Gecko, list[list[Record]], TrainConfig]:
    """Section 3.1: the encoder before and after, the sets it learned from, and how it is to be trained further."""
    length = 160 if o.corpus else 64                                 # documents are longer than docstrings
    if o.init != "tiny":
        print(f"3.1  Pre-finetuning is left out: {o.init} has its makers'")
        pre = load(o.init)
        pre.formats = dict(FORMATS) if o.unified else pre.formats
        return pre, pre, [], replace(LAYERS, seed=o.seed, precision=o.precision, max_length=length)
    print("3.1  Pre-finetuning on pairs (eq. 2)")
    c = replace(BAG, seed=o.seed, max_length=length)
    pairs = title_body_pairs(o, corpus, sizes)
    start = untrained(corpus, list(itertools.chain(*pairs)), o.seed)
    steps = min(sizes.pre_steps, 50 + 20 * len(pairs[0]) // c.batch_size)
    pre = trained(start, "prefinetune", pairs, PAIR_WEIGHTS, replace(c, steps=steps), out / "pre")
    steps = min(sizes.steps, 20 + 20 * len(corpus) // c.batch_size)
    return start, pre, pairs, replace(c, steps=steps, lr=2e-3)


# Weights of the mixture (section 3.3), chosen on the dev questions: of title-body pairs and templated queries, and
# of the LLM's queries and these two. Where the last sets are missing, so are their weights.
PAIR_WEIGHTS = [2.0, 1.0]
WEIGHTS = [1.0, 0.5, 1.0]


def title_body_pairs(o: Recipe, corpus: Corpus, sizes: Sizes) -> list[list[Record]]:
    """Sets to pre-finetune `tiny` on: headings and paragraphs of your documents, or for the built-in corpus the
    interpreter's documentation and sources, and queries by template. The paper has the web, and academic sets.
    """
    if o.corpus:
        return [[record("search result", query, {"title": title, "text": text})
                 for query, title, text in heading_pairs(corpus)]]
    stand_in = Offline(corpus, None, list(llm.FREQUENT_TASKS), o.seed)
    draws = llm.seed_draws(corpus, sizes.templates * len(corpus), o.seed)
    pairs = builtin_pairs(corpus, sizes.pairs, o.seed)
    templated = list(llm.generate(stand_in, corpus, draws))
    return [pairs, templated]


def untrained(corpus: Corpus, pairs: Records, seed: int = 0) -> Gecko:
    """The smallest encoder, with a tokenizer of all that it will read."""
    return tiny([f"{p['title']} {p['text']}" for p in corpus]
                + [f"{r['query']} {r['positive']['text']}" for r in pairs], seed)


def trained(start: Gecko, stage: str, sets: Sequence[Records], weights: Sequence[float],
            c: TrainConfig, out: Path) -> Gecko:
    """A copy of `start` after a stage, written to its folder, where an earlier run of the same stage goes on."""
    model = copy.deepcopy(start)
    c = replace(c, resume=True, save_every=100)
    train(model, stage, sets, c, weights[:len(sets)], out.name, out, anew=True)
    return model


# --------------------------------------------------------------------------------------------------
# Command line


def train_command(args: Arguments) -> None:
    """prefinetune and finetune: read the sets, train, write the model; under torchrun on several processes."""
    c, out = from_flags(TrainConfig, args), Path(args.out)
    paths, weights = zip(*map(path_and_weight, args.data), strict=True)
    start_processes()
    first = processes()[0] == 0
    sets = [read_records(path, candidates=False) for path in paths]
    if first:
        sizes = [len(rows) for rows in sets]
        say(data=args.data, rows=sizes, init=args.init, out=out, **vars(c), processes=processes()[1])
    if args.init == "tiny":
        model = tiny([f"{r['query']} {r['positive'].get('title', '')} {r['positive']['text']}"
                      for r in itertools.chain(*sets)], c.seed)
        model.encoder.to("cuda" if torch.cuda.is_available() else "cpu")
    else:
        model = load(args.init)
    if c.unified:
        model.formats = dict(FORMATS)
    losses = train(model, args.command, sets, c, weights, out=out)
    stop_processes()
    if first:
        print(f"wrote {args.out}: {len(losses)} steps, loss {losses[0]:.3f} -> {np.mean(losses[-20:]):.3f}")
        print(f"next: python train.py evaluate --model {args.out} --beir DIR")


def main() -> None:
    args = train_arguments(__doc__, TrainConfig)
    if args.command is None:
        began, out = time.time(), Path(args.out)
        recipe(from_flags(Recipe, args), out)
        if args.dry_run:
            return
        print(f"{time.time() - began:.0f} s; {out}/ holds corpus, queries, fret, retriever, gecko, results")
        print(f'next: python gecko.py search "your question" --model {out}/gecko')
        print(f"      python llm.py show {out}/fret.jsonl --changed")
    elif args.command == "evaluate":
        evaluate_command(args, load, format_query)
    else:
        train_command(args)


if __name__ == "__main__":
    run(main)
