"""The package has the structure that docs/architecture.md describes: modules, no import cycles, layers."""

import ast
import pathlib
import re
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs/architecture.md"


def _modules(root: pathlib.Path) -> dict[str, pathlib.Path]:
    """Dotted name -> file of every module and package under `root`/pi_jax."""
    files = {".".join(p.relative_to(root).with_suffix("").parts): p for p in root.glob("pi_jax/**/*.py")}
    return {name.removesuffix(".__init__"): path for name, path in files.items()}


def _named(page: str) -> list[str]:
    """Paths, relative to the repository, of the packages ("pi_jax/rope/") and modules in the page's tree."""
    tree = page.split("## Tree")[1].split("\n## ")[0]
    packages: list[str] = []
    paths = []
    for line in tree.splitlines():
        if not (match := re.fullmatch(r"    ((?:  )*)(\S.*?)(?:  +(.*))?", line)):
            continue
        indent, entry, text = len(match[1]) // 2, match[2], match[3] or ""
        packages = packages[:indent]
        folder = "/".join(packages)
        if entry.endswith("/"):
            packages.append(entry[:-1])
            paths.append("/".join(packages) + "/")
            if re.fullmatch(r"\w+(, \w+)+", text):  # the modules of a package, on its own line
                paths += [f"{'/'.join(packages)}/{name}.py" for name in text.split(", ")]
        else:
            paths += [f"{folder}/{name}.py" for name in entry.split(", ")]
    return paths


def _missing(page: str, root: pathlib.Path) -> list[str]:
    return [path for path in _named(page) if not (root / path).exists()]


def _imports(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports that run when a module is imported, not those inside functions or under TYPE_CHECKING."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from _imports(node.orelse)
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.ClassDef):
            handlers = [s for h in getattr(node, "handlers", ()) for s in h.body]
            yield from _imports([*node.body, *getattr(node, "orelse", ()), *getattr(node, "finalbody", ()), *handlers])


def _targets(node: ast.Import | ast.ImportFrom, module: str, is_package: bool, known: set[str]) -> set[str]:
    """Modules of the package that an import statement names."""
    if isinstance(node, ast.Import):
        names = {alias.name for alias in node.names}
    else:
        base = node.module or ""
        if node.level:
            parts = module.split(".")
            parents = parts[: len(parts) - node.level + is_package]
            base = ".".join([*parents, *filter(None, [node.module])])
        names = {f"{base}.{a.name}" if f"{base}.{a.name}" in known else base for a in node.names}
    return names & known


def _graph(root: pathlib.Path) -> dict[str, set[str]]:
    """Module -> modules that it imports.

    Importing a.b.c also runs a.b, so that is an edge as well, except from inside a.b.
    """
    modules = _modules(root)
    graph = {}
    for name, path in modules.items():
        statements = _imports(ast.parse(path.read_text(encoding="utf-8")).body)
        is_package = path.name == "__init__.py"
        direct = {t for node in statements for t in _targets(node, name, is_package, set(modules))}
        parents = {t[:i] for t in direct for i in range(len(t)) if t[i] == "."}
        outside = {p for p in parents if p in modules and not f"{name}.".startswith(f"{p}.")}
        graph[name] = (direct | outside) - {name}
    return graph


def _cycle(graph: dict[str, set[str]]) -> list[str] | None:
    """One import cycle, first module repeated at the end; None if there is none."""
    finished: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str] | None:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in finished:
            return None
        found = next(filter(None, (visit(n, [*path, name]) for n in sorted(graph[name]))), None)
        finished.add(name)
        return found

    return next(filter(None, (visit(name, []) for name in sorted(graph))), None)


def test_the_page_names_modules_that_exist():
    page = PAGE.read_text(encoding="utf-8")
    assert len(_named(page)) > 80
    assert _missing(page, ROOT) == []


def test_a_missing_module_is_found():
    page = PAGE.read_text(encoding="utf-8").replace("        loop  ", "        loup  ", 1)
    assert "pi_jax/train/loup.py" in _missing(page, ROOT)


def test_no_import_cycles():
    cycle = _cycle(_graph(ROOT))
    assert cycle is None, " -> ".join(cycle or [])


def test_an_import_cycle_is_found(tmp_path):
    sources = {
        "__init__": "",
        "a": "from pi_jax import b",
        "b": "try:\n    from pi_jax.sub.c import f\nexcept ImportError:\n    pass",
        "d": "def f():\n    import pi_jax.a",
        "sub/__init__": "from . import c",
        "sub/c": "import pi_jax.a",
    }
    for name, source in sources.items():
        file = tmp_path / f"pi_jax/{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    graph = _graph(tmp_path)
    assert graph["pi_jax.b"] == {"pi_jax.sub", "pi_jax.sub.c"}
    assert graph["pi_jax.sub"] == {"pi_jax.sub.c"}
    assert graph["pi_jax.d"] == set()
    assert _cycle(graph) == ["pi_jax.a", "pi_jax.b", "pi_jax.sub", "pi_jax.sub.c", "pi_jax.a"]


@pytest.mark.parametrize("layer", ["train", "data", "convert", "evaluate"])
def test_the_model_does_not_import(layer):
    """Not even inside a function."""
    modules = _modules(ROOT)
    for name, path in modules.items():
        if not f"{name}.".startswith("pi_jax.model."):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
        is_package = path.name == "__init__.py"
        found = {t for n in nodes for t in _targets(n, name, is_package, set(modules))}
        assert not [t for t in found if f"{t}.".startswith(f"pi_jax.{layer}.")], name
