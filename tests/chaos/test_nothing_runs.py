"""Storage and data sets hold bytes, never programs: nothing in the package can unpickle, evaluate or start a shell."""

import ast
from pathlib import Path

import pytest

from diki_ray.config.yaml_text import read_tree
from diki_ray.errors import ConfigError

ROOT = Path(__file__).parents[2]
FILES = sorted(path for folder in ("diki_ray", "jobs") for path in (ROOT / folder).rglob("*.py"))
RUNS_WHAT_IT_READS = {
    *("pickle.load", "pickle.loads", "cloudpickle.load", "cloudpickle.loads", "dill.load", "dill.loads"),
    *("joblib.load", "marshal.loads", "shelve.open", "yaml.load", "yaml.unsafe_load", "yaml.full_load"),
    *("eval", "exec", "os.system", "os.popen", "pickle.Unpickler", "pandas.read_pickle"),
    *("__import__", "importlib.import_module", "import_module", "runpy.run_path", "runpy.run_module"),
    *("torch.jit.load", "torch.hub.load", "torch.package.PackageImporter"),
}
A_BACKBONE = ("backbone.py", "spec.loader.exec_module(module)")
"""The one place that runs a Python file: a backbone that the caller names (`clip/trust.py`)."""
SAFE_YAML = ("yaml_text.py", "yaml.load(text, Loader=_LOADER)")
"""The one place that reads YAML: its loader is asked below what it does with an object."""


def calls(source: str) -> list[tuple[str, ast.Call]]:
    """(dotted name, call) of every call by name."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [(ast.unparse(node.func), node) for node in nodes]


def dangerous(source: str) -> list[str]:
    found = []
    for name, node in calls(source):
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if (
            name in RUNS_WHAT_IT_READS
            or (name == "torch.load" and keywords.get("weights_only") != "True")
            or (name in ("np.load", "numpy.load") and keywords.get("allow_pickle", "False") != "False")
            or keywords.get("shell", "False") != "False"
            or keywords.get("trust_remote_code", "False") != "False"
            or name.rpartition(".")[2] in ("exec_module", "load_module")
        ):
            found.append(f"line {node.lineno}: {ast.unparse(node)[:80]}")
    return found


def guarded(path: Path, found: str) -> bool:
    return (path.name, found.partition(": ")[2]) in (A_BACKBONE, SAFE_YAML)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_of_ours_runs_what_it_reads(path: Path) -> None:
    assert [found for found in dangerous(path.read_text()) if not guarded(path, found)] == []


def test_a_python_file_is_run_in_one_place_and_yaml_is_read_in_one() -> None:
    found = [path.name for path in FILES for line in dangerous(path.read_text()) if guarded(path, line)]
    assert sorted(found) == ["backbone.py", "yaml_text.py"]


def test_yaml_makes_no_objects() -> None:
    with pytest.raises(ConfigError, match="not YAML"):
        read_tree("a: !!python/object/apply:os.getcwd []", "the text")


def test_the_test_sees_what_it_is_for() -> None:
    source = "torch.load(f)\npickle.load(f)\nsubprocess.run(c, shell=True)\nnp.load(f, allow_pickle=True)"
    assert len(dangerous(source)) == 4
    source = "spec.loader.exec_module(m)\nimportlib.import_module(n)\nf(trust_remote_code=x)\n__import__(n)"
    assert len(dangerous(source)) == 4
    assert dangerous("f(trust_remote_code=False)") == []
    assert dangerous("torch.load(f, weights_only=True)\nnp.load(f)\nyaml.safe_load(f)") == []
