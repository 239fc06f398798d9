"""Texts as token ids: many at a time, cut, with a count of what was lost; a tokenizer trained on texts."""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from engine.files import InputError, one_line

TokenIds = Sequence[Sequence[int]]   # of each text

TEXTS_AT_ONCE = 1024         # that are tokenised together, to bound the memory
CHARS_A_TOKEN = 16           # far more than a token has in the mean


def tokenise(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    length: int,
) -> tuple[list[array[int]], int, float]:
    """Token ids of each text, cut at `length`; how many texts were cut; the share of unknown tokens.

    Of a long text only the beginning is tokenised, which has the same first tokens.
    """
    if length <= tokenizer.num_special_tokens_to_add(False):
        raise InputError(f"a length of {length} tokens leaves none for the text")
    tokenizer.no_padding()
    tokenizer.enable_truncation(length)
    unknown = [i for i in map(tokenizer.token_to_id, ("[UNK]", "<unk>")) if i is not None]   # BERT's, RoBERTa's
    tokens: list[array[int]] = []                                    # a tenth of the memory of lists
    truncated = unknown_tokens = 0
    chars = CHARS_A_TOKEN * length                                   # of the beginning
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        part = texts[start:start + TEXTS_AT_ONCE]
        encodings = tokenizer.encode_batch_fast([text[:chars] for text in part])
        for text, encoding in zip(part, encodings, strict=True):
            # subtle: of blanks, or of one endless word, the beginning may have too few tokens; two more
            # pieces of this length say that the cut is far behind the tokens that are kept
            if len(text) > chars and len(encoding.overflowing) < 2:
                encoding = tokenizer.encode(text)
            ids = encoding.ids
            if not ids:
                raise InputError(f"a text of no tokens has no embedding: {one_line(text, 60)!r}; remove it")
            tokens.append(array("i", ids))
            truncated += bool(encoding.overflowing)
            unknown_tokens += sum(map(ids.count, unknown))
    return tokens, truncated, unknown_tokens / max(1, sum(map(len, tokens)))


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """Byte-pair encoding of lower-cased words; CamelCase and snake_case fall into their parts.

    No mark for "inside a word": the "tree" of "rmtree" is the word "tree". A rare letter becomes its
    bytes, so that no text is lost.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    camel_case = normalizers.Replace(Regex("(?<=[a-z])(?=[A-Z])"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), camel_case, normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, min_frequency=2, show_progress=False,
                                  special_tokens=["[PAD]", "[UNK]"], limit_alphabet=200)
    tokenizer.train_from_iterator(texts, trainer)
    # the trainer knows no bytes: they get the ids behind its own
    state = json.loads(tokenizer.to_str())
    words = state["model"]["vocab"]
    for byte in range(256):
        words[f"<0x{byte:02X}>"] = len(words)
    state["model"]["byte_fallback"] = True
    return Tokenizer.from_str(json.dumps(state))
