"""The text of .md, .rst and .txt files: headings, paragraphs, and what must keep its lines.

No parser of either language: it finds what a reader would read, and loses no word of it where a file breaks
the rules. What is not read: front matter, comments, directives without text, images, badges, addresses.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence

FRONT_MATTER = re.compile(r"(---|\+\+\+)\n(.*?)\n\1\n", re.DOTALL)
FENCE_OR_COMMENT = re.compile(r"^ *(```|~~~).*?^ *\1|<!--(?:(?!<!--).)*?-->", re.DOTALL | re.MULTILINE)
HTML_HEADING = re.compile(r"<h[1-6][^>]*>(.*?)</h[1-6]>", re.DOTALL)
# Directives of reStructuredText that hold no text, with comments and targets; then all others
EMPTY = "image|figure|toctree|contents|include|raw|index|highlight|meta|currentmodule|automodule|autoclass"
UNSEEN = re.compile(rf"^( *)\.\.(?: (?:(?:{EMPTY})::|(?![\w:+-]+::|\[)).*)?\n(?:(?:\1 +\S.*| *)\n)*", re.MULTILINE)
DIRECTIVE = re.compile(r"^( *)\.\. ([\w:+-]+)::(.*)(?:\n\1 +:[\w-]+:.*)*", re.MULTILINE)


def visible(text: str, markdown: bool) -> list[str]:
    """The lines of a text that a reader would see as text."""
    text = "\n".join(line.rstrip().expandtabs(4) for line in text.splitlines()) + "\n"
    if markdown:
        front = FRONT_MATTER.match(text)
        if front:
            title = re.search(r"^title *[:=] *[\"']?(.+?)[\"']?$", front[2], re.MULTILINE)
            text = (f"# {title[1]}\n" if title else "") + text[front.end():]
        text = FENCE_OR_COMMENT.sub(lambda m: m[0] if m[1] else "", text)
        text = HTML_HEADING.sub(lambda m: f"\n# {' '.join(m[1].split())}\n", text)
    else:
        text = UNSEEN.sub("\n", text)
        text = DIRECTIVE.sub(lambda m: m[1] + ("" if "code" in m[2] else m[3].strip()), text)
    return text.split("\n")


RULE = re.compile(r"([=\-~^\"'`#*+.:_])\1{2,}")
FENCE = re.compile(r" *(`{3,}|~{3,})")


def blocks(lines: Sequence[str], markdown: bool) -> Iterator[tuple[str, str]]:
    """("heading" | "text" | "lines", text): paragraphs and lists; code and tables, whose lines must stay."""
    for kind, block in raw_blocks(lines, markdown):
        text = "\n".join(block).strip("\n")
        if kind == "text" and not LETTER.search(LINK.sub("", text)):  # badges, a list of links
            continue
        if kind == "text" and text.startswith(("    ", "|", "+")):
            kind = "lines"
        if kind != "code" and not (markdown and text.startswith("    ")):
            text = plain(text)
        if kind == "heading":
            text = " ".join(re.sub("[*`]", "", text).split())
        if LETTER.search(text):
            yield "lines" if kind == "code" else kind, text


def raw_blocks(lines: Sequence[str], markdown: bool) -> Iterator[tuple[str, list[str]]]:
    """("heading" | "text" | "code", its lines), with empty ones between."""
    block, fence = list[str](), ""
    for line, below in itertools.pairwise([*lines, ""]):
        opening = FENCE.match(line) if markdown else None
        heading = re.match(r" {0,3}#{1,6} +(.*?)[ #]*$", line) if markdown else None
        if fence:
            if line.strip().startswith(fence):
                yield "code", block
                block, fence = [], ""
            else:
                block.append(line)
        elif opening:
            yield "text", block
            block, fence = [], opening[1]
        elif heading:
            yield "text", block
            yield "heading", [heading[1]]
            block = []
        elif RULE.fullmatch(line) and underlined(block, line, markdown):
            yield "heading", block[-1:]
            block = []
        elif line or (block and block[0].startswith("    ") and below.startswith("    ")):
            block.append(line)
        else:
            yield "text", block
            block = []
    yield "code" if fence else "text", block


def underlined(block: Sequence[str], line: str, markdown: bool) -> bool:
    """Whether the line below a block makes it a heading; it may have a line above it too."""
    if not block or len(block) > 2 or (len(block) == 2 and not RULE.fullmatch(block[0])):
        return False
    title = block[-1].strip()
    length = 3 if markdown else 0.6 * len(title)
    return line[0] in ("=-" if markdown else line) and len(line) >= length and len(title) <= 100 and (
        re.match(r"[^\W_]|[`\"'(*:.<\[]", title) is not None)


LETTER = re.compile(r"[^\W_]")
IMAGE = r"!\[[^\[\]]*\](?:\([^()]*\)|\[[^\[\]]*\])"
# (pattern, what stays of it): of Markdown, of reStructuredText, of HTML in either
MARKUP = [
    (IMAGE, ""),
    (r"(?<![\w\])])\[([^\[\]]*)\](?:\([^()\s]*(?: \"[^\"]*\")?\)|\[[^\[\]]*\])", r"\1"),  # [text](address)
    (r"`([^`<]+?)\s*(?:<[^`>]+>)?`__?", r"\1"),                       # `text <address>`_
    (r":[\w:+-]+:`[~!]?([^`<]*?)\s*(?:<[^`>]*>)?`", r"\1"),          # :role:`text`
    (r"</?(?:a|p|div|img|br|hr|span|center|picture|source|table|t[hdr]|[bi]|em|su[bp]|summary)\b[^<>]*>", ""),
    (r"(?m)^ *\[[^\]]+\]: \S+.*\n?", ""),                            # [name]: address
    (r"(?m)^(?:[^\w\n(){}\[\]]|_){4,}(?:\n|$)", ""),                 # a line that is drawn
    (r"(?m)::$", ":"),
    (r"\\(?=[_*#<>`\[\]])", ""),                                     # \_
]
LINK = re.compile("|".join([*(pattern for pattern, _ in MARKUP[:3]), r"<?https?://\S+", r"\|[\w.-]+\|"]))


def plain(text: str) -> str:
    """A text without the markup of links, images, roles and HTML."""
    for pattern, kept in MARKUP:
        text = re.sub(pattern, kept, text)
    return text.strip("\n")
