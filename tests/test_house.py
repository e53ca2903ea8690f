"""The house: where what is, and that imports point one way."""

import ast
import sys

from helpers import ROOT

PROGRAMS = ("train", "sample", "edit", "bench")


def imported_names(path):
    """All that a file imports, within functions, too: "a.b" for "import a.b", "a" and "a.b" for "from a import b"."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def imports():
    """{module: modules of the repository that it imports}. Programs are modules here, too."""
    paths = [path for path in ROOT.rglob("*.py") if not {"tests", "out"} & set(path.parts)]
    modules = {}
    for path in paths:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        modules[name] = path
    return {name: imported_names(path) & modules.keys() for name, path in modules.items()}


def reachable(graph, name):
    """All that a module imports, directly or not. It is among them if there is a circle."""
    seen = set()
    waiting = [name]
    while waiting:
        new = graph[waiting.pop()] - seen
        seen |= new
        waiting.extend(new)
    return seen


def of(graph, *parts):
    return {name for name in graph if name.split(".")[0] in parts}


def test_imports_have_no_circle():
    graph = imports()
    assert len(graph) > 25 and graph["train"] >= {"model", "kernels", "runtime.checkpoint"}
    circles = {name for name in graph if name in reachable(graph, name)}
    assert not circles


def test_imports_point_one_way():
    """Programs -> model -> systems -> memory -> kernels; runtime and data below."""
    graph = imports()
    programs = of(graph, *PROGRAMS)
    for name in graph.keys() - programs:
        assert not reachable(graph, name) & programs, name
    for name in of(graph, "runtime"):
        assert not reachable(graph, name) & of(graph, "model", "systems", "data"), name
    for name in of(graph, "data"):
        assert not reachable(graph, name) & of(graph, "model", "systems", "memory", "kernels"), name
    for name in of(graph, "systems"):
        assert "model" not in reachable(graph, name), name


def test_a_program_imports_no_other_one_that_it_does_not_need():
    graph = imports()
    assert not reachable(graph, "train") & of(graph, "sample", "edit", "bench")
    assert not reachable(graph, "sample") & {"train", "edit.update", *of(graph, "bench")}
    for name in of(graph, "edit"):
        assert not reachable(graph, name) & of(graph, "bench"), name


def test_the_method_imports_nothing_but_torch_and_the_standard_library():
    """memory.py and kernels.py are all that one needs in a model of one's own; NumPy comes with PyTorch, Triton where there is one."""
    packages = {
        file: {name.split(".")[0] for name in imported_names(ROOT / file)}
        for file in ("memory.py", "kernels.py")
    }
    standard = sys.stdlib_module_names
    assert packages["memory.py"] - standard == {"torch", "kernels"}
    assert packages["kernels.py"] - standard == {"torch", "numpy", "triton"}


def test_the_code_is_in_the_places_that_the_readme_names():
    places = {path.name for path in ROOT.iterdir()} - {"out"}
    files = {"memory.py", "kernels.py", "model.py", "train.py", "sample.py", "presets.py"}
    assert files | {"systems", "runtime", "edit", "data", "bench", "assets", "tests"} <= places
    assert {path.suffix for path in (ROOT / "assets").iterdir()} == {".svg"}
    python = {path.name for path in ROOT.glob("*.py")}
    assert python == files
