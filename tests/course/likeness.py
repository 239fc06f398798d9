"""How alike two bodies are, whatever their names, comments and layout: for an oral check, never for a grade."""

from __future__ import annotations

import ast
import csv
import difflib
import io
from collections.abc import Iterator


def normal_form(body: str) -> list[str]:
    """The nodes of the syntax tree, in order; names are numbered as they come."""
    numbers: dict[str, int] = {}

    def visit(node: ast.AST) -> Iterator[str]:
        yield type(node).__name__
        if isinstance(node, (ast.Name, ast.arg)):
            name = node.id if isinstance(node, ast.Name) else node.arg
            yield f"name {numbers.setdefault(name, len(numbers))}"
        if isinstance(node, ast.Attribute):
            yield node.attr
        if isinstance(node, ast.Constant):
            yield repr(node.value)
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.expr_context):
                yield from visit(child)

    return list(visit(ast.parse(f"def f():\n{body}\n    pass\n")))


def likeness(a: list[str], b: list[str]) -> float:
    """Of two normal forms: 1 where they are the same, 0 where they have nothing in common."""
    return difflib.SequenceMatcher(None, a, b, autojunk=False).ratio()


def report(bodies: dict[int, dict[str, str]], solutions: dict[int, str]) -> str:
    """A CSV table of {exercise: {hand-in: body}}, the most alike first.

    A short body is alike by its shortness: `nodes` says how much there is to be alike.
    """
    rows = []
    for n, of in bodies.items():
        forms = {}
        for name, body in of.items():
            try:
                forms[name] = normal_form(body)
            except (SyntaxError, ValueError):
                continue                                # it earns nothing as it is
        solution = normal_form(solutions[n])
        for name, form in forms.items():
            others = [(likeness(form, forms[other]), other) for other in forms if other != name]
            nearest = max(others, default=(0.0, ""))
            rows.append([n, name, len(form), likeness(form, solution), *nearest])
    rows.sort(key=lambda row: -max(row[3], row[4]))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["exercise", "hand-in", "nodes", "like the solution", "like another", "which"])
    for n, name, nodes, solution_share, other_share, other in rows:
        writer.writerow([n, name, nodes, f"{solution_share:.2f}", f"{other_share:.2f}", other])
    return out.getvalue()
