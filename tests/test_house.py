# SPDX-License-Identifier: Apache-2.0
"""The structure of the project: who imports whom, no import cycles, and what every source file begins with."""

import ast
from collections.abc import Container, Iterator
from pathlib import Path, PurePosixPath

import pytest


ROOT = Path(__file__).parents[1]
ROOMS = ("modeling_camoe", "camoe_search", "training", "hub_cards", "benchmarks", "tests")
# Folders whose modules are imported by their plain names: programs put their own folder on the path.
PLAIN_ROOTS = ("training", "hub_cards", "hub_cards/space", "benchmarks")

# Room or folder of training/ -> what it may import besides itself. `programs` are the files at the top of training/.
MAY_IMPORT = {
    "modeling_camoe": set(),
    "camoe_search": {"modeling_camoe"},
    "hub_cards": {"modeling_camoe"},
    "benchmarks": {"modeling_camoe", "camoe_search", "engine", "data", "evaluation", "motion"},
    "programs": {"modeling_camoe", "engine", "data", "evaluation"},
    "engine": {"modeling_camoe", "data", "evaluation"},
    "evaluation": {"modeling_camoe", "data"},
    "data": {"modeling_camoe"},
    "motion": {"modeling_camoe", "data"},
}
# The only files of training/ outside of motion/ that may import it: its program, and the start from scratch.
MAY_IMPORT_MOTION = {"training/make_motion_clips.py", "training/engine/start.py"}


def source_files(root: Path) -> list[Path]:
    return sorted(file for room in ROOMS for file in (root / room).rglob("*.py") if file.is_file())


def imports(root: Path, at_import: bool = False) -> dict[str, set[str]]:
    """File -> the files of the project that it imports; all paths are relative to `root`.

    Anywhere in the file, or only `at_import`: not inside functions, which run when every module is there.
    """
    texts = {file.relative_to(root).as_posix(): file.read_text(encoding="utf-8") for file in source_files(root)}
    return {
        file: {
            other
            for folders, name in imported_names(file, text, at_import)
            if (other := find_module(folders, name, texts))
        }
        for file, text in texts.items()
    }


def nodes(node: ast.AST, at_import: bool) -> Iterator[ast.AST]:
    """A node and all below it, without the bodies of functions if only what runs `at_import` counts."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (at_import and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)):
            yield from nodes(child, at_import)


def imported_names(file: str, text: str, at_import: bool) -> Iterator[tuple[list[str], str]]:
    """(folders to search, dotted name) of each import; `from a import b` gives a.b, which may be a module or not."""
    parents = [parent.as_posix() for parent in PurePosixPath(file).parents]
    roots = sorted([".", *PLAIN_ROOTS], key=lambda folder: folder != parents[0])  # a program's own folder comes first
    for node in nodes(ast.parse(text), at_import):
        if isinstance(node, ast.Import):
            yield from ((roots, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            folders = [parents[node.level - 1]] if node.level else roots
            yield from (
                (folders, f"{node.module}.{alias.name}" if node.module else alias.name) for alias in node.names
            )


def find_module(folders: list[str], name: str, files: Container[str]) -> str | None:
    """The file of the longest part of a dotted name that is a module of the project."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        for folder in folders:
            path = PurePosixPath(folder, *parts[:length]).as_posix()
            for file in (f"{path}.py", f"{path}/__init__.py"):
                if file in files:
                    return file
    return None


def room_of(file: str) -> str:
    room, *rest = file.split("/")
    if room == "training":
        return rest[0] if len(rest) > 1 else "programs"
    return room


def forbidden_imports(graph: dict[str, set[str]]) -> list[str]:
    """Imports against the directions above, as "a imports b"; tests may import everything."""
    wrong = []
    for file, imported in graph.items():
        room = room_of(file)
        for other in imported if room != "tests" else ():
            own_room = room_of(other) == room and room != "programs"  # programs do not import each other
            motion = room_of(other) == "motion" and file in MAY_IMPORT_MOTION
            if not (own_room or motion or room_of(other) in MAY_IMPORT[room]):
                wrong.append(f"{file} imports {other}")
    return sorted(wrong)


def import_cycle(graph: dict[str, set[str]]) -> list[str] | None:
    """Files that import each other in a circle, the first one again at the end; None if there is no circle."""
    done: set[str] = set()

    def visit(file: str, path: list[str]) -> list[str] | None:
        if file in path:
            return [*path[path.index(file) :], file]
        if file in done:
            return None
        for other in sorted(graph[file]):
            if cycle := visit(other, [*path, file]):
                return cycle
        done.add(file)
        return None

    return next((cycle for file in sorted(graph) if (cycle := visit(file, []))), None)


def head_is_wrong(text: str) -> str | None:
    """What is wrong with the first lines of a source file, or None."""
    lines = text.splitlines()
    if lines and lines[0].startswith("#!"):
        lines = lines[1:]
    if lines[:1] != ["# SPDX-License-Identifier: Apache-2.0"]:
        return "does not begin with the SPDX line"
    tree = ast.parse(text)
    if ast.get_docstring(tree) is None or tree.body[0].lineno > 3:
        return "has no docstring that starts by line 3"
    return None


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    return imports(ROOT)


def test_imports_follow_the_directions_of_the_design(graph):
    assert graph["training/run_retrieval.py"] >= {"training/engine/trainer.py", "training/data/batches.py"}
    assert forbidden_imports(graph) == []


def test_no_modules_import_each_other_in_a_circle():
    assert import_cycle(imports(ROOT, at_import=True)) is None


def test_modeling_camoe_is_flat():
    assert not [file for file in (ROOT / "modeling_camoe").rglob("*.py") if file.parent.name != "modeling_camoe"]


def test_training_has_at_most_eight_files_at_its_top():
    assert 1 <= len(list((ROOT / "training").glob("*.py"))) <= 8


def test_every_source_file_begins_with_the_licence_line_and_its_purpose():
    files = source_files(ROOT)
    assert len(files) > 150
    wrong = {file.relative_to(ROOT).as_posix(): head_is_wrong(file.read_text(encoding="utf-8")) for file in files}
    assert not {file: problem for file, problem in wrong.items() if problem}


# --- the checks themselves, on a small made-up project ---------------------------------------------------------------


@pytest.fixture
def project(tmp_path):
    """write(path, text) -> the graph of a project that has this file beside a few right ones."""

    def write(path: str = "", text: str = "") -> dict[str, set[str]]:
        files = {
            "modeling_camoe/__init__.py": "from .frames import sample_frames",
            "modeling_camoe/frames.py": "import torch",
            "camoe_search/__init__.py": "",
            "camoe_search/index.py": "from modeling_camoe import frames",
            "training/engine/start.py": "from motion.scenes import draw\nfrom data.readers import msvd",
            "training/data/errors.py": "",
            "training/data/readers/__init__.py": "",
            "training/data/readers/msvd.py": "from ..errors import UserError\nfrom data import errors",
            "training/motion/scenes.py": "import numpy",
            "training/evaluation/scoring.py": "def f():\n    import data.errors",
            "training/run_retrieval.py": "from engine import start",
            "hub_cards/card.py": "import untrusted",
            "hub_cards/untrusted.py": "",
            "benchmarks/harness.py": "",
            "benchmarks/evaluation.py": "import harness\nfrom evaluation.scoring import f",
            "tests/test_all.py": "import run_retrieval, card\nfrom motion import scenes",
        }
        for name, content in {**files, **({path: text} if path else {})}.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content)
        return imports(tmp_path)

    return write


def test_the_walker_resolves_every_form_of_import(project):
    graph = project()
    assert forbidden_imports(graph) == [] and import_cycle(graph) is None
    assert graph["camoe_search/index.py"] == {"modeling_camoe/frames.py"}
    assert graph["training/engine/start.py"] == {"training/motion/scenes.py", "training/data/readers/msvd.py"}
    assert graph["training/data/readers/msvd.py"] == {"training/data/errors.py"}
    assert graph["training/evaluation/scoring.py"] == {"training/data/errors.py"}
    assert graph["benchmarks/evaluation.py"] == {"benchmarks/harness.py", "training/evaluation/scoring.py"}
    assert len(graph["tests/test_all.py"]) == 3


@pytest.mark.parametrize(
    ("file", "text", "imported"),
    [
        ("modeling_camoe/frames.py", "import camoe_search.index", "camoe_search/index.py"),
        ("camoe_search/index.py", "from data.errors import UserError", "training/data/errors.py"),
        ("hub_cards/card.py", "from camoe_search import index", "camoe_search/index.py"),
        ("benchmarks/harness.py", "import run_retrieval", "training/run_retrieval.py"),
        ("benchmarks/harness.py", "import card", "hub_cards/card.py"),
        ("training/explain.py", "from run_retrieval import main", "training/run_retrieval.py"),
        ("training/explain.py", "def f():\n    from motion.scenes import draw", "training/motion/scenes.py"),
        ("training/engine/trainer.py", "from motion import scenes", "training/motion/scenes.py"),
        ("training/data/errors.py", "from engine.start import f", "training/engine/start.py"),
        ("training/evaluation/scoring.py", "from engine import start", "training/engine/start.py"),
        ("training/motion/scenes.py", "import engine.start", "training/engine/start.py"),
        ("training/engine/start.py", "import run_retrieval", "training/run_retrieval.py"),
    ],
)
def test_an_import_in_a_wrong_direction_is_found(project, file, text, imported):
    assert forbidden_imports(project(file, text)) == [f"{file} imports {imported}"]


def test_an_import_cycle_is_found(project):
    cycle = import_cycle(project("training/data/errors.py", "if True:\n    from .readers import msvd"))
    assert cycle == ["training/data/errors.py", "training/data/readers/msvd.py", "training/data/errors.py"]
    assert import_cycle(project("modeling_camoe/frames.py", "from . import frames")) is not None


def test_an_import_inside_a_function_is_not_part_of_a_cycle(tmp_path, project):
    project("training/data/errors.py", "def f():\n    from .readers import msvd")
    assert import_cycle(imports(tmp_path)) is not None
    assert import_cycle(imports(tmp_path, at_import=True)) is None


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('# SPDX-License-Identifier: Apache-2.0\n"""What it is."""\n', None),
        ('#!/usr/bin/env python\n# SPDX-License-Identifier: Apache-2.0\n"""What it is."""\n', None),
        ('"""What it is."""\n', "does not begin with the SPDX line"),
        ("", "does not begin with the SPDX line"),
        ("# SPDX-License-Identifier: Apache-2.0\nimport os\n", "has no docstring that starts by line 3"),
        ('# SPDX-License-Identifier: Apache-2.0\n#\n#\n"""Late."""\n', "has no docstring that starts by line 3"),
    ],
)
def test_a_wrong_head_is_found(text, problem):
    assert head_is_wrong(text) == problem
