"""Model folders in and out, as transformers and sentence-transformers know them. Never a pickle.

What a folder holds comes as a plain `Folder`. A setting that would change the vectors, and that this
repository does not implement, is refused by name.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, normalizers
from torch import Tensor

from engine.files import InputError, first_line, folder_beside, read_json, write_json

Json = dict[str, Any]


@dataclass
class Folder:
    config: Json            # the fields of config.json that shape the encoder
    weights: dict[str, Tensor]        # under Hugging Face's names, without the prefix of a model with a head
    tokenizer: Tokenizer
    max_length: int                   # tokens
    dims: list[int]                   # Matryoshka sizes
    prompts: dict[str, str]           # sentence-transformers': {task: what stands before the text}
    default_prompt: str = ""
    formats: dict[str, str] | None = None   # our own, where the folder is ours


ENCODERS = {"bert": "BertModel", "roberta": "RobertaModel", "xlm-roberta": "XLMRobertaModel"}
# the values that are supported; but for model_type, the first is what a silent file means
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "model_type": tuple(ENCODERS), "hidden_act": ("gelu",), "position_embedding_type": ("absolute",),
    "is_decoder": (False,), "add_cross_attention": (False,)}
REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
            "max_position_embeddings")                               # whole numbers
OPTIONAL = ("type_vocab_size", "layer_norm_eps", "hidden_dropout_prob", "attention_probs_dropout_prob",
            "pad_token_id", "hidden_act", "model_type")
# parts of a checkpoint that are not the encoder's
HEADS = ("pooler.", "cls.", "lm_head.", "classifier.", "qa_outputs.", "embeddings.position_ids",
         "embeddings.token_type_ids")
# what is fetched from the hub
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "modules.json",
         "*_Pooling/config.json", "gecko.json", "sentence_*_config.json", "config_sentence_transformers.json")
# settings of tokenizer_config.json that transformers puts over those of tokenizer.json
OVERRIDES = {"do_lower_case": ("normalizer", "lowercase"), "strip_accents": ("normalizer", "strip_accents"),
             "tokenize_chinese_chars": ("normalizer", "handle_chinese_chars"),
             "add_prefix_space": ("pre_tokenizer", "add_prefix_space")}


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
    """What safetensors, tokenizers and misshapen JSON raise, as one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # of types of their own
        raise InputError(f"{path}: not a readable checkpoint ({first_line(error)}); "
                         "write or copy it again") from error


def read_optional(path: Path) -> Json:
    """A JSON object; an empty one where there is no file."""
    return read_json(path, dict) if path.is_file() else {}


# --------------------------------------------------------------------------------------------------
# In


def read_folder(path: Path) -> Folder:
    for name in ("config.json", "tokenizer.json"):
        if not (path / name).is_file():
            raise InputError(f"{path}: no {name} there; give a model folder, for instance one "
                             "that `python train.py` wrote (runs/demo/gecko)")
    with readable(path):
        config = read_config(path / "config.json")
        normalised = check_modules(path, config["hidden_size"])
        tokenizer = read_tokenizer(path, config["vocab_size"])
        folder = Folder(config, read_weights(path), tokenizer, 0, [], {})
        read_settings(path, folder, normalised)
    return folder


def read_config(path: Path) -> Json:
    """The fields that shape the encoder, and none that would need another one."""
    raw = {"model_type": None, **read_json(path, dict)}
    for key, allowed in SUPPORTED.items():
        if raw.get(key, allowed[0]) not in allowed:
            raise InputError(f"{path}: {key} {raw[key]!r} is not supported; give a folder of an encoder with "
                             + " or ".join(map(repr, allowed)))
    for key in REQUIRED:
        if type(raw.get(key)) is not int:
            raise InputError(f"{path}: {key} is {raw.get(key)!r}, not a whole number; save the model again")
    config: Json = {key: raw[key] for key in (*REQUIRED, *OPTIONAL) if raw.get(key) is not None}
    for key, value in config.items():
        if key not in SUPPORTED and not (isinstance(value, (int, float)) and value >= 0):
            raise InputError(f"{path}: {key} is {value!r}, not a number from 0 on; save the model again")
    config.setdefault("pad_token_id", 0 if config["model_type"] == "bert" else 1)
    d, heads = config["hidden_size"], config["num_attention_heads"]
    if config["num_hidden_layers"] and (heads < 1 or d % heads):
        raise InputError(f"{path}: hidden_size {d} is not a multiple of num_attention_heads {heads}")
    return config


def check_modules(path: Path, d: int) -> bool:
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
        modes = raw.get("pooling_mode")                              # older versions have a flag for each mode:
        if not modes:
            modes = [key for key, on in raw.items() if key.startswith("pooling_mode_") and on]
        mean = modes in ("mean", ["mean"], ["pooling_mode_mean_tokens"])
        if not mean or not raw.get("include_prompt", True):
            raise InputError(f"{pooling}: pooling {modes!r} is not supported, nor a prompt left out of it; "
                             "only the mean over all tokens (eq. 1) is")
        if raw.get("embedding_dimension", raw.get("word_embedding_dimension", d)) != d:
            raise InputError(f"{pooling}: the pooling's dimension does not fit the encoder's hidden_size {d}")
    return "Normalize" in kinds


def read_weights(path: Path) -> dict[str, Tensor]:
    """The encoder's parameters out of model.safetensors."""
    file = path / "model.safetensors"
    if not file.is_file():
        raise InputError(f"{path}: no model.safetensors there (shards are not supported, and a .bin is a pickle "
                         "and is never opened); save the model again with transformers' save_pretrained(DIR, "
                         "max_shard_size='100GB')")
    weights = {}
    with readable(file):
        for name, x in load_file(file).items():
            name = re.sub(r"^(bert|roberta)\.", "", name)            # of a checkpoint with heads
            if not name.startswith(HEADS):
                weights[name] = x
    return weights


def check_weights(path: Path, weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """InputError unless the weights have the names and the shapes of the encoder that config.json makes."""
    for name, x in wanted.items():
        if name not in weights:
            raise InputError(f"{path}: the weights lack {name}; the file is not this config.json's, or is "
                             "older than 2020: save the model again with transformers' save_pretrained")
        if weights[name].shape != x.shape:
            raise InputError(f"{path}: {name} has shape {tuple(weights[name].shape)}, but config.json makes it "
                             f"{tuple(x.shape)}; not a readable checkpoint")
    for name in weights.keys() - wanted.keys():
        raise InputError(f"{path}: the weights hold {name}, which is no part of this encoder")


def read_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """tokenizer.json, where tokenizer_config.json asks for nothing else."""
    file = path / "tokenizer.json"
    with readable(file):
        tokenizer = Tokenizer.from_file(str(file))
    last = max(tokenizer.get_vocab().values(), default=0)
    if last >= vocab_size:
        raise InputError(f"{file}: {last + 1} tokens, but the weights have {vocab_size}; "
                         "the two files do not belong together")
    settings, state = read_optional(path / "tokenizer_config.json"), json.loads(tokenizer.to_str())
    wrong = [f"{key} {settings[key]!r}" for key in ("truncation_side", "padding_side")
             if settings.get(key, "right") != "right"]
    for key, (part, name) in OVERRIDES.items():
        stated = state[part] or {}
        if key in settings and name in stated and settings[key] != stated[name]:
            wrong.append(f"{key} {settings[key]!r}, but tokenizer.json {name} {stated[name]!r}")
    for i, token in (settings.get("added_tokens_decoder") or {}).items():
        if tokenizer.token_to_id(token["content"]) != int(i):
            wrong.append(f"the added token {token['content']!r}, which tokenizer.json has not as {i}")
    if wrong:
        raise InputError(f"{path}/tokenizer_config.json: {wrong[0]} is not supported; save the tokenizer "
                         "again, so that tokenizer.json says all")
    return tokenizer


def read_settings(path: Path, folder: Folder, normalised: bool) -> None:
    """Prompts, formats, Matryoshka dims, longest text: gecko.json's, else sentence-transformers'."""
    ours, theirs = read_optional(path / "gecko.json"), read_optional(path / "config_sentence_transformers.json")
    encoder: Json = {}
    for kind in ENCODERS:                                            # bert or, by older versions, the encoder's own
        encoder = encoder or read_optional(path / f"sentence_{kind}_config.json")
    similarity = theirs.get("similarity_fn_name") or "cosine"
    if similarity != "cosine" and not (similarity == "dot" and normalised):
        raise InputError(f"{path}/config_sentence_transformers.json: similarity_fn_name {similarity!r} without "
                         "vectors of length 1 is not supported; only cosine (section 3.1) is")
    if encoder.get("do_lower_case"):
        parts = [normalizers.Lowercase(), folder.tokenizer.normalizer]
        folder.tokenizer.normalizer = normalizers.Sequence([part for part in parts if part])
    prompts = theirs.get("prompts") or {}
    folder.prompts = {name: text for name, text in prompts.items() if text}
    folder.default_prompt = folder.prompts.get(str(theirs.get("default_prompt_name")), "")
    if ours:
        folder.formats = {name: str(ours["formats"][name]) for name in ("query", "passage")}
        if not all("{text}" in form for form in folder.formats.values()):
            raise InputError(f"{path}/gecko.json: a format without {{text}} makes all texts one; give it a place")
    d = folder.config["hidden_size"]
    folder.dims = ours.get("dims") or read_json(path / "config.json").get("matryoshka_dimensions") or []
    if not all(1 <= dim <= d for dim in folder.dims):
        raise InputError(f"{path}: dims {folder.dims} are not all from 1 to {d}; save the model again")
    tokens = read_optional(path / "tokenizer_config.json").get("model_max_length")
    wanted = ours.get("max_length") or encoder.get("max_seq_length") or tokens or math.inf
    folder.max_length = int(min(wanted, folder.config["max_position_embeddings"]))
    if folder.max_length <= folder.tokenizer.num_special_tokens_to_add(False):
        raise InputError(f"{path}: a length of {folder.max_length} tokens leaves none for the text")


# --------------------------------------------------------------------------------------------------
# Out

SPECIAL = {"unk_token": ("[UNK]", "<unk>"), "cls_token": ("[CLS]", "<s>"), "sep_token": ("[SEP]", "</s>"),
           "mask_token": ("[MASK]", "<mask>")}


def write_folder(path: str | Path, folder: Folder) -> None:
    """Whole or not at all: written beside its place, then renamed."""
    with folder_beside(path) as new:
        weights = {name: x.cpu().contiguous() for name, x in folder.weights.items()}
        save_file(weights, new / "model.safetensors", metadata={"format": "pt"})
        folder.tokenizer.no_truncation()
        (new / "tokenizer.json").write_text(folder.tokenizer.to_str(pretty=True), encoding="utf-8")
        for name, content in small_files(folder).items():
            write_json(new / name, content)


def small_files(folder: Folder) -> Json:
    """The JSON files; all but gecko.json are for transformers and its family."""
    c, modules = folder.config, ("Transformer", "Pooling", "Normalize")
    special = {"pad_token": folder.tokenizer.id_to_token(c["pad_token_id"])}
    known = {t.content for t in folder.tokenizer.get_added_tokens_decoder().values() if t.special}
    for key, names in SPECIAL.items():
        for token in known.intersection(names):
            special[key] = token
    return {
        "config.json": {"architectures": [ENCODERS[c["model_type"]]], **c,
                        "matryoshka_dimensions": folder.dims},       # vLLM's name for them
        "gecko.json": {"formats": folder.formats, "dims": folder.dims, "max_length": folder.max_length},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", **special,
                                  "model_max_length": folder.max_length},
        "modules.json": [{"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "",
                          "type": f"sentence_transformers.models.{kind}"} for i, kind in enumerate(modules)],
        "1_Pooling/config.json": {"word_embedding_dimension": c["hidden_size"], "pooling_mode_mean_tokens": True},
        "2_Normalize/config.json": {},
        "sentence_bert_config.json": {"max_seq_length": folder.max_length},
        "config_sentence_transformers.json": {"prompts": folder.prompts, "similarity_fn_name": "cosine"},
    }
