"""The house rules, asserted: floors, no pickle, no torch where it does not belong, docstrings, sizes, generated code."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import holdfast
import pytest

ROOT = Path(holdfast.__file__).parent
FLOORS = {
    "errors": 0, "crashpoints": 0, "_version": 0, "erasure": 1, "snapshot": 1, "storage": 2, "agent": 3, "hooks": 4, "ops": 5,
}  # fmt: skip
FOLDERS = ("erasure", "snapshot", "storage", "agent", "hooks", "ops")
DOORS = frozenset(
    {"holdfast", "holdfast.__main__", "holdfast.dcp"}
)  # the package's own front: they offer what is above them, lazily
GENERATED = frozenset({"holdfast.agent.wire_pb2"})
TORCH = frozenset({"holdfast.snapshot.capture", "holdfast.snapshot.state", "holdfast.snapshot.cuda",
                   "holdfast.snapshot.frozen", "holdfast.snapshot.live", "holdfast.snapshot.meshes", "holdfast.snapshot.proof",
                   "holdfast.snapshot.replicas", "holdfast.snapshot.streams"})  # fmt: skip


@cache
def modules() -> dict[str, Path]:
    """Every module of the package, by its full name."""
    files = [*ROOT.glob("*.py"), *(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))]
    found = {}
    for file in files:
        parts = ["holdfast", *file.relative_to(ROOT).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text())


def _runtime(node: ast.AST, *, lazily: bool) -> Iterator[ast.AST]:
    """All nodes but those under ``if TYPE_CHECKING``; without *lazily*, also not those inside functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if not lazily and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        yield child
        yield from _runtime(child, lazily=lazily)


def imports(module: str, *, lazily: bool = True) -> set[str]:
    """Full names of the modules that *module* imports; ours as modules, foreign ones by their first name."""
    package = module if modules()[module].name == "__init__.py" else module.rpartition(".")[0]
    found: set[str] = set()
    for node in _runtime(tree(module), lazily=lazily):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            found.update(full if (full := f"{name}.{a.name}") in modules() else name for a in node.names)
    return {name if name in modules() else name.split(".")[0] for name in found}


def ours(module: str, *, lazily: bool = True) -> set[str]:
    return {name for name in imports(module, lazily=lazily) if name in modules()} - {module}


def floor(module: str) -> int:
    return FLOORS[module.split(".")[1]]


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_point_downward(module: str) -> None:
    if module in DOORS:
        return
    for name in ours(module) - {"holdfast"}:
        assert floor(name) <= floor(module), f"{module} imports {name} from a floor above"
        beside = floor(name) == floor(module) and name.split(".")[1] != module.split(".")[1]
        # snapshot may use erasure's checksums; nothing else looks into the room next door.
        allowed = name.startswith("holdfast.erasure") and module.startswith("holdfast.snapshot")
        assert not beside or allowed, f"{module} imports {name} next door"


def test_imports_are_relative() -> None:
    for module in set(modules()) - GENERATED:
        for node in ast.walk(tree(module)):
            named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            named += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert "holdfast" not in {name.split(".")[0] for name in named}, f"{module} imports the package by name"


def test_no_cycles() -> None:
    graph = {module: ours(module, lazily=False) for module in modules() if module not in DOORS}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done and module in graph:
            for name in sorted(graph[module]):
                visit(name, (*path, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_only_some_of_snapshot_knows_torch() -> None:
    users = {module for module in modules() if "torch" in imports(module)}
    low = {module for module in users if module.split(".")[1] in ("erasure", "storage", "agent", "errors")}
    assert not low
    assert {module for module in users if module.startswith("holdfast.snapshot")} <= TORCH


ADAPTERS = {
    "holdfast.hooks.lightning": {"lightning", "pytorch_lightning"},
    "holdfast.hooks.transformers": {"transformers", "safetensors"},
    "holdfast.hooks.accelerate": {"accelerate"},
}


def test_frameworks_are_imported_by_their_adapters_alone() -> None:
    """And adapters by nobody, but on demand by the package itself."""
    frameworks = {"lightning", "pytorch_lightning", "transformers", "accelerate", "torchtitan"}
    for module in modules():
        assert imports(module) & frameworks <= ADAPTERS.get(module, set()), module
        assert module in DOORS or not ours(module) & set(ADAPTERS), module


@pytest.mark.parametrize(
    "start", ["holdfast", "holdfast.agent.daemon, holdfast.ops.agent", "holdfast.ops.cli", "holdfast.agent.client"]
)
def test_the_agent_and_the_command_line_do_without_torch(start: str) -> None:
    wanted = [module for module in modules() if module.split(".")[1:2] in (["agent"], ["storage"])]
    code = f"import sys, {start}, {', '.join(wanted)}; print([m for m in ('torch', 'matplotlib') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert found.stdout.strip() == "[]"


def test_commands_do_without_torch() -> None:
    """The command that every node runs first, as a user types it."""
    code = (
        "import sys\nfrom holdfast.ops.cli import main\n"
        "try:\n    main(['agent', '--help'])\nexcept SystemExit:\n    pass\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=120)


FORBIDDEN = frozenset({"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "yaml", "joblib"})
EXECUTING = frozenset({"eval", "exec", "compile", "__import__"})
UNPICKLING = ("torch.load", "np.load", "numpy.load", "os.system", "os.popen", "broadcast_object_list",
              "all_gather_object", "gather_object", "scatter_object_list")  # fmt: skip


@pytest.mark.parametrize("module", sorted(modules()))
def test_nothing_executes(module: str) -> None:
    assert not FORBIDDEN & imports(module)
    for node in ast.walk(tree(module)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called not in EXECUTING, f"{module}:{node.lineno}: {called}"
        assert not called.endswith(UNPICKLING), f"{module}:{node.lineno}: {called}"
        for keyword in node.keywords:
            shell = keyword.arg == "shell" and not (isinstance(keyword.value, ast.Constant) and not keyword.value.value)
            assert not shell, f"{module}:{node.lineno}: shell="


@pytest.mark.parametrize("module", sorted(set(modules()) - GENERATED))
def test_sizes_and_docstrings(module: str) -> None:
    """No function over 70 lines, no file over 700 (but the codec, of which a third is tables); public names documented."""
    lines = len(modules()[module].read_text().splitlines())
    assert lines <= (750 if module == "holdfast.snapshot.codec" else 700), f"{module} has {lines} lines"
    assert ast.get_docstring(tree(module)), f"{module} has no docstring"
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            assert length <= 70, f"{module}: {node.name} has {length} lines"
    for node in tree(module).body:
        public = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith(
            "_"
        )
        if public:
            assert ast.get_docstring(node), f"{module}: {node.name} has no docstring"  # type: ignore[arg-type,attr-defined]


def test_what_is_offered_is_documented() -> None:
    for name in holdfast.__all__:
        if name != "__version__":
            offered = getattr(holdfast, name)
            assert (offered.__doc__ or "").strip(), name
            for member, value in vars(offered).items():
                if not member.startswith("_") and callable(value) and not isinstance(value, type):
                    assert (value.__doc__ or "").strip(), f"{name}.{member}"
    with pytest.raises(AttributeError):
        holdfast.no_such_name  # noqa: B018


def test_no_module_of_leftovers() -> None:
    names = {part for module in modules() for part in module.split(".")}
    assert not names & {"utils", "util", "helpers", "helper", "common", "manager", "misc"}


def test_every_package_is_installed() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    assert listed == {name for name, file in modules().items() if file.name == "__init__.py"}


def test_wire_is_what_make_proto_generates(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools")
    (tmp_path / "holdfast").symlink_to(ROOT)
    out = tmp_path / "out"
    out.mkdir()
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-I.", f"--python_out={out}", f"--pyi_out={out}",
         "holdfast/agent/wire.proto"],
        cwd=tmp_path, check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    for suffix in ("py", "pyi"):
        made = (out / f"holdfast/agent/wire_pb2.{suffix}").read_text()
        assert made == (ROOT / f"agent/wire_pb2.{suffix}").read_text(), "run make proto"
