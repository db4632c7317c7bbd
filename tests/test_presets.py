"""Presets: sizes and switches of published models."""

import jax
import pytest

from flaxmodels import sections
from flaxmodels.models import MODELS, build, expand
from flaxmodels.models.presets import PRESETS

# Published numbers of parameters: of each model's weights, a tied head counted once; BERT's with the head that guesses
# tokens, ViT's for 224 x 224 pixels and 1,000 classes.
COUNTS = {
    "gpt2": 124_439_808,
    "gpt2_medium": 354_823_168,
    "gpt2_large": 774_030_080,
    "gpt2_xl": 1_557_611_200,
    "llama2_7b": 6_738_415_616,
    "llama3_8b": 8_030_261_248,
    "llama3_1_8b": 8_030_261_248,
    "llama3_2_1b": 1_235_814_400,
    "tinyllama": 1_100_048_384,
    "mistral_7b": 7_241_732_096,
    "qwen2_5_0_5b": 494_032_768,
    "qwen2_5_1_5b": 1_543_714_304,
    "qwen2_5_7b": 7_615_616_512,
    "qwen3_0_6b": 596_049_920,
    "qwen3_1_7b": 1_720_574_976,
    "qwen3_8b": 8_190_735_360,
    "gemma2_2b": 2_614_341_888,
    "gemma2_9b": 9_241_705_984,
    "bert_base": 109_514_298,
    "bert_large": 335_174_458,
    "distilbert": 66_985_530,
    "vit_tiny": 5_717_416,
    "vit_small": 22_050_664,
    "vit_base": 86_567_656,
    "vit_large": 304_326_632,
}
CONFIG = {
    "data": {"name": "synthetic_tokens", "batch_size": 8},
    "optim": {"name": "adam", "learning_rate": 1e-3},
    "train": {"duration": 5},
}


def count(name):
    images = name.startswith("vit")
    model = build(**expand({"name": name, **({"classes": 1000} if images else {})}))
    inputs = jax.ShapeDtypeStruct((1, 224, 224, 3), "float32") if images else jax.ShapeDtypeStruct((1, 8), "int32")
    return sum(x.size for x in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0), inputs)))


def test_every_preset_is_counted_and_hides_no_model():
    assert set(COUNTS) == set(PRESETS) and not set(PRESETS) & set(MODELS)


OFTEN = ("gpt2", "llama3_2_1b", "qwen2_5_0_5b", "qwen3_0_6b", "gemma2_2b", "bert_base", "vit_tiny")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.nightly) for name in PRESETS]
)
def test_a_preset_has_as_many_parameters_as_the_model_that_was_published(name):
    assert count(name) == COUNTS[name]


def test_a_preset_is_its_models_fields_and_what_a_config_sets_counts():
    model, fields = PRESETS["gemma2_2b"]
    assert expand({"name": "gemma2_2b"}) == {"name": model, **fields}
    assert expand({"name": "gemma2_2b", "layers": 2, "windows": (8,)}) == {
        "name": model, **fields, "layers": 2, "windows": (8,),
    }  # fmt: skip


def test_a_config_shows_what_came_from_a_preset():
    rows = {key: (value, origin) for key, value, origin in sections.resolved(
        CONFIG | {"model": {"name": "gpt2", "layers": 2, "heads": 12}}, ["model.layers"]
    )}  # fmt: skip
    assert rows["model.name"] == ("transformer", "preset")
    assert rows["model.width"] == (768, "preset")
    assert rows["model.layers"] == (2, "command line")
    assert rows["model.heads"] == (12, "config")
    assert rows["model.kv_heads"] == (None, "default")


def test_a_preset_is_the_same_config_as_its_fields():
    def checked(model):
        return sections.check(CONFIG | {"model": model}, lambda text, where: 0)

    model, fields = PRESETS["gpt2"]
    assert checked({"name": "gpt2"}) == checked({"name": model, **fields})
