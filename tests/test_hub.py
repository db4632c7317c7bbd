"""Directories of Hugging Face: what is read is what is there, and what does not fit is named; without their library."""

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import small
from flax.traverse_util import flatten_dict, unflatten_dict

from flaxmodels import guard, hub, resume, sharding, shelf, warm
from flaxmodels.checkpoint import Checkpoints
from flaxmodels.cli import hub as verbs
from flaxmodels.data import tokenizer as tokenizers
from flaxmodels.fitting import Leaf
from flaxmodels.hub import families, fields, reading, tensor_files, writing
from flaxmodels.hub.families import ARCHITECTURES
from flaxmodels.hub.links import Link
from flaxmodels.job import assemble
from flaxmodels.models import transformer
from flaxmodels.models.presets import PRESETS
from flaxmodels.registry import UserError
from flaxmodels.state import TrainState
from flaxmodels.warm import Origin

SIZES = dict(vocab_size=96, layers=3, width=32, heads=4, mlp_width=48, max_length=16)
LLAMA = dict(name="transformer", kv_heads=2, **SIZES)
GPT2 = dict(
    name="transformer", norm="layer", norm_eps=1e-5, positions="learned", mlp="gelu", tied_head=True, use_bias=True,
    **SIZES,
)  # fmt: skip
GEMMA2 = dict(
    name="transformer", head_size=16, kv_heads=2, tied_head=True, mlp="geglu", windows=(7, 0), softcap=50.0,
    head_softcap=30.0, query_scale=24**-0.5, embed_scale=True, norm_plus_one=True, post_norms=True, **SIZES,
)  # fmt: skip
VIT = dict(name="vit", classes=5, patch=4, layers=3, width=32, heads=4, mlp_width=48)
TOYS = {
    "GPT2LMHeadModel": GPT2,
    "LlamaForCausalLM": LLAMA | dict(rope_base=5e5, rope_scaling=(8.0, 1.0, 4.0, 8.0), tied_head=True),
    "MistralForCausalLM": LLAMA | dict(windows=(7,)),
    "Qwen2ForCausalLM": LLAMA | dict(qkv_bias=True),
    "Qwen3ForCausalLM": LLAMA | dict(qk_norm=True, head_size=16, windows=(0, 0, 5)),
    "Gemma2ForCausalLM": GEMMA2,
    "LlamaForSequenceClassification": LLAMA | dict(name="classifier", classes=3, head_bias=False),
    "DistilBertForMaskedLM": dict(name="bert", types=0, **SIZES),
    "DistilBertForSequenceClassification": dict(name="bert_classifier", types=0, pooler="relu", classes=3, **SIZES),
    "BertForMaskedLM": dict(name="bert", **SIZES),
    "BertForSequenceClassification": dict(name="bert_classifier", classes=3, **SIZES),
    "ViTForImageClassification": VIT,
}
IMAGE = {"image_size": 16, "channels": 3}


def random_params(architecture, model, dtype="float32", seed=0):
    """Parameters of the shapes that the architecture's links say."""
    options = {name: value for name, value in model.items() if name != "name"}
    complete = families.complete(options | (IMAGE if model["name"] == "vit" else {}), model["name"])
    draw, sizes, flat = np.random.default_rng(seed), families.sizes(complete), {}
    for link in ARCHITECTURES[architecture].links(complete):
        lead = (complete["layers"],) if link.of_blocks else ()
        values = draw.standard_normal((*lead, *link.our_shape(sizes)), np.float32)
        flat[link.ours] = values.astype(jnp.dtype(dtype))
    return unflatten_dict(flat, sep="/")


def abstract_of(params, mesh, dtype=None):
    places = sharding.shard_tree(params, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=s), params, places)


def same(one, other):
    one, other = flatten_dict(one, sep="/"), flatten_dict(other, sep="/")
    assert set(one) == set(other)
    for path, x in one.items():
        assert x.dtype == other[path].dtype and np.array_equal(np.asarray(x), np.asarray(other[path])), path


@pytest.fixture
def written(tmp_path):
    """A directory of a small Llama; and its tensors, so that a test may change them."""
    folder = tmp_path / "llama"
    hub.write(folder, LLAMA, random_params("LlamaForCausalLM", LLAMA))
    return folder, safetensors.numpy.load_file(folder / "model.safetensors")


def test_a_link_turns_axes_about():
    link = Link("blocks/attention/query/kernel", "h.{}.c.weight", "d n h -> d (n h)", (1, 3))
    sizes = {"d": 2, "n": 3, "h": 4}
    theirs = np.arange(2 * 36).reshape(2, 36)
    ours = link.to_ours(theirs, sizes)
    assert link.their_shape(sizes) == (2, 36) and ours.shape == link.our_shape(sizes) == (2, 3, 4)
    assert ours[1, 2, 3] == theirs[1, 12 + 2 * 4 + 3] and np.shares_memory(ours, theirs)
    np.testing.assert_array_equal(link.to_theirs(ours, sizes), theirs[:, 12:24])
    assert link.names(2) == ["h.0.c.weight", "h.1.c.weight"]
    patches = Link("patches/kernel", "p.weight", "(y x i) d -> d i y x")
    sizes = {"y": 2, "x": 2, "i": 3, "d": 5}
    theirs = np.arange(60).reshape(5, 3, 2, 2)
    ours = patches.to_ours(theirs, sizes)
    assert ours.shape == (12, 5) and ours[1 * 6 + 0 * 3 + 2, 4] == theirs[4, 2, 1, 0]
    np.testing.assert_array_equal(patches.to_theirs(ours, sizes), theirs)


FAST = ("GPT2LMHeadModel", "Gemma2ForCausalLM")
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in TOYS if name not in FAST]


@pytest.mark.parametrize("architecture", [*FAST, *SLOW])
def test_what_is_written_is_read(architecture, tmp_path):
    """On 8 devices, blocks stacked or by themselves; each model is written as its own architecture."""
    model, mesh = TOYS[architecture], sharding.make_mesh(fsdp=2, tensor=2)
    params = random_params(architecture, model)
    hub.write(tmp_path / "hf", model, params)
    described = hub.describe(tmp_path / "hf")
    assert described.architecture == architecture and described.unused == () and described.chat_template is None
    options = {name: value for name, value in described.model.items() if name != "name"}
    given = {name: value for name, value in model.items() if name != "name"}
    assert families.complete(options, model["name"]) == families.complete(given, model["name"])
    read = hub.read(tmp_path / "hf", abstract_of(params, mesh))
    same(read, params)
    kernel = read["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4, "split over fsdp and tensor"
    apart = {f"blocks_{i}": jax.tree.map(lambda x, i=i: x[i], params["blocks"]) for i in range(3)}
    apart |= {name: tree for name, tree in params.items() if name != "blocks"}
    same(hub.read(tmp_path / "hf", abstract_of(apart, mesh)), apart)
    hub.write(tmp_path / "again", model, apart)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()


@pytest.mark.slow
def test_sharded_arrays_are_written_as_those_of_the_host(tmp_path):
    params = random_params("GPT2LMHeadModel", GPT2)
    hub.write(tmp_path / "host", GPT2, params)
    places = jax.tree.map(lambda x: x.sharding, abstract_of(params, sharding.make_mesh(fsdp=2, tensor=2)))
    hub.write(tmp_path / "mesh", GPT2, jax.device_put(params, places))
    assert (tmp_path / "mesh/model.safetensors").read_bytes() == (tmp_path / "host/model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_run_starts_from_a_directory(tmp_path):
    """Stored in bfloat16, cast by name; the head is new, and an array that the directory lacks is named."""
    job = assemble(small.config("transformer"), jax.devices()[:2])
    model = resume.meta(job, resume.Memory(), {})["model"]
    state = jax.device_get(job.fresh())
    params = jax.tree.map(lambda x: (x + 1).astype(jnp.bfloat16), state.params)
    hub.write(tmp_path / "hf", model, params)
    described = warm.find(Origin(workdir=str(tmp_path / "hf")))
    assert isinstance(described, hub.Described) and warm.tree(described)["params/norm/scale"] == Leaf((32,), "bfloat16")

    def begin(**options):
        origin = Origin(workdir=str(tmp_path / "hf"), **options)
        return warm.begin(origin, warm.find(origin), job.fresh, job.abstract, guard.init_of(job.tx, job.guard).init)

    begun = begin(cast=("^params/",), fresh=("head/kernel",))
    assert begun.origin == str(tmp_path / "hf") and int(begun.state.step) == 0
    assert "LlamaForCausalLM" in begun.notes[0]
    wanted = jax.tree.map(lambda x: x.astype(np.float32), params)
    wanted["head"]["kernel"] = state.params["head"]["kernel"]
    same(jax.device_get(begun.state.params), wanted)
    assert all(x.sharding == y.sharding for x, y in zip(*map(jax.tree.leaves, (begun.state, job.abstract))))
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    apart = jax.eval_shape(transformer.unstack, wanted)
    wanted_apart = {"params": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), apart)}
    origin = Origin(workdir=str(tmp_path / "hf"), cast=("^params/",))
    found, _ = warm.read(origin, warm.find(origin), wanted_apart)
    np.testing.assert_array_equal(found["params/blocks_1/mlp/up/kernel"], wanted["blocks"]["mlp"]["up"]["kernel"][1])
    with pytest.raises(UserError, match=r"was .* bfloat16, is .* float32; start.cast does not name it"):
        begin()
    with pytest.raises(UserError, match=r"start.step=3: .* is no workdir, and has no steps"):
        begin(step=3)
    assert (
        resume.version_changes(described.meta) == [] and resume.data_changes(job, described.meta, ("tokenizer",)) == ""
    )


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_an_architecture(name):
    """Its fields become a config.json, which becomes the same fields."""
    model, options = PRESETS[name]
    extra = {"classes": 1000} if model == "vit" else {}
    complete = families.complete(options | extra, model)
    leaves = {"params/blocks/mlp/up/kernel": Leaf((complete["layers"], complete["width"], 4 * complete["width"]), "")}
    leaves = {} if "mlp_width" in options else leaves
    if model == "vit":
        leaves |= {"params/embed_positions/embedding": Leaf((197, complete["width"]), "")}
        leaves |= {"params/patches/kernel": Leaf((768, complete["width"]), "")}
    architecture, found, _ = writing.translated({"name": name, **extra}, leaves)
    assert architecture.lower().startswith(name.partition("_")[0].rstrip("0123456789").replace("tiny", "")[:4])
    assert {key: found[key] for key in complete if complete[key] is not None} == {
        key: value for key, value in complete.items() if value is not None
    }


def test_what_no_architecture_computes_is_said():
    for change, says in (
        (dict(qk_norm=True, softcap=30.0), "Qwen3ForCausalLM comes nearest, and has no softcap=30.0"),
        (dict(norm="layer"), "norm='layer'"),
        (dict(name="mlp"), "has no like there: expected one of bert, bert_classifier, classifier, trans"),
    ):
        with pytest.raises(UserError, match=says):
            writing.translated(LLAMA | change, {})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_floats_pass_as_they_are_and_are_cast_where_asked(dtype, tmp_path):
    params, mesh = random_params("LlamaForCausalLM", LLAMA, dtype), sharding.make_mesh(devices=jax.devices()[:1])
    hub.write(tmp_path / "a", LLAMA, params)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["torch_dtype"] == dtype
    same(hub.read(tmp_path / "a", abstract_of(params, mesh)), params)
    wide = hub.read(tmp_path / "a", abstract_of(params, mesh, "float32"))
    same(wide, jax.tree.map(lambda x: x.astype(np.float32), params))
    with pytest.raises(UserError, match=r"params/embed/embedding was \(96, 32\) .*; cast does not name it"):
        hub.read(tmp_path / "a", abstract_of(params, mesh, "float32"), cast=("^params/norm/",))
    hub.write(tmp_path / "b", LLAMA, jax.device_get(wide), dtype=dtype)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_a_number_that_is_too_large_is_not_cast(tmp_path):
    params = random_params("LlamaForCausalLM", LLAMA)
    params["norm"]["scale"][3] = 1e6
    with pytest.raises(UserError, match=r"model.norm.weight holds values that are too large for float16"):
        hub.write(tmp_path / "a", LLAMA, params, dtype="float16")
    assert not hub.is_directory(tmp_path / "a")
    hub.write(tmp_path / "b", LLAMA, params)
    with pytest.raises(UserError, match=r"params/norm/scale: 1 values of float32 are too large for float16"):
        hub.read(tmp_path / "b", abstract_of(params, sharding.make_mesh(), "float16"))


def test_shards_of_files(written, tmp_path):
    _, tensors = written
    params = random_params("LlamaForCausalLM", LLAMA)
    files = hub.write(tmp_path / "many", LLAMA, params, shard_bytes=10_000)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors) and not (tmp_path / "many" / "model.safetensors").exists()
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
    shards = [file for file in files if file.suffix == ".safetensors"]
    assert all(file.stat().st_size < 11_000 or len(safetensors.numpy.load_file(file)) == 1 for file in shards)
    assert shards[0].name == f"model-00001-of-{len(shards):05}.safetensors" and len(shards) > 5
    found = {}
    for file in shards:
        found |= safetensors.numpy.load_file(file)
    assert all(np.array_equal(found[name], tensors[name]) for name in tensors)
    same(hub.read(tmp_path / "many", abstract_of(params, sharding.make_mesh())), params)
    shards[2].unlink()
    with pytest.raises(UserError, match=f"names files that are not there: {shards[2].name}"):
        hub.describe(tmp_path / "many")


def test_only_shards_of_one_array_are_ever_on_the_host(tmp_path, monkeypatch):
    """What the host makes is a shard of each array, once; and nothing whole where the mesh splits it."""
    params, mesh = random_params("LlamaForCausalLM", LLAMA), sharding.make_mesh(fsdp=8)
    hub.write(tmp_path / "hf", LLAMA, params)
    parts, part = [], reading._part

    def seen(path, *rest):
        found = part(path, *rest)
        parts.append((path, found.nbytes))
        return found

    monkeypatch.setattr(reading, "_part", seen)
    same(hub.read(tmp_path / "hf", abstract_of(params, mesh)), params)
    whole = {f"params/{path}": x.nbytes for path, x in flatten_dict(params, sep="/").items()}
    for path, nbytes in whole.items():
        mine = [size for name, size in parts if name == path]
        split = nbytes // mine[0]
        assert sum(mine) == nbytes and split == (8 if nbytes >= 4096 else 1), path


def test_writing_asks_for_each_array_once(tmp_path):
    params = random_params("GPT2LMHeadModel", GPT2)
    flat, asked = {f"params/{path}": x for path, x in flatten_dict(params, sep="/").items()}, []
    leaves = {path: Leaf(x.shape, str(x.dtype)) for path, x in flat.items()}
    writing.write_fetched(tmp_path / "hf", GPT2, leaves, lambda path: asked.append(path) or flat[path])
    assert sorted(asked) == sorted(flat)


def test_all_that_does_not_fit_is_named(written):
    folder, tensors = written
    tensors["model.layers.7.mlp.up_proj.weight"] = tensors.pop("model.layers.2.mlp.up_proj.weight")
    tensors["model.norm.weight"] = np.zeros(31, np.float32)
    del tensors["lm_head.weight"]
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError) as raised:
        hub.describe(folder)
    for line in (
        f"LlamaForCausalLM of '{folder}' does not hold what its config.json says: 4 differences",
        "model.layers.2.mlp.up_proj.weight is missing: wanted (48, 32) float32",
        "model.layers.7.mlp.up_proj.weight is not wanted: saved (48, 32) float32",
        "model.norm.weight was (31,) float32, is (32,) float32",
        "lm_head.weight is missing: wanted (96, 32) float32",
    ):
        assert line in str(raised.value)


def test_another_model_is_refused_with_every_difference(written):
    folder, _ = written
    other = random_params("LlamaForCausalLM", LLAMA | dict(layers=4, tied_head=True))
    with pytest.raises(UserError, match=r"can.t be read into this model: 10 differences") as raised:
        hub.read(folder, abstract_of(other, sharding.make_mesh()))
    assert "params/head/kernel is not wanted" in str(raised.value)


def test_a_copy_of_the_tied_head_is_used_once_and_must_be_one(tmp_path):
    model = TOYS["LlamaForCausalLM"]
    params = random_params("LlamaForCausalLM", model)
    hub.write(tmp_path / "hf", model, params)
    tensors = safetensors.numpy.load_file(tmp_path / "hf" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / "hf" / "model.safetensors")
    assert hub.describe(tmp_path / "hf").unused == ("model.layers.0.self_attn.rotary_emb.inv_freq",)
    same(hub.read(tmp_path / "hf", abstract_of(params, sharding.make_mesh())), params)
    tensors["lm_head.weight"][5, 5] += 1
    safetensors.numpy.save_file(tensors, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(UserError, match=r"lm_head.weight differs from model.embed_tokens.weight, to which config.json"):
        hub.describe(tmp_path / "hf")


def test_names_of_early_files(tmp_path):
    """BERT's norms had other names; a model that was saved without its head has no prefix."""
    model = TOYS["BertForMaskedLM"]
    params = random_params("BertForMaskedLM", model)
    hub.write(tmp_path / "hf", model, params)
    file = tmp_path / "hf" / "model.safetensors"
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x
           for name, x in safetensors.numpy.load_file(file).items()}  # fmt: skip
    assert any(name.endswith("gamma") for name in old)
    old["cls.seq_relationship.weight"] = np.zeros((2, 32), np.float32)
    safetensors.numpy.save_file(old, file)
    assert hub.describe(tmp_path / "hf").unused == ("cls.seq_relationship.weight",)
    same(hub.read(tmp_path / "hf", abstract_of(params, sharding.make_mesh())), params)
    params = random_params("GPT2LMHeadModel", GPT2)
    hub.write(tmp_path / "gpt2", GPT2, params)
    file = tmp_path / "gpt2" / "model.safetensors"
    bare = {name.removeprefix("transformer."): x for name, x in safetensors.numpy.load_file(file).items()}
    bare["h.0.attn.bias"] = np.ones((1, 1, 16, 16), np.float32)
    safetensors.numpy.save_file(bare, file)
    assert hub.describe(tmp_path / "gpt2").unused == ("transformer.h.0.attn.bias",)
    same(hub.read(tmp_path / "gpt2", abstract_of(params, sharding.make_mesh())), params)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(architectures=["LlamaForCausalML"]), "'LlamaForCausalML' is not known. Did you mean 'LlamaForCausalLM'"),
        (dict(architectures=None, model_type="mamba"), "the architecture 'mamba' is not known"),
        (dict(rope_scaling=dict(type="yarn", factor=4.0)), "rope_type='yarn' is not supported: expected 'default' or"),
        (dict(rope_scaling=dict(rope_type="llama3", factor=4.0)), "config.json has no 'low_freq_factor'"),
        (dict(hidden_act="relu"), "hidden_act='relu' is not supported: expected 'silu'"),
        (dict(mlp_bias=True), "mlp_bias=True is not supported: expected False"),
        (dict(num_hidden_layers="three"), "config.json is damaged, or of another version"),
        (dict(num_attention_heads=0, head_dim=None), "config.json is damaged, or of another version"),
        (dict(rope_theta="far"), "config.json is damaged, or of another version"),
        (dict(id2label=3, architectures=["LlamaForSequenceClassification"]), "config.json is damaged, or of another"),
        (dict(num_hidden_layers=None), "config.json has no 'num_hidden_layers'"),
        (dict(num_hidden_layers=0), "config.json describes no model: model: layers=0 must be at least 1"),
        (dict(rms_norm_eps="1e-5"), "config.json describes no model: model.norm_eps='1e-5' has the wrong type"),
        (dict(quantization_config=dict(bits=4)), "has quantised weights"),
    ],
)  # fmt: skip
def test_what_our_models_can_not_do_is_refused(change, says, written):
    folder, _ = written
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=says):
        hub.describe(folder)


def test_other_ways_to_say_the_same():
    """Keys of two versions of the library, and their defaults."""
    sizes = dict(
        vocab_size=96, num_hidden_layers=4, hidden_size=32, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=16,
    )  # fmt: skip
    old = dict(rope_theta=5e5, rope_scaling=dict(type="llama3", factor=8, low_freq_factor=1, high_freq_factor=4,
               original_max_position_embeddings=8))  # fmt: skip
    new = dict(rope_parameters={"rope_theta": 5e5, "rope_type": "llama3", **old["rope_scaling"]})
    assert fields.llama(sizes | old) == fields.llama(sizes | new)
    assert fields.llama(sizes)["rope_base"] == 10000.0 and not fields.llama(sizes)["tied_head"]
    gemma = dict(sizes, head_dim=16, sliding_window=8)
    kinds = ["sliding_attention", "full_attention"] * 2
    assert fields.gemma2(gemma) == fields.gemma2(dict(gemma, layer_types=kinds, hidden_act="gelu_pytorch_tanh"))
    assert fields.gemma2(gemma)["windows"] == (8, 0) and fields.gemma2(gemma)["tied_head"]
    qwen = dict(sizes, sliding_window=8, max_window_layers=2)
    assert fields.qwen2(qwen)["windows"] == (0,)
    assert fields.qwen2(dict(qwen, use_sliding_window=True))["windows"] == (0, 0, 8, 8)
    assert fields.mistral(dict(sizes, sliding_window=None))["windows"] == (0,)
    assert fields.mistral(sizes)["windows"] == (4096,)  # the library's default, as for those below
    windowed = dict(sizes, use_sliding_window=True, max_window_layers=2)
    assert fields.qwen2(windowed)["windows"] == fields.qwen3(windowed)["windows"] == (0, 0, 4096, 4096)
    with pytest.raises(UserError, match="layer_types='chunked_attention'"):
        fields.gemma2(dict(gemma, layer_types=["chunked_attention"] * 4))
    assert fields.period([8, 0, 8]) == (8, 0) and fields.period([8, 0, 0]) == (8, 0, 0)


def test_weights_that_could_run_code_are_not_read(written):
    folder, _ = written
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"has no model.safetensors: pytorch_model.bin can run code, .*safe_serializat"):
        hub.describe(folder)


def test_what_is_no_directory(tmp_path, written):
    folder, _ = written
    assert hub.is_directory(folder) and not hub.is_directory(tmp_path) and not hub.is_directory(tmp_path / "none")
    (tmp_path / "config.json").write_text('{"config": {}, "versions": {}}')
    assert not hub.is_directory(tmp_path), "a workdir of ours"
    with pytest.raises(UserError, match=r"config.json describes no model of Hugging Face: it has no 'architectures'"):
        hub.describe(tmp_path)
    with pytest.raises(UserError, match=r"none/config.json is not there: expected a directory of Hugging Face"):
        hub.describe(tmp_path / "none")
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json is damaged"):
        hub.describe(folder)
    with pytest.raises(UserError, match="is there already: name a new folder"):
        hub.write(folder, LLAMA, random_params("LlamaForCausalLM", LLAMA))


def test_files_of_tensors_are_those_of_the_library(tmp_path):
    draw = np.random.default_rng(0)
    arrays = {name: draw.integers(0, 2, (3, 5)).astype(jnp.dtype(dtype)) for name, dtype in tensor_files.DTYPES.items()}
    arrays |= {"none": np.zeros((0, 4), np.float32), "one": np.array(7, np.int32)}
    leaves = {name: Leaf(x.shape, str(x.dtype)) for name, x in arrays.items()}
    tensor_files.write(tmp_path / "a", leaves, reversed(arrays.items()))
    safetensors.numpy.save_file(arrays, tmp_path / "b", metadata={"format": "pt"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    for name, tensor in tensor_files.tensors(tmp_path / "b").items():
        view = tensor.view()
        assert tensor.leaf == leaves[name] and view.tobytes() == arrays[name].tobytes()
        assert name == "none" or not view.flags.writeable
    with pytest.raises(ValueError, match="was announced"):
        tensor_files.write(tmp_path / "c", leaves, [("one", np.zeros(2))])


def test_damaged_files_of_tensors(written):
    folder, _ = written
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    header["lm_head.weight"]["data_offsets"][1] += 4
    long = json.dumps(header).encode()
    for content, says in (
        (whole[:-1], "bytes, and its header describes"),
        (whole[:100], "is not a whole .safetensors file"),
        (b"", "is not a whole .safetensors file"),
        (b"\xff" * 64, "is not a whole .safetensors file"),
        (len(long).to_bytes(8, "little") + long + whole[8 + length :], "is not a whole .safetensors file"),
        (whole.replace(b'"F32"', b'"F99"', 1), "the dtype 'F99' is unknown"),
    ):
        file.write_bytes(content)
        with pytest.raises(UserError, match=says):
            hub.describe(folder)


@pytest.mark.slow
def test_import_makes_a_workdir_and_export_gives_the_directory_back(tmp_path, capsys):
    params = random_params("GPT2LMHeadModel", GPT2)
    made = tokenizers.train("bpe", lambda: ["a small text"], vocab_size=264, documents=True)
    model = GPT2 | dict(vocab_size=300)
    params["embed"]["embedding"] = np.random.default_rng(1).standard_normal((300, 32), np.float32)
    hub.write(tmp_path / "hf", model, params, tokenizer=tokenizers.dump(made))
    (tmp_path / "hf" / "generation_config.json").write_text('{"eos_token_id": 5}')
    (tmp_path / "hf" / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    assert hub.describe(tmp_path / "hf").chat_template == "{{ messages }}"
    arguments = [f"--from={tmp_path / 'hf'}", f"--to={tmp_path / 'run'}"]
    assert verbs.import_(arguments) == 0
    assert "20 arrays" in capsys.readouterr().out
    entry = shelf.find(tmp_path / "run", "best")
    assert entry.step == 0 and entry.meta["model"]["vocab_size"] == 300 and shelf.problems(entry) == []
    assert entry.meta["data"]["tokenizer"] == made.fingerprint == tokenizers.load(tmp_path / "run").fingerprint
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["model.norm"] == "layer"
    assert not hub.is_directory(tmp_path / "run") and hub.chat_template(tmp_path / "run") == "{{ messages }}"
    assert verbs.export([f"--workdir={tmp_path / 'run'}", f"--to={tmp_path / 'back'}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 0
    for name in ("model.safetensors", "generation_config.json", "tokenizer_config.json", "tokenizer.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    assert hub.describe(tmp_path / "back").model == hub.describe(tmp_path / "hf").model
    with pytest.raises(UserError, match="is there already"):
        verbs.import_(arguments)
    with pytest.raises(UserError, match="--format='onnx' does not exist"):
        verbs.export([f"--workdir={tmp_path / 'run'}", f"--to={tmp_path / 'x'}", "--format=onnx"])
    with pytest.raises(UserError, match="'--form=x' is not a flag"):
        verbs.export([f"--workdir={tmp_path / 'run'}", f"--to={tmp_path / 'x'}", "--form=x"])


@pytest.mark.slow
def test_what_of_a_checkpoint_is_written(tmp_path):
    """The average where there is one, given parameters before all; a checkpoint with more is refused."""
    params, average, given = (random_params("GPT2LMHeadModel", GPT2, seed=seed) for seed in range(3))

    def entry(name, opt_state=(), extra=None, **meta):
        state = TrainState(jnp.zeros((), jnp.int32), params, extra or {}, opt_state)
        with contextlib.closing(Checkpoints(tmp_path / name / "checkpoints", every_seconds=0.0)) as checkpoints:
            checkpoints.save(state, 7, {"model": GPT2} | meta)
        return shelf.find(tmp_path / name, 7)

    def released(name, found, **options):
        files, what = hub.release(found, tmp_path / "out" / name, **options)
        assert [file.name for file in files] == ["model.safetensors", "config.json"]
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        leaves = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), params)
        return what, hub.read(tmp_path / "out" / name, leaves)

    averaged = entry("averaged", {"parameters_average": average})
    for name, found, options, what, wanted in (
        ("plain", entry("plain"), {}, "parameters", params),
        ("averaged", averaged, {}, "averaged parameters", average),
        ("given", averaged, {"params": given}, "merged parameters", given),
    ):
        said, read = released(name, found, **options)
        assert said == what
        same(read, wanted)
    with pytest.raises(UserError, match="has more than parameters, such as extra/batch_stats/mean"):
        hub.release(entry("extra", extra={"batch_stats": {"mean": np.zeros(3)}}), tmp_path / "x")
    with pytest.raises(UserError, match="these parameters are not those of the model: one difference"):
        hub.release(entry("other", model=GPT2 | dict(max_length=17)), tmp_path / "x")
    file = max((f for f in averaged.folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="is damaged"):
        hub.release(averaged, tmp_path / "x")
    assert not (tmp_path / "x").exists()
