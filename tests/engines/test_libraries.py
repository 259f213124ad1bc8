"""NVIDIA's libraries: every name that we use exists in each of them, read off the real bindings without a GPU; loading them."""

import ast
import builtins
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest

from bca_deploy.bundle.engine_options import EngineTable, HardwareCompatibility
from bca_deploy.engines import builder_process, libraries
from bca_deploy.engines.libraries import LIBRARIES, check_targets
from bca_deploy.errors import InputError, MissingDependencyError
from bca_deploy.session.backends import engine_lane, loaded_engine
from bca_deploy.spec import EngineLibrary, Precision

#: Our modules that call the library.
CALLERS = {"builder_process": builder_process, "loaded_engine": loaded_engine, "engine_lane": engine_lane}
#: Bare bindings of TensorRT 10 and 11, put there by `make setup`; their libraries are not on PyPI.
BINDINGS = Path(sys.prefix) / "bindings"
MODULES = {"10": "tensorrt_bindings", "11": "tensorrt_bindings", "rtx": "tensorrt_rtx"}
TYPES = ("trt", "tensorrt")  # the names under which our modules write the library down

# ---- what our code uses, read off its source

# What a variable holds, by its name, or by its function's and its own where one name holds two things. One that holds nothing
# of the library's says so by "": a name in neither table is a hole in the check, and fails it.
VARIABLES = {
    "builder": "Builder",
    "cache": "ITimingCache",
    "config": "IBuilderConfig",
    "context": "IExecutionContext",
    "dims": "Dims",
    "e": "ParserError",
    "engine": "ICudaEngine",
    "serializing": "ISerializationConfig",
    "flags": "NetworkDefinitionCreationFlag",
    "layer": "ILayer",
    "logger": "ILogger",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "profile": "IOptimizationProfile",
    "refit.parser": "OnnxParserRefitter",
    "refitter": "Refitter",
    "runtime": "Runtime",
    "runtime_config": "IRuntimeConfig",
    "self.runtime_cache": "IRuntimeCache",
    "self.engine": "ICudaEngine",
    "severity": "ILogger.Severity",
    "t": "ITensor",
    "tensor": "ITensor",
    "_reasons.parser": "OnnxParser|OnnxParserRefitter",
}
NOT_THEIRS = frozenset(
    re.findall(
        r"\w+",
        """array buffer copy error events file found given inputs inside made meter msg libraries options partial path profiles
        ranges request said self shapes signal target torch weights accepted addresses graph inputs key launch memory outputs
        places ready same scratch size gpu""",
    )
)
# What a method returns or a property holds, where something is taken from it in turn.
RETURNS = {
    "IBuilderConfig.get_timing_cache": "ITimingCache",
    "ICudaEngine.get_tensor_dtype": "DataType",
    "ICudaEngine.get_tensor_mode": "TensorIOMode",
    "ILogger.Severity.name": "",
    "ITensor.dtype": "DataType",
}


def _literal(tree: ast.Module, name: str) -> Any:
    values = (n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == name)
    return ast.literal_eval(next(values))


#: Names that are put together at run time: by getattr(trt.<key>, ...).
MADE: dict[str, Callable[[ast.Module], list[str]]] = {
    "ProfilingVerbosity": lambda tree: list(_literal(tree, "_VERBOSITY").values()),
    "HardwareCompatibilityLevel": lambda tree: [n.upper() for n in get_args(HardwareCompatibility)],
    "ComputeCapability": lambda tree: [target.upper() for target in LIBRARIES["rtx"].targets],
}


def is_rtx_only(name: str) -> bool:
    return name.startswith("ComputeCapability") or name in (
        "IBuilderConfig.num_compute_capabilities",
        "IBuilderConfig.set_compute_capability",
        "IExecutionContext.is_stream_capturable",
        "IRuntimeConfig.create_runtime_cache",
        "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy",
        "IRuntimeConfig.set_runtime_cache",
        "IRuntimeCache.deserialize",
        "IRuntimeCache.serialize",
    )


@dataclass
class Used:
    """Names such as ``IBuilderConfig.set_flag``, keywords by method, and what could not be told."""

    names: set[str] = field(default_factory=set)
    keywords: set[tuple[str, str]] = field(default_factory=set)
    unknown: set[str] = field(default_factory=set)


class Reader(ast.NodeVisitor):
    """Walks a module and notes what it takes from the library."""

    def __init__(self, tree: ast.Module) -> None:
        self.tree, self.found, self.functions = tree, Used(), [""]
        imported = (n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom))
        self.plain = {*NOT_THEIRS, *dir(builtins), *((a.asname or a.name) for n in imported for a in n.names)} - set(TYPES)
        self.plain |= {n.name for n in ast.walk(tree) if isinstance(n, ast.ClassDef)}
        self.plain |= {n.targets[0].id for n in tree.body if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name)}

    def kind(self, node: ast.expr) -> str | None:
        """Return the class that an expression belongs to: "" if none of the library's, None if it cannot be told."""
        if isinstance(node, ast.Name):
            return self._named(node.id)
        if isinstance(node, ast.Attribute):
            return self._taken(node)
        if isinstance(node, ast.Call):
            return self._called(node)
        if isinstance(node, ast.Subscript):
            return "" if self.kind(node.value) == "" else None
        return "" if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp | ast.Dict | ast.List | ast.Tuple) else None

    def _named(self, name: str) -> str | None:
        if name in TYPES:
            return "trt"
        for key in (f"{self.functions[-1]}.{name}", name):
            if key in VARIABLES:
                return VARIABLES[key]
        return "" if name in self.plain else None

    def _taken(self, node: ast.Attribute) -> str | None:
        if ast.unparse(node) in VARIABLES:
            return VARIABLES[ast.unparse(node)]
        owner = self.kind(node.value)
        if owner is None:
            self.found.unknown.add(ast.unparse(node))
        if not owner:
            return owner
        name = node.attr if owner == "trt" else f"{owner}.{node.attr}"
        self.found.names |= {f"{each}.{node.attr}" for each in owner.split("|")} if owner != "trt" else {name}
        # Of the module one takes classes, of a class its members; what a method returns is in the table.
        return name if owner == "trt" or node.attr[0].isupper() else RETURNS.get(name)

    def _called(self, node: ast.Call) -> str | None:
        made = self.kind(node.func)
        if isinstance(node.func, ast.Attribute):
            owner = self.kind(node.func.value)
            if owner and owner != "trt":
                self.found.keywords |= {(f"{owner}.{node.func.attr}", k.arg) for k in node.keywords if k.arg}
        return made

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.functions.append(node.name)
        for argument in node.args.args:
            self._agree(argument.arg, classes_in(argument.annotation))
        self.generic_visit(node)
        self.functions.pop()

    def visit_Assign(self, node: ast.Assign) -> None:
        """What is known of the value must be what the tables say of the variable."""
        if isinstance(node.targets[0], ast.Name) and (kind := self.kind(node.value)) not in ("", None, "trt"):
            self._agree(node.targets[0].id, kind or "")
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self._agree(ast.unparse(node.target), classes_in(node.annotation))
        self.generic_visit(node)

    def _agree(self, name: str, kind: str) -> None:
        if kind and (self._named(name) or "") != kind:
            self.found.unknown.add(f"{name}: {kind}")

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        """Methods of a subclass of the library's: they override what is there."""
        for base in (name for b in node.bases if (name := self.kind(b))):
            self.found.names |= {f"{base}.{n.name}" for n in node.body if isinstance(n, ast.FunctionDef)}
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.kind(node)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        self.kind(node)
        if ast.unparse(node.func) == "getattr" and (owner := self.kind(node.args[0])) != "":
            self.found.names |= {f"{owner}.{name}" for name in MADE.get(str(owner), lambda tree: [])(self.tree)}
            if owner not in MADE:
                self.found.unknown.add(ast.unparse(node))
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        """Annotations in quotes."""
        if isinstance(node.value, str) and re.match(rf"(\w+\[)?({'|'.join(TYPES)})\.", node.value):
            self.visit(ast.parse(node.value, mode="eval").body)


def classes_in(annotation: ast.expr | None) -> str:
    text = ast.unparse(annotation) if annotation else ""
    return "|".join(re.findall(rf"\b(?:{'|'.join(TYPES)})\.([\w.]+)", text))


def used_in(source: str) -> Used:
    tree = ast.parse(source)
    reader = Reader(tree)
    reader.visit(tree)
    return reader.found


def source(module: str) -> str:
    return Path(str(CALLERS[module].__file__)).read_text(encoding="utf-8")


# ---- what the libraries have

DUMP = """
import importlib, json, sys
module, names = importlib.import_module(sys.argv[1]), {}
def look(owner, prefix, depth):
    for name in dir(owner):
        value = getattr(owner, name, None)
        names[prefix + name] = getattr(value, "__doc__", None) or ""
        if isinstance(value, type) and depth:
            look(value, f"{prefix}{name}.", depth - 1)
look(module, "", 2)
json.dump(names, sys.stdout, default=str)
"""
# Each library that the bindings link to, and all functions that they take from any of them (nm -D --undefined-only).
LINKED = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
TAKEN = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)


def dump(module: str, **environment: str) -> dict[str, str]:
    """Return a library's names and their documentation, from a process of its own."""
    command = [sys.executable, "-c", DUMP, module]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    names: dict[str, str] = json.loads(done.stdout)
    assert len(names) > 1000
    return names


def stub_libraries(directory: Path, major: str) -> None:
    """Compile libraries by the names of NVIDIA's whose functions do nothing: enough to import the bindings."""
    code = directory / "stub.c"
    code.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in TAKEN), encoding="utf-8")
    for library in LINKED:
        name = f"lib{library}.so.{major}"
        subprocess.run(["cc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", directory / name, code], check=True)


Surfaces = dict[str, dict[str, str]]


@pytest.fixture(scope="module")
def surfaces(tmp_path_factory: pytest.TempPathFactory) -> Surfaces:
    """All names of TensorRT 10, TensorRT 11 and TensorRT-RTX."""
    if not BINDINGS.is_dir():
        pytest.skip(f"{BINDINGS} is absent: `make setup` puts the bindings of TensorRT there")
    if shutil.which("cc") is None:
        pytest.skip("no C compiler (cc) to stand in for the libraries that TensorRT's bindings link to")
    found = {"rtx": dump(MODULES["rtx"])}
    for major in ("10", "11"):
        (bindings,) = BINDINGS.glob(f"{major}.*")
        stubs = tmp_path_factory.mktemp(f"stubs{major}")
        stub_libraries(stubs, major)
        found[major] = dump(MODULES[major], PYTHONPATH=str(bindings), LD_LIBRARY_PATH=str(stubs))
    return found


def missing(used: Used, surface: dict[str, str], rtx: bool) -> set[str]:
    names = {name for name in used.names if name not in surface and (rtx or not is_rtx_only(name))}
    return names | {f"{name}({k}=)" for name, k in used.keywords if not re.search(rf"\b{k}:", surface.get(name, ""))}


# ---- the check


@pytest.mark.parametrize("library", ["10", "11", "rtx"])
@pytest.mark.parametrize("module", CALLERS)
def test_every_name_that_we_use_is_in_the_library(surfaces: Surfaces, module: str, library: str) -> None:
    assert missing(used_in(source(module)), surfaces[library], library == "rtx") == set()


@pytest.mark.parametrize("module", CALLERS)
def test_every_variable_is_in_the_tables(module: str) -> None:
    assert used_in(source(module)).unknown == set()


def test_the_check_sees_what_is_there() -> None:
    seen = used_in(source("builder_process"))
    assert {"BuilderFlag.TF32", "ProfilingVerbosity.DETAILED", "HardwareCompatibilityLevel.AMPERE_PLUS"} <= seen.names
    assert {"ILogger.log", "IProgressMonitor.step_complete", "ParserError.desc", "DataType.name"} <= seen.names
    assert {"OnnxParserRefitter.refit_from_file", "ITimingCache.serialize", "IBuilderConfig.progress_monitor"} <= seen.names
    assert {"ComputeCapability.SM89", "IBuilderConfig.set_compute_capability", "__version__"} <= seen.names
    assert seen.keywords == {("IBuilderConfig.set_timing_cache", "ignore_mismatch")}
    assert {"IExecutionContext.execute_async_v3", "TensorIOMode.name"} <= used_in(source("engine_lane")).names | used_in(
        source("loaded_engine")
    ).names


MISSPELT = [
    ("config.set_flag(", "config.set_flg(", "IBuilderConfig.set_flg"),
    ("trt.BuilderFlag.STRIP_PLAN", "trt.BuilderFlag.STRIPPED", "BuilderFlag.STRIPPED"),
    ("trt.Refitter(", "trt.Refiter(", "Refiter"),
    ("flags.STRONGLY_TYPED", "flags.STRONG", "NetworkDefinitionCreationFlag.STRONG"),
    ("tensor.dtype.name", "tensor.dtype.nam", "DataType.nam"),
    ("e.node_operator()", "e.node_op()", "ParserError.node_op"),
    ("get_timing_cache().serialize", "get_timing_cache().serialise", "ITimingCache.serialise"),
    ("ignore_mismatch=", "ignore_missing=", "IBuilderConfig.set_timing_cache(ignore_missing=)"),
    ('"LAYER_NAMES_ONLY"', '"LAYER_NAMES"', "ProfilingVerbosity.LAYER_NAMES"),
    ("def phase_finish", "def phase_end", "IProgressMonitor.phase_end"),
    ('-> "trt.IProgressMonitor"', '-> "trt.IProgress"', "IProgress"),
]


@pytest.mark.parametrize(("right", "wrong", "name"), MISSPELT)
def test_a_misspelt_name_is_found(surfaces: Surfaces, right: str, wrong: str, name: str) -> None:
    text = source("builder_process")
    assert right in text
    for library, surface in surfaces.items():
        assert missing(used_in(text.replace(right, wrong)), surface, library == "rtx") == {name}


@pytest.mark.parametrize(
    ("line", "unknown"),
    [
        ("def f(config):\n    kept = config.get_timing_cache()\n    kept.serialize()\n", "kept.serialize"),
        ("def f(engine):\n    engine.create_engine_inspector().get_engine_information()\n", "get_engine_information"),
        ("def f(path):\n    path = trt.Runtime(logger)\n", "path: Runtime"),
        ("def f(made: 'trt.Builder'):\n    made.x\n", "made: Builder"),
        ("def f(name):\n    getattr(trt.TacticSource, name)\n", "getattr(trt.TacticSource, name)"),
    ],
)
def test_what_the_tables_do_not_know_is_found(line: str, unknown: str) -> None:
    assert [text for text in used_in(line).unknown if unknown in text]


def test_nothing_is_used_that_tensorrt_11_removed(surfaces: Surfaces) -> None:
    removed = set(surfaces["10"]) - set(surfaces["11"])
    assert {"BuilderFlag.FP16", "BuilderFlag.BF16", "BuilderFlag.OBEY_PRECISION_CONSTRAINTS"} <= removed
    assert {"NetworkDefinitionCreationFlag.EXPLICIT_BATCH", "ICudaEngine.device_memory_size"} <= removed
    assert not removed & (
        used_in(source("builder_process")).names | used_in(source("loaded_engine")).names | used_in(source("engine_lane")).names
    )


def test_what_only_tensorrt_rtx_has_is_reached_only_with_targets(surfaces: Surfaces) -> None:
    used = used_in(source("builder_process")).names
    only = {name for name in used if name in surfaces["rtx"] and name not in surfaces["10"]}
    assert only == {name for name in used if is_rtx_only(name)}
    assert not {name for name in only if name in surfaces["11"]}
    builder_process._set_targets(object(), [])  # type: ignore[arg-type]  # an object without attributes: nothing is set on it


def test_tensorrt_is_never_given_targets() -> None:
    assert check_targets(LIBRARIES["tensorrt"], (), "fp16") == ()
    with pytest.raises(InputError, match="target sm89 with --engine tensorrt: it compiles for the GPU at hand, so leave"):
        check_targets(LIBRARIES["tensorrt"], ("sm89",), "fp16")


def test_the_targets_are_those_of_the_installed_tensorrt_rtx() -> None:
    names = set(libraries.load("rtx").ComputeCapability.__members__) - {"NONE", "CURRENT"}
    assert {name.lower() for name in names} == set(LIBRARIES["rtx"].targets)


# ---- loading


@pytest.fixture
def no_tensorrt(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """TensorRT is not imported in this test, and not afterwards by what this test imported."""
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    yield
    sys.modules.pop("tensorrt", None)


def installed(directory: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    package = directory / "tensorrt"
    package.mkdir()
    (package / "__init__.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(directory)


@pytest.mark.parametrize("name", ["rtx", "tensorrt"])
def test_an_absent_library_is_refused_with_the_command(monkeypatch: pytest.MonkeyPatch, name: EngineLibrary) -> None:
    module = LIBRARIES[name].module
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError) as refused:
        libraries.load(name)
    assert str(refused.value) == f"{module} is not installed; run: pip install 'bca-deploy[{name}]'"


def test_type_stubs_alone_are_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    # A directory of .pyi files imports as an empty namespace.
    monkeypatch.setitem(sys.modules, "tensorrt", ModuleType("tensorrt"))
    with pytest.raises(MissingDependencyError, match=r"tensorrt is not installed; run: pip install 'bca-deploy\[tensorrt\]'"):
        libraries.load("tensorrt")


@pytest.mark.usefixtures("no_tensorrt")
@pytest.mark.parametrize("error", ["OSError", "ImportError"])
def test_a_library_that_does_not_load_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str) -> None:
    installed(tmp_path, monkeypatch, f"raise {error}('libnvinfer.so.10: cannot open shared object file')")
    with pytest.raises(MissingDependencyError) as refused:
        libraries.load("tensorrt")
    assert str(refused.value) == (
        "tensorrt does not load (libnvinfer.so.10: cannot open shared object file); run: pip install --force-reinstall tensorrt"
    )


@pytest.mark.usefixtures("no_tensorrt")
def test_a_library_without_its_bindings_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(tmp_path, monkeypatch, "from tensorrt_bindings_of_another_python import *")
    with pytest.raises(MissingDependencyError, match="tensorrt is not installed; run: pip install"):
        libraries.load("tensorrt")


def test_a_library_loads() -> None:
    assert libraries.load("rtx") is sys.modules["tensorrt_rtx"]


# ---- what the libraries are


def test_every_library_has_an_entry_under_its_name() -> None:
    assert set(LIBRARIES) == set(get_args(EngineLibrary))
    assert all(library.name == name for name, library in LIBRARIES.items())
    assert (LIBRARIES["tensorrt"].needs_gpu, LIBRARIES["rtx"].needs_gpu) == (True, False)


def test_what_a_library_lacks_are_options_that_exist() -> None:
    for library in LIBRARIES.values():
        assert set(library.lacks) <= set(EngineTable.model_fields)


def test_the_extra_of_a_library_installs_its_first_package(repository: Path) -> None:
    extras = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for name, library in LIBRARIES.items():
        assert extras[name][0].partition(">=")[0] == library.packages[0]
        assert any(requirement.startswith("nvidia-ml-py") for requirement in extras[name])


# ---- targets

RTX = LIBRARIES["rtx"]


def test_no_target_means_all_that_can_run_the_precision() -> None:
    assert check_targets(RTX, (), "fp16") == RTX.targets
    assert check_targets(RTX, (), "bf16") == check_targets(RTX, (), "fp32") == ("sm80", "sm86", "sm89", "sm120", "sm121")


@pytest.mark.parametrize("precision", get_args(Precision))
def test_targets_are_put_in_order_once_each(precision: Precision) -> None:
    assert check_targets(RTX, ("sm120", "sm86", "sm120"), precision) == ("sm86", "sm120")


@pytest.mark.parametrize("targets", [("sm75",), ("sm89", "sm75")])
def test_bf16_on_turing_is_refused(targets: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match=r"^precision bf16 with target sm75: TensorRT-RTX compiles no bf16 products"):
        check_targets(RTX, targets, "bf16")
    assert check_targets(RTX, targets, "fp16")[0] == "sm75"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("sm90", r"^target sm90 \(H100 and H200\): TensorRT-RTX does not compile for it; use --engine tensorrt on that GPU"),
        ("sm100", r"^target sm100 \(B200 and B300\): TensorRT-RTX does not compile for it; use --engine tensorrt"),
        ("sm88", r"^target 'sm88' is not known \(did you mean 'sm8[069]'\?\); allowed: sm75, sm80, sm86, sm89, sm120, sm121$"),
        ("rtx 4090", "^target 'rtx 4090' is not known; allowed: sm75"),
        ("SM89", "^target 'SM89' is not known"),
    ],
)
def test_a_target_that_cannot_be_is_refused(target: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_targets(RTX, ("sm89", target), "fp16")
