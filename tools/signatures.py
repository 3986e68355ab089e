"""Signatures of other projects' functions that this project calls, read from syntax trees: nothing is imported.

    python tools/signatures.py DISTRIBUTION VERSION FOLDER [FOLDER ...]

FOLDER is an unpacked wheel, or a site-packages. Writes tests/data/signatures/DISTRIBUTION-VERSION.json: for every
function or class of it that is called, its parameters; for SGLang also its HTTP endpoints with the fields that they
read. tests/project/test_signatures.py binds the calls to them. Also read: megatron-core's own calls of Transformer
Engine, which is what a GPU adds to them.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "data" / "signatures"
PACKAGES = {"transformer-engine": "transformer_engine", "sglang": "sglang", "megatron-core": "megatron"}
PICKLED = ("sglang.srt.weight_sync.tensor_bucket:FlattenedTensorMetadata",)  # sync/ipc.py writes it by its name
EXTENSIONS = "megatron.core.extensions.transformer_engine"  # where its other modules have such functions from
HTTP_SERVER = "sglang.srt.entrypoints.http_server"


# ------------------------------------------------------------------------------------------ who calls what
@dataclass(frozen=True)
class Call:
    """A call of something imported: `target` is module:name, e.g. "megatron.core:parallel_state.get_rank"."""

    target: str
    positional: int
    keywords: tuple[str, ...]
    open: bool  # has * or **: more arguments than can be read
    where: str


def calls(file: Path, packages: tuple[str, ...], passed_on: dict[str, str] | None = None) -> list[Call]:
    """Return the calls in a file of what it imports from these packages, also by a name or attribute set to it.

    Args:
        passed_on: what `names` returned for megatron-core's module that others import such functions from.
    """
    text = file.read_text()
    if not any(package in text for package in (*packages, *([EXTENSIONS] if passed_on else []))):
        return []
    tree = ast.parse(text)
    names = _names(tree, packages, passed_on or {})
    found = []
    for scope, node in _calls(tree):
        target = _target(node.func, names)
        if target is None and scope is not None and ast.unparse(node.func) == "super().__init__" and scope.bases:
            target = _target(scope.bases[0], names)
        if target is not None and not target.endswith(":"):
            open_ended = any(isinstance(one, ast.Starred) for one in node.args)
            open_ended |= any(keyword.arg is None for keyword in node.keywords)
            words = tuple(keyword.arg for keyword in node.keywords if keyword.arg is not None)
            count = sum(not isinstance(one, ast.Starred) for one in node.args)
            found.append(Call(target, count, words, open_ended, f"{file.name}:{node.lineno}"))
    return found


def names(file: Path, packages: tuple[str, ...]) -> dict[str, str]:
    """Targets by the names that a module has for them."""
    return _names(ast.parse(file.read_text()), packages, {})


def _names(tree: ast.AST, packages: tuple[str, ...], passed_on: dict[str, str]) -> dict[str, str]:
    """The first of a name's imports counts: branches for older versions come later."""
    names: dict[str, str] = {}
    for name, target in _imports(tree, packages):
        names.setdefault(name, target)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == EXTENSIONS:
            names |= {one.asname or one.name: passed_on[one.name] for one in node.names if one.name in passed_on}
        if isinstance(node, ast.Assign) and (target := _target(node.value, names)):
            names.update((ast.unparse(place), target) for place in node.targets)
    return names


def _imports(tree: ast.AST, packages: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] in packages:
            yield from ((one.asname or one.name, f"{node.module}:{one.name}") for one in node.names)
        elif isinstance(node, ast.Import):
            for one in node.names:
                if one.name.split(".")[0] in packages:
                    package = one.name.split(".")[0]
                    yield (one.asname or package), f"{one.name if one.asname else package}:"


def _calls(node: ast.AST, scope: ast.ClassDef | None = None) -> Iterator[tuple[ast.ClassDef | None, ast.Call]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Call):
            yield scope, child
        yield from _calls(child, child if isinstance(child, ast.ClassDef) else scope)


def _target(node: ast.AST, names: dict[str, str]) -> str | None:
    if not isinstance(node, ast.Name | ast.Attribute):
        return None
    text = ast.unparse(node)
    if text in names:
        return names[text]
    if isinstance(node, ast.Attribute) and (base := _target(node.value, names)):
        return base + ("" if base.endswith(":") else ".") + node.attr
    return None


# ------------------------------------------------------------------------------------------ what is called
class Sources:
    """Functions and classes of packages in some folders, by module and name; re-exports are followed."""

    def __init__(self, *folders: Path):
        self._folders = folders
        self._trees: dict[str, ast.Module | None] = {}

    def find(self, target: str) -> tuple[str, ast.FunctionDef | ast.ClassDef] | None:
        """(module, definition) of "module:name" or "module:submodule.name"."""
        module, _, name = target.partition(":")
        first, _, rest = name.partition(".")
        if rest and (self._tree(f"{module}.{first}") is not None):
            return self.find(f"{module}.{first}:{rest}")
        return self._in_module(module, first) if not rest else self._member(module, first, rest)

    def signature(self, target: str) -> str | None:
        """Parameters as Python writes them, defaults as `...`; of a class those of __init__ or a dataclass"""
        found = self.find(target)
        if found is None:
            return None
        module, node = found
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            bound = any(ast.unparse(one) == "classmethod" for one in node.decorator_list)
            return _written(node.args, int(bound))
        return self._of_class(module, node)

    def fields(self, target: str) -> dict[str, bool] | None:
        """Annotated fields of a class and its bases: whether each must be given."""
        found = self.find(target)
        if found is None or not isinstance(found[1], ast.ClassDef):
            return None
        module, node = found
        names: dict[str, bool] = {}
        for base in node.bases:
            if isinstance(base, ast.Name):
                names |= self.fields(f"{module}:{base.id}") or {}
        lines = [line for line in node.body if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)]
        return names | {line.target.id: line.value is None for line in lines if "ClassVar" not in ast.unparse(line)}

    def endpoints(self, module: str) -> dict[str, dict[str, bool]]:
        """Fields of the first parameter of every function of FastAPI's routes, by path."""
        tree, found = self._tree(module), {}
        for node in ast.walk(tree) if tree else ():
            if isinstance(node, ast.AsyncFunctionDef):
                paths = [path for one in node.decorator_list for path in _route(one)]
                known = [self.fields(f"{module}:{_bare(one.annotation)}") for one in node.args.args if one.annotation]
                found |= {path: next((fields for fields in known if fields), {}) for path in paths}
        return found

    def _tree(self, module: str) -> ast.Module | None:
        if module not in self._trees:
            path = Path(*module.split("."))
            places = [folder / name for folder in self._folders for name in (f"{path}.py", path / "__init__.py")]
            file = next((place for place in places if place.is_file()), None)
            self._trees[module] = ast.parse(file.read_text()) if file else None
        return self._trees[module]

    def _in_module(self, module: str, name: str) -> tuple[str, ast.FunctionDef | ast.ClassDef] | None:
        tree = self._tree(module)
        if tree is None:
            return None
        body = list(_top_level(tree))
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name == name:
                return module, node
        for node in body:
            if isinstance(node, ast.Assign) and any(ast.unparse(place) == name for place in node.targets):
                return module, ast.parse(f"def {name}(*args, **kwargs): ...").body[0]  # made of something else
            if not isinstance(node, ast.ImportFrom):
                continue
            whence = self._absolute(module, node)
            for one in node.names:
                if (one.asname or one.name) == name or one.name == "*":
                    found = self._in_module(whence, name if one.name == "*" else one.name)
                    if found is not None:
                        return found
        return None

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        is_package = any((folder / Path(*module.split(".")) / "__init__.py").is_file() for folder in self._folders)
        parts = module.split(".")[: None if is_package else -1]
        parts = parts[: len(parts) - (node.level - 1)]
        return ".".join([*parts, *([node.module] if node.module else [])])

    def _member(self, module: str, name: str, rest: str) -> tuple[str, ast.FunctionDef | ast.ClassDef] | None:
        found = self._in_module(module, name)
        if found is None or "." in rest or not isinstance(found[1], ast.ClassDef):
            return None
        methods = [node for node in found[1].body if isinstance(node, ast.FunctionDef) and node.name == rest]
        return (found[0], methods[0]) if methods else None

    def _of_class(self, module: str, node: ast.ClassDef) -> str | None:
        for line in node.body:
            if isinstance(line, ast.FunctionDef) and line.name == "__init__":
                return _written(line.args, 1)
        if any("dataclass" in ast.unparse(one) for one in node.decorator_list):
            fields = self.fields(f"{module}:{node.name}") or {}
            return ", ".join(name if needed else f"{name}=..." for name, needed in fields.items())
        for base in node.bases:
            if isinstance(base, ast.Name) and (text := self.signature(f"{module}:{base.id}")) is not None:
                return text
        return "*args, **kwargs" if node.bases else ""


def _top_level(tree: ast.AST) -> Iterator[ast.stmt]:
    """Statements of a module, those inside `if` and `try` too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If | ast.Try | ast.ExceptHandler | ast.With):
            yield from _top_level(node)
        elif isinstance(node, ast.stmt):
            yield node


def _written(arguments: ast.arguments, skip: int) -> str:
    for one in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]:
        if one is not None:
            one.annotation = None
    arguments.defaults = [ast.Constant(...) for _ in arguments.defaults]
    arguments.kw_defaults = [ast.Constant(...) if value else None for value in arguments.kw_defaults]
    own = ast.arguments(**{**vars(arguments), "args": arguments.args[skip:]})
    return ast.unparse(own).replace("=Ellipsis", "=...")


def _route(decorator: ast.expr) -> Iterator[str]:
    if isinstance(decorator, ast.Call) and ast.unparse(decorator.func).startswith("app.") and decorator.args:
        if isinstance(decorator.args[0], ast.Constant):
            yield str(decorator.args[0].value)


def _bare(annotation: ast.expr | None) -> str:
    """The class in `X`, `Annotated[X, ...]`, `Optional[X]` or `X.__pydantic_model__`-like forms."""
    while isinstance(annotation, ast.Subscript):
        inner = annotation.slice
        annotation = inner.elts[0] if isinstance(inner, ast.Tuple) else inner
    return ast.unparse(annotation) if annotation is not None else ""


# ------------------------------------------------------------------------------------------ the command
def our_files() -> list[Path]:
    return sorted((ROOT / "owpo_megatron").rglob("*.py"))


def megatrons_calls(site_packages: Path) -> list[Call]:
    """Calls by megatron-core of Transformer Engine: layers, attention, optimizer and fused kernels."""
    core, package = site_packages / "megatron" / "core", (PACKAGES["transformer-engine"],)
    extensions = core / "extensions" / "transformer_engine.py"
    files = [core / "optimizer" / "__init__.py", core / "transformer" / "moe" / "moe_utils.py"]
    passed_on = names(extensions, package)
    return calls(extensions, package) + [call for file in files for call in calls(file, package, passed_on)]


def main(distribution: str, version: str, *folders: str) -> None:
    paths = [Path(folder) for folder in folders]
    sources = Sources(*paths)
    package = (PACKAGES[distribution],)
    found = [call for file in our_files() for call in calls(file, package)]
    if distribution == "transformer-engine":
        found += [call for folder in paths if (folder / "megatron").exists() for call in megatrons_calls(folder)]
    known = {call.target: sources.signature(call.target) for call in found}
    data: dict[str, object] = {
        "distribution": distribution,
        "version": version,
        "signatures": {target: text for target, text in sorted(known.items()) if text is not None},
    }
    if distribution == "sglang":
        data["pickled"] = {target: list(sources.fields(target) or ()) for target in PICKLED}
        data["endpoints"] = sources.endpoints(HTTP_SERVER)
    DATA.mkdir(parents=True, exist_ok=True)
    (DATA / f"{distribution}-{version}.json").write_text(json.dumps(data, indent=1) + "\n")
    missing = sorted(target for target, text in known.items() if text is None)
    print(f"{len(known) - len(missing)} signatures; not found: {', '.join(missing) or 'none'}")


if __name__ == "__main__":
    main(*sys.argv[1:])
