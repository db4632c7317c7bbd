import json
import pickle
import random
import re

import numpy as np
import pytest
from shared_data import shared_data

from flaxmodels.data import byte_pairs, tokenizer, vocabularies
from flaxmodels.data.byte_pairs import BytePairs
from flaxmodels.data.vocabularies import Characters, Words
from flaxmodels.registry import UserError

SENTENCE = "Größe: 3 µm, ¿no? 日本 🎉👩‍👩‍👧. It's\r\n\tfine\x00\x1b[0m\n\n  <|endoftext|> </s>\u2028 end\n"
SIZES = {"bpe": 320, "words": 40}


def trained(kind, text=SENTENCE, documents=False, vocab_size=None):
    return tokenizer.train(kind, lambda: [text], vocab_size=vocab_size or SIZES.get(kind), documents=documents)


def random_text(seed, length=400):
    """Any code points but surrogates: control characters, emoji, combining marks, white space of all kinds."""
    draw = random.Random(seed)
    ranges = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x1F300, 0x1FAFF), (0x10000, 0x110000)]
    spaces = " \n\r\t\x0b\x0c\x1c\x85\u00a0\u2028\u3000'.,<|>"
    return "".join(
        draw.choice(spaces) if draw.random() < 0.4 else chr(draw.randrange(*draw.choice(ranges))) for _ in range(length)
    )


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("kind", tokenizer.KINDS)
def test_what_every_kind_must_be(kind, documents, tmp_path):
    made = trained(kind, SENTENCE * 3, documents)
    ids = made.encode(SENTENCE)
    assert ids.ndim == 1 and ids.dtype == (np.uint8 if made.size <= 256 else np.uint16)
    assert ids.max() < made.size and made.end not in ids.tolist()
    assert made.end == (made.size - 1 if documents else None)
    assert len(made.token_bytes) == made.size and (not documents or made.token_bytes[made.end] == 0)
    if kind != "words":
        assert made.decode(ids) == SENTENCE
        assert sum(made.token_bytes[i] for i in ids) == len(SENTENCE.encode())
    if documents:
        closed = np.append(ids, made.end)
        assert made.decode(closed) == made.decode(ids)
    assert made.encode("").shape == (0,) and made.decode([]) == ""
    for text, many in zip(texts := [SENTENCE, "", SENTENCE[:5]], tokenizer.encode_many(made, texts)):
        np.testing.assert_array_equal(many, made.encode(text))
        assert many.dtype == ids.dtype
    tokenizer.save(made, tmp_path / "tokenizer.json")
    loaded = tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded == made == tokenizer.load(tmp_path) == pickle.loads(pickle.dumps(loaded))
    assert loaded.fingerprint == made.fingerprint and loaded.token_bytes == made.token_bytes
    assert tokenizer.make(str(tmp_path), list, documents=documents) == made


def test_fingerprints_tell_all_tokenizers_apart():
    found = [
        trained(k, t, d).fingerprint for k in tokenizer.KINDS for d in (False, True) for t in (SENTENCE, "abc abd")
    ]
    assert len(set(found)) == len(found) - 2, "only bytes are the same for two texts"


@pytest.mark.parametrize("seed", range(5))
def test_bpe_gives_back_any_text(seed):
    made = trained("bpe", random_text(100 + seed, 2000), documents=True, vocab_size=400)
    text = random_text(seed)
    ids = made.encode(text)
    assert made.decode(ids) == text
    assert sum(made.token_bytes[i] for i in ids) == len(text.encode())


def test_bpe_twice_has_equal_bytes_and_the_vocabulary_asked_for():
    text = (shared_data("tiny_shakespeare") / "input.txt").read_text()[:300_000]
    first, second = (trained("bpe", text, documents=True, vocab_size=1024) for _ in range(2))
    assert first.definition.encode() == second.definition.encode()
    assert first.size == 1024 and first.end == 1023
    ids = first.encode(text)
    assert first.decode(ids) == text and len(ids) < 0.55 * len(text)


@pytest.mark.parametrize("kind", ["bpe", "words"])
def test_a_long_text_is_encoded_in_pieces_as_in_one(kind, monkeypatch):
    text = "".join(random_text(seed, 60) + " a word, and\nmore:\n\n  x  y " for seed in range(40))
    made = trained(kind, text, vocab_size=600)
    monkeypatch.setattr(vocabularies, "_PIECE", 2**30)
    whole = made.encode(text)
    again = trained(kind, text, vocab_size=600)
    monkeypatch.setattr(vocabularies, "_PIECE", 20)
    monkeypatch.setattr(byte_pairs, "_BATCH", 100)
    assert len(list(vocabularies.cut(text))) > 60 and "".join(vocabularies.cut(text)) == text
    np.testing.assert_array_equal(made.encode(text), whole)
    assert trained(kind, text, vocab_size=600) == again == made


def test_bpe_has_all_bytes_and_no_more_than_it_found():
    made = trained("bpe", "ab", documents=True, vocab_size=5000)
    assert made.size == 256 + 1 + 1, "the bytes, one pair, the end"
    assert sorted(made.token_bytes) == [0] + [1] * 256 + [2]


def test_special_tokens_in_a_text_are_text():
    made = trained("bpe", "<|endoftext|> " * 100, documents=True, vocab_size=400)
    ids = made.encode("a<|endoftext|>b")
    assert made.end not in ids.tolist() and made.decode(ids) == "a<|endoftext|>b"
    assert made._library.token_to_id("<|endoftext|>") == made.end, "others know it by its name"


def gpt2_file(path):
    """A `tokenizer.json` as others write it, with padding, truncation and a template."""
    import tokenizers

    library = tokenizers.Tokenizer.from_str(trained("bpe", "the cat and the hat " * 9).definition)
    library.add_special_tokens(["<|endoftext|>", "[CLS]"])
    library.enable_truncation(4)
    library.enable_padding(length=64)
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", library.token_to_id("[CLS]"))]
    )
    path.write_text(library.to_str())
    return library


def test_files_of_others_load(tmp_path):
    library = gpt2_file(tmp_path / "gpt2.json")
    made = tokenizer.load(tmp_path / "gpt2.json")
    text = "the cat sat <|endoftext|> [CLS] 🎉 and a long end of it"
    ids = made.encode(text)
    assert made.decode(ids) == text and len(ids) > 4
    assert made.end == library.token_to_id("<|endoftext|>") and made.size == library.get_vocab_size()
    assert sum(made.token_bytes[i] for i in ids) == len(text.encode())
    cls = library.token_to_id("[CLS]")
    assert made.token_bytes[cls] == 0 and cls not in ids.tolist()
    assert made.decode([cls, *ids[:3]]) == made.decode(ids[:3])


@pytest.mark.parametrize("name", byte_pairs.ENDS)
def test_the_end_has_the_usual_names(tmp_path, name):
    found = json.loads(trained("bpe", "abc", documents=True).definition)
    found["added_tokens"][0] |= {"content": name, "special": False}  # some files forget that it is special
    (tmp_path / "x.json").write_text(json.dumps(found))
    made = tokenizer.make(str(tmp_path / "x.json"), list, documents=True)
    assert made.end == made.size - 1 and made.end not in made.encode(f"a{name}b").tolist()


@pytest.mark.parametrize(
    ("model", "decoder", "text"),
    [
        (
            {"type": "WordPiece", "vocab": {"[UNK]": 0, "the": 1, "##se": 2, "cat": 3}},
            {"type": "WordPiece"},
            "these cat",
        ),
        (
            {"type": "BPE", "vocab": {"▁the": 0, "▁cat": 1, "<0x0A>": 2}, "merges": []},
            {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Metaspace"}]},
            None,
        ),
    ],
)
def test_bytes_of_tokens_that_are_not_byte_level(tmp_path, model, decoder, text):
    defaults = {
        "WordPiece": {"unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100},
        "BPE": {"byte_fallback": True},
    }
    settings = {"WordPiece": {"prefix": "##", "cleanup": False}, "Sequence": {}}[decoder["type"]]
    for part in decoder.get("decoders", ()):
        if part["type"] == "Metaspace":
            part |= {"replacement": "▁", "prepend_scheme": "always", "split": True}
    described = {
        "version": "1.0", "added_tokens": [], "normalizer": None, "post_processor": None, "truncation": None,
        "padding": None, "pre_tokenizer": {"type": "Whitespace"}, "decoder": {**decoder, **settings},
        "model": {**defaults[model["type"]], **model},
    }  # fmt: skip
    (tmp_path / "x.json").write_text(json.dumps(described))
    made = tokenizer.load(tmp_path / "x.json")
    if text is None:
        assert made.token_bytes == (4, 4, 1), "a space and three letters; one byte"
    else:
        ids = made.encode(text)
        assert ids.tolist() == [1, 2, 3] and made.decode(ids) == text
        assert [made.token_bytes[i] for i in (1, 2, 3)] == [4, 2, 4], "a space before a word, none before its rest"


def test_characters_are_those_of_the_text_in_order():
    made = trained("characters", "banana 🎉é", documents=True)
    assert made.characters == tuple(sorted("ban 🎉é")) and made.end == 6
    assert made.encode("nab🎉 é").tolist() == [3, 1, 2, 5, 0, 4]


def test_dtypes_are_the_smallest():
    for size, dtype in ((255, np.uint8), (256, np.uint16), (65_535, np.uint16), (65_536, np.uint32)):
        points = [c for c in range(size + 2048) if not 0xD800 <= c < 0xE000][:size]
        made = Characters(tuple(map(chr, points)), documents=True)
        ids = made.encode(chr(points[-1]) + "a")
        assert made.size == size + 1 and ids.dtype == dtype and ids.tolist() == [size - 1, 97]
        assert made.decode(ids) == chr(points[-1]) + "a"


@pytest.mark.parametrize("unknown", ["z", "!", "é", "🎉", "\ud800", "\U0010ffff"])
def test_unknown_character_is_named(unknown):
    with pytest.raises(UserError, match=r"position 2\) is not among the 3 .*tokens=bytes") as error:
        Characters(("a", "b", "c"), documents=True).encode("ab" + unknown + "c")
    assert repr(unknown) in str(error.value)


def test_words_are_the_most_frequent_ties_by_code_point():
    made = trained("words", "b b b a a c c Z. 12 12\n", documents=True, vocab_size=8)
    assert made.words == ("<unk>", "b", "12", "a", "c", "\n", ".") and made.end == 7
    assert made.encode("a b, 12 unseen\n").tolist() == [3, 1, 0, 2, 0, 5]
    assert made.token_bytes == (0, 1, 2, 1, 1, 1, 1, 0)
    assert Words(("<unk>", "é")).token_bytes == (0, 2)
    assert trained("words", "b b a", vocab_size=100).words == ("<unk>", "b", "a")


def test_words_can_be_read_again():
    text = "It's said (once), that 3.5 is 'fine'.\nNew line: é日本!\n"
    made = trained("words", text, vocab_size=100)
    again = made.decode(made.encode(text))
    assert again == "It's said (once), that 3. 5 is'fine'.\nNew line: é日本!\n"
    assert re.findall(r"\w+|[^\w\s]|\n", again) == re.findall(r"\w+|[^\w\s]|\n", text)


def test_words_do_not_grow_with_what_they_do_not_know():
    made = trained("words", "a b", vocab_size=10)
    made.encode("c d e f")
    assert len(made._ids) == made.size == 3


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("byts", {}, "'byts' is not a kind of tokens. Did you mean 'bytes'"),
        ("bpe", {}, r"data\.vocab_size is not set: data\.tokens=bpe"),
        ("words", {}, r"data\.vocab_size is not set: data\.tokens=words"),
        ("bpe", {"vocab_size": 256}, "vocab_size=256 is too small .* at least 257"),
        ("words", {"vocab_size": 2}, "vocab_size=2 is too small"),
        ("bytes", {"vocab_size": 300}, "vocab_size=300: data.tokens=bytes has as many tokens as there are bytes"),
        ("characters", {"vocab_size": 300}, "Leave it out"),
    ],
)
def test_errors_of_training(kind, options, message):
    with pytest.raises(UserError, match=message):
        tokenizer.train(kind, lambda: pytest.fail("must not be read"), **options)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
@pytest.mark.parametrize("half", ["\ud800", "\udc80"])
def test_half_a_character_is_named(kind, half):
    made = trained(kind, "ab")
    with pytest.raises(UserError, match=rf"{ascii(half)[1:-1]}' at position 2 is half".replace("\\", r"\\")):
        made.encode("ab" + half)
    if kind == "bpe":
        with pytest.raises(UserError, match="is half of a character"):
            trained(kind, "ab" + half)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"data\.tokens='byts' is neither .* Did you mean 'bytes'"):
        tokenizer.make("byts", list)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"neither a kind of tokens nor a file .* Did you mean 'tokenizer\.json'"):
        tokenizer.load(tmp_path / "tokeniser.json")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "my_tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"are: bpe, bytes, characters, my_tokenizer\.json, tokenizer\.json, words"):
        tokenizer.load(tmp_path / "tokeniser.json")
    with pytest.raises(UserError, match="neither"):
        tokenizer.load(tmp_path / "nowhere" / "tokenizer.json")


GOOD = {"flaxmodels": 1, "kind": "characters", "documents": False, "characters": [97, 98]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is damaged: .*Copy or prepare it again"),
        (b"\xff\xfe", "is damaged"),
        (b"[1, 2]", 'is not a tokenizer: expected the key "flaxmodels"'),
        (b"{}", "is not a tokenizer"),
        (b'{"model": {}}', "is damaged, or no tokenizer"),
        (b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "is damaged, or no tokenizer"),
        (json.dumps({**GOOD, "kind": "letters"}).encode(), "of a later version: kind 'letters'"),
        (json.dumps({**GOOD, "flaxmodels": 2}).encode(), "of a later version: .* format 2"),
        (json.dumps({**GOOD, "documents": 5}).encode(), "is damaged"),
        (json.dumps({**GOOD, "characters": [97, -1]}).encode(), "is damaged"),
        (json.dumps({**GOOD, "characters": ["a"]}).encode(), "is damaged"),
        (json.dumps({**GOOD, "characters": None}).encode(), "is damaged"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "characters"}).encode(), "is damaged: KeyError"),
        (json.dumps({**GOOD, "kind": "words", "words": [1]}).encode(), "is damaged"),
    ],
)
def test_damaged_files_are_refused(tmp_path, content, message):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        tokenizer.load(tmp_path)
    assert str(tmp_path / "tokenizer.json") in str(error.value)


def test_a_half_of_a_bpe_file_is_refused(tmp_path):
    definition = trained("bpe").definition
    (tmp_path / "x.json").write_text(definition[: len(definition) // 2])
    with pytest.raises(UserError, match="is damaged"):
        tokenizer.load(tmp_path / "x.json")


def test_what_a_file_can_not_do_is_said(tmp_path):
    tokenizer.save(trained("bpe"), tmp_path / "x.json")
    with pytest.raises(UserError, match=r"has no token to end a document: .*<\|endoftext\|>"):
        tokenizer.make(str(tmp_path / "x.json"), list, documents=True)
    with pytest.raises(UserError, match=r"vocab_size=300: data\.tokens='.*' is trained already"):
        tokenizer.make(str(tmp_path / "x.json"), list, vocab_size=300)


def test_nothing_else_can_be_saved(tmp_path):
    with pytest.raises(UserError, match="int can't be saved"):
        tokenizer.save(3, tmp_path / "x.json")


@pytest.mark.parametrize("kind", tokenizer.KINDS)
def test_equal_texts_make_equal_files(kind):
    texts = [SENTENCE, "more of it\n"] * 3
    made = [tokenizer.train(kind, lambda: texts, vocab_size=SIZES.get(kind)) for _ in range(3)]
    assert len({tokenizer.dump(each) for each in made}) == 1


def test_a_bpe_of_no_text_is_bytes():
    made = tokenizer.train("bpe", list, vocab_size=257)
    assert isinstance(made, BytePairs) and made.token_bytes == (1,) * 256
