"""One document -> passages: a .md, .rst or .txt file is cut where its makers cut it.

That is at headings, then between paragraphs, list items or lines; within a paragraph only where an encoder
could not read it whole. No parser of either language: a file that breaks the rules loses no word. What is not
read: front matter, comments, directives without text, images, badges, addresses, lists of links.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from engine.corpus import UNSPACED, Passage

# The most words of a passage, as `size` counts them: with its title, 99 of 100 are then within the 256 tokens
# at which all-MiniLM-L6-v2 and `tiny` cut a text.
MAX_WORDS = 160
FEW_WORDS = 20               # a smaller piece joins a neighbour
MARKDOWN = (".md", ".markdown")

# --------------------------------------------------------------------------------------------------
# A document -> passages


def passages_of(name: str, text: str) -> list[Passage]:
    """The passages of one document, numbered in their order.

    >>> passages_of("tea.md", "Boil water.")
    [{'_id': 'tea.md#1', 'title': 'tea', 'text': 'Boil water.'}]
    """
    markdown = Path(name).suffix.lower() in MARKDOWN
    parts = list(blocks(visible(text, markdown), markdown))
    headings = [part for kind, part in parts[:3] if kind == "heading"]
    title = headings[0] if headings else re.sub("[-_]+", " ", Path(name).stem)
    heading, section = "", list[str]()
    pieces = []                                                      # (heading, text)
    for kind, part in [*parts, ("heading", "")]:
        if kind == "heading":
            section = introduced(section)
            pieces += [(heading, piece) for piece in packed(section, "\n\n")]
            heading, section = part, []
        else:
            section += cut(part, CUTS[kind])
    rows = list[Passage]()
    for heading, piece in joined(pieces):
        if len(WORD.findall(piece)) < size(piece) / 10:              # a table of numbers, no text
            continue
        full_title = title if heading in ("", title) else f"{title}: {heading}"
        rows.append({"_id": f"{name}#{len(rows) + 1}", "title": full_title, "text": piece})
    return rows


# What an encoder will read as a token, nearly: a word of common length, a character, a punctuation mark
TOKEN = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]{{1,12}}|[^\w\s]|_")
WORD = re.compile(rf"[{UNSPACED}]|[^\W\d_]{{2,}}")


@functools.lru_cache                                                 # cutting asks for the same texts again
def size(text: str) -> int:
    return len(TOKEN.findall(text))


# Where to cut what is too long, the best place first: (pattern, what joins the pieces again)
CUTS = {
    "text": [(r"\n(?= *(?:[-*+•]|\d+[.)]) )", "\n"), (r"(?<=[.!?])\s+|(?<=[。！？])", " "),
             (r"\n", "\n"), (r"\s+", " ")],
    "lines": [(r"\n\n+", "\n\n"), (r"\n", "\n"), (r"\s+", " ")],
}


def cut(text: str, cuts: Sequence[tuple[str, str]]) -> list[str]:
    """A text in pieces of at most MAX_WORDS, each as long as the coarsest cuts allow."""
    if size(text) <= MAX_WORDS:
        return [text]
    if not cuts:                                                     # one endless word
        return [text[i:i + MAX_WORDS] for i in range(0, len(text), MAX_WORDS)]
    pattern, joint = cuts[0]
    parts = []
    for part in re.split(pattern, text):
        parts += cut(part, cuts[1:])
    return packed(parts, joint)


def packed(parts: Sequence[str], joint: str) -> list[str]:
    """Neighbours joined, to as few pieces of about equal size as MAX_WORDS allows."""
    sizes = [size(part) for part in parts]
    aim = sum(sizes) / max(1, math.ceil(sum(sizes) / MAX_WORDS))
    pieces, total = list[list[str]](), 0
    for part, words in zip(parts, sizes, strict=True):
        if not pieces or total >= aim or total + words > MAX_WORDS:
            pieces.append([])
            total = 0
        pieces[-1].append(part)
        total += words
    return [joint.join(piece) for piece in pieces]


def introduced(parts: Sequence[str]) -> list[str]:
    """A part that ends with a colon stays with what it introduces."""
    found = list[str]()
    for part in parts:
        if found and found[-1].endswith(":") and size(found[-1]) + size(part) <= MAX_WORDS:
            found[-1] += "\n\n" + part
        else:
            found.append(part)
    return found


def joined(pieces: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """A piece of few words goes to the one below it, the last one to the one above, under its heading."""
    found = list[tuple[str, str]]()
    for i, (heading, text) in enumerate(pieces):
        above_heading, above = found[-1] if found else ("", "")
        small = size(text) < FEW_WORDS and (heading == above_heading or i == len(pieces) - 1)
        inner = text if heading == above_heading else f"{heading}\n{text}"
        if found and (small or size(above) < FEW_WORDS) and size(above) + size(inner) <= MAX_WORDS:
            found[-1] = above_heading or heading, f"{above}\n\n{inner}"
        else:
            found.append((heading, text))
    return found


# --------------------------------------------------------------------------------------------------
# A text -> its headings and blocks

FRONT_MATTER = re.compile(r"(---|\+\+\+)\n((?:#|\w[\w -]*[:=]).*?)\n\1\n", re.DOTALL)
FENCE_OR_COMMENT = re.compile(r"^ *(```|~~~).*?^ *\1|<!--(?:(?!<!--).)*?-->", re.DOTALL | re.MULTILINE)
HTML_HEADING = re.compile(r"<h[1-6][^>]*>(.*?)</h[1-6]>", re.DOTALL)
# Directives of reStructuredText that hold no text, with comments and targets; then all others
EMPTY = "image|figure|toctree|contents|include|literalinclude|raw|index|highlight|meta|currentmodule|auto\\w+"
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
TITLE = re.compile(r"[\w`\"'(*:.<\[].{,99}")
FENCE = re.compile(r" *(`{3,}|~{3,})")
HEADING = re.compile(r" {0,3}#{1,6} +(.{,150}?)[ #]*$")


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
    block, fence = [], ""
    for line, below in itertools.pairwise([*lines, ""]):
        opening = FENCE.match(line) if markdown else None
        heading = HEADING.match(line) if markdown else None
        if fence and not line.strip().startswith(fence):
            block.append(line)
            continue
        if fence:
            yield "code", block
            fence = ""
        elif opening:
            yield "text", block
            fence = opening[1]
        elif heading:
            yield "text", block
            yield "heading", [heading[1]]
        elif RULE.fullmatch(line) and underlined(block, line, markdown):
            yield "heading", block[-1:]
        elif line or (block and block[0].startswith("    ") and below.startswith("    ")):
            block.append(line)
            continue
        else:
            yield "text", block
        block = []
    yield "code" if fence else "text", block


def underlined(block: Sequence[str], line: str, markdown: bool) -> bool:
    """Whether the line below a block makes it a heading; it may have a line above it too."""
    overlined = len(block) == 2 and RULE.fullmatch(block[0])
    if len(block) != 1 and not overlined:
        return False
    title = block[-1].strip()
    if not TITLE.fullmatch(title):                                   # a list or a table above a line
        return False
    return line[0] in "=-" if markdown else len(line) >= 0.6 * len(title)


LETTER = re.compile(r"[^\W_]")
IMAGE = r"!\[[^\[\]]*\](?:\([^()]*\)|\[[^\[\]]*\])"
TAGS = "a|p|div|img|br|hr|span|center|code|d[ldt]|[ou]l|li|pre|kbd|table|t[hdr]|[bi]|em|strong|su[bp]|summary"
# (pattern, what stays of it): of Markdown, of reStructuredText, of HTML in either
MARKUP = [
    (IMAGE, ""),
    (r"(?<![\w\])])\[([^\[\]]*)\](?:\([^()\s]*(?: \"[^\"]*\")?\)|\[[^\[\]]*\])", r"\1"),  # [text](address)
    (r"`([^`<]+?)\s*(?:<[^`>]+>)?`__?", r"\1"),                       # `text <address>`_
    (r":[\w:+-]+:`[~!]?([^`<]*?)\s*(?:<[^`>]*>)?`", r"\1"),          # :role:`text`
    (rf"(?<!`)</?(?:{TAGS})\b[^<>]*>", ""),
    (r"(?m)^ *\[[^\]^]+\]: *\S+(?: +[\"'(].*)?(?:\n|$)", ""),          # [name]: address
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
