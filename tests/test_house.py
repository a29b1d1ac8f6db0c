"""Tests of the layout: a module imports only from lower levels, and the table from the papers to the code is right."""

import ast
import re
import sys

import pytest

from conftest import ROOT, SCRIPTS

# The levels, lowest first: a module may import only modules of earlier lines.
ORDER = """
errors terminal
ranks
files
options training reviews
formats.chat formats.tokenizer_files formats.checkpoints
formats.records
formats.sources
tokenizer
data
kernels_triton
kernels
model
generate
rewards metrics
evaluate
judge
memory
plot
run
train_sft train_rm train_ppo train_dpo train_rrhf sample_bon
jobs
bench_gpu
bench __main__
experiments
findings
study
"""
LEVEL = {name: level for level, line in enumerate(ORDER.strip().split("\n")) for name in line.split()}
CORE = {"torch", "tiktoken", "numpy", "safetensors", "regex", "jinja2"}                # tiktoken needs regex, torch jinja2


def files():
    """Returns {short module name: path} for the package and the scripts."""
    package = {".".join(p.relative_to(ROOT / "nanorlhf").with_suffix("").parts): p for p in (ROOT / "nanorlhf").rglob("*.py")}
    return {name: p for name, p in package.items() if not name.endswith("__init__")} | {
        name: ROOT / f"{name}.py" for name in SCRIPTS}


def imports(path):
    """Yields (module, line, whether it is inside a function) for every import in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{a.name}" for a in node.names] if node.module in ("nanorlhf", "nanorlhf.formats") else [
                node.module]
        else:
            continue
        for name in names:
            yield name, node.lineno, id(node) in inside


@pytest.mark.parametrize("name", files())
def test_a_module_imports_only_from_lower_levels(name):
    level = LEVEL.get(name, LEVEL["train_sft"])                                        # new scripts: the level of the others
    for imported, line, _ in imports(files()[name]):
        short = imported.removeprefix("nanorlhf.")
        if short in LEVEL:
            if name in SCRIPTS:
                assert short not in SCRIPTS, f"{name}:{line} imports another script"
            assert LEVEL[short] < level or short == name, f"{name}.py:{line} imports {imported}, which lies above it"


def test_only_scripts_and_programs_import_run_and_options():
    for name, path in files().items():
        if name not in SCRIPTS and name not in ("run", "bench", "__main__", "study"):
            assert "nanorlhf.run" not in [m for m, *_ in imports(path)], name
        if name not in SCRIPTS and name not in ("run", "data", "evaluate", "judge", "generate", "memory", "plot", "bench", "__main__",
                                             "study"):
            assert "nanorlhf.options" not in [m for m, *_ in imports(path)], name


@pytest.mark.parametrize("name", files())
def test_optional_packages_are_imported_inside_functions(name):
    for imported, line, inside in imports(files()[name]):
        top = imported.split(".")[0]
        known = top in CORE or top in sys.stdlib_module_names or top == "nanorlhf" or top in SCRIPTS
        known = known and imported != "nanorlhf.kernels_triton" or (name, top) == ("kernels_triton", "triton")
        assert known or inside, f"{name}.py:{line} imports {imported} at the top"


def test_every_module_has_a_level():
    assert set(files()) - set(SCRIPTS) <= set(LEVEL)


def test_no_module_reexports_names_of_another():
    """A name is imported from where it is defined. data.load_tokenizer is the one exception: callers may use that name."""
    for name, path in files().items():
        assert "noqa" not in path.read_text(encoding="utf-8"), name
    from nanorlhf.data import load_tokenizer
    from nanorlhf.tokenizer import load_tokenizer as its_own
    assert load_tokenizer is its_own


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_keeps_to_110_columns(name):
    for number, line in enumerate(files()[name].read_text(encoding="utf-8").splitlines(), 1):
        assert len(line) <= 110, f"{name}.py:{number}"


# ---- From the papers to the code ------------------------------------------------------------------------------------
TABLE = (ROOT / "nanorlhf" / "README.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| .*\| `([\w/]+\.py)` \| `([\w.]+)` \| `(.+)` \|$", TABLE, re.MULTILINE)


def source_of(path, name):
    """Returns the source of a function or of Class.method."""
    text = path.read_text(encoding="utf-8")
    nodes = ast.parse(text).body
    for part in name.split("."):
        node = next((n for n in nodes if getattr(n, "name", None) == part), None)
        assert node is not None, f"{path.name} has no {name}"
        nodes = node.body
    return ast.get_source_segment(text, node)


@pytest.mark.parametrize("file, function, code", ROWS, ids=[f"{f} {n}" for f, n, _ in ROWS])
def test_the_table_names_the_function_that_holds_the_code(file, function, code):
    path = ROOT / file if (ROOT / file).exists() else ROOT / "nanorlhf" / file
    assert code.replace("\\|", "|") in source_of(path, function)


def test_the_table_is_complete():
    assert len(ROWS) >= 28
