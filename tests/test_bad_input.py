"""Bad input of every kind ends before the first step: exit code 2, a few lines that help, no traceback, nothing left.

All of it goes through `train.main` as the shell would call it, in this process where that tells the same.
"""

import importlib
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train
from flaxmodels import cli
from flaxmodels.runtime import exits, lock

ROOT = Path(__file__).parent.parent

CONFIG = """
def get_config(kind="mlp"):
    model = {
        "mlp": dict(name="mlp", hidden=(8,)),
        "cnn": dict(name="cnn", features=(4, 4)),
        "resnet": dict(name="resnet", width=4),
        "transformer": dict(name="transformer", layers=1, width=16, heads=2),
    }.get(kind, dict(name=kind))
    small = dict(batch_size=8, examples=16, test_examples=8)
    if kind == "transformer":
        data = dict(name="synthetic_tokens", length=16, **small)
    else:
        data = dict(name="synthetic_images", **small)
    optim = dict(name="adam", learning_rate=1e-3)
    return dict(model=model, data=data, optim=optim, train=dict(duration=2, log_every=1))
"""

MINE = """
import flax.linen as nn
from pathlib import Path
from flaxmodels.data import synthetic

def function(): pass

class NoModule: pass

class Picky(nn.Module):
    width: int = 3
    def __post_init__(self):
        raise ValueError(f"width={self.width} is not even")

class Buggy(nn.Module):
    @nn.compact
    def __call__(self, inputs):
        raise ValueError("a bug of my own")

class Empty(nn.Module):
    @nn.compact
    def __call__(self, inputs):
        return inputs.reshape(inputs.shape[0], -1)[:, :10]

def no_optimizer(): pass

def data():
    seed = int(Path(__file__).with_name("seed").read_text())
    return synthetic.synthetic_images(examples=16, test_examples=8, seed=seed)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A config file, and modules of a user's own."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "config.py").write_text(CONFIG)
    (folder / "bad_mine.py").write_text(MINE)
    (folder / "bad_broken.py").write_text("1 / 0\n")
    (folder / "bad_needy.py").write_text("import a_package_that_is_not_here\n")
    (folder / "seed").write_text("0")
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture
def shell(folder, tmp_path, capsys):
    """Call `train.main` as the shell does: ("data.batch_size=3", "--debug") -> (code, stderr); `kind` picks a model."""

    def call(*words, kind="mlp", workdir=None, config=None):
        argv = [f"--config={config or folder / 'config.py'}" + (f":{kind}" if config is None else "")]
        argv += [f"--workdir={tmp_path / 'run' if workdir is None else workdir}"]
        argv += [word if word.startswith("-") else f"--config.{word}" for word in words]
        capsys.readouterr()
        try:
            code = exits.reported(lambda: train.main(argv), debug="--debug" in argv)
        except SystemExit as left:  # argparse
            code = left.code
        return code, capsys.readouterr().err

    return call


@pytest.fixture
def refused(shell, tmp_path):
    """As `shell`, for what must be refused; returns the message."""

    def call(*words, lines=3, fresh=True, **options):
        start = time.monotonic()
        code, message = shell(*words, **options)
        assert code == exits.BAD_INPUT, message
        assert time.monotonic() - start < 60
        assert "Traceback" not in message and message.strip().count("\n") < lines, message
        assert max(map(len, message.splitlines())) < 600, message
        if fresh:
            assert not (tmp_path / "run").exists(), "a run that never was leaves nothing behind"
        return message

    return call


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """The workdir of a run of 2 steps; copy it before you write."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    argv = [f"--config={folder / 'config.py'}", f"--workdir={workdir}"]
    assert train.main([*argv, "--config.data.name=bad_mine:data", *OWN_DATA]) == 0
    return workdir


# The file's data section has options of another source: `del` has no spelling on a command line, so name all of it.
OWN_DATA = ("--config.data={'name': 'bad_mine:data', 'batch_size': 8}",)
OWN = tuple(word.removeprefix("--config.") for word in OWN_DATA)

# name -> (kind of model, overrides, what the message must say: the key and value, what was expected, the remedy)
REFUSED = {
    # unknown keys, with the nearest that exists
    "unknown section": ("mlp", ["modle.name=mlp"], ["modle=", "unknown section", "Did you mean 'model'?"]),
    "unknown key": ("mlp", ["model.hiden=(8,)"], ["model.hiden=(8,)", "unknown key", "Did you mean 'hidden'?"]),
    "unknown top-level value": ("mlp", ["sede=3"], ["sede=3", "Did you mean 'seed'?"]),
    "section given as a value": ("mlp", ["model=3"], ["model=3", "expected a section"]),
    "value given as a section": ("mlp", ["model.name.x=3"], ["model.name is a value, not a section"]),
    "empty key": ("mlp", ["model..name=3"], ["--config.model..name=3", "expected --config.SECTION.KEY=VALUE"]),
    "empty value": ("mlp", ["optim.learning_rate="], ["has no value", "--config.optim.learning_rate=VALUE"]),
    "a key that the program sets": ("mlp", ["checkpoint.directory=x"], ["checkpoint.directory='x'", "unknown key"]),
    # types
    "text for a number": ("mlp", ["optim.learning_rate=abc"], ["optim.learning_rate='abc'", "expected a number"]),
    "None for a number": ("mlp", ["optim.learning_rate=None"], ["optim.learning_rate=None", "expected a number"]),
    "True for a number": ("mlp", ["optim.learning_rate=True"], ["optim.learning_rate=True", "expected a number"]),
    "True for an integer": ("mlp", ["seed=True"], ["seed=True", "expected an integer"]),
    "float for an integer": ("mlp", ["data.batch_size=8.0"], ["data.batch_size=8.0", "expected an integer"]),
    "number for a list": ("mlp", ["model.hidden=8"], ["model.hidden=8", "expected a list of an integer"]),
    "text in a list": ("mlp", ["model.hidden=(8,'a')"], ["model.hidden=(8, 'a')", "expected a list of an integer"]),
    "bool in a list": ("mlp", ["model.hidden=(8,True)"], ["model.hidden=(8, True)", "expected a list of an integer"]),
    "none of the choices": ("mlp", ["train.mode=most"], ["train.mode='most'", "one of 'min', 'max'"]),
    "text for a list of choices": ("mlp", ["loss.metrics=accuracy"], ["loss.metrics='accuracy'", "'top_k'"]),
    # ranges
    "NaN": ("mlp", ["optim.learning_rate=nan"], ["optim.learning_rate=nan", "expected a finite number, at least 0"]),
    "infinity": ("mlp", ["optim.learning_rate=inf"], ["optim.learning_rate=inf", "expected a finite number"]),
    "negative rate": ("mlp", ["optim.learning_rate=-1"], ["optim.learning_rate=-1", "at least 0"]),
    "negative in a list": ("mlp", ["model.hidden=(8,-1)"], ["model.hidden=(8, -1)", "at least 0"]),
    "zero width": ("mlp", ["model.hidden=(0,)"], ["hidden=(0,)", "must be at least 1"]),
    "share over 1": ("mlp", ["loss.label_smoothing=2"], ["loss.label_smoothing=2", "between 0 and 1"]),
    "huge seed": ("mlp", ["seed=99999999999999999999"], ["seed=99999999999999999999", "between 0 and 4294967295"]),
    "negative seed": ("mlp", ["seed=-1"], ["seed=-1", "between 0"]),
    "huge dispatch": ("mlp", ["train.steps_per_dispatch=1000000000"], ["steps_per_dispatch=1000000000", "10000"]),
    "never a log": ("mlp", ["train.log_every=0"], ["train.log_every=0", "between 1"]),
    "no checkpoint kept": ("mlp", ["checkpoint.keep=0"], ["checkpoint.keep=0", "at least 1"]),
    # durations
    "negative steps": ("mlp", ["train.duration=-5"], ["train.duration=-5", "between 0"]),
    "no step": ("mlp", ["train.duration=0"], ["train.duration=0", "expected at least one"]),
    "half a step": ("mlp", ["train.duration=1.5"], ["train.duration=1.5", 'such as "5 epochs"']),
    "unknown unit": ("mlp", ["train.duration=5 parsecs"], ["train.duration='5 parsecs'", '"5 epochs"']),
    "too many steps": ("mlp", ["train.duration=99999999999"], ["train.duration=99999999999", "2147483647"]),
    "too many epochs": ("mlp", ["train.duration=1e300 epochs"], ["train.duration='1e300 epochs'", "is the unit"]),
    "share of itself": ("mlp", ["train.duration=10%"], ["train.duration='10%'", "use steps or epochs"]),
    "long warmup": ("mlp", ["optim.warmup=10"], ["optim.warmup=10 steps", "not shorter than the run of 2 steps"]),
    # batches and the mesh
    "no batch": ("mlp", ["data.batch_size=0"], ["data.batch_size=0", "between 1"]),
    "huge batch": ("mlp", ["data.batch_size=1000000000000"], ["data.batch_size=1000000000000", "16777216"]),
    "batch over the mesh": ("mlp", ["data.batch_size=12"], ["data.batch_size=12", "the 8 devices", "use 8 or 16"]),
    "eval batch over the mesh": ("mlp", ["data.eval_batch_size=3"], ["data.eval_batch_size=3", "use 8."]),
    "mesh of 3": ("mlp", ["mesh.fsdp=3"], ["fsdp=3", "there are 8", "divide 8"]),
    "mesh of too many": ("mlp", ["mesh.data=4", "mesh.tensor=4"], ["data=4", "tensor=4", "is 16 devices", "are 8"]),
    "no such accelerator": (
        "mlp", ["mesh.platform=tpu"], ["mesh.platform='tpu'", "there is no such device", "[cuda] or [tpu]"]
    ),
    "no such platform": ("mlp", ["mesh.platform=quantum"], ["mesh.platform='quantum'", "'cpu', 'gpu', 'tpu'"]),
    "rule with unknown axis": (
        "mlp", ["sharding.rules=(('head/kernel',('dta',)),)"], ["'head/kernel'", "axis 'dta'", "Did you mean 'data'?"]
    ),
    "rule with an axis twice": (
        "mlp", ["sharding.rules=(('kernel',('fsdp','fsdp')),)"], ["'kernel'", "axis 'fsdp' twice", "each once"]
    ),
    "rule for too many dimensions": (
        "mlp", ["sharding.rules=(('hidden_0/bias',('fsdp','data')),)"], ["hidden_0/bias' has shape (8,)", "its spec"]
    ),
    "rule that does not divide": (
        "mlp",
        ["sharding.rules=(('head/kernel',(None,'fsdp')),)", "mesh.fsdp=4"],
        ["dimension 1 of 'head/kernel' is 10", "'fsdp'=4 does not divide"],
    ),
    "rule that matches nothing": (
        "mlp", ["sharding.rules=(('haed/kernel',('fsdp',)),)"], ["'haed/kernel'", "no parameter", "head/kernel"]
    ),
    "no rule": ("mlp", ["sharding.rules=('x',)"], ["'x' is no rule", 'such as ("up/kernel"']),
    # names
    "model": ("mlp", ["model.name=mpl"], ["model.name='mpl'", "Did you mean 'mlp'?", '"package.module:attribute"']),
    "data": ("mlp", ["data.name=minst"], ["data.name='minst'", "Did you mean 'mnist'?"]),
    "loss": ("mlp", ["loss.name=softmax"], ["loss.name='softmax'", "softmax_cross_entropy"]),
    "optimizer": ("mlp", ["optim.name=adaam"], ["optim.name='adaam'", "Did you mean 'adam'?"]),
    "schedule": ("mlp", ["optim.schedule=cosin"], ["optim.schedule='cosin'", "Did you mean 'cosine'?"]),
    "metric": ("mlp", ["train.metric=eval/acuracy"], ["train.metric='eval/acuracy'", "Did you mean 'eval/accuracy'?"]),
    "no such module": ("no_such_module:Net", [], ["there is no module 'no_such_module'", "PYTHONPATH"]),
    "no such class": ("bad_mine:Net", [], ["module 'bad_mine' has no 'Net'", "There are:", "Picky"]),
    "a function for a model": ("bad_mine:function", [], ["'bad_mine:function'", "derives from flax.linen.Module"]),
    "a class for a model": ("bad_mine:NoModule", [], ["'bad_mine:NoModule'", "derives from flax.linen.Module"]),
    "no transform": ("mlp", ["optim.name=bad_mine:no_optimizer"], ["returned None", "optax.GradientTransformation"]),
    # pieces that do not fit each other
    "own model refuses": ("bad_mine:Picky", [], ["model: width=3 is not even"]),
    "own model without parameters": ("bad_mine:Empty", [], ["'bad_mine:Empty' has no parameters", "nothing to train"]),
    "heads": ("transformer", ["model.heads=3"], ["width=16", "multiple of heads=3"]),
    "kv_heads": ("transformer", ["model.kv_heads=3"], ["kv_heads=3 must divide heads=2"]),
    "odd heads": ("transformer", ["model.width=6"], ["width / heads = 3 must be even", 'positions="learned"']),
    "long context": ("transformer", ["model.max_length=8"], ["model.max_length=8", "max_length=16", "Leave it out"]),
    "small vocabulary": ("transformer", ["model.vocab_size=8"], ["model.vocab_size=8", "=64", "Leave it out"]),
    "few classes": ("mlp", ["model.classes=3"], ["model.classes=3", "classes=10", "Leave it out"]),
    "small images": ("cnn", ["data.side=2"], ["(1, 2, 2, 1)", "sides of at least", "lower pool"]),
    "no GPU for its attention": ("transformer", ["model.attention=cudnn"], ["needs an Nvidia GPU", 'attention="xla"']),
    "loss of another kind": (
        "mlp", ["loss.name=mean_squared_error"], ["outputs have shape (8, 10), targets (8,)", "Check that loss.name"]
    ),
    "chunks of a whole head": ("mlp", ["loss.chunks=2"], ["loss.chunks=2", "model.name='mlp' has none", "chunks out"]),
    "chunks against split_head": (
        "transformer", ["loss.chunks=2", "model.split_head=False"], ["split_head=False contradicts loss.chunks=2"]
    ),
    "split head of another loss": (
        "transformer", ["loss.name=mean_squared_error", "model.split_head=True"], ["'features'", "model.split_head out"]
    ),
    "two dtypes": (
        "cnn", ["precision.compute=bfloat16", "model.dtype=float32"], ["contradicts precision.compute='bfloat16'"]
    ),
    "no text": ("mlp", ["loss.metrics=('bits_per_byte',)"], ["'bits_per_byte'", "not text", "leave it out"]),
    "top 50 of 10": ("mlp", ["loss.metrics=('top_k',)", "loss.top_k=50"], ["loss.top_k=50", "10 classes"]),
    "optimizer rule that matches nothing": (
        "mlp", ["optim.rules=(('haed',{'freeze':True}),)"], ["'haed' matches no parameter", "head/kernel"]
    ),
    "optimizer rule with unknown key": (
        "mlp", ["optim.rules=(('head',{'freze':True}),)"], ["optim.rules['head'].freze=True", "Did you mean 'freeze'?"]
    ),
    "no regular expression": ("mlp", ["optim.decay_mask=("], ["optim.decay_mask: '('", "not a regular expression"]),
    # flags
    "misspelled flag": ("mlp", ["--workdri=x"], ["'--workdri=x' is not a flag", "Did you mean '--workdir'?"]),
    "a word": ("mlp", ["extra"], ["--config.extra", "has no value"]),
    "flag without value": ("mlp", ["--config"], ["--config: expected one argument"]),
    "empty workdir": ("mlp", ["--workdir="], ["--workdir: '' is no folder"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(refused, name):
    kind, overrides, said = REFUSED[name]
    message = refused(*overrides, kind=kind)
    assert message.startswith("error: ") or message.startswith("usage: ")
    for fragment in said:
        assert fragment in message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, ["there is no such file", "Did you mean"]),
        ("def get_config(:\n", ["line 1", "SyntaxError"]),
        ("x = 1\n", ["no function get_config()", "expected one that returns a ConfigDict"]),
        ("def get_config():\n    return 3\n", ["get_config() returned int, expected a ConfigDict"]),
        ("import nothing_of_that_name\n", ["line 1", "ModuleNotFoundError", "nothing_of_that_name"]),
        ("def get_config():\n    return {'model': 1 / 0}\n", ["line 2", "ZeroDivisionError"]),
    ],
)
def test_config_file(refused, folder, content, said):
    file = folder / "confg.py"
    if content is not None:
        file.write_text(content)
    message = refused(config=file)
    file.unlink(missing_ok=True)
    assert f"--config='{file}'" in message
    for fragment in said:
        assert fragment in message


def test_a_folder_as_config(refused, folder):
    assert "that is a folder" in (message := refused(config=folder)) and "config.py" in message


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("bad_mine:Buggy", ValueError),
        ("bad_broken:Net", ZeroDivisionError),
        ("bad_needy:Net", ModuleNotFoundError),
    ],
)
def test_bugs_of_a_users_own_code_keep_their_traceback(shell, tmp_path, name, error):
    with pytest.raises(error) as caught:
        shell(kind=name)
    assert caught.type is error
    assert not (tmp_path / "run").exists()


def test_debug_shows_the_traceback_with_the_same_exit_code(shell):
    code, message = shell("model.name=mpl", "--debug")
    assert code == exits.BAD_INPUT
    assert message.startswith("Traceback") and message.splitlines()[-1].startswith("error: model.name='mpl'")


# Workdirs


@pytest.mark.parametrize(
    ("below", "reason"), [("file", "File exists"), ("file/run", "Not a directory"), ("/proc/run", "No such file")]
)
def test_workdir_that_can_not_be_written(refused, tmp_path, below, reason):
    """Not by chmod: root ignores that."""
    (tmp_path / "file").write_text("")
    message = refused(workdir=tmp_path / below)
    assert f"--workdir='{tmp_path / below}' can't be written: {reason}" in message and "Choose another" in message


HOLD = "import sys; from pathlib import Path; from flaxmodels.runtime.lock import workdir_lock\n"
HOLD += "with workdir_lock(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"


@pytest.mark.slow
def test_workdir_of_another_process(refused, shell, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "DEAD", 300.0)  # an owner that lives is named at once
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    owner = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "run"], env=env, **pipes)
    try:
        assert owner.stdout.readline() == "held\n"
        start = time.monotonic()
        message = refused(fresh=False)
        assert time.monotonic() - start < 60
        assert "belongs to another running process" in message
        assert f"pid {owner.pid} on {socket.gethostname()}, since " in message and "Wait for it" in message
    finally:
        owner.kill()  # -9: it can't clean up
        owner.communicate()
    assert shell() == (0, "")


def test_a_folder_that_was_there_is_left_alone(refused, tmp_path):
    (tmp_path / "mine").mkdir()
    refused("model.hidden=(0,)", workdir=tmp_path / "mine")
    refused("model.hidden=(0,)", workdir=tmp_path / "new" / "deep")
    assert (tmp_path / "mine").is_dir() and not (tmp_path / "new").exists()


def test_workdir_of_another_config(refused, shell, trained, tmp_path):
    workdir = shutil.copytree(trained, tmp_path / "copy")
    before = (workdir / "config.json").read_bytes()
    message = refused(*OWN, "model.hidden=(16,)", "optim.learning_rate=2e-3", workdir=workdir)
    assert "model.hidden was [8], is [16]" in message and "optim.learning_rate was 0.001, is 0.002" in message
    assert "belongs to another config" in message and "--allow_config_change" in message
    assert (workdir / "config.json").read_bytes() == before
    # The learning rate may change, when asked to; a layer's width can't.
    assert shell(*OWN, "optim.learning_rate=2e-3", "train.duration=3", "--allow_config_change", workdir=workdir)[0] == 0
    before = (workdir / "config.json").read_bytes()
    message = refused(
        *OWN, "model.hidden=(16,)", "train.duration=4", "--allow_config_change", workdir=workdir, lines=12
    )
    assert (
        "checkpoint 3" in message and "can't be restored into this model" in message and "another --workdir" in message
    )
    assert "hidden_0/kernel was (64, 8) float32, is (64, 16) float32" in message
    message = refused(*OWN, "optim.name=sgd", "train.duration=4", "--allow_config_change", workdir=workdir, lines=25)
    assert "can't be restored into this model and optimizer" in message
    assert (workdir / "config.json").read_bytes() == before


def test_a_start_that_is_refused_when_all_is_ready_leaves_nothing_behind(refused):
    assert "start.workdir='nowhere' is not there" in refused(*OWN, "start.workdir=nowhere")


def test_a_config_that_never_saved_a_step_does_not_own_the_workdir(shell, tmp_path):
    """So that the remedy for a typo is to correct it, and no new workdir."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"config": {"model.hidden": [9]}}')
    assert shell() == (0, "")


def test_other_durations(refused, shell, trained, tmp_path):
    workdir = shutil.copytree(trained, tmp_path / "copy")
    assert "train.duration was 2, is 1" in refused(*OWN, "train.duration=1", workdir=workdir)
    message = refused(*OWN, "train.duration=1", "--allow_config_change", workdir=workdir)
    assert "train.duration is 1 steps" in message and "is at step 2 already" in message and "longer" in message


def test_data_that_changed_between_runs(refused, folder, trained, tmp_path):
    workdir = shutil.copytree(trained, tmp_path / "copy")
    (folder / "seed").write_text("1")
    try:
        message = refused(*OWN, workdir=workdir)
    finally:
        (folder / "seed").write_text("0")
    assert "not what the workdir was trained on: content was" in message and "--allow_data_change" in message


# Archives, without a network


def test_no_network(refused, tmp_path, monkeypatch):
    with socket.socket() as free:  # a port where nobody listens
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{free.getsockname()[1]}")
    importlib.import_module("tensorflow_datasets")  # which takes seconds
    start = time.monotonic()
    message = refused(f"data={{'name': 'mnist', 'batch_size': 8, 'data_dir': {str(tmp_path / 'tfds')!r}}}", lines=7)
    assert time.monotonic() - start < 30
    assert "can't be downloaded" in message and "refused" in message and "--config.data.manual_dir=FOLDER" in message
    for part in itertools.product(("train", "t10k"), ("images-idx3", "labels-idx1")):
        assert f"https://storage.googleapis.com/cvdf-datasets/mnist/{'-'.join(part)}-ubyte.gz" in message


def test_wrong_checksum(refused, tmp_path):
    (tmp_path / "input.txt").write_text("To be, or not to bee")
    options = {"name": "tiny_shakespeare", "batch_size": 8, "manual_dir": str(tmp_path), "data_dir": f"{tmp_path}/tfds"}
    message = refused(f"data={options}", "train.duration=1", kind="transformer", lines=5)
    assert f"{tmp_path}/input.txt is damaged, or another file" in message and "expected sha256 86c4e6aa9db7" in message
    assert "fetch it again from https://" in message
    message = refused(f"data={options | {'manual_dir': '/nowhere'}}", kind="transformer", lines=5)
    assert "data.manual_dir='/nowhere' is not a folder" in message and "input.txt  from https://" in message


# The other verbs


def verb(capsys, *argv):
    capsys.readouterr()
    code = cli.main([str(word) for word in argv])
    return code, capsys.readouterr().err


def test_unknown_verb(capsys):
    code, message = verb(capsys, "trian")
    assert code == exits.BAD_INPUT and "'trian' is not a verb. Did you mean 'train'?" in message
    assert verb(capsys)[0] == exits.BAD_INPUT


def test_evaluating_what_is_not_there(capsys, folder, trained, tmp_path):
    config = f"--config={folder / 'config.py'}"
    code, message = verb(capsys, "eval", config, f"--workdir={tmp_path / 'none'}")
    assert code == exits.BAD_INPUT and "has no checkpoints: train first" in message and not (tmp_path / "none").exists()
    for step in ("7", "bset", "-1"):
        code, message = verb(capsys, "eval", config, *OWN_DATA, f"--workdir={trained}", f"--step={step}")
        assert code == exits.BAD_INPUT and f"--step='{step}'" in message and "There are: 2, best, latest" in message
    code, message = verb(capsys, "eval", config, *OWN_DATA, f"--workdir={trained}", "--config.model.hidden=(16,)")
    assert code == exits.BAD_INPUT and "can't be restored into this model" in message and "Traceback" not in message


def test_config_verb_checks_too(capsys, folder):
    code, message = verb(capsys, "config", f"--config={folder / 'config.py'}", "--config.model.hiden=3")
    assert code == exits.BAD_INPUT and "Did you mean 'hidden'?" in message


# As processes


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_no_accelerator_where_the_environment_asks_for_one(run, folder, tmp_path, platform):
    result = run("train.py", f"--config={folder}/config.py", f"--workdir={tmp_path}/run", JAX_PLATFORMS=platform)
    assert result.returncode == exits.BAD_INPUT
    message = result.stderr[result.stderr.index("error: ") :]
    assert f"JAX_PLATFORMS='{platform}': there is no such device" in message and "to use what is there" in message
    assert "Traceback" not in result.stderr and message.strip().count("\n") < 3, result.stderr
    assert not (tmp_path / "run").exists()


def test_a_process_that_was_given_bad_input(run, folder, tmp_path):
    command = ["train.py", f"--config={folder}/config.py", f"--workdir={tmp_path}/run", "--config.train.duration=-1"]
    result = run(*command)
    assert (result.returncode, result.stdout) == (exits.BAD_INPUT, "")
    assert result.stderr.startswith("error: train.duration=-1") and result.stderr.count("\n") == 1
    result = run("-m", "flaxmodels", *command, "--debug")
    assert result.returncode == exits.BAD_INPUT and "is not a verb" in result.stderr
    result = run(*command, "--debug")
    assert result.returncode == exits.BAD_INPUT
    assert result.stderr.startswith("Traceback") and result.stderr.splitlines()[-1].startswith("error: train.duration")


# As `sitecustomize`: says so when the imports have come this far, deep in those of others, and stays there.
IMPORTING = """
import sys, time

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "jax.numpy":
            print("importing", flush=True)
            time.sleep(600)

sys.meta_path.insert(0, Finder)
"""


def test_interrupted_while_it_imports(folder, tmp_path):
    """Ctrl-C in the first seconds: no traceback, and the exit code that a shell gives a process that SIGINT ended."""
    command = [sys.executable, "train.py", f"--config={folder}/config.py", f"--workdir={tmp_path}/run"]
    (tmp_path / "sitecustomize.py").write_text(IMPORTING)
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=env, **pipes) as process:
        try:
            assert process.stdout.readline() == "importing\n"
            process.send_signal(signal.SIGINT)
            _, message = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == exits.INTERRUPTED
    assert message == "interrupted before there was anything to save\n"
    assert not (tmp_path / "run").exists()
