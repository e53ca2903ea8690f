"""The house: where what is, and that imports point one way."""

import ast
import subprocess
import sys

from helpers import ROOT

PROGRAMS = ("train", "sample", "edit", "bench")


def imports():
    """{module: modules of the repository that it imports}, from the syntax trees. Scripts that only run are there, too."""
    paths = [path for path in ROOT.rglob("*.py") if not {"tests", "out"} & set(path.parts)]
    modules = {}
    for path in paths:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        modules[name] = path
    graph = {}
    for name, path in modules.items():
        graph[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                found = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            else:
                continue
            graph[name] |= {other for other in found if other in modules} - {name}
    return graph


def reachable(graph, name):
    seen, waiting = set(), [name]
    while waiting:
        for other in graph[waiting.pop()] - seen:
            seen.add(other)
            waiting.append(other)
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
    assert reachable(graph, "memory") == {"kernels"} and not graph["kernels"]
    for name in of(graph, "runtime"):
        assert not reachable(graph, name) & of(graph, "model", "systems", "data"), name
    for name in of(graph, "data"):
        assert not reachable(graph, name) & of(graph, "model", "systems", "memory", "kernels"), name
    for name in of(graph, "systems"):
        assert "model" not in reachable(graph, name), name
    assert not reachable(graph, "train") & of(graph, "sample", "edit", "bench")
    assert "train" not in reachable(graph, "sample")
    assert not of(graph, "bench") & {other for name in of(graph, "edit") for other in graph[name]}


def test_the_method_imports_nothing_but_torch_and_the_standard_library():
    code = "import sys, torch, triton; before = set(sys.modules); import memory; print(set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() in ("{'memory', 'kernels'}", "{'kernels', 'memory'}"), done


def test_the_code_is_in_the_places_that_the_readme_names():
    places = {path.name for path in ROOT.iterdir()} - {"out"}
    files = {"memory.py", "kernels.py", "model.py", "train.py", "sample.py", "presets.py"}
    assert files | {"systems", "runtime", "edit", "data", "bench", "assets", "tests"} <= places
    assert {path.suffix for path in (ROOT / "assets").iterdir()} == {".svg"}
    python = {path.name for path in ROOT.glob("*.py")}
    assert python == files
