"""What the chapters promise each other and their readers; every notebook is held to it."""

import ast
import inspect
import importlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
CHAPTERS = {re.sub(r"^\d+[a-z]?_", "", path.stem): path for path in NOTEBOOKS}
ORDER = list(CHAPTERS)
HEAVY = ("mlflow", "sentence_transformers", "transformers", "datasets", "peft", "accelerate", "sklearn", "scipy")

CELLS, EXPORT_LINES, MODULE_LINES, BYTES = 120, 32, 470, 320_000


@cache
def cells(path: Path) -> list[dict]:
    """The cells of a notebook with their source as one string."""
    loaded = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in loaded]


def exported(path: Path) -> list[str]:
    """The source of the exported cells, without the directive."""
    return [cell["source"].split("\n", 1)[1] for cell in cells(path) if cell["source"].startswith("#| export\n")]


def code_lines(source: str) -> int:
    """Lines of code: neither blank, nor a comment alone, nor an argument on its own line with its comment."""
    silent = re.compile(r"\s*(#.*|[*\w]+: .*,  # .*|\) -> .*:  # .*)?$")
    return sum(not silent.match(line) for line in source.split("\n"))


@pytest.mark.parametrize("name", ORDER)
def test_form(name):
    path = CHAPTERS[name]
    text = [cell["source"] for cell in cells(path) if cell["cell_type"] == "markdown"]
    assert cells(path)[0]["source"].strip() == f"#| default_exp {name}", "the first cell names the module"
    assert re.match(r"# [A-Z].*\n> \S", text[0]), "title and a one-line promise open the chapter"
    assert "▶" in text[1], "the second text cell shows where we are in the life of a model"
    assert re.search(r"^\*\*Checked against\*\* \S", text[1], re.M), "the opening says against what"
    headings = re.findall(r"^## (.*)$", "\n".join(text), re.M)
    assert headings[-3:] == ["Summary", "Exercises", "Sources"], headings[-3:]
    closing = "\n".join(text).split("## Exercises")[1]
    assert len(re.findall(r"^\d\. ", closing.split("## Sources")[0], re.M)) == 3, "three exercises"
    assert re.search(r"(19|20)\d\d", closing.split("## Sources")[1]), "sources with their year"


@pytest.mark.parametrize("name", ORDER)
def test_size(name):
    path = CHAPTERS[name]
    assert len(cells(path)) <= CELLS
    assert path.stat().st_size <= BYTES
    assert sum(map(code_lines, exported(path))) <= MODULE_LINES
    for source in exported(path):
        assert code_lines(source) <= EXPORT_LINES, f"exported cell of {code_lines(source)} lines:\n{source[:200]}"
        assert all(len(line) <= 100 for line in source.split("\n")), f"a line over 100 columns:\n{source[:200]}"


@pytest.mark.parametrize("name", ORDER)
def test_outputs_are_stored(name):
    code = [cell for cell in cells(CHAPTERS[name]) if cell["cell_type"] == "code"]
    shown = [cell for cell in code if cell["outputs"]]
    checked = [cell for cell in code if re.search(r"\bassert\b|\btest_\w+\(|expect_fail", cell["source"])]
    lessons = [cell for cell in code if not cell["source"].startswith(("#| export", "#| default_exp"))]
    assert len(shown) >= 4, "a reader of the page sees what the code does"
    assert 3 * len(checked) >= len(lessons), f"{len(checked)} of {len(lessons)} lesson cells check something"
    for cell in code:
        stored = json.dumps(cell["outputs"])
        assert '"output_type": "error"' not in stored
        assert not re.search(r"/(tmp|home|root|work)/", stored), f"a path of one machine: {cell['source'][:80]}"


@pytest.mark.parametrize("name", ORDER)
def test_imports_stand_alone_and_point_down(name):
    for cell in cells(CHAPTERS[name]):
        if cell["cell_type"] != "code" or not re.search(r"^\s*(import|from)\s", cell["source"], re.M):
            continue
        tree = ast.parse(re.sub(r"^[%!].*$", "", cell["source"], flags=re.M))
        top = [isinstance(node, (ast.Import, ast.ImportFrom)) or _type_checking(node) for node in tree.body]
        assert all(top) or not any(top), f"imports share a cell with code:\n{cell['source'][:200]}"
    module = ast.parse((ROOT / "llmbook" / f"{name}.py").read_text(encoding="utf-8"))
    for node in ast.walk(module):
        names = ["llmbook." * bool(node.level) + (node.module or "")] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for imported in names:
            if imported.startswith("llmbook."):
                target = imported.split(".")[1]
                assert ORDER.index(target) < ORDER.index(name), f"{name} reaches up to {target}"


def test_layering_sees_every_import():
    found = [
        node for name in ORDER for node in ast.walk(ast.parse((ROOT / "llmbook" / f"{name}.py").read_text()))
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("llmbook."))
    ]
    assert len(found) > 2 * len(ORDER), "chapters import each other; the test above must see it"


def _type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def test_no_name_is_defined_twice():
    counted = Counter()
    for name in ORDER:
        tree = ast.parse((ROOT / "llmbook" / f"{name}.py").read_text(encoding="utf-8"))
        kinds = (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)
        counted.update(
            node.name for node in tree.body
            if isinstance(node, kinds) and not node.name.startswith("_") and not _patched(node)
        )
    assert [name for name, times in counted.items() if times > 1] == []


def _patched(node: ast.AST) -> bool:
    return any(getattr(decorator, "id", "") == "patch" for decorator in node.decorator_list)


def _public(name: str) -> list[tuple[str, ast.FunctionDef]]:
    tree = ast.parse((ROOT / "llmbook" / f"{name}.py").read_text(encoding="utf-8"))
    found = []
    for node in tree.body:
        inside = node.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_") else []
        for item in [node, *inside]:
            if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef)) and not item.name.startswith("_"):
                found.append((f"{name}.{item.name}", item))
    return found


@pytest.mark.parametrize("name", ORDER)
def test_public_names_are_documented(name):
    source = (ROOT / "llmbook" / f"{name}.py").read_text(encoding="utf-8").split("\n")
    problems = []
    for title, node in _public(name):
        if not ast.get_docstring(node):
            problems.append(f"{title}: no docstring")
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        method = bool(arguments) and arguments[0].arg in ("self", "cls")
        for argument in arguments[method:]:
            if argument.annotation is None:
                problems.append(f"{title}: no type for {argument.arg}")
            told = any("app.command" in ast.unparse(decorator) for decorator in node.decorator_list)
            if not told and "#" not in source[(argument.end_lineno or argument.lineno) - 1]:
                problems.append(f"{title}: no comment for {argument.arg}")
        if node.returns is None:
            problems.append(f"{title}: no return type")
    for node in ast.parse("\n".join(source)).body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and not ast.get_docstring(node):
            problems.append(f"{name}.{node.name}: no docstring")
    assert problems == []


@pytest.mark.parametrize("name", ORDER)
def test_heavy_libraries_wait_until_they_are_needed(name):
    tree = ast.parse((ROOT / "llmbook" / f"{name}.py").read_text(encoding="utf-8"))
    for node in tree.body:
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for imported in names:
            assert imported.split(".")[0] not in HEAVY, f"{name} imports {imported} at its top"


@pytest.mark.parametrize("name", ORDER)
def test_signatures_can_be_shown(name):
    module = importlib.import_module(f"llmbook.{name}")
    for public in module.__all__:
        value = getattr(module, public)
        if inspect.isfunction(value):
            inspect.signature(value)


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """A copy of the notebooks and modules to export and clean in, so that the tree itself is not touched."""
    folder = tmp_path_factory.mktemp("copy") / "llmbook"
    folder.mkdir()
    for name in ("nbs", "llmbook"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for name in ("pyproject.toml", "settings.ini", "_quarto.yml", "README.md"):
        shutil.copy(ROOT / name, folder)
    for command in ("nbdev-export", "nbdev-clean"):
        subprocess.run([Path(sys.executable).parent / command], cwd=folder, check=True, capture_output=True)
    return folder


def test_modules_are_what_the_notebooks_export(copied):
    for path in sorted((ROOT / "llmbook").glob("*.py")):
        assert path.read_text() == (copied / "llmbook" / path.name).read_text(), f"{path.name}: run nbdev-export"


def test_notebooks_are_clean(copied):
    for path in NOTEBOOKS:
        assert path.read_bytes() == (copied / "nbs" / path.name).read_bytes(), f"{path.name}: run nbdev-clean"


def test_every_notebook_is_in_the_sidebar_and_every_module_has_a_notebook():
    sidebar = (ROOT / "_quarto.yml").read_text()
    assert [path.name for path in NOTEBOOKS if path.name not in sidebar] == []
    modules = {path.stem for path in (ROOT / "llmbook").glob("[!_]*.py")}
    assert modules == set(ORDER)


def test_readme_table_is_generated_from_the_notebooks():
    sys.path.insert(0, str(ROOT / "site"))
    import chapters

    assert chapters.table() in (ROOT / "README.md").read_text(encoding="utf-8"), "run python site/chapters.py"


def test_index_lists_the_chapters_that_exist():
    listed = re.findall(r"\]\((\d\w+\.ipynb)\)", (ROOT / "nbs/index.ipynb").read_text(encoding="utf-8"))
    assert listed == [path.name for path in NOTEBOOKS], "run nbs/index.ipynb again and save it"


def test_extras_are_pinned_by_the_constraints():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().split("\n")
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(need for extra in extras.values() for need in extra)]
    names = {re.match(r"[\w-]+", need).group().lower().replace("_", "-") for need in wanted} - {"llmbook"}
    assert sorted(names - pinned) == []
