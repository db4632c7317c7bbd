"""Held against the `transformers` library: logits of every architecture, and files that go there and back unchanged."""

import json
import warnings

import jax
import numpy as np
import pytest

from flaxmodels import hub, models, sharding, state
from flaxmodels.cli import hub as verbs
from flaxmodels.data import tokenizer as tokenizers

torch = pytest.importorskip("torch", reason="what it is held against needs PyTorch")
transformers = pytest.importorskip("transformers", reason="the library that it is held against")
pytestmark = pytest.mark.slow

SIZES = dict(
    vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    max_position_embeddings=64, bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip
GROUPED = dict(SIZES, num_key_value_heads=2)
GPT2 = dict(vocab_size=99, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=None, eos_token_id=None)
DISTILBERT = dict(vocab_size=99, dim=32, hidden_dim=48, n_layers=3, n_heads=4, max_position_embeddings=64)
LLAMA3 = dict(
    rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=16,
)  # fmt: skip
TOYS = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "llama_3_1": ("LlamaForCausalLM", "LlamaConfig", dict(GROUPED, rope_parameters=LLAMA3, tie_word_embeddings=True)),
    "llama_biases": ("LlamaForCausalLM", "LlamaConfig", dict(GROUPED, attention_bias=True, mlp_bias=True)),
    "mistral": ("MistralForCausalLM", "MistralConfig", dict(GROUPED, sliding_window=7)),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "qwen2_windows": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        dict(GROUPED, use_sliding_window=True, sliding_window=7, max_window_layers=2, tie_word_embeddings=True),
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", dict(GROUPED, head_dim=16)),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        dict(GROUPED, head_dim=16, sliding_window=7, query_pre_attn_scalar=24, attn_logit_softcapping=5.0,
             final_logit_softcapping=8.0),
    ),
    "bert": ("BertForMaskedLM", "BertConfig", SIZES),
    "bert_classifier": ("BertForSequenceClassification", "BertConfig", dict(SIZES, num_labels=3)),
    "distilbert": ("DistilBertForMaskedLM", "DistilBertConfig", DISTILBERT),
    "distilbert_classifier": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        dict(DISTILBERT, num_labels=3),
    ),
    "gemma2_classifier": (
        "Gemma2ForSequenceClassification",
        "Gemma2Config",
        dict(GROUPED, head_dim=16, sliding_window=7, pad_token_id=0, num_labels=3),
    ),
    "vit": (
        "ViTForImageClassification",
        "ViTConfig",
        dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=16,
             patch_size=4, num_labels=5),
    ),
}  # fmt: skip


NIGHTLY = ("llama_biases", "qwen2_windows", "distilbert_classifier", "gemma2_classifier")


def toy(name, folder, dtype=None, **changed):
    """A model of the library with random weights, saved; norms near 1, so that all of it matters."""
    model, config, options = TOYS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = getattr(transformers, model)(getattr(transformers, config)(**{**options, **changed})).eval()
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for path, weight in made.named_parameters():
                noise = torch.randn(weight.shape, generator=draw)
                unit = "norm" in path.lower() or ".ln_" in path
                weight.copy_(0.2 * noise + (1.0 if unit and path.endswith("weight") and name != "gemma2" else 0.0))
        made = made.to(dtype) if dtype else made
        made.save_pretrained(folder)
    return made


def example(name):
    """(inputs of ours, of theirs)."""
    draw = np.random.default_rng(0)
    if name == "vit":
        images = draw.standard_normal((2, 16, 16, 3), np.float32)
        return images, torch.tensor(images.transpose(0, 3, 1, 2))
    tokens = draw.integers(1, 99, (2, 40), np.int32)  # 0 is padding to some
    return tokens, torch.tensor(tokens.astype(np.int64))


def abstract_of(model, inputs, mesh):
    shapes = jax.eval_shape(lambda: model.init(state.base_key(0), inputs[:1]))["params"]
    places = sharding.shard_tree(shapes, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, places)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.nightly) if name in NIGHTLY else name for name in TOYS]
)
def test_logits_and_the_way_back(name, tmp_path):
    theirs = toy(name, tmp_path / "theirs")
    inputs, their_inputs = example(name)
    described = hub.describe(tmp_path / "theirs")
    model = models.build(**described.model)
    params = hub.read(tmp_path / "theirs", abstract_of(model, inputs, sharding.make_mesh(devices=jax.devices()[:1])))
    logits = np.asarray(jax.jit(model.apply)({"params": params}, inputs))
    with torch.no_grad():
        expected = theirs(their_inputs).logits.numpy()
    assert logits.shape == expected.shape and np.abs(expected).max() > 0.5
    assert np.abs(logits - expected).max() <= 1e-4

    hub.write(tmp_path / "ours", described.model, jax.device_get(params))
    file = "model.safetensors"
    assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert torch.equal(again.eval()(their_inputs).logits, theirs(their_inputs).logits)


def test_bfloat16_there_and_back(tmp_path):
    theirs = toy("llama", tmp_path / "theirs", torch.bfloat16)
    inputs, _ = example("llama")
    described = hub.describe(tmp_path / "theirs")
    assert {leaf.dtype for leaf in described.leaves.values()} == {"bfloat16"}
    abstract = abstract_of(models.build(**described.model), inputs, sharding.make_mesh(devices=jax.devices()[:1]))
    params = jax.device_get(hub.read(tmp_path / "theirs", abstract))
    assert params["norm"]["scale"].dtype == np.float32
    hub.write(tmp_path / "ours", described.model, params, dtype="bfloat16")
    file = "model.safetensors"
    assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()
    again = type(theirs).from_pretrained(tmp_path / "ours")
    assert again.dtype == torch.bfloat16


def test_files_of_a_model_without_its_head(tmp_path):
    """As those of GPT-2 are: names without a prefix; and in several shards."""
    theirs = toy("gpt2", tmp_path / "theirs")
    theirs.transformer.save_pretrained(tmp_path / "bare", max_shard_size="20KB")
    assert (tmp_path / "bare" / "model.safetensors.index.json").exists()
    config = json.loads((tmp_path / "bare" / "config.json").read_text()) | {"architectures": ["GPT2LMHeadModel"]}
    (tmp_path / "bare" / "config.json").write_text(json.dumps(config))
    whole, bare = (hub.describe(tmp_path / name) for name in ("theirs", "bare"))
    assert bare.leaves == whole.leaves and len(bare.files) > 3
    places = {path: jax.sharding.SingleDeviceSharding(jax.devices()[0]) for path in bare.leaves}
    for path, array in hub.sharded(bare, places).items():
        assert np.array_equal(array, hub.sharded(whole, {path: places[path]})[path]), path


def test_tokenizers_of_others_read_the_same(tmp_path):
    """WordPiece as BERT has it, and BPE with bytes to fall back on, as made of SentencePiece: ids and texts agree."""
    import tokenizers as library

    texts = [
        "The cat sat on the mat.",
        "Größe: 3 µm, naïve façade!",
        "日本 🎉 cats sitting",
        "  two  spaces\nand lines",
    ]
    piece = library.Tokenizer(library.models.WordPiece(unk_token="[UNK]"))
    piece.normalizer = library.normalizers.BertNormalizer(lowercase=True)
    piece.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    piece.decoder = library.decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    piece.train_from_iterator(texts, library.trainers.WordPieceTrainer(vocab_size=120, special_tokens=special))
    ends = [("[CLS]", piece.token_to_id("[CLS]")), ("[SEP]", piece.token_to_id("[SEP]"))]
    piece.post_processor = library.processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)

    marks = ["<unk>", "<s>", "</s>"]
    letters = sorted({letter for text in texts[:2] for letter in text.replace(" ", "▁")})
    names = [*marks, *(f"<0x{i:02X}>" for i in range(256)), *letters, "th", "at"]
    pairs = library.Tokenizer(
        library.models.BPE({name: i for i, name in enumerate(names)}, [("t", "h"), ("a", "t")], unk_token="<unk>",
                           fuse_unk=True, byte_fallback=True)
    )  # fmt: skip
    pairs.normalizer = library.normalizers.Sequence(
        [library.normalizers.Prepend("▁"), library.normalizers.Replace(" ", "▁")]
    )
    strip = [library.decoders.Strip(" ", 1, 0)]
    pairs.decoder = library.decoders.Sequence(
        [library.decoders.Replace("▁", " "), library.decoders.ByteFallback(), library.decoders.Fuse(), *strip]
    )
    pairs.add_special_tokens(marks)
    pairs.post_processor = library.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])

    for made, begin, end in ((piece, "[CLS]", "[SEP]"), (pairs, "<s>", "</s>")):
        made.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        ours = tokenizers.load(tmp_path)
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
        assert (ours.begin, ours.end) == (made.token_to_id(begin), made.token_to_id(end))
        for text in texts:
            ids = ours.encode(text).tolist()
            assert ids == theirs(text, add_special_tokens=False)["input_ids"]
            assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)
        if made is pairs:
            assert [ours.decode(ours.encode(text)) for text in texts] == texts, "nothing is lost"
            assert sum(ours.token_bytes[i] for i in ours.encode(texts[2])) == len(texts[2].encode()) + 1
        again = tmp_path / "again.json"
        tokenizers.save(ours, again)
        assert again.read_text() == (tmp_path / "tokenizer.json").read_text()


def test_what_was_imported_and_exported_opens_there(tmp_path):
    """Tokenizer and model, by their automatic classes, in another precision."""
    theirs = toy("gpt2", tmp_path / "theirs", vocab_size=300)
    made = tokenizers.train("bpe", lambda: ["a small text, " * 9], vocab_size=280, documents=True)
    tokenizers.save(made, tmp_path / "theirs" / "tokenizer.json")
    assert verbs.import_([f"--from={tmp_path / 'theirs'}", f"--to={tmp_path / 'run'}"]) == 0
    assert verbs.export([f"--workdir={tmp_path / 'run'}", f"--to={tmp_path / 'out'}", "--dtype=bfloat16"]) == 0
    opened = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert opened("a text")["input_ids"] == made.encode("a text").tolist()
    assert (opened.eos_token, opened.eos_token_id) == ("<|endoftext|>", made.end)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model) is type(theirs) and model.dtype == torch.bfloat16 and model.config.eos_token_id == made.end
    for path, weight in theirs.state_dict().items():
        assert torch.equal(model.state_dict()[path], weight.to(torch.bfloat16)), path
