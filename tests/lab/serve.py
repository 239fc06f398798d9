"""A real language model behind an OpenAI-compatible URL: llama-server, from the xllamacpp wheel.

    pip install xllamacpp
    python tests/lab/fetch_model.py qwen              once: runs/models/qwen/model.gguf
    python tests/lab/serve.py qwen                    or gemma, or FILE.gguf; prints the URL, runs until Ctrl-C
    python llm.py probe --llm http://127.0.0.1:8080/v1
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from engine.files import InputError, run


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model", nargs="?", default="qwen", help="qwen, gemma or FILE.gguf (%(default)s)")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of the CPU (%(default)s)")
    parser.add_argument("--slots", type=int, default=2, help="requests at a time (%(default)s)")
    parser.add_argument("--context", type=int, default=4096, help="tokens of a request (%(default)s)")
    args = parser.parse_args()
    path = Path(args.model)
    if args.model in ("qwen", "gemma"):
        path = Path(f"runs/models/{args.model}/model.gguf")
        if not path.exists():
            raise InputError(f"{path}: not there yet; run: python tests/lab/fetch_model.py {args.model}")
    if not path.is_file():
        raise InputError(f"{path}: no such file; give qwen, gemma or a .gguf file")
    try:
        import xllamacpp
    except ImportError as error:
        raise InputError("llama-server comes with xllamacpp: pip install xllamacpp") from error
    p = xllamacpp.CommonParams()
    p.model.path, p.hostnames, p.port = str(path), ["127.0.0.1"], args.port
    p.n_parallel, p.n_ctx, p.warmup = args.slots, args.slots * args.context, False
    p.cpuparams.n_threads = p.cpuparams_batch.n_threads = args.threads
    server = xllamacpp.Server(p)
    print(f"listening {server.listening_address}/v1\nnext: python llm.py probe --llm {server.listening_address}/v1",
          flush=True)
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    run(main)
