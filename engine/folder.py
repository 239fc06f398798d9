"""Model folders in and out, as transformers and sentence-transformers know them. Never a pickle.

What a folder holds comes as a plain `Folder`. A setting that would change the vectors, and that this
repository does not implement, is refused by name.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from tokenizers import Tokenizer, normalizers
from torch import Tensor

from engine.files import InputError, first_line, folder_beside, one_line, read_json, write_json

Json = dict[str, Any]


@dataclass
class Folder:
    config: Json                      # the fields of config.json that shape the encoder
    weights: dict[str, Tensor]        # under Hugging Face's names, without the prefix of a model with a head
    tokenizer: Tokenizer
    max_length: int                   # tokens
    dims: list[int]                   # Matryoshka sizes
    prompts: dict[str, str]           # sentence-transformers': {task: what stands before the text}
    formats: dict[str, str] | None    # our own, where the folder is ours


ENCODERS = {"bert": "BertModel", "roberta": "RobertaModel", "xlm-roberta": "XLMRobertaModel"}
# fields of config.json that may have one value alone, which a silent file means
FIXED = {"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False}
# numbers; one that the file lacks is BERT's
WHOLE = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
         "max_position_embeddings", "type_vocab_size", "pad_token_id")
REAL = ("layer_norm_eps", "hidden_dropout_prob", "attention_probs_dropout_prob")
# the encoder's parameters, with the prefix that they have in a checkpoint with heads; parts that no vector needs
PARAMETER = r"(?:bert\.|roberta\.)?((?:embeddings|encoder)\..+(?<!_ids))"
UNUSED = r"(?:bert\.|roberta\.)?(?:pooler|cls|lm_head|classifier|qa_outputs)\..+|.+_ids"
# settings of tokenizer_config.json that transformers puts over those of tokenizer.json, and their names there
OVERRIDES = {"do_lower_case": "lowercase", "strip_accents": "strip_accents",
             "tokenize_chinese_chars": "handle_chinese_chars", "add_prefix_space": "add_prefix_space"}
# what is fetched from the hub
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "modules.json",
         "*_Pooling/config.json", "gecko.json", "sentence_*_config.json", "config_sentence_transformers.json")


def fetch(name: str | Path) -> Path:
    """The folder itself; ORG/NAME that is no path here is fetched from the Hugging Face hub, without pickles."""
    org = str(name).split("/")[0]
    if Path(org).is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        return Path(name)
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(str(name), allow_patterns=list(FILES)))
    except Exception as error:  # the client's, of many kinds, or it is not installed
        raise InputError(f"{name}: no such folder, and not to be had from the Hugging Face hub "
                         f"({first_line(error)}); check the name, the network, and pip install huggingface_hub"
                         ) from error


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """What torch, safetensors, tokenizers and misshapen JSON raise, as one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # of types of their own
        what = one_line(f"{type(error).__name__}: {error}", 240)
        raise InputError(f"{path}: not a readable checkpoint ({what}); save or copy it again, "
                         "or remove it") from error


def read_optional(path: Path) -> Json:
    """A JSON object; an empty one where there is no file."""
    return read_json(path, dict) if path.is_file() else {}


# --------------------------------------------------------------------------------------------------
# In


def read_folder(path: Path) -> Folder:
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        if not (path / name).is_file():
            raise InputError(f"{path}: no {name} there; give a folder that `python train.py` wrote, or one of "
                             "transformers' save_pretrained(DIR, max_shard_size='100GB'): shards are not "
                             "supported, and a .bin is a pickle and is never opened")
    with readable(path):
        config = read_config(path / "config.json")
        settings = read_optional(path / "tokenizer_config.json")
        sentence: Json = {}
        # named after the encoder by older versions; of several, the first by name
        for file in sorted(path.glob("sentence_*_config.json"), reverse=True):
            sentence = read_json(file, dict)
        for key, value in sentence.items():                          # of one call of the tokenizer or the model
            if value and key.endswith(("_args", "_kwargs")):
                raise InputError(f"{path}: {key} {value} in sentence_*_config.json is not supported")
        tokenizer = read_tokenizer(path / "tokenizer.json", settings, config["vocab_size"])
        if sentence.get("do_lower_case"):
            others = [tokenizer.normalizer] if tokenizer.normalizer else []
            tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *others])
        wanted = sentence.get("max_seq_length") or settings.get("model_max_length") or math.inf
        length = int(min(wanted, config["max_position_embeddings"]))
        dims = list(read_json(path / "config.json", dict).get("matryoshka_dimensions") or [])
        if not all(1 <= dim <= config["hidden_size"] for dim in dims):
            raise InputError(f"{path}: dims {dims} are not all from 1 to {config['hidden_size']}")
        return Folder(
            config=config,
            weights=read_weights(path / "model.safetensors"),
            tokenizer=tokenizer,
            max_length=length,
            dims=dims,
            prompts=read_prompts(path / "config_sentence_transformers.json", check_modules(path)),
            formats=read_formats(path / "gecko.json"),
        )


def read_config(path: Path) -> Json:
    """The fields that shape the encoder, and none that would need another one."""
    raw = read_json(path, dict)
    kind = raw.get("model_type")
    if kind not in ENCODERS:
        raise InputError(f"{path}: model_type {kind!r} is not supported; only {', '.join(ENCODERS)} are")
    for key, only in FIXED.items():
        if raw.get(key, only) != only:
            raise InputError(f"{path}: {key} {raw[key]!r} is not supported; only {only!r} is")
    config = {"model_type": kind, "pad_token_id": 0 if kind == "bert" else 1}
    for key in (*WHOLE, *REAL):
        value = raw.get(key)
        if value is None:
            continue
        number = float if key in REAL else int
        if type(value) not in (int, number) or not value >= 0:
            raise InputError(f"{path}: {key} is {value!r}; want {number.__name__}, 0 or more; save the model again")
        config[key] = value
    d, heads = config["hidden_size"], config["num_attention_heads"]
    if config["num_hidden_layers"] and (heads == 0 or d % heads):
        raise InputError(f"{path}: hidden_size {d} is not a multiple of num_attention_heads {heads}")
    return config


def check_modules(path: Path) -> bool:
    """modules.json and 1_Pooling: encoder, mean over all tokens; true where vectors are made of length 1."""
    listed = path / "modules.json"
    modules = [{"type": "Transformer"}, {"type": "Pooling", "path": "1_Pooling"}]
    if listed.is_file():
        modules = read_json(listed, list)
    kinds = [str(module.get("type")).split(".")[-1] for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise InputError(f"{listed}: the modules {', '.join(kinds)} are not supported; only "
                         "Transformer, Pooling and Normalize, in this order, are")
    place = str(modules[1].get("path"))
    if not re.fullmatch(r"\w[\w.-]*", place):
        raise InputError(f"{listed}: {place!r} is not a name in this folder; refused")
    pooling = path / place / "config.json"
    if listed.is_file() or pooling.is_file():
        raw = read_json(pooling, dict)
        flags = [key for key, on in raw.items() if key.startswith("pooling_mode_") and on]   # of older versions
        modes = raw.get("pooling_mode") or flags
        if modes not in ("mean", ["pooling_mode_mean_tokens"]) or not raw.get("include_prompt", True):
            raise InputError(f"{pooling}: pooling {modes!r} is not supported, nor a prompt left out of it; "
                             "only the mean over all tokens (eq. 1) is")
    return "Normalize" in kinds


def read_weights(file: Path) -> dict[str, Tensor]:
    """The encoder's parameters, without those of a head."""
    weights = {}
    for name, x in load_file(file).items():
        parameter = re.fullmatch(PARAMETER, name)
        if parameter:
            weights[parameter[1]] = x
        elif not re.fullmatch(UNUSED, name):
            raise InputError(f"{file}: the weights hold {name}, which is no part of this encoder")
    return weights


def read_tokenizer(file: Path, settings: Json, vocab_size: int) -> Tokenizer:
    """tokenizer.json, where `settings` of tokenizer_config.json ask for nothing else."""
    with readable(file):
        tokenizer = Tokenizer.from_file(str(file))
    last = max(tokenizer.get_vocab().values(), default=0)
    if last >= vocab_size:
        raise InputError(f"{file}: {last + 1} tokens, but the weights have {vocab_size}; "
                         "the two files do not belong together")
    state = json.loads(tokenizer.to_str())
    stated = {**(state["normalizer"] or {}), **(state["pre_tokenizer"] or {})}
    wrong = [f"{key} {settings[key]!r}" for key, name in OVERRIDES.items()
             if key in settings and name in stated and settings[key] != stated[name]]
    sides = [settings.get("truncation_side"), settings.get("padding_side")]
    sides += [part["direction"] for part in (tokenizer.truncation, tokenizer.padding) if part]
    if "left" in sides:
        wrong.append("cutting or padding at the left")
    for i, token in (settings.get("added_tokens_decoder") or {}).items():
        if tokenizer.token_to_id(token["content"]) != int(i):
            wrong.append(f"the added token {token['content']!r}")
    if wrong:
        raise InputError(f"{file.parent}/tokenizer_config.json: {wrong[0]} is not supported; save the tokenizer "
                         "again, so that tokenizer.json says all")
    return tokenizer


def read_prompts(path: Path, normalised: bool) -> dict[str, str]:
    """By name; the default one stands for queries and passages that have none of their own."""
    settings = read_optional(path)
    similarity = settings.get("similarity_fn_name") or "cosine"
    if similarity != "cosine" and not (similarity == "dot" and normalised):
        raise InputError(f"{path}: similarity_fn_name {similarity!r} without "
                         "vectors of length 1 is not supported; only cosine (section 3.1) is")
    if settings.get("truncate_dim"):
        raise InputError(f"{path}: truncate_dim {settings['truncate_dim']} is not supported; remove it, give --dim")
    stated, name = settings.get("prompts") or {}, settings.get("default_prompt_name")
    default = stated[name] if name else ""
    prompts = {name: text for name, text in stated.items() if text}
    return {"query": default, "corpus": default, **prompts}


def read_formats(path: Path) -> dict[str, str] | None:
    """Ours, of queries and passages; None where another made the folder."""
    if not path.is_file():
        return None
    stated = read_json(path, dict)["formats"]
    formats = {name: str(stated[name]) for name in ("query", "passage")}
    if not all("{text}" in form for form in formats.values()):
        raise InputError(f"{path}: a format without {{text}} makes all texts one; give it a place")
    return formats


# --------------------------------------------------------------------------------------------------
# Out


def write_folder(path: str | Path, folder: Folder) -> None:
    """Whole or not at all: written beside its place, then renamed."""
    with folder_beside(path) as new:
        # bytes, since a file that safetensors writes itself only its owner may read
        (new / "model.safetensors").write_bytes(save(folder.weights, metadata={"format": "pt"}))
        folder.tokenizer.no_truncation()
        folder.tokenizer.save(str(new / "tokenizer.json"))
        for name, content in small_files(folder).items():
            write_json(new / name, content)


def small_files(folder: Folder) -> Json:
    """The JSON files; all but gecko.json are for transformers and its family."""
    c, modules = folder.config, ("Transformer", "Pooling", "Normalize")
    return {
        "config.json": {"architectures": [ENCODERS[c["model_type"]]], **c,
                        "matryoshka_dimensions": folder.dims},       # vLLM's name for them
        "gecko.json": {"formats": folder.formats},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast",
                                  "pad_token": folder.tokenizer.id_to_token(c["pad_token_id"]),
                                  "model_max_length": folder.max_length},
        "modules.json": [{"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "",
                          "type": f"sentence_transformers.models.{kind}"} for i, kind in enumerate(modules)],
        "1_Pooling/config.json": {"word_embedding_dimension": c["hidden_size"], "pooling_mode_mean_tokens": True},
        "2_Normalize/config.json": {},
        "sentence_bert_config.json": {"max_seq_length": folder.max_length},
        "config_sentence_transformers.json": {"prompts": folder.prompts, "similarity_fn_name": "cosine"},
    }
