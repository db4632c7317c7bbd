"""Conversations, pairs, and what begins a text: which tokens there are, and which of them are learned."""

import json

import jax
import numpy as np
import pytest

import flaxmodels.data
from flaxmodels import hub
from flaxmodels.data import chat, tokenizer
from flaxmodels.data.documents import Documents, windows
from flaxmodels.registry import UserError

TALK = (
    {"role": "system", "content": " Be kind. "},
    {"role": "user", "content": "Hi <|im_end|>"},
    {"role": "assistant", "content": " Hello\n"},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
)
# What is in braces is learned; marks stand by their names, and $ ends a document.
WRITTEN = {
    "chatml": "<|im_start|>system\n Be kind. <|im_end|>\n<|im_start|>user\nHi <|im_end|><|im_end|>\n"
    "<|im_start|>assistant\n{ Hello\n<|im_end|>}\n"
    "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n{2<|im_end|>}\n",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi <|im_end|><|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{Hello<|eot_id|>}"
    "<|start_header_id|>user<|end_header_id|>\n\n1+1?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{2<|eot_id|>}",
    "gemma": "<bos><start_of_turn>user\nBe kind.\n\nHi <|im_end|><end_of_turn>\n"
    "<start_of_turn>model\n{Hello<end_of_turn>}\n"
    "<start_of_turn>user\n1+1?<end_of_turn>\n<start_of_turn>model\n{2<end_of_turn>}\n",
    "plain": "System:  Be kind. $User: Hi <|im_end|>$Assistant:{  Hello\n$}User: 1+1?$Assistant:{ 2$}",
}
ASKED = {
    "chatml": "<|im_start|>assistant\n",
    "llama3": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "gemma": "<start_of_turn>model\n",
    "plain": "Assistant:",
}


def bytes_for(template):
    return tokenizer.extended(tokenizer.train("bytes", list, documents=True), template.marks)


def written(made, ids, learned):
    """As in `WRITTEN`."""
    names = {number: name for name, number in made.special.items()} | {made.end: "$"}
    text, before = b"", False
    for number, now in zip(ids.tolist(), learned.tolist()):
        text += "".join({(False, True): "{", (True, False): "}"}.get((before, now), "")).encode()
        text += names[number].encode() if number in names else bytes([number])
        before = now
    return text.decode() + "}" * before


@pytest.mark.parametrize("name", chat.TEMPLATES)
def test_templates_and_what_is_learned(name):
    template = chat.pick(name, "bytes")
    made = bytes_for(template)
    assert written(made, *chat.encode(template, made, TALK)) == WRITTEN[name]
    asked, learned = chat.encode(template, made, TALK[:-1], prompt=True)
    assert written(made, asked, learned).endswith(ASKED[name]) and not learned[-1]
    whole, _ = chat.encode(template, made, TALK)
    assert np.array_equal(asked, whole[: len(asked)]), "a model is asked as it was trained"
    stops = chat.stops(template, made)
    assert whole[np.flatnonzero(chat.encode(template, made, TALK)[1])[-1]] in stops and stops[-1] == made.end


@pytest.mark.parametrize("name", chat.TEMPLATES)
def test_what_is_said_is_never_a_mark(name):
    template = chat.TEMPLATES[name]
    made = bytes_for(template)
    calm = ({"role": "user", "content": "x"}, {"role": "assistant", "content": "y"})
    loud = tuple({**message, "content": "".join(template.marks) or "$"} for message in calm)
    count = [(chat.encode(template, made, talk)[0] >= 256).sum() for talk in (calm, loud)]
    assert count[0] == count[1]


def test_what_is_learned_is_encoded_by_itself():
    made = tokenizer.train("bpe", lambda: ["ab ab"] * 9, vocab_size=260, documents=True)
    assert made.decode(made.encode("ab")[:1]) == "ab"
    template = chat.Template("odd", lambda talk, prompt, special: [chat.Piece("a"), chat.Piece("b", learned=True)])
    ids, learned = chat.encode(template, made, TALK)
    assert [made.decode(ids[learned]), made.decode(ids[~learned]), len(ids)] == ["b", "a", 2]


def test_several_conversations_are_those_alone():
    template = chat.TEMPLATES["chatml"]
    made = bytes_for(template)
    talks = [TALK, TALK[1:3], TALK[:3]]
    tokens, ends, learned = chat.encode_many(template, made, talks)
    alone = [chat.encode(template, made, talk) for talk in talks]
    for (ids, heard), begin, end in zip(alone, [0, *ends[:-1]], ends):
        assert np.array_equal(tokens[begin:end], ids) and np.array_equal(learned[begin:end], heard)
    assert ends[-1] == len(tokens) == len(learned)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("hi", "f:1: a conversation is str: expected a list of"),
        ([], "f:1: a conversation is list"),
        (["hi"], "f:1: message 0 is str"),
        ([{"role": "usr", "content": "a"}], r"message 0 has the role 'usr'\. Did you mean 'user'"),
        ([{"role": "user", "content": ""}], "message 0, of the user, has no text"),
        ([{"role": "user"}], "message 0, of the user, has no text"),
        ([{"role": "user", "content": "a"}, {"role": "system", "content": "a"}], "message 1 is of the system"),
        ([{"role": "user", "content": "a"}], "the assistant says nothing"),
    ],
)
def test_what_is_no_conversation(value, message):
    with pytest.raises(UserError, match=message):
        chat.checked(value, "f:1")


def test_conversations_as_sharegpt_writes_them():
    given = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    assert chat.checked(given, "") == ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})


def test_a_mark_that_a_tokenizer_lacks_is_named():
    made = tokenizer.train("bytes", list)
    with pytest.raises(UserError, match=r"'chatml' needs a special token '<\|im_start\|>'"):
        chat.encode(chat.TEMPLATES["chatml"], made, TALK)
    with pytest.raises(UserError, match="'plain' needs a special token that ends a document"):
        chat.encode(chat.TEMPLATES["plain"], made, TALK)
    with pytest.raises(UserError, match=r"data\.template='chatlm' is neither .* Did you mean 'chatml'"):
        chat.pick("chatlm", "bytes")


# Templates of tokenizers

LLAMA3 = (
    "{% for m in messages %}{% set content = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
    " + m['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML = (
    "{%- for message in messages %}\n"
    "    {{- '<|im_start|>' + message.role + '\n' }}\n"
    "    {%- generation %}\n"
    "    {{- message.content + '<|im_end|>' }}\n"
    "    {%- endgeneration %}\n"
    "    {{- '\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\n' }}\n{%- endif %}"
)
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
BEGINS = {"llama3": "<|begin_of_text|>", "gemma": "<bos>"}


def folder_of(tmp_path, name, source, made):
    tokenizer.save(made, tmp_path / "tokenizer.json")
    begin = {"bos_token": {"content": BEGINS[name]}} if name in BEGINS else {}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": source, **begin}))
    return str(tmp_path)


@pytest.mark.parametrize(("name", "source"), [("llama3", LLAMA3), ("chatml", CHATML), ("gemma", GEMMA)])
def test_a_template_of_a_tokenizer(tmp_path, name, source):
    pytest.importorskip("jinja2", reason="chat templates of tokenizers need jinja2")
    ours = chat.TEMPLATES[name]
    made = bytes_for(ours)
    found = chat.pick(None, folder_of(tmp_path, name, source, made))
    assert found.name.endswith("tokenizer_config.json") and found.marks == ()
    talk = TALK[1:] if name == "gemma" else TALK
    for prompt, messages in ((False, talk), (True, talk[:-1])):
        one, other = (chat.encode(template, made, messages, prompt=prompt) for template in (ours, found))
        assert written(made, *one) == written(made, *other)
    assert chat.stops(ours, made) == chat.stops(found, made)
    if name == "gemma":
        with pytest.raises(UserError, match=r"tokenizer_config\.json refuses a conversation: System role not"):
            chat.encode(found, made, TALK)


def test_where_a_template_is_looked_for(tmp_path):
    pytest.importorskip("jinja2", reason="chat templates of tokenizers need jinja2")
    assert chat.pick(None, str(tmp_path)) is chat.TEMPLATES["chatml"] is chat.pick(None, "bytes")
    file = tmp_path / "chat_template.jinja"
    file.write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    made = tokenizer.train("bytes", list, documents=True)
    (tmp_path / "tokenizer.json").write_text("{}")
    for name, tokens in ((str(file), "bytes"), (str(tmp_path), "bytes"), (None, str(tmp_path / "tokenizer.json"))):
        assert written(made, *chat.encode(chat.pick(name, tokens), made, TALK[3:])) == "[1+1?][{2]}"
    several = [{"name": "tools", "template": "no"}, {"name": "default", "template": "{{ messages[1].content }}"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    own = chat.pick(str(tmp_path / "tokenizer_config.json"), "bytes")
    assert written(made, *chat.encode(own, made, TALK[3:])) == "{2}"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", b"{", r"tokenizer_config\.json can't be read as JSON"),
        ("tokenizer_config.json", b"[]", r"tokenizer_config\.json is list: expected a JSON object"),
        ("tokenizer_config.json", b'{"chat_template": ["{{ messages }}"]}', "neither a template nor a file with one"),
        ("chat_template.jinja", b"{{ '\xe9' }}", r"chat_template\.jinja can't be read as text"),
    ],
)
def test_a_damaged_folder_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        chat.pick(str(tmp_path), "bytes")
    if "neither" not in message:
        with pytest.raises(UserError, match=message.partition(" ")[0]):
            hub.chat_template(tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for m in messages %}", r"chat_template\.jinja:1: the chat template is no Jinja"),
        ("{{ messages[0].content }}", "leaves out message 2, of the assistant"),
        ("{{ messages.__class__.__mro__ }}", "refuses a conversation: .*unsafe"),
        ("{{ messages.append(1) }}", "refuses a conversation: .*unsafe"),
    ],
)
def test_a_template_that_is_refused(tmp_path, source, message):
    pytest.importorskip("jinja2", reason="chat templates of tokenizers need jinja2")
    (tmp_path / "chat_template.jinja").write_text(source)
    with pytest.raises(UserError, match=message):
        chat.encode(chat.pick(str(tmp_path), "bytes"), tokenizer.train("bytes", list), TALK)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "source"), [("chatml", CHATML), ("gemma", GEMMA)])
def test_tokens_are_those_of_transformers(tmp_path, name, source):
    transformers = pytest.importorskip("transformers", reason="tokens are compared with those of transformers")
    made = tokenizer.train("bpe", lambda: ["user assistant model hello there how are you"] * 5, vocab_size=300)
    made = tokenizer.extended(made, chat.TEMPLATES[name].marks)
    folder = folder_of(tmp_path, name, source, made)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=f"{folder}/tokenizer.json", bos_token=BEGINS.get(name), chat_template=source
    )
    talk = [{"role": "user", "content": "hello  there"}, {"role": "assistant", "content": "how are\n\nyou?"}]
    for prompt in (False, True):
        text = theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=prompt)
        expected = theirs(text, add_special_tokens=False)["input_ids"]
        assert chat.encode(chat.TEMPLATES[name], made, talk, prompt=prompt)[0].tolist() == expected


# As a source


def load(tmp_path, rows, **options):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return flaxmodels.data.load("jsonl", path=str(path), test_path=str(path), **options)


def every(split):
    index = np.arange(split.size, dtype=np.int32)
    return jax.tree.map(np.asarray, split.prepare(split.gather(split.arrays, index), index))


ROWS = [{"talk": [*TALK[1:3], *({"role": r, "content": f"{r} {i}"} for r in ("user", "assistant"))]} for i in range(5)]


@pytest.mark.parametrize("kind", [pytest.param("packed", marks=pytest.mark.slow), "padded"])
def test_only_answers_are_learned(tmp_path, kind):
    source = load(tmp_path, ROWS, messages="talk", windows=kind, length=256)
    assert source.transforms["template"] == "chatml" and source.tokenizer.end == 256
    assert source.facts == {"vocab_size": 259, "max_length": 256}
    batch, end = every(source.train), source.tokenizer.special["<|im_end|>"]
    found = []
    for number in range(source.train.size):
        heard = batch["targets"][number][batch["weights"][number] == 1]
        found += [source.tokenizer.decode(part) for part in np.split(heard, np.flatnonzero(heard == end) + 1)[:-1]]
    assert sorted(found) == sorted([" Hello\n"] * 5 + [f"assistant {i}" for i in range(5)])


def test_sources_with_conversations_differ_by_them(tmp_path):
    one = load(tmp_path, ROWS, messages="talk", template="plain")
    other = load(tmp_path, ROWS[::-1], messages="talk", template="plain")
    assert one.fingerprint != other.fingerprint and one.facts["vocab_size"] == 257
    assert load(tmp_path, ROWS, messages="talk").fingerprint == one.fingerprint
    kinds = load(tmp_path, ROWS, messages="talk", tokens="characters")
    assert "\n" in kinds.tokenizer.characters and kinds.tokenizer.marks == chat.TEMPLATES["chatml"].marks


@pytest.mark.slow
def test_what_is_held_out_of_conversations_stands_on_one_side(tmp_path):
    path = tmp_path / "a.jsonl"
    talks = [[{"role": "user", "content": f"{i % 20}"}, {"role": "assistant", "content": "yes"}] for i in range(80)]
    path.write_text("".join(json.dumps({"m": talk}) + "\n" for talk in talks))
    source = flaxmodels.data.load("jsonl", path=str(path), messages="m", windows="padded", length=99, validation=0.3)
    train, test = (every(split)["inputs"]["tokens"] for split in (source.train, source.test))
    assert not {row.tobytes() for row in train} & {row.tobytes() for row in test} and len(train) + len(test) == 80


@pytest.mark.slow
def test_learned_parts_of_documents():
    sizes = np.array([9, 4, 20, 6])
    learned = np.random.default_rng(0).random(sizes.sum()) < 0.4
    learned[9:13] = False
    learned[[0, 12, 13]] = True
    starts = np.cumsum(sizes) - sizes
    documents = Documents(np.arange(sizes.sum(), dtype=np.uint16), np.cumsum(sizes), learned=learned)
    expected = np.setdiff1d(np.flatnonzero(learned), starts)
    for kind, length in (("packed", 5), ("packed", 64), ("padded", 20)):
        batch = every(windows(documents, kind, length))
        assert np.sort(batch["targets"][batch["weights"] == 1]).tolist() == expected.tolist()
        assert (batch["weights"].sum(1) > 0).all()
    with pytest.raises(UserError, match="Document 1: the prompt alone has 3 tokens"):
        windows(documents, "padded", 2)


PAIRS = [{"a": "x" * (1 + i % 3), "b": "y" * (1 + i % 2), "l": i % 2} for i in range(12)]


@pytest.mark.slow
@pytest.mark.parametrize("begin", [False, True])
def test_pairs_have_types(tmp_path, begin):
    source = load(tmp_path, PAIRS, text="a", pair="b", label="l", length=8, begin=begin)
    assert source.facts == {"vocab_size": 257 + begin, "max_length": 8, "classes": 2, "types": 2}
    inputs, end = every(source.train)["inputs"], source.tokenizer.end
    for number, one in enumerate(PAIRS):
        first = [source.tokenizer.begin] * begin + [ord("x")] * len(one["a"]) + [end]
        second = [ord("y")] * len(one["b"]) + [end]
        rest = [0] * (8 - len(first) - len(second))
        assert inputs["tokens"][number].tolist() == first + second + rest
        assert inputs["types"][number].tolist() == [0] * len(first) + [1] * len(second) + rest
        assert inputs["segments"][number].tolist() == [1] * (len(first) + len(second)) + rest
    other = load(tmp_path, [{**PAIRS[0], "b": "z"}, *PAIRS[1:]], text="a", pair="b", label="l", length=8)
    assert other.fingerprint != source.fingerprint


@pytest.mark.slow
def test_a_text_begins_with_what_the_tokenizer_has_for_that(tmp_path):
    rows = [{"p": "ab", "c": "c", "l": i} for i in range(2)]
    alone = every(load(tmp_path, rows, text="p", windows="padded", length=4, begin=True).train)
    assert alone["inputs"]["tokens"][0].tolist() == [257, 97, 98, 0] and alone["targets"][0].tolist() == [
        97,
        98,
        256,
        0,
    ]
    batch = every(load(tmp_path, rows, prompt="p", completion="c", windows="padded", length=6, begin=True).train)
    assert batch["inputs"]["tokens"][0].tolist() == [257, 97, 98, 99, 0, 0]
    assert batch["weights"][0].tolist() == [0, 0, 1, 1, 0, 0], "the completion and the end"
    source = load(tmp_path, rows, text="p", label="l", length=6, begin=True)
    assert every(source.train)["inputs"]["tokens"][0].tolist() == [257, 97, 98, 256, 0, 0]
    assert source.transforms["begin"] is True and source.tokenizer.special == {"[CLS]": 257}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": "a", "template": "chatml"}, r"data\.template='chatml' is for conversations"),
        ({"messages": "a", "text": "b"}, r"data\.text='b' means nothing beside data\.messages='a'"),
        ({"messages": "a", "begin": True}, r"data\.begin=True: conversations begin as data\.template says"),
        ({"messages": "a"}, r"a\.jsonl:1: a conversation is str"),
        ({"messages": "m"}, r"no column 'm' \(data\.messages\)"),
        ({"text": "a", "pair": "b"}, r"data\.pair='b' is the second text of what has a label"),
        ({"text": "a", "pair": "l", "label": "l"}, r"a\.jsonl:1: 'l' is 0, of type int: expected a text"),
    ],
)
def test_errors_name_the_option(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, PAIRS, **options)


def test_a_tokenizer_without_a_begin_is_named(tmp_path):
    tokenizer.save(tokenizer.train("bytes", list, documents=True), tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match=r"data\.begin=True: data\.tokens='.*tokenizer\.json' has no token to begin"):
        load(tmp_path, PAIRS, text="a", tokens=str(tmp_path / "tokenizer.json"), begin=True)


# Special tokens


@pytest.mark.parametrize(
    ("kind", "options"), [("bytes", {}), ("characters", {}), ("words", {"vocab_size": 9}), ("bpe", {"vocab_size": 270})]
)
@pytest.mark.parametrize("documents", [False, True])
def test_special_tokens_come_after_all_others(tmp_path, kind, options, documents):
    made = tokenizer.train(kind, lambda: ["ab ab [MASK] cd"] * 3, documents=documents, **options)
    more = tokenizer.extended(made, ["[MASK]", "[CLS]", "[MASK]"])
    assert (more.size, more.special["[MASK]"], more.begin) == (made.size + 2, made.size, made.size + 1)
    assert more.end == made.end and made.begin is None and more.token_bytes == (*made.token_bytes, 0, 0)
    assert more.encode("ab [MASK]").max() < made.size, "what is written is text"
    ids = np.concatenate([more.encode("ab cd"), [made.size, made.size + 1]])
    assert more.decode(ids) == made.decode(made.encode("ab cd"))
    tokenizer.save(more, tmp_path / "tokenizer.json")
    assert tokenizer.load(tmp_path) == more and more.fingerprint != made.fingerprint
    assert tokenizer.extended(more, ["[CLS]"]) is more


def test_a_post_processor_says_what_begins_a_text():
    made = tokenizer.extended(tokenizer.train("bpe", lambda: ["a"], vocab_size=257), ["<s>", "[CLS]"])
    assert made.begin == made.special["[CLS]"]
    described = json.loads(made.definition)
    for name, expected in (("<s>", made.special["<s>"]), (None, None)):
        special = {name: {"id": name, "ids": [expected], "tokens": [name]}} if name else {}
        before = [{"SpecialToken": {"id": name, "type_id": 0}}] if name else []
        described["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [*before, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": special,
        }
        assert tokenizer.BytePairs(json.dumps(described)).begin == expected
