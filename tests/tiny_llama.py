"""A llama of random weights: as a model for real servers, and as plain numpy for the sums they must give.

    python tests/tiny_llama.py make DIR          DIR/tiny.gguf for llama.cpp, DIR/hf for vLLM
    python tests/tiny_llama.py serve tiny.gguf PORT            llama.cpp's own server, or
    python -m llama_cpp.server --model DIR/tiny.gguf --n_ctx 2048 --port PORT                  or
    vllm serve DIR/hf --dtype float32 --max-model-len 2048 --enforce-eager --port PORT
    python tests/tiny_llama.py check URL         the server's QL and RC beside those of the weights
"""

from __future__ import annotations

import glob
import json
import math
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

V, D, LAYERS, H, KV, FF, CONTEXT = 2048, 64, 2, 2, 1, 128, 2048
SPECIAL = ["<unk>", "<s>", "</s>"]
CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


TEA = {"_id": "t", "title": "Tea", "text": "Thé vert 緑茶 🍵: tea is a drink."}
BOOK = {"_id": "b", "title": "", "text": "A book has pages."}
QUERIES = {"ascii": "what is tea", "accents": "où boire un thé à la crème", "cjk": "東京でお茶はどこですか",
           "emoji": "tea 🍵 for a 👩‍🚀"}


def tokenizer() -> Tokenizer:
    """Byte-level BPE, trained on the standard library's own text; a blank and the first byte of a
    Japanese character are one token, as in many a real vocabulary."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    files = sorted(glob.glob(sysconfig.get_path("stdlib") + "/*.py"))[:60]
    kanji = " ".join(chr(c) for c in range(0x6700, 0x6800) if chr(c) not in QUERIES["cjk"])
    texts = [Path(file).read_text(encoding="utf-8") for file in files] + [f" {kanji}"] * 100
    tok.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=V, special_tokens=SPECIAL, show_progress=False,
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
    w.add_chat_template(CHAT)
    for name, tensor in weights(len(names)).items():
        w.add_tensor(f"{name}.weight", tensor)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def write_folder(folder: Path) -> None:
    """The same model as Hugging Face's Llama."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tok, d = tokenizer(), D // H
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tok.decoder = decoders.ByteLevel()
    tok.save(str(folder / "tokenizer.json"))
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"} | {
        f"blk.{i}.{a}": f"model.layers.{i}.{b}" for i in range(LAYERS) for a, b in {
            "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
            "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
            "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm",
            "ffn_norm": "post_attention_layernorm"}.items()}
    w = weights(tok.get_vocab_size())
    for k in w:                              # there a pair that is rotated stands d / 2 apart
        if k.endswith(("attn_q", "attn_k")):
            w[k] = w[k].reshape(-1, d // 2, 2, D).transpose(0, 2, 1, 3).reshape(-1, D)
    save_file({f"{names[k]}.weight": np.ascontiguousarray(v) for k, v in w.items()},
              folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": tok.get_vocab_size(),
        "hidden_size": D, "num_hidden_layers": LAYERS, "num_attention_heads": H, "num_key_value_heads": KV,
        "intermediate_size": FF, "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
        "torch_dtype": "float32"}))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
        "unk_token": "<unk>", "chat_template": CHAT}))


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


def check(url: str) -> None:
    """Query likelihood and relevance of a server beside the equations in numpy."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from fake_server import ql_prompt, rc_prompt

    import llm
    from engine.endpoint import Endpoint

    tok, e = tokenizer(), Endpoint(url, "", llm.TRIALS)
    model = llm.LanguageModel(e)
    print(f"{'':10s} {'weights':>10s} {'server':>10s} {'apart':>8s}   {e.describe('log_likelihood')}")
    for name, query in QUERIES.items():
        pairs = [(query, TEA), (query, BOOK)]
        for p, got in zip((TEA, BOOK), model.query_likelihood(pairs), strict=True):
            show(f"{name} {p['_id']}", sum(reference(tok, *ql_prompt(query, p))), got)
    pairs = [(q, p) for q in QUERIES.values() for p in (TEA, BOOK)]
    print("rc")
    for (q, p), got in zip(pairs, model.relevance(pairs), strict=True):
        name = next(k for k, v in QUERIES.items() if v == q)
        show(f"{name} {p['_id']}", sum(reference(tok, rc_prompt(q, p), llm.LABELS[0])), got)


def show(name: str, want: float, got: float | None) -> None:
    apart = f"{abs(got / want - 1):8.4%}" if got is not None else "none"
    print(f"{name:10s} {want:10.4f} {got if got is not None else math.nan:10.4f} {apart:>8s}")


if __name__ == "__main__":
    command, *rest = sys.argv[1:] or [""]
    if len(rest) != {"make": 1, "serve": 2, "check": 1}.get(command):
        sys.exit((__doc__ or "").strip())
    if command == "make":
        Path(rest[0]).mkdir(parents=True, exist_ok=True)
        write_gguf(Path(rest[0]) / "tiny.gguf")
        write_folder(Path(rest[0]) / "hf")
    elif command == "serve":
        serve(rest[0], int(rest[1]))
    else:
        check(rest[0])
