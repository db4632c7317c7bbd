"""Directories of Hugging Face: config.json, weights of the safetensors format, tokenizer.json; read and written."""

from flaxmodels.hub.directory import Described as Described
from flaxmodels.hub.directory import chat_template as chat_template
from flaxmodels.hub.directory import describe as describe
from flaxmodels.hub.directory import is_directory as is_directory
from flaxmodels.hub.reading import laid as laid
from flaxmodels.hub.reading import read as read
from flaxmodels.hub.reading import sharded as sharded
from flaxmodels.hub.workdirs import adopt as adopt
from flaxmodels.hub.workdirs import release as release
from flaxmodels.hub.writing import write as write
