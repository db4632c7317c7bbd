"""From tokens to text: whole characters, and stop strings that lie over the ends of tokens."""

import numpy as np
import pytest

from flaxmodels.data import tokenizer
from flaxmodels.data.vocabularies import Bytes, Characters, Words
from flaxmodels.inference.stops import Reader
from flaxmodels.registry import UserError

TEXT = "naïve 你好 \U0001f600, e\u0301."


def read(made, ids, stops=(), prompt=()):
    """(pieces as they come, the reader)."""
    reader = Reader(made, prompt, stops)
    pieces = [reader.push(int(i)) for i in ids]
    return [*pieces, reader.close()], reader


def test_characters_come_whole():
    pieces, _ = read(Bytes(), Bytes().encode(TEXT))
    assert "".join(pieces) == TEXT
    assert "\ufffd" not in "".join(pieces)
    at = len("naïve ".encode())
    assert pieces[at : at + 4] == ["", "", "你", ""]


@pytest.mark.parametrize("broken", [b"\xffab", b"a\xe4\xbdb", b"ab\xe4\xbd", b"\xe4\xbd\xe4\xbd\xa0"])
def test_bytes_that_are_no_character_come_as_the_decoder_has_them(broken):
    pieces, _ = read(Bytes(), list(broken))
    assert "".join(pieces) == broken.decode("utf-8", "replace")


def test_the_pieces_are_the_text_of_every_tokenizer(tmp_path):
    corpus = [TEXT * 5, 'It\'s a test (of words), "quoted"; and more.\n' * 4]
    for kind, size in (("characters", None), ("words", 40), ("bpe", 300)):
        made = tokenizer.train(kind, lambda: corpus, vocab_size=size)
        ids = made.encode(corpus[1] + TEXT)
        for cut in (0, 1, 7):
            pieces, _ = read(made, ids[cut:], prompt=ids[:cut].tolist())
            whole = made.decode(ids)
            assert "".join(pieces) == whole[len(made.decode(ids[:cut])) :]


def test_a_word_after_a_prompt_has_its_space():
    made = Words(("<unk>", "the", "cat", "."))
    assert read(made, [2, 3], prompt=[1])[0] == [" cat", ".", ""]
    assert read(made, [2, 3])[0] == ["cat", ".", ""]


def test_spaces_of_others_are_kept_too():
    """SentencePiece's decoder takes a space off the first token of what it decodes."""

    class Pieces:
        vocabulary = ("\u2581the", "\u2581cat", "s")

        def decode(self, ids):
            return "".join(self.vocabulary[i] for i in ids).replace("\u2581", " ").removeprefix(" ")

    assert read(Pieces(), [1, 2, 0], prompt=[0])[0] == [" cat", "s", " the", ""]


def test_stop_strings_end_the_text_wherever_tokens_end():
    text = "one two END three"
    for made in (Bytes(), Characters(tuple(sorted(set(text))))):
        pieces, reader = read(made, made.encode(text), ["END"])
        assert "".join(pieces) == "one two " and reader.stopped
    pieces, reader = read(Words(("<unk>", "a", "b", "stop")), [1, 2, 3, 1], ["b stop"])
    assert "".join(pieces) == "a " and reader.stopped


def test_text_is_held_back_only_while_it_may_be_a_stop():
    pieces, reader = read(Bytes(), b"aE\nENx", ["END", "\nENDE"])
    assert pieces == ["a", "", "E", "", "", "\nENx", ""]
    assert not reader.stopped
    pieces, _ = read(Bytes(), b"abEN", ["END"])
    assert pieces == ["a", "b", "", "", "EN"]


def test_of_two_stops_the_first_in_the_text_counts():
    pieces, _ = read(Bytes(), b"xabcy", ["c", "abcy", "bc"])
    assert "".join(pieces) == "xa"
    with pytest.raises(UserError, match="empty"):
        Reader(Bytes(), (), ["a", ""])


def test_a_random_text_is_cut_as_if_it_were_whole():
    rng = np.random.default_rng(0)
    for _ in range(200):
        ids = rng.choice(list("abé".encode()), 12)
        stops = ["ab", "ba", "aab"][: rng.integers(1, 4)]
        whole = bytes(ids.tolist()).decode("utf-8", "replace")
        found = [whole.find(stop) for stop in stops if stop in whole]
        # The stop that is complete first ends the text, though a longer one may begin before it.
        ends = [whole.find(stop) + len(stop) for stop in stops if stop in whole]
        pieces, reader = read(Bytes(), ids, stops)
        assert reader.stopped == bool(found)
        if found:
            first = min(ends)
            assert "".join(pieces) == whole[: min(at for at, end in zip(found, ends) if end == first)]
        else:
            assert "".join(pieces) == whole
