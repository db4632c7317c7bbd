"""Imports go one way, importing is cheap, and nothing runs what it reads."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "flaxmodels"

# From the ground up. A module may import what is in a line above its own, and what shares its entry: "data" is all of
# flaxmodels/data. A new module needs a place here.
LAYERS = (
    ("version",),
    ("registry", "hardware", "paths"),
    ("buckets",),
    ("storage",),
    ("mirror",),
    ("precision", "schedules", "meshes", "ring", "masked"),
    ("durations", "metrics", "attention", "models", "optim", "sharding", "runtime", "console", "fitting", "manifest"),
    ("chunked", "disk", "testing"),
    ("losses", "state", "curves", "config", "saving"),
    ("step", "data", "evaluate", "checkpoint", "writers", "lora", "fingerprints"),
    ("guard", "freezing"),
    ("watch",),
    ("stored", "shelf"),
    ("hub",),
    ("warm", "tensors"),
    ("averaging", "basis"),
    ("sections",),
    ("filling",),
    ("job",),
    ("activations",),
    ("bottleneck", "capsule", "memory", "programs", "resume", "together"),
    ("inference",),
    ("run", "banner"),
    ("evaluating",),
    ("loop",),
    ("perf", "verify"),
    ("looking",),
    ("cli",),
    ("__main__", "train.py"),
)
# These stand on the ground: they take plain arguments, never a config, and know nothing of who calls them.
GROUND = ("attention", "models", "chunked", "fitting", "losses", "metrics", "optim", "precision", "sharding")
UPPER = ("config", "data", "sections", "job", "loop", "checkpoint", "evaluate", "writers", "step", "state", "cli")


def module_of(path):
    if path == ROOT / "train.py":
        return "train.py"
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(path): path for path in [ROOT / "train.py", *sorted(PACKAGE.rglob("*.py"))]}


@functools.cache
def tree(module):
    return ast.parse(FILES[module].read_text())


def imported(module):
    """Our modules that `module` imports, also inside of functions."""
    package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.partition(".")[0] == "flaxmodels")
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            source = ".".join(filter(None, (base, node.module)))
            if source.partition(".")[0] == "flaxmodels":
                for name in node.names:
                    inner = f"{source}.{name.name}"
                    yield inner if inner in FILES else source


GRAPH = {module: sorted(set(imported(module)) - {module}) for module in FILES}


def entry_of(module):
    return module.split(".")[1] if module.startswith("flaxmodels.") else module


def layer_of(module):
    found = [i for i, layer in enumerate(LAYERS) if entry_of(module) in layer]
    assert found, f"{module} has no place in LAYERS: give it one."
    return found[0]


def test_the_graph_is_read():
    """This file would pass with an empty graph."""
    assert {"flaxmodels.registry", "flaxmodels.metrics"} <= set(GRAPH["flaxmodels.losses"])
    assert "flaxmodels.sharding" in GRAPH["flaxmodels.data.feed"]
    assert "flaxmodels.data.order" in GRAPH["flaxmodels.data.feed"]
    assert "flaxmodels.loop" in GRAPH["train.py"]
    assert sum(map(len, GRAPH.values())) > 50


@pytest.mark.parametrize("module", [module for module in FILES if module != "flaxmodels"])
def test_imports_go_down(module):
    for target in GRAPH[module]:
        if target != "flaxmodels" and entry_of(target) != entry_of(module):
            assert layer_of(target) < layer_of(module), f"{module} imports {target}, which does not stand below it."
    layer_of(module)


def test_there_is_no_cycle():
    graph = {module: set(targets) for module, targets in GRAPH.items()}
    while leaves := [module for module, targets in graph.items() if not targets & set(graph)]:
        for module in leaves:
            del graph[module]
    assert not graph, f"import cycle among {sorted(graph)}"


@pytest.mark.parametrize("module", [module for module in FILES if entry_of(module) in GROUND])
def test_what_stands_on_the_ground_knows_nothing_above(module):
    reached, waiting = set(), [module]
    while waiting:
        new = set(GRAPH.get(waiting.pop(), ())) - reached
        reached |= new
        waiting += new
    above = {target for target in reached if entry_of(target) in UPPER}
    assert not above, f"{module} reaches {sorted(above)}"
    assert "ml_collections" not in FILES[module].read_text()


def test_the_package_itself_imports_only_its_version():
    assert GRAPH["flaxmodels"] == ["flaxmodels.version"]


def test_models_are_whole_in_one_file():
    """Or made of the transformer's blocks, and then these are all that it imports."""
    for module in FILES:
        if module.startswith("flaxmodels.models."):
            shared = {f"flaxmodels.models.{name}" for name in ("blocks", "transformer", "classifier")}
            others = set(GRAPH[module]) - shared
            assert not others, f"{module} imports {sorted(others)}"


def loaded(statement):
    code = f"{statement}\nimport sys\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


HEAVY = {"tensorflow", "tensorflow_datasets", "grain", "orbax", "ml_collections", "matplotlib", "sklearn"}


def test_importing_a_model_loads_little():
    names = loaded("import flaxmodels.models.transformer")
    ours = {name for name in names if name.partition(".")[0] == "flaxmodels"}
    assert "flaxmodels.models.transformer" in ours and len(ours) <= 6, sorted(ours)
    assert names & HEAVY == set()


def test_importing_the_package_loads_no_jax():
    names = loaded("import flaxmodels, flaxmodels.registry, flaxmodels.durations; dir(flaxmodels)")
    assert not names & (HEAVY | {"jax", "flax", "numpy", "optax"})


def test_public_names_exist():
    code = "import flaxmodels\nfor name in flaxmodels.__all__: print(name, getattr(flaxmodels, name) is not None)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 10 and "False" not in done.stdout
    done = subprocess.run([sys.executable, "-c", "import flaxmodels; flaxmodels.fits"], cwd=ROOT, capture_output=True)
    assert b"AttributeError: module 'flaxmodels' has no attribute 'fits'" in done.stderr


DANGEROUS = {"eval", "exec", "compile", "__import__"}
MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}


def dangers(parsed):
    """Calls and imports that would run what a file, an archive or a checkpoint says."""
    for node in ast.walk(parsed):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [name.name for name in node.names] + [getattr(node, "module", None) or ""]
            if {part for name in names for part in name.split(".")} & MODULES:
                yield node
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            unsafe = [k for k in node.keywords if k.arg == "allow_pickle" and ast.unparse(k.value) != "False"]
            if (
                name in DANGEROUS or name in ("yaml.load", "yaml.unsafe_load", "os.system") or unsafe
                or name.endswith(".extractall") or [k for k in node.keywords if k.arg == "shell"]
            ):  # fmt: skip
                yield node


@pytest.mark.parametrize(
    "text",
    [
        "import pickle", "from pickle import loads", "import a, dill", "eval('1')", "x = exec(text)", "yaml.load(f)",
        "tarfile.open(p).extractall(q)", "np.load(p, allow_pickle=True)", "os.system('ls')", "run('ls', shell=True)",
    ],
)  # fmt: skip
def test_dangers_are_seen(text):
    assert list(dangers(ast.parse(text)))


@pytest.mark.parametrize("module", FILES)
def test_nothing_runs_what_it_reads(module):
    assert not [f"line {node.lineno}: {ast.unparse(node)}" for node in dangers(tree(module))]


def test_no_module_is_a_drawer():
    assert not [module for module in FILES if re.search(r"(^|[._])(utils?|helpers?|misc|common)$", module)]
