"""engine/packed.py: encoding without padding, and many texts.   pytest tests/test_packed.py

Invariants: packed gives the vectors of the plain encoder, whatever the batches; blocks and bfloat16
change nothing but the last digits; what cannot be encoded is refused, and the encoder stays as it was.
"""

import numpy as np
import pytest
import torch

import gecko
from engine import files, packed, search
from engine import tokens as tokens_file

BF16 = pytest.param("bf16", marks=pytest.mark.skipif(not search.has_bfloat16(torch.device("cpu")),
                                                     reason="no fast bfloat16 on this CPU"))
TEXTS = [" ".join(f"word{(i * j) % 17}" for j in range(1 + i * 7 % 23)) for i in range(120)]


@pytest.fixture(scope="module")
def model():
    """Two transformer layers that are not the identity."""
    model = gecko.tiny(TEXTS, num_hidden_layers=2, hidden_size=48, num_attention_heads=3,
                       intermediate_size=96, layer_norm_eps=1e-12)
    generator = torch.Generator().manual_seed(0)
    for p in model.encoder.parameters():
        torch.nn.init.normal_(p, 0, 0.2, generator=generator)
    model.encoder.eval()
    return model


def plainly(model):
    """One text at a time: nothing is padded, nothing packed."""
    with torch.no_grad():
        return torch.cat([gecko.truncate_dim(gecko.embed(model.encoder, *gecko.pad([ids], 0)))
                          for ids in model.tokens(TEXTS)]).numpy()


@pytest.mark.parametrize("batch_tokens", [1, 64, 4096])
def test_packed_gives_the_plain_vectors(model, batch_tokens):
    """In float32 within 1e-5; with one layer's bias changed they differ, so the comparison can fail."""
    want = plainly(model)
    pack = packed.packed(model.encoder, torch.float32)
    tokens = model.tokens(TEXTS)
    for batch in packed.length_batches([len(t) for t in tokens], batch_tokens):
        with torch.no_grad():
            x = gecko.truncate_dim(pack([tokens[i] for i in batch])).numpy()
        np.testing.assert_allclose(x, want[batch], atol=1e-5)
    with torch.no_grad():
        model.encoder.encoder["layer"][1].attention["self"]["key"].weight += 0.1
        changed = gecko.truncate_dim(packed.packed(model.encoder, torch.float32)(tokens)).numpy()
        model.encoder.encoder["layer"][1].attention["self"]["key"].weight -= 0.1
    assert np.abs(changed - want).max() > 1e-4


@pytest.mark.parametrize("precision, atol", [("float32", 1e-5), pytest.param("bf16", 0.05, marks=BF16.marks)])
def test_blocks_and_precision_keep_the_vectors(model, precision, atol, monkeypatch):
    """In blocks of texts: float32 unit vectors in order; bfloat16 is near and not the same."""
    want = plainly(model)
    whole = model.encode(TEXTS, precision=precision)
    monkeypatch.setattr(tokens_file, "TEXTS_AT_ONCE", 50)
    monkeypatch.setitem(gecko.BATCH_TOKENS, "cpu", 100)
    x = model.encode(TEXTS, precision=precision)
    assert x.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(x, want, atol=atol)
    np.testing.assert_allclose(x, whole, atol=atol)
    assert precision == "float32" or np.abs(x - want).max() > 1e-5


def test_texts_cut_are_counted_over_the_blocks(model, monkeypatch):
    monkeypatch.setattr(tokens_file, "TEXTS_AT_ONCE", 50)
    model.encode([*TEXTS, "word1 " * 1000, *TEXTS, "word1 " * 1000])
    assert model.truncated == 2 and model.lost() == "2 of 242 texts were cut at 256 tokens"
    model.encode(TEXTS)
    assert model.truncated == 0 and model.lost() == ""


@pytest.mark.parametrize("fast, precision, said",
                         [(True, "bf16", False), (False, "bf16", True), (False, "float32", False)])
def test_emulated_bfloat16_is_not_slow_in_silence(monkeypatch, capsys, fast, precision, said):
    """Training says it, and so does encoding (below)."""
    monkeypatch.setattr(packed, "has_bfloat16", lambda device: fast)
    with packed.autocast(torch.device("cpu"), precision):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
    assert ("this cpu only emulates" in capsys.readouterr().err) == said


def test_precision_and_training_mode(model, monkeypatch, capsys):
    """A wrong name is refused, bfloat16 without the instructions for it said; training mode stays."""
    with pytest.raises(KeyError, match="fp8"):
        model.encode(TEXTS, precision="fp8")
    monkeypatch.setattr(packed, "has_bfloat16", lambda device: False)
    np.testing.assert_allclose(model.encode(TEXTS, precision="bf16"), plainly(model), atol=0.05)
    assert "this cpu only emulates" in capsys.readouterr().err
    model.encoder.train()
    with pytest.raises(files.InputError, match="no tokens"):
        model.encode([*TEXTS, " "])
    model.encode(TEXTS)
    assert model.encoder.training
    model.encoder.eval()


# --------------------------------------------------------------------------------------------------
# Texts that are hard to tokenise


@pytest.mark.parametrize("text", [
    "word1 word2 " * 5000, "word1" * 5000, " " * 60_000 + "word3 word4", "x " + "\n" * 9000 + "word5 " * 900,
    "word1 word2 " * 350, "漢字" * 9000, "\u0301" * 9000 + "word6"],
    ids=["words", "one word", "blanks first", "blanks inside", "just too long", "han", "marks"])
def test_a_long_text_has_the_tokens_of_the_whole(model, text):
    """Its beginning is tokenised first; where that is not enough, all of it."""
    model.tokenizer.enable_truncation(40)
    whole = model.tokenizer.encode(text)
    assert model.tokens([text, "word1"], 40)[0].tolist() == whole.ids
    assert model.truncated == bool(whole.overflowing)


def test_only_the_beginning_of_a_long_text_is_tokenised(model, monkeypatch):
    """A long document costs no more than the tokens that are kept of it."""
    seen, encode = [], model.tokenizer.encode_batch_fast
    monkeypatch.setattr(tokens_file, "TEXTS_AT_ONCE", 3)

    class Spy:
        no_padding, enable_truncation = model.tokenizer.no_padding, model.tokenizer.enable_truncation
        token_to_id, encode = model.tokenizer.token_to_id, None
        num_special_tokens_to_add = model.tokenizer.num_special_tokens_to_add

        def encode_batch_fast(self, texts):
            seen.append([len(t) for t in texts])
            return encode(texts)

    tokens_file.tokenise(Spy(), ["word1 " * 10_000] * 4, 32)
    assert seen == [[16 * 32] * 3, [16 * 32]]


def test_unknown_tokens_are_said():
    """A tokenizer that does not know a script: the share is said where it is above 1 %."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1, "red": 2, "green": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    model = gecko.Gecko(gecko.tiny(["red green"], hidden_size=12).encoder, tokenizer, 64, gecko.PLAIN)
    model.tokens(["red green", "北京 上海"])
    assert model.unknown == 0.5 and model.lost() == "50% of the tokens are unknown to this model's tokenizer"
    model.tokens(["red green"])
    assert model.lost() == ""
