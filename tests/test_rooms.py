"""Rooms: imports between the packages of biofx run one way, on few floors, and a pass needs little of it."""

import ast
from pathlib import Path

import networkx
import pytest

import biofx
from biofx import passes

SOURCES = {"biofx": Path(biofx.__file__).parent, "biofx.passes": Path(passes.__file__).parent}


def modules():
    """The file of every module of biofx, by its name."""
    result = {}
    for package, folder in SOURCES.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            result.setdefault(name, path)
    return result


def imported(path):
    """What a file imports when it is loaded, as dotted names."""
    statements = [ast.parse(path.read_text())]
    while statements:
        node = statements.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue  # it imports when it is called
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        statements.extend(ast.iter_child_nodes(node))


def graph_of_imports():
    files = modules()
    graph = networkx.DiGraph()
    graph.add_nodes_from(files)
    for name, path in files.items():
        for target in imported(path):
            found = target if target in files else target.rpartition(".")[0]
            if found in files and found != name:
                graph.add_edge(name, found)
    return graph


def room(name):
    package, _, rest = name.removeprefix("biofx.").partition(".")
    return package if rest or (SOURCES["biofx"] / package).is_dir() or package == "passes" else "biofx"


@pytest.fixture(scope="module")
def imports():
    return graph_of_imports()


@pytest.fixture(scope="module")
def rooms(imports):
    edges = {(room(a), room(b)) for a, b in imports.edges}
    return networkx.DiGraph([(a, b) for a, b in edges if a != b])


def test_every_module_is_found(imports):
    assert {"biofx", "biofx.compiler", "biofx.base.errors", "biofx.passes.rejuvenate"} <= set(imports)
    assert imports.has_edge("biofx.compiler", "biofx.base.errors")


def test_modules_do_not_import_each_other(imports):
    assert list(networkx.simple_cycles(imports)) == []


def test_imports_run_one_way_on_ten_floors(rooms):
    assert networkx.is_directed_acyclic_graph(rooms)
    assert len(networkx.dag_longest_path(rooms)) <= 10


def test_passes_know_the_compiler_and_not_the_other_way_round(rooms):
    assert [*rooms.predecessors("passes")] == ["biofx"]


def test_nothing_imports_the_trainers_but_their_callbacks(imports):
    assert {"biofx.integrations", "biofx.integrations.lightning"} <= set(imports)
    assert {room(name) for module in imports if room(module) == "integrations" for name in imports.pred[module]} == {
        "integrations"
    }


def test_no_public_name_hides_a_module(imports):
    hidden = {f"biofx.{name}" for name in biofx.__all__} & set(imports)
    assert hidden == {"biofx.passes"}  # which is the module itself


def test_few_files_lie_outside_of_rooms():
    assert len([*SOURCES["biofx"].glob("*.py")]) <= 8


def test_the_smallest_pass_needs_few_modules(imports):
    needed = networkx.descendants(imports, "biofx.passes.l1_regularization")
    assert len(needed) <= 15


def test_names_of_tests_can_be_read_at_a_glance():
    names = [
        node.name
        for path in Path(__file__).parent.rglob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    assert [name for name in names if len(name) > 60] == []
