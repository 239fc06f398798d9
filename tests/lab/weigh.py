"""How heavy a file is to read.   python tests/lab/weigh.py gecko.py data.py llm.py train.py engine/*.py

Words are Python's tokens without comments, layout and docstrings; a code line is one that has some. Lines are a
poor measure alone: a line that does three things is three lines.
"""

from __future__ import annotations

import argparse
import ast
import io
import tokenize
from pathlib import Path
from typing import NamedTuple

LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
# from Python 3.12 on an f-string is many tokens; it counts as one, as before
FSTRING_START, FSTRING_END = getattr(tokenize, "FSTRING_START", -1), getattr(tokenize, "FSTRING_END", -1)
SCOPES = (ast.Module, ast.ClassDef, ast.FunctionDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


class Weight(NamedTuple):
    lines: int
    code: int           # lines that hold code
    words: int
    nested: int         # comprehensions that hold another
    walruses: int
    longest: int        # lines of the longest function, `train` left out
    words_a_line: float


def weigh(path: Path) -> Weight:
    text = path.read_text(encoding="utf-8")
    nodes = list(ast.walk(ast.parse(text)))
    docs = set()
    for node in nodes:
        if isinstance(node, SCOPES) and ast.get_docstring(node) is not None:
            docs |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    words, depth = [], 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        depth -= token.type == FSTRING_END
        if token.type not in LAYOUT and token.start[0] not in docs and depth == 0 and token.type != FSTRING_END:
            words.append(token.start[0])
        depth += token.type == FSTRING_START
    nested = [node for node in nodes if isinstance(node, COMPREHENSIONS)
              and any(isinstance(inner, COMPREHENSIONS) for inner in ast.walk(node) if inner is not node)]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef) and node.name != "train"]
    lengths = [(node.end_lineno or 0) - node.lineno + 1 for node in functions]
    code = len(set(words))
    return Weight(len(text.splitlines()), code, len(words), len(nested),
                  sum(isinstance(node, ast.NamedExpr) for node in nodes), max(lengths, default=0),
                  round(len(words) / max(1, code), 1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("   ")[0])
    parser.add_argument("files", nargs="+")
    names = parser.parse_args().files
    weights = [weigh(Path(name)) for name in names]
    for name, weight in zip(names, weights, strict=True):
        print(f"{name:20}", "  ".join(f"{field} {value}" for field, value in weight._asdict().items()))
    print(f"{'all':20} lines {sum(weight.lines for weight in weights)}  words {sum(w.words for w in weights)}")
