"""engine/local.py: a causal language model in this process.   pytest tests/test_local.py

Invariants: a score is what transformers, read plainly, gives: alone, among others, in any order; what stands
beside a text in a batch is not seen by it; a seed's answer does not depend on the other rows.
"""

import functools
import json
import re
import shutil

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="no transformers: pip install transformers")

import tiny_llama  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tokenizers.processors import TemplateProcessing  # noqa: E402

import gecko  # noqa: E402
import llm  # noqa: E402
from engine.files import InputError, write_jsonl  # noqa: E402
from engine.local import Local  # noqa: E402

SIZES = {"vocab_size": tiny_llama.V, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
         "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
WINDOWED = SIZES | {"head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
CONFIGS = {"llama": lambda: transformers.LlamaConfig(**SIZES),
           "qwen2": lambda: transformers.Qwen2Config(**SIZES),
           "gemma3": lambda: transformers.Gemma3TextConfig(**WINDOWED),
           # places that count the padding
           "mpt": lambda: transformers.MptConfig(vocab_size=tiny_llama.V, d_model=32, n_layers=2, n_heads=4,
                                                 expansion_ratio=2, initializer_range=0.3),
           # with pictures: what its text model is stands a level below
           "gemma3 of 4B": lambda: transformers.Gemma3Config(text_config=WINDOWED, vision_config={
               "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
               "image_size": 28, "patch_size": 14}, mm_tokens_per_image=4),
           "gpt-neo": lambda: transformers.GPTNeoConfig(
               vocab_size=tiny_llama.V, hidden_size=32, num_layers=2, attention_types=[[["global", "local"], 1]],
               num_heads=4, window_size=8, max_position_embeddings=512, initializer_range=0.3)}
HEAD = "Read the passage, then write its query.\n\nPassage: "
PREFIXES = [HEAD + text + "\nQuery:" for text in ("tea is a drink", "a book has pages, many of them", "x", "x y")]
TEXTS = [" what is tea", " how many pages has a book", " why", " 東京でお茶はどこですか", " où boire un thé"]
PAIRS = [(prefix, text) for text in TEXTS for prefix in PREFIXES]


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request, tmp_path_factory):
    """A model of random weights, which tells every token and every place apart."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(CONFIGS[request.param]()).save_pretrained(folder)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tiny_llama.tokenizer(), bos_token="<s>",
                                                     eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def opened_once(folder):
    return Local(folder, rows=5, max_tokens=12)


@pytest.fixture
def model(opened_once):
    """One that knows no answer yet."""
    opened_once.answers.clear()
    return opened_once


@functools.cache
def opened(folder):
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    return plain, transformers.AutoTokenizer.from_pretrained(folder)


def log_likelihood_spec(folder, prefix, text):
    """One prompt, one forward of transformers, a loop over the text's tokens."""
    plain, tokenizer = opened(folder)
    before, ids = tokenizer(prefix)["input_ids"], tokenizer(prefix + text)["input_ids"]
    with torch.inference_mode():
        log_p = plain(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(log_p[place - 1, ids[place]]) for place in range(len(before), len(ids)))


def test_query_likelihood_is_the_plain_sum(model, folder):
    expected = [log_likelihood_spec(folder, *pair) for pair in PAIRS]
    assert model.log_likelihood(PAIRS) == pytest.approx(expected, abs=1e-4)
    assert len({round(score, 3) for score in expected}) == len(PAIRS)


def test_what_stands_beside_a_text_in_a_batch_changes_no_score(model):
    """Alone, and in one batch."""
    together = model.log_likelihood(PAIRS)
    model.answers.clear()
    alone = [model.log_likelihood([pair])[0] for pair in PAIRS]
    model.answers.clear()
    model.rows = 1000
    one_batch = model.log_likelihood(PAIRS[::-1])[::-1]
    model.rows = 5
    for other in (alone, one_batch):
        assert other == pytest.approx(together, abs=1e-4)


def test_negative_control_padding_that_is_read_changes_scores(model, monkeypatch):
    together = model.log_likelihood(PAIRS)
    forward = model.forward
    model.answers.clear()
    monkeypatch.setattr(model, "forward", lambda ids, *rest: forward(ids.clamp(min=0), *rest))
    assert model.log_likelihood(PAIRS) != pytest.approx(together, abs=1e-2)


def test_a_transformers_that_calls_the_cache_otherwise_is_as_fast_and_right(folder, model, monkeypatch):
    """Older versions say past_key_values: what is read once is still read once."""
    together, kind = model.log_likelihood(PAIRS), type(model.model)
    forward, seen = kind.forward, []

    def older(self, input_ids, past_key_values=None, **rest):
        seen.append(past_key_values.get_seq_length())
        return forward(self, input_ids, cache=past_key_values, **rest)

    monkeypatch.setattr(kind, "forward", older)
    assert Local(folder).log_likelihood(PAIRS) == pytest.approx(together, abs=1e-4)
    assert max(seen) > 0


def test_a_special_token_ends_an_answer(folder):
    """Also one that generation_config.json does not name: a small model runs on after it."""
    model = Local(folder, stop=())
    for token in ("<s>", "</s>", "<unk>"):
        assert model.stop.split(f"what is tea{token} To: more") == ["what is tea", " To: more"]


def test_an_end_that_the_tokenizer_does_not_call_special_ends_an_answer(folder, tmp_path):
    """Many a chat model's; another added token is a text as any other, as the blanks of some vocabularies."""
    shutil.copytree(folder, tmp_path / "m")
    tokenizer = opened(folder)[1].from_pretrained(folder)
    tokenizer.add_tokens(["<|end|>", "<b>"])
    tokenizer.save_pretrained(tmp_path / "m")
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    (tmp_path / "m/generation_config.json").write_text(json.dumps({"eos_token_id": [2, end]}))
    assert Local(str(tmp_path / "m")).stop.split("what <b>tea<|end|> To: more") == ["what <b>tea", " To: more"]


def test_an_answer_that_was_cut_off_has_whole_lines_alone(model, monkeypatch):
    """Half a query is no query; one that is followed by a stop is whole."""
    written = model.complete(PREFIXES[:1], [7])[0]
    monkeypatch.setattr(model.tokenizer, "decode", lambda ids: "Task: t\nQuery: what is"[:2 * len(ids)])
    model.answers.clear()
    assert model.complete(PREFIXES[:1], [7]) == ["Task: t"] != [written]
    monkeypatch.setattr(model.tokenizer, "decode", lambda ids: "Task: t\nQuery: q\n\nTask: u"[:3 * len(ids)])
    model.answers.clear()
    assert model.complete(PREFIXES[:1], [7]) == ["Task: t\nQuery: q"]


def test_what_a_text_says_is_no_control_token(model):
    """A passage about language models may quote them."""
    assert 2 not in model.tokens("it ends with </s> and")


def test_greedy_answers_are_those_of_generate(folder):
    """Temperature 0, rows of different lengths, with and without a shared head; until the first stop."""
    model = Local(folder, temperature=0.0, max_tokens=12)
    for prompts in (PREFIXES, ["tea", "a book has many pages"]):
        texts = []
        for prompt in prompts:
            ids = torch.tensor([model.tokens(prompt)])
            out = model.model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=2)
            texts.append(model.tokenizer.decode(out[0, ids.shape[1]:]))
        model.stop = re.compile("|".join(re.escape(text[-1]) for text in texts))
        assert model.complete(prompts, [0] * len(prompts)) == [model.stop.split(text)[0] for text in texts]


def test_an_answer_is_its_seeds_own(model, monkeypatch):
    """Whatever rows are written beside it; another seed gives another answer; a stop ends it."""
    monkeypatch.setattr(model, "stop", re.compile(r"(?s)(?<=.{12})"))                 # after 12 characters
    together = model.complete(PREFIXES + PREFIXES, [0, 1, 2, 3, 4, 5, 6, 7])
    model.answers.clear()
    alone = [model.complete([prompt], [seed])[0] for seed, prompt in enumerate(PREFIXES + PREFIXES)]
    assert together == alone and together[:4] != together[4:]
    assert {len(answer) for answer in together} == {12}


def test_samples_follow_the_models_own_probabilities(folder):
    """A first token of probability p comes about p of the time."""
    model = Local(folder, temperature=1.0, max_tokens=1, rows=400)
    model.stop = re.compile(r"\Z")                                   # a token is an answer
    plain, tokenizer = opened(folder)
    with torch.inference_mode():
        likeliest = plain(torch.tensor([tokenizer(PREFIXES[0])["input_ids"]])).logits[0, -1].softmax(-1).max(0)
    p, token = float(likeliest.values), tokenizer.decode(likeliest.indices)
    answers = model.complete(PREFIXES[:1] * 400, range(400))
    assert answers.count(token) / 400 == pytest.approx(p, abs=4 * (p * (1 - p) / 400) ** 0.5)


def test_answers_are_kept_as_they_come(folder, tmp_path, monkeypatch):
    """Stopped in the middle, a run goes on from the last batch: the cache holds all that was scored."""
    model, path = Local(folder, rows=6), tmp_path / "cache.jsonl"
    expected, batches, sums = model.log_likelihood(PAIRS), [], model.log_likelihood_batch
    model.answers.clear()

    def stopping(ids, cache, pairs):
        batches.append(pairs)
        if len(batches) == 3:
            raise KeyboardInterrupt
        return sums(ids, cache, pairs)

    monkeypatch.setattr(model, "log_likelihood_batch", stopping)
    model.keep_in(path)
    with pytest.raises(KeyboardInterrupt):
        model.log_likelihood(PAIRS)
    again = Local(folder, rows=6)
    again.keep_in(path)
    assert again.log_likelihood(PAIRS) == pytest.approx(expected, abs=1e-4)
    assert again.found == sum(map(len, batches[:2])) == 12


def test_mine_with_a_model_in_this_process(folder, tmp_path, monkeypatch, capsys):
    """--llm hf:FOLDER --rank ql: candidates are ranked by the sums above, and the records say by which model."""
    corpus = [{"_id": name, "title": name, "text": f"{name} is a drink."} for name in ("tea", "milk", "coffee")]
    write_jsonl(tmp_path / "c.jsonl", corpus)
    write_jsonl(tmp_path / "q.jsonl", [{"_id": "q0", "task": "find it", "query": "what is tea", "seed_id": "milk"}])
    gecko.save(gecko.tiny([p["text"] for p in corpus]), tmp_path / "m")
    paths = [str(tmp_path / name) for name in ("c.jsonl", "q.jsonl", "f.jsonl")]
    flags = ["--model-dir", str(tmp_path / "m"), "--llm", f"hf:{folder}", "--rank", "ql", "-N", "3"]
    monkeypatch.setattr("sys.argv", ["llm.py", "mine", *paths, *flags])
    llm.main()
    row = json.loads((tmp_path / "f.jsonl").read_text())
    assert row["scored_by"] == {"ql": f"hf:{folder} in float32", "rc": None} and row["rank"] == "ql"
    for p in row["candidates"]:
        prefix = gecko.fill(llm.P_QL, passage=f"{p['id']} {p['id']} is a drink.")
        assert p["ql"] == pytest.approx(log_likelihood_spec(folder, prefix, " what is tea"), abs=1e-3)
    assert row["positive_id"] == max(row["candidates"], key=lambda p: p["ql"])["id"]
    assert f"0 answers of hf:{folder} in float32 from {tmp_path}/f.cache.jsonl" in capsys.readouterr().out


def test_what_is_no_model_is_one_line(tmp_path):
    with pytest.raises(InputError, match="transformers opens no causal language model there"):
        Local(str(tmp_path))


def test_a_tokenizer_that_ends_each_text_scores_the_same(folder, model, tmp_path):
    """The end is no part of a prompt that goes on; counted as one of its tokens, it would take the text's first."""
    tokenizer = tiny_llama.tokenizer()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    copy = shutil.copytree(folder, tmp_path / "m")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(copy)
    other = Local(str(copy))
    assert other.log_likelihood(PAIRS) == pytest.approx(model.log_likelihood(PAIRS), abs=1e-4)


def test_top_tokens_are_the_likeliest_and_agree_with_the_sums(model):
    for prompt, top in zip(PREFIXES, model.top_tokens(PREFIXES), strict=True):
        values = [log_p for _, log_p in top]
        assert values == sorted(values, reverse=True) and len(values) == 20
        token, log_p = next((t, v) for t, v in top if model.tokens(prompt + t)[:-1] == model.tokens(prompt))
        assert model.log_likelihood([(prompt, token)])[0] == pytest.approx(log_p, abs=1e-4)


def test_what_has_no_tokens_of_its_own_or_no_place_is_a_failed_call(model, folder):
    """A token across the prompt's end, an empty text, a prompt beyond the context: no score, and counted."""
    long = "tea is a drink " * 200
    pairs = [("tea is a dri", "nk"), ("tea:", ""), (long, " why"), PAIRS[0]]
    model.context, before = 512, len(model.failures)
    assert model.log_likelihood(pairs) == [None, None, None, pytest.approx(log_likelihood_spec(folder, *PAIRS[0]))]
    assert None is model.complete([long], [1])[0]
    assert len(model.failures) == before + 4 and "the model reads 512: give a smaller --chars" in model.report()
    assert any("a token crosses the prompt's end before 'nk'" in reason for reason in model.failures)


@pytest.mark.parametrize("spoiled", ["an encoder", "a state", "no weight", "no tokenizer", "torn weights"])
def test_what_would_be_read_wrongly_is_refused(spoiled, tmp_path):
    """transformers opens most of them, and draws what is missing at random."""
    config = transformers.Qwen2Config(**SIZES)
    if spoiled == "a state":
        config = transformers.MambaConfig(vocab_size=tiny_llama.V, hidden_size=32, num_hidden_layers=1)
    kind = transformers.AutoModel if spoiled == "an encoder" else transformers.AutoModelForCausalLM
    kind.from_config(config).save_pretrained(tmp_path)
    if spoiled != "no tokenizer":
        transformers.PreTrainedTokenizerFast(tokenizer_object=tiny_llama.tokenizer()).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    if spoiled == "no weight":
        tensors = load_file(weights)
        tensors.pop("model.layers.1.mlp.up_proj.weight")
        save_file(tensors, weights, metadata={"format": "pt"})
    if spoiled == "torn weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match=f"^{tmp_path}: ") as error:
        Local(str(tmp_path))
    reason = {"an encoder": "lm_head.weight", "a state": "linear_attention", "no weight": "layers.1.mlp.up",
              "no tokenizer": "no tokens", "torn weights": "deserializing"}[spoiled]
    assert reason in str(error.value)


@pytest.mark.parametrize("fast, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_bfloat16_weights_are_read_as_float32_where_a_cpu_only_emulates_it(tmp_path, monkeypatch, fast, dtype):
    if torch.cuda.is_available():
        pytest.skip("a GPU takes the weights as they are")
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"]()).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tiny_llama.tokenizer()).save_pretrained(tmp_path)
    monkeypatch.setattr("engine.local.has_bfloat16", lambda device: fast)
    local = Local(str(tmp_path))
    assert local.model.dtype == dtype
    assert local.describe("log_likelihood").endswith(str(dtype).removeprefix("torch."))
