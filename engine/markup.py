"""One document -> passages: a .md, .rst or .txt file is cut where its makers cut it.

That is at headings, then between paragraphs; at items of a list, sentences, lines or words only where an encoder
could not read the whole. There is no parser of either language: one list of patterns says what a reader does not
see as text, and a file that breaks the rules loses no word. What is not read: front matter, comments, directives
without text, images, addresses, lists of links, tables of numbers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

from engine.corpus import UNSPACED, Passage

# The most words of a passage, as `size` counts them: with its title, 99 of 100 are then within the 256 tokens
# at which all-MiniLM-L6-v2 and `tiny` cut a text.
MAX_WORDS = 160
FEW_WORDS = 20               # a shorter piece joins its neighbour

# --------------------------------------------------------------------------------------------------
# A text as its reader sees it

TARGET = r"(?:\((?:[^()\s]|\([^()\s]*\))*(?:\s[^()]*)?\)|\[[^\[\]]*\])"   # (address "title") or [name]
# Directives of reStructuredText that hold no text
EMPTY = "image|figure|toctree|contents|include|literalinclude|raw|index|highlight|meta|currentmodule|auto\\w+"
PARTING_TAGS = "p|div|br|hr|d[ldt]|[ou]l|li|pre|table|t[hdr]|h\\d"      # words on either side are two
TAGS = f"{PARTING_TAGS}|a|img|span|center|code|kbd|[bi]|em|strong|su[bp]|details|summary"
# The marks of Markdown, reStructuredText and HTML: the last group of each stays, else nothing. They are tried in
# this order at every place, and what one has taken no other one sees: code stays as it is.
MARKUP = [
    r"^ *(?P<fence>```+|~~~+(?= *\w))[^`\n]*\n((?:.*\n)*?)(?: *(?P=fence).*$|\Z)",   # lines of code
    # what stands before the words of a heading: #, <h1>, or nothing where a line is drawn below them
    r"(?P<heading>^#{1,6} +|<h[1-6]\b[^<>]*>(?:\s|<[^<>]*>)*"
    r"|(?<=[\n=~*#>-]\n) *(?=[^\s|+-].{,99}\n[=\-~^\"'#*+.:_]{3,}$))",
    r"<!--(?:(?!<!--)[\s\S])*?-->",
    # a comment, an address or a directive without text, with the lines that belong to it; none to an empty comment
    rf"^(?P<indent> *)\.\.(?!\n\n)(?: (?:(?:{EMPTY}) ?::|(?![\w:+-]+ ?::|\[)).*)?\n(?:(?:(?P=indent) +\S.*| *)\n)*",
    r"^ *\.\. (?:(?:code|source|only)[\w-]* ?::.*|[\w:+-]+ ?:: ?)",    # the name of another directive
    r"^ *:[a-z-]+:(?: \S+)?$",                                       # an option of one
    rf"^ *(?:[*+-]|\d+\.) +\[[^\[\]]*\]{TARGET}\n",                  # an item that is a link alone
    rf"\[?!\[[^\[\]]*\]{TARGET}(?:\]{TARGET})?",                     # an image, which may be a link
    rf"(?<![\w\])])\[([^\[\]]*)\]{TARGET}",                          # [text](address)
    r"^ *\[[^\]^\n]+\]: *\S+(?: +[\"'(].*)?\n",                      # [name]: address
    r"(?::[\w+-]+){1,3}:`[~!]?([^`<]*[^`<\s])\s*(?:<[^`>]*>)?`",     # :role:`text <name>`
    r"`([^`<]*[^`<\s])\s*(?:<[^`>]+>)?`__?",                         # `text <address>`_
    r"(`{1,3}[^`\n]+`{1,3})",                                        # code within a line
    rf"(?P<parting>(?<=\S)</?(?:{PARTING_TAGS})\b[^<>]*>(?=\S))",
    rf"</?(?:{TAGS})\b[^<>]*>",
    r"^(?:[^\w\n(){}\[\]]|_)+\n",                                    # a line that is drawn
    r"(:):$",                                                        # a colon above code
    r"\\([_*#<>`\[\]])",
]
INSTEAD = {"heading": "\f", "parting": " "}
FRONT_MATTER = (r"\A(---|\+\+\+)\n(?=#|\w[\w -]*[:=])"
                r"(?>(?:(?!\1\n).*\n)*?[Tt]itle *[:=] *(?:[>|][+-]?\n *)?(.*)\n)?(?:(?!\1\n).*\n)*\1\n")


def visible(text: str) -> str:
    """The text without its markup, and a form feed before each heading."""
    lines = [line.rstrip().expandtabs(4) for line in text.splitlines()]
    text = re.sub(FRONT_MATTER, r"# \2\n", "\n".join(lines) + "\n")
    text = re.sub("|".join(MARKUP), staying, f"\n\n{text}", flags=re.MULTILINE)
    return re.sub(r"\n[ \n]*\n", "\n\n", text)


def staying(markup: re.Match[str]) -> str:
    """What a reader sees of it."""
    if markup.lastgroup in INSTEAD:
        return INSTEAD[markup.lastgroup]
    return markup[markup.lastindex] if markup.lastindex else ""


# --------------------------------------------------------------------------------------------------
# A document -> passages

# What an encoder will read as a token, nearly: a word of common length, a character, a punctuation mark
TOKEN = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]{{1,12}}|[^\w\s]|_")
# A letter alone is no word, but with a mark, as in many scripts
WORD = re.compile(rf"[{UNSPACED}]|[^\W\d_](?:[^\W\d_]+|[\u0300-\uffff])")


def size(text: str) -> int:
    return len(TOKEN.findall(text))


def passages_of(name: str, text: str) -> list[Passage]:
    """The passages of one document, numbered in their order.

    >>> passages_of("tea.md", "Boil water.")
    [{'_id': 'tea.md#1', 'title': 'tea', 'text': 'Boil water.'}]
    """
    if name.lower().endswith(".txt"):
        text = re.sub("(?m)^#", " #", text)                          # a comment, no heading
    above, *parts = visible(text).split("\f")
    title = re.sub(r"[-_\s]+", " ", Path(name).stem)
    if parts and size(above) < FEW_WORDS:
        title = headed(parts[0])[0] or title
    rows = list[Passage]()
    for part in ["\n" + above, *parts]:
        heading, body = headed(part)
        full_title = title if heading in ("", title) else f"{title}: {heading}"
        for piece in map(str.rstrip, cut(body)):
            if len(WORD.findall(piece)) <= size(piece) / 10:         # a table of numbers, or nothing
                continue
            same_section = rows and rows[-1]["title"] == full_title
            below = piece if same_section else f"{heading}\n{piece}"
            if rows and joins(rows[-1]["text"], below):
                rows[-1]["text"] += "\n\n" + below
            else:
                rows.append({"_id": f"{name}#{len(rows) + 1}", "title": full_title, "text": piece})
    return rows


def headed(part: str) -> tuple[str, str]:
    """The heading of a part, and what stands below it."""
    heading, _, body = part.partition("\n")
    return re.sub("[*`\"]", "", heading).strip(" #:"), body.lstrip("\n")


def joins(above: str, below: str) -> bool:
    """Whether one of two pieces has few words, and both fit into one."""
    words = size(above), size(below)
    return min(words) < FEW_WORDS and sum(words) <= MAX_WORDS


# Where to cut what is too long, the best places first: below a paragraph that announces nothing, above an item of a
# list, after a sentence, between lines
CUTS = (r"(?<=[^:]\n\n)", r"(?<=\n)(?= *(?:[-*+•|]|\d+[.)]) )", r"(?<=[^\d\s][.!?।؟۔።]\s)|(?<=[。！？])",
        r"(?<=\n)")


def cut(text: str, cuts: Sequence[str] = CUTS) -> list[str]:
    """A text in few pieces of about equal size, at most MAX_WORDS, each cut at the best places there are."""
    words = size(text)
    if words <= MAX_WORDS:
        return [text]
    parts = []
    if cuts:
        for part in re.split(cuts[0], text):
            parts += cut(part, cuts[1:])
    else:
        parts = re.findall(rf"\s*\S{{1,{MAX_WORDS}}}", text)
    aim = words / math.ceil(words / MAX_WORDS)
    pieces, filled = [""], 0
    for part in parts:
        more = size(part)
        if filled >= aim or filled + more > MAX_WORDS:
            pieces.append("")
            filled = 0
        pieces[-1] += part
        filled += more
    return pieces
