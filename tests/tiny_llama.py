"""A llama of random weights: as a GGUF file for real servers, and as plain numpy for the sums they must give.

    python tests/tiny_llama.py tiny.gguf     then llama_cpp.server --model tiny.gguf, or
    python tests/tiny_llama.py serve tiny.gguf PORT
"""

from __future__ import annotations

import glob
import json
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

V, D, LAYERS, H, KV, FF, CONTEXT = 2048, 64, 2, 2, 1, 128, 2048
SPECIAL = ["<unk>", "<s>", "</s>"]


def tokenizer() -> Tokenizer:
    """Byte-level BPE, trained on the standard library's own text."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    files = sorted(glob.glob(sysconfig.get_path("stdlib") + "/*.py"))[:60]
    tok.train(files, trainers.BpeTrainer(vocab_size=V, special_tokens=SPECIAL, show_progress=False,
                                         initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tok


def plain(tok: Tokenizer) -> Tokenizer:
    """The same without control tokens: "<s>" in a text is a text."""
    return Tokenizer.from_str(json.dumps(json.loads(tok.to_str()) | {"added_tokens": []}))


def weights(vocabulary: int) -> dict[str, np.ndarray]:
    rng, d = np.random.default_rng(0), D // H

    def drawn(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 0.25).astype(np.float32)

    w = {"token_embd": drawn(vocabulary, D), "output_norm": np.ones(D, np.float32),
         "output": drawn(vocabulary, D)}
    for i in range(LAYERS):
        w |= {f"blk.{i}.attn_q": drawn(D, D), f"blk.{i}.attn_k": drawn(KV * d, D),
              f"blk.{i}.attn_v": drawn(KV * d, D), f"blk.{i}.attn_output": drawn(D, D),
              f"blk.{i}.ffn_gate": drawn(FF, D), f"blk.{i}.ffn_up": drawn(FF, D),
              f"blk.{i}.ffn_down": drawn(D, FF), f"blk.{i}.attn_norm": np.ones(D, np.float32),
              f"blk.{i}.ffn_norm": np.ones(D, np.float32)}
    return w


def write_gguf(path: str | Path) -> None:
    import gguf

    tok = tokenizer()
    names = [t for t, _ in sorted(tok.get_vocab().items(), key=lambda kv: kv[1])]
    merges = json.loads(tok.to_str())["model"]["merges"]
    w = gguf.GGUFWriter(str(path), "llama")
    w.add_context_length(CONTEXT)
    w.add_embedding_length(D)
    w.add_block_count(LAYERS)
    w.add_feed_forward_length(FF)
    w.add_head_count(H)
    w.add_head_count_kv(KV)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_dimension_count(D // H)
    w.add_vocab_size(len(names))
    w.add_file_type(0)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list(names)
    w.add_token_merges([" ".join(m) if isinstance(m, list) else m for m in merges])
    w.add_token_types([gguf.TokenType.CONTROL if t in SPECIAL else gguf.TokenType.NORMAL for t in names])
    w.add_unk_token_id(0)
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    w.add_add_bos_token(True)
    w.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    for name, tensor in weights(len(names)).items():
        w.add_tensor(f"{name}.weight", tensor)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def log_probs(ids: list[int], vocabulary: int) -> np.ndarray:
    """log p(next token) after each of T ids: (T, V). The llama equations, nothing else."""
    w = {k: v.astype(np.float64) for k, v in weights(vocabulary).items()}
    T, d = len(ids), D // H
    angle = np.arange(T)[:, None] * 10000.0 ** (-np.arange(0, d, 2) / d)  # (T, d / 2)

    def norm(x: np.ndarray, g: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + 1e-5) * g

    def rotated(x: np.ndarray) -> np.ndarray:                        # (T, heads, d): neighbours are a pair
        a, b, cos, sin = x[..., ::2], x[..., 1::2], np.cos(angle)[:, None], np.sin(angle)[:, None]
        return np.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(x.shape)

    x = w["token_embd"][ids]                                         # (T, D)
    for i in range(LAYERS):
        m = {k.split(".")[2]: v for k, v in w.items() if k.startswith(f"blk.{i}.")}
        h = norm(x, m["attn_norm"])
        q = rotated((h @ m["attn_q"].T).reshape(T, H, d))
        k = rotated((h @ m["attn_k"].T).reshape(T, KV, d)).repeat(H // KV, 1)
        v = (h @ m["attn_v"].T).reshape(T, KV, d).repeat(H // KV, 1)
        s = np.einsum("thd,shd->hts", q, k) / np.sqrt(d)
        s = np.exp(np.where(np.tri(T, dtype=bool), s, -np.inf) - s.max(-1, keepdims=True))
        x = x + np.einsum("hts,shd->thd", s / s.sum(-1, keepdims=True), v).reshape(T, D) @ m["attn_output"].T
        h = norm(x, m["ffn_norm"])
        gate = h @ m["ffn_gate"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ m["ffn_up"].T)) @ m["ffn_down"].T
    logits = norm(x, w["output_norm"]) @ w["output"].T               # (T, V)
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def reference(tok: Tokenizer, prefix: str, text: str) -> list[float]:
    """log p of each token of the text after the prefix, from the weights."""
    head, tail, both = (plain(tok).encode(t).ids for t in (prefix, text, prefix + text))
    assert both == head + tail
    ids = [1, *head, *tail]
    rows = log_probs(ids, tok.get_vocab_size())
    return [float(rows[n - 1, ids[n]]) for n in range(1 + len(head), len(ids))]


def serve(path: str, port: int) -> None:
    """llama.cpp's own server, from the xllamacpp wheel."""
    import xllamacpp

    p = xllamacpp.CommonParams()
    p.model.path, p.hostnames, p.port = path, ["127.0.0.1"], port
    p.n_parallel, p.n_ctx, p.n_gpu_layers, p.warmup = 4, 4 * CONTEXT, 0, False
    p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(p)
    print("listening", server.listening_address, flush=True)
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    serve(sys.argv[2], int(sys.argv[3])) if sys.argv[1] == "serve" else write_gguf(sys.argv[1])
