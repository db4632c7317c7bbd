"""What a model is asked in a conversation: in words that it knows, and no more of them than it can see."""

import io
import json
import types

import pytest

from flaxmodels import registry
from flaxmodels.cli import chat as cli
from flaxmodels.cli import trained
from flaxmodels.data import chat, tokenizer
from flaxmodels.data.vocabularies import Bytes
from flaxmodels.inference import conversation, weights
from flaxmodels.inference import generate as generating
from flaxmodels.models.transformer import Transformer

PLAIN = chat.TEMPLATES["plain"]
BYTES = Bytes(documents=True)
END = chr(0)  # of a document, in what `written` shows


def say(role, content):
    return {"role": role, "content": content}


def written(ids):
    return "".join(END if i == BYTES.end else chr(i) for i in ids)


TALK = [say("user", "hello"), say("assistant", "hi"), say("user", "who?")]
LAST = "User: who?\0Assistant:"
WHOLE = "User: hello\0Assistant: hi\0" + LAST


@pytest.mark.parametrize("most, shown, left_out", [(99, WHOLE, 0), (len(WHOLE), WHOLE, 0), (len(WHOLE) - 1, LAST, 2)])
def test_the_oldest_turns_are_left_out(most, shown, left_out):
    ids, count = conversation.ids_of(PLAIN, BYTES, TALK, most)
    assert (written(ids), count) == (shown, left_out)


def test_what_the_system_says_stays():
    talk = [say("system", "be kind"), *TALK]
    ids, count = conversation.ids_of(PLAIN, BYTES, talk, 45)
    assert written(ids) == "System: be kind\0" + LAST and count == 2
    with pytest.raises(registry.UserError, match="the message has 37 tokens with what stands around it, and there is "):
        conversation.ids_of(PLAIN, BYTES, talk, 36)


def test_the_template_is_that_which_the_model_knows(tmp_path):
    def found(config, made=BYTES):
        return conversation.template_of(tmp_path, config, made)

    assert found({"data.messages": "m", "data.template": "plain", "data.tokens": "bytes"}) is PLAIN
    assert found({"data.messages": "m", "data.template": None, "data.tokens": "bytes"}).name == "chatml"
    asked = found({"data.prompt": "q", "data.completion": "a"})
    assert conversation.ids_of(asked, BYTES, TALK, 9) == (list(b"who?"), 0)
    with pytest.raises(registry.UserError, match="does not say how conversations are written"):
        found({})
    assert found({}, tokenizer.extended(BYTES, chat.TEMPLATES["chatml"].marks)).name == "chatml"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages[0]['content'] }}"}))
    assert found({}).name == str(tmp_path / "tokenizer_config.json")


@pytest.fixture
def talk(monkeypatch, capsys):
    """Talk to a model that says back, in capitals, what it was asked; returns what was printed, and what it saw."""

    batches = []

    def talked(typed, *flags, config=None):
        seen = []

        class Echo:
            def __init__(self, model, params, extra, *, batch, length, mesh, tokenizer, ends):
                batches.append(batch)
                self.length, self.ends = length, ends

            def stream(self, prompts, sampling, most):
                assert BYTES.end in self.ends
                text = written(prompts[0])
                seen.append(text)
                said = text.rpartition("User: ")[2].partition("\0")[0].upper()
                for piece in (" ", said[:2], said[2:]):
                    yield types.SimpleNamespace(text=piece)

        made = types.SimpleNamespace(
            model=Transformer(vocab_size=257, max_length=128), params={}, extra={}, ends=(), config=config or {}
        )
        monkeypatch.setattr(trained, "load", lambda asked: (made, BYTES, None))
        monkeypatch.setattr(generating, "Generator", Echo)
        monkeypatch.setattr(weights, "prepare", lambda model, params, precision: (model, params))
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        assert cli.chat(["--workdir=w", "--template=plain", *flags]) == 0
        return capsys.readouterr(), seen

    talked.batches = batches
    return talked


def test_a_search_has_a_row_for_each_hypothesis(talk):
    talk("hello\n", "--beams=3")
    assert talk.batches == [3]


def test_each_line_is_a_message_and_the_model_sees_what_was_said(talk):
    printed, seen = talk("hello\n\nwho?\n", "--system=be")
    assert printed.out == "HELLO\nWHO?\n" and not printed.err
    assert seen == [
        "System: be\0User: hello\0Assistant:",
        "System: be\0User: hello\0Assistant: HELLO\0User: who?\0Assistant:",
    ]


def test_a_long_conversation_goes_on(talk):
    printed, seen = talk("hello\nwho are you?\n", "--json", "--length=60", "--tokens=20")
    assert [json.loads(line)["answer"] for line in printed.out.splitlines()] == ["HELLO", "WHO ARE YOU?"]
    assert seen[1] == "User: who are you?\0Assistant:"
    assert printed.err == "(the first 2 messages are no longer seen)\n"
    with pytest.raises(registry.UserError, match="there is room for 64"):
        talk("hello " * 20)
