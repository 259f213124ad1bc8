"""Whole models of every kind: in at one end, out as one bundle that computes the same without the user's code."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from support.forms import FORMS
from support.models import KINDS, Kind
from torch import Tensor, nn
from typer.testing import CliRunner, Result

import bca_deploy
from bca_deploy.bundle import selftest
from bca_deploy.bundle.read import Bundle
from bca_deploy.cli import export_app
from bca_deploy.errors import InputError
from bca_deploy.files import read_arrays
from bca_deploy.whole.samples import named_outputs

#: What every export of a kind is told beside its samples.
FAST = "contrastive"
BIN = Path(sys.executable).parent


def told(kind: Kind, **options: Any) -> dict[str, Any]:
    return {"dims": dict(kind.dims), "masks": dict(kind.masks), **options}


def exported(kind: Kind, out: Path, **options: Any) -> Bundle:
    named = {"axes": dict(kind.axes), "precision": ["fp32", "fp16"], **options}
    return bca_deploy.export(kind.make(), out, inputs=kind.pair(), **told(kind, **named))


def of_kinds(*but: str) -> list[Any]:
    return [pytest.param(name, id=name, marks=() if name == FAST else pytest.mark.slow) for name in KINDS if name not in but]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The exported kinds, each made once, where it is first asked for."""
    made: dict[str, Path] = {}

    def bundle(name: str) -> Path:
        if name not in made:
            out = tmp_path_factory.mktemp("whole") / name
            exported(KINDS[name], out).close()
            made[name] = out
        return made[name]

    return bundle


def onnx_files(directory: Path) -> list[Path]:
    return sorted(directory.rglob("*.onnx"))


def held(session: Any, kind: Kind, model: nn.Module, sizes: dict[str, int], atol: float) -> None:
    given = kind.sample(5, sizes)
    with torch.no_grad():
        wanted = named_outputs(model(**{name: t.clone() for name, t in given.items()}))
    got = session.run({name: t.numpy() for name, t in given.items()})
    assert len(got) == len(wanted)
    for (name, array), true in zip(got.items(), wanted.values(), strict=True):
        assert array.shape == tuple(true.shape), name
        scale = max(1.0, float(true.double().abs().max()))
        np.testing.assert_allclose(array.astype(np.float64), true.double().numpy(), atol=atol * scale, rtol=0, err_msg=name)


# ---- every kind


@pytest.mark.parametrize("name", of_kinds())
def test_every_file_is_opset_17_and_the_checker_takes_it(name: str, bundles: Callable[[str], Path]) -> None:
    files = onnx_files(bundles(name))
    assert {path.stem for path in files} >= {"fp32", "fp16"}
    for path in files:
        model = onnx.load(path)
        assert {entry.domain: entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")} == {"": 17}
        if not any(entry.domain for entry in model.opset_import):
            onnx.checker.check_model(model, full_check=True)


@pytest.mark.parametrize("name", of_kinds())
def test_a_session_is_the_model_at_every_kind_of_sizes(name: str, bundles: Callable[[str], Path]) -> None:
    kind = KINDS[name]
    model = kind.make()
    with bca_deploy.open(bundles(name)) as session:
        for which in ("min", "odd", "even", "equal", "unequal", "max"):
            held(session, kind, model, kind.sizes()[which], atol=1e-5)


@pytest.mark.parametrize("name", of_kinds())
def test_the_manifest_has_the_layers_with_their_proofs(name: str, bundles: Callable[[str], Path]) -> None:
    kind = KINDS[name]
    with Bundle.open(bundles(name)) as bundle:
        manifest = bundle.manifest
        assert manifest.source == type(kind.make()).__name__
        assert manifest.interface is None
        assert tuple(layer.path for layer in manifest.layers) == kind.layers
        assert tuple(layer.path for layer in manifest.layers if layer.lowering == "reference") == kind.literal
        for layer in manifest.layers:
            assert layer.proof is not None
            assert layer.proof.cases >= 16
            assert layer.proof.worst < 1e-9
        assert all(model.parity.passed and model.opset == 17 for model in manifest.models)
        signature = manifest.signature
        assert {t.name: t.axes for t in signature.inputs} == {n: given.shape for n, given in kind.inputs.items()}
        assert {dim: (r.min, r.opt, r.max) for dim, r in signature.dims.items()} == dict(kind.dims)


@pytest.mark.parametrize("name", of_kinds())
def test_the_bundle_proves_itself_without_the_code_that_made_it(
    name: str, bundles: Callable[[str], Path], tmp_path: Path
) -> None:
    code = "import sys, bca_deploy; bca_deploy.open(sys.argv[1]).selftest(); assert 'support.models' not in sys.modules"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for command in ([sys.executable, "-c", code, bundles(name)], [BIN / "bca", "verify", bundles(name)]):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", of_kinds())
def test_outputs_that_are_off_fail_the_self_test(name: str, bundles: Callable[[str], Path]) -> None:
    arrays = read_arrays(bundles(name) / "selftest.npz")
    with bca_deploy.open(bundles(name)) as session:

        def off(inputs: Any) -> dict[str, Any]:
            return {output: a * 1.01 + 0.01 if a.dtype.kind == "f" else a for output, a in session.run(inputs).items()}

        assert not selftest.failures(arrays, "fp32", session.run)
        assert selftest.failures(arrays, "fp32", off)


@pytest.mark.parametrize("name", of_kinds())
def test_no_path_and_no_source_text_is_in_a_file(name: str, bundles: Callable[[str], Path], repository: Path) -> None:
    for path in onnx_files(bundles(name)):
        content = path.read_bytes()
        for told in (str(repository), "/tests/support", "models.py", "self.attend", ".venv", "site-packages", "pkg.torch"):
            assert told.encode() not in content, told


# ---- the same from anywhere

SOURCE = """
import torch
from torch import nn
from bca_deploy.layers.reference import BidirectionalCrossAttention


class Matcher(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(30, 16)
        self.attend = BidirectionalCrossAttention(dim=24, context_dim=16, heads=3, dim_head=8, prenorm=True)
        self.head = nn.Linear(40, 3)

    def forward(self, x, tokens, mask=None):
        context = self.words(tokens)
        out, context_out = self.attend(x, context, mask, tokens != 0)
        return {"logits": self.head(torch.cat([(x + out).mean(1), (context + context_out).mean(1)], -1))}


def build():
    torch.manual_seed(3)
    return Matcher()
"""


def put_source(directory: Path) -> Path:
    directory.mkdir(parents=True)
    (directory / "matcher.py").write_text(SOURCE)
    rng = np.random.default_rng(0)
    for name, (batch, n, m) in {"a": (3, 5, 7), "b": (2, 4, 6)}.items():
        tokens = rng.integers(1, 30, (batch, m))
        tokens[0, -2:] = 0
        x = rng.normal(size=(batch, n, 24)).astype(np.float32)
        np.savez(directory / f"{name}.npz", x=x, tokens=tokens, mask=np.ones((batch, n), dtype=bool))
    return directory


def command(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    every = [str(BIN / "bca-export"), "--model", *map(str, arguments)]
    return subprocess.run(every, cwd=cwd, capture_output=True, text=True, check=False)


DIM = ("--dim", "x_len=1:5:9", "--dim", "tokens_len=1:7:9", "--dim", "batch=1:2:4")


@pytest.mark.slow
def test_two_directories_give_the_same_bytes(tmp_path: Path) -> None:
    for place, run_from, model in (
        (tmp_path / "one", tmp_path / "one", "matcher.py:build"),
        (tmp_path / "some" / "where" / "else", tmp_path, "some/where/else/matcher.py:build"),
    ):
        put_source(place)
        done = command(
            model, "--inputs", place / "a.npz", "--inputs", place / "b.npz", *DIM, "--out", place / "out", cwd=run_from
        )
        assert done.returncode == 0, done.stdout + done.stderr
    one, other = (tmp_path / "one" / "out", tmp_path / "some" / "where" / "else" / "out")
    names = [path.relative_to(one) for path in onnx_files(one)]
    assert names
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
        for text in (str(tmp_path), "matcher", "def forward", "self.head"):
            assert text.encode() not in (one / name).read_bytes(), text
    manifests = [json.loads((place / "manifest.json").read_text()) for place in (one, other)]
    assert manifests[0] == manifests[1]
    assert str(tmp_path) not in json.dumps(manifests[0])


@pytest.mark.slow
def test_the_bundle_outlives_the_model_s_file(tmp_path: Path) -> None:
    place = put_source(tmp_path / "model")
    done = command("matcher.py:build", "--inputs", "a.npz", "--inputs", "b.npz", *DIM, "--out", tmp_path / "out", cwd=place)
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.rmtree(place)
    code = "import sys, bca_deploy; bca_deploy.open(sys.argv[1]).selftest()"
    for again in ([sys.executable, "-c", code, tmp_path / "out"], [BIN / "bca", "verify", tmp_path / "out"]):
        done = subprocess.run(again, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


# ---- opsets


@pytest.mark.slow
@pytest.mark.parametrize("opset", [18, 20, 24, 27])
def test_the_file_has_the_opset_that_was_asked_for_and_is_the_model(opset: int, tmp_path: Path) -> None:
    kind = KINDS["maps"]
    with exported(kind, tmp_path / "out", opset=opset, precision=["fp32"]) as bundle:
        path = bundle.path(bundle.manifest.models[0].file)
        model = onnx.load(path)
        assert [entry.version for entry in model.opset_import if not entry.domain] == [opset]
        onnx.checker.check_model(model, full_check=True)
    with bca_deploy.open(tmp_path / "out") as session:
        held(session, kind, kind.make(), kind.sizes()["unequal"], atol=1e-5)


# ---- samples and axes


@pytest.mark.slow
def test_one_sample_and_its_axes_are_enough(tmp_path: Path) -> None:
    kind = KINDS["stack"]
    one = kind.sample(0, kind.sizes()["equal"])
    with bca_deploy.export(kind.make(), tmp_path / "out", inputs=[one], axes=dict(kind.axes), **told(kind)) as bundle:
        assert {t.name: t.axes for t in bundle.manifest.signature.inputs} == {n: i.shape for n, i in kind.inputs.items()}
    with bca_deploy.open(tmp_path / "out") as session:
        held(session, kind, kind.make(), kind.sizes()["unequal"], atol=1e-5)


@pytest.mark.slow
def test_two_samples_as_tuples_infer_everything(tmp_path: Path) -> None:
    kind = KINDS["stack"]
    samples = [tuple(sample.values()) for sample in kind.pair()]
    with bca_deploy.export(kind.make(), tmp_path / "out", inputs=samples) as bundle:
        found = {t.name: t.axes for t in bundle.manifest.signature.inputs}
        assert found == {n: i.shape for n, i in kind.inputs.items()}
        ranges = {dim: (r.min, r.opt, r.max) for dim, r in bundle.manifest.signature.dims.items()}
        assert ranges == {"batch": (1, 3, 12), "x_len": (1, 5, 20), "context_len": (1, 7, 28)}


def test_one_sample_alone_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    kind = KINDS["stack"]
    with pytest.raises(InputError, match="one sample does not show which axes are dynamic"):
        bca_deploy.export(kind.make(), tmp_path / "out", inputs=kind.pair()[:1])
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "mask of every item",
        "mask of ones",
        "mask of zeros",
        "bias computed",
        "called twice",
        "token in front",
        "under two names",
        "one map used",
        "compiled layer",
    ],
)
def test_forms_of_the_call_are_exported(name: str, tmp_path: Path) -> None:
    kind = FORMS[name]
    with torch.compiler.set_stance("force_eager"):
        model = kind.make()
        exported(kind, tmp_path / "out", precision=["fp32"]).close()
        with bca_deploy.open(tmp_path / "out") as session:
            for which in ("min", "odd", "unequal"):
                held(session, kind, model, kind.sizes()[which], atol=1e-5)


@pytest.mark.slow
def test_a_weight_that_is_shared_is_once_in_the_file(tmp_path: Path) -> None:
    sizes = {}
    for name in ("positional", "under two names"):
        with exported(FORMS[name], tmp_path / name.replace(" ", "-"), precision=["fp32"]) as bundle:
            model = onnx.load(bundle.path(bundle.manifest.models[0].file))
            sizes[name] = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    assert sizes["under two names"] < 1.1 * sizes["positional"]


class Casting(nn.Module):
    """As many are written: norms and sums in float32 whatever the model is in."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = FORMS["positional"].make().get_submodule("layer")

    def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        out, context_out = self.attend(x, context)
        wide = out.float() + torch.zeros(out.shape[-1])
        return (wide / wide.norm(dim=-1, keepdim=True)).to(x.dtype), context_out.softmax(-1, dtype=torch.float32)


@pytest.mark.slow
def test_a_model_that_casts_is_exported_in_both_precisions(tmp_path: Path) -> None:
    samples = [(torch.randn(3, 5, 24), torch.randn(3, 7, 16)), (torch.randn(2, 4, 24), torch.randn(2, 6, 16))]
    dims = {"batch": (1, 2, 4), "x_len": (1, 6, 9), "context_len": (1, 6, 9)}
    bca_deploy.export(Casting().eval(), tmp_path / "out", inputs=samples, dims=dims, precision=["fp32", "fp16"]).close()


# ---- many at once


@pytest.mark.slow
@pytest.mark.parametrize(("name", "pads"), [("twice", False), ("policy", False), ("stack", True)])
def test_many_are_run_each_as_alone_and_padded_only_where_the_signature_says_so(
    name: str, pads: bool, bundles: Callable[[str], Path]
) -> None:
    kind = KINDS[name]
    requests = [
        kind.sample(seed, {**kind.sizes()[which], "batch": 1}) for seed, which in enumerate(("odd", "even", "min", "unequal"))
    ]
    # All live: a masked row of a padded pair is the mean over the padded values, too (see run_many).
    inputs = [
        tuple(t.numpy() if t.dtype != torch.bool else np.ones(t.shape, bool) for t in request.values()) for request in requests
    ]
    with Bundle.open(bundles(name)) as bundle:
        assert bundle.manifest.signature.pads == pads
    with bca_deploy.open(bundles(name)) as session:
        alone = [session(*each) for each in inputs]
        for policy in ("auto", "alone", *(["pad"] if pads else [])):
            for got, wanted in zip(session.run_many(inputs, policy=policy), alone, strict=True):
                for ours, theirs in zip(got, wanted, strict=True):
                    np.testing.assert_allclose(ours, theirs, atol=1e-5)
        if not pads:
            with pytest.raises(InputError, match="pad"):
                session.run_many(inputs, policy="pad")


# ---- the command line


def bca_export(*arguments: object) -> Result:
    return CliRunner().invoke(export_app, [str(argument) for argument in arguments])


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    found = put_source(tmp_path / "model")
    monkeypatch.chdir(found)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "matcher", raising=False)
    return found


SAMPLES = ("--inputs", "a.npz", "--inputs", "b.npz")


def test_a_dry_run_shows_layers_proof_axes_and_outputs_and_writes_nothing(place: Path) -> None:
    before = sorted(path.name for path in place.iterdir())
    done = bca_export("--model", "matcher.py:build", *SAMPLES, "--dim", "x_len=1:5:9", "--dry-run")
    assert done.exit_code == 0, done.output
    for text in (
        "Matcher",
        "attend: ",
        "fused",
        "proven in ",
        "batch",
        "x_len 1..9 (opt 5)",
        "tokens_len 1..28 (opt 7)",
        "logits",
    ):
        assert text in " ".join(done.output.split()), text
    assert sorted(path.name for path in place.iterdir() if path.name != "__pycache__") == before
    done = bca_export("--model", "matcher.py:build", *SAMPLES, "--dim", "x_len=1:5:9", "--dry-run", "--json")
    shown = json.loads(done.stdout)
    assert [layer["path"] for layer in shown["layers"]] == ["attend"]
    assert shown["outputs"] == {"logits": ["batch", 3]}
    assert shown["dims"]["tokens_len"] == {"min": 1, "opt": 7, "max": 28}


@pytest.mark.slow
def test_the_command_loads_a_checkpoint_into_the_model_and_exports_it(place: Path) -> None:
    sys.path.insert(0, str(place))
    from matcher import build  # type: ignore[import-not-found]

    model = build().eval()
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    torch.save({f"module.{name}": tensor for name, tensor in model.state_dict().items()}, "trained.pt")
    done = bca_export("--model", "matcher.py:build", "--checkpoint", "trained.pt", *SAMPLES, *DIM, "--out", "out")
    assert done.exit_code == 0, done.output
    arrays = dict(np.load("a.npz"))
    with torch.no_grad(), bca_deploy.open("out") as session:
        wanted = model(**{name: torch.from_numpy(array) for name, array in arrays.items()})["logits"]
        np.testing.assert_allclose(session.run(arrays)["logits"], wanted.numpy(), atol=1e-5)


@pytest.mark.slow
def test_a_recipe_says_the_same_as_the_flags(place: Path) -> None:
    (place / "recipe.toml").write_text(
        'precision = ["fp32"]\n'
        "[model]\n"
        'factory = "matcher.py:build"\n'
        'samples = ["a.npz"]\n'
        'axes = {x = ["batch", "n", 0], tokens = ["batch", "m"], mask = ["batch", "n"]}\n'
        "[dims]\n"
        "n = {min = 1, opt = 5, max = 9}\n"
        "m = {min = 1, opt = 7, max = 9}\n"
        "batch = {min = 1, opt = 2, max = 4}\n"
    )
    done = bca_export("--recipe", "recipe.toml", "--out", "out")
    assert done.exit_code == 0, done.output
    with Bundle.open("out") as bundle:
        assert {t.name: t.axes for t in bundle.manifest.signature.inputs}["x"] == ("batch", "n", 24)
    flags = ("--axes", "x=batch,n,0", "--axes", "tokens=batch,m", "--axes", "mask=batch,n", "--inputs", "a.npz")
    ranges = ("--dim", "n=1:5:9", "--dim", "m=1:7:9", "--dim", "batch=1:2:4")
    done = bca_export("--model", "matcher.py:build", *flags, *ranges, "--out", "again")
    assert done.exit_code == 0, done.output
    for path in onnx_files(Path("out")):
        assert path.read_bytes() == (Path("again") / path.relative_to("out")).read_bytes()


@pytest.mark.slow
def test_a_model_without_a_layer_is_exported_where_that_is_allowed(place: Path) -> None:
    (place / "plain.py").write_text("from torch import nn\ndef build(): return nn.Sequential(nn.Linear(24, 5), nn.GELU())\n")
    for name, shape in (("c", (3, 5, 24)), ("d", (2, 4, 24))):
        np.savez(place / f"{name}.npz", input=np.ones(shape, np.float32))
    samples = ("--inputs", "c.npz", "--inputs", "d.npz")
    done = bca_export("--model", "plain.py:build", *samples, "--out", "out")
    assert done.exit_code == 2
    assert "--allow-none exports the model as it is" in " ".join(done.stderr.split())
    done = bca_export("--model", "plain.py:build", *samples, "--allow-none", "--out", "out")
    assert done.exit_code == 0, done.output
    with Bundle.open("out") as bundle:
        assert bundle.manifest.layers == ()
        assert {model.lowering for model in bundle.manifest.models} == {"none"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "matcher.py:build"), "a whole model needs samples of its inputs; give two of different sizes"),
        (("--model", "matcher.py:build", "--inputs", "none.npz"), r"none\.npz"),
        (("--model", "matcher.py:build", *SAMPLES, "--heads", "3"), "--heads is about the bare layer"),
        (("--model", "matcher.py:build", *SAMPLES, "--dim", "x_len"), "--dim 'x_len': give NAME=VALUE, each name once"),
        (("--model", "matcher.py:build", *SAMPLES, "--dim", "y_len=1:2:3"), r"there is no dimension 'y_len' \(did you mean"),
        (("--model", "matcher.py:build", *SAMPLES, "--range", "tokens=a:b"), "--range 'a:b': give LOW:HIGH"),
        (("--model", "matcher.py:build", *SAMPLES, "--keep-literal", "attnd"), "--keep-literal attnd: no layer is there"),
        (("--model", "matcher.py:buld", *SAMPLES), r"has no buld \(did you mean 'build'\?\)"),
        (("--model", "matcher.py:build", *SAMPLES, "--checkpoint", "other.pt"), r"is not of this Matcher: missing key"),
        (("--inputs", "a.npz"), "give the model, too: --model pkg.module:factory"),
        (("--model", "matcher.py:build", *SAMPLES, "--no-mask"), "inputs is about the bare layer, and this is a whole model"),
    ],
)
def test_what_does_not_fit_a_whole_model_is_refused(place: Path, arguments: tuple[str, ...], message: str) -> None:
    torch.save({"head.weight": torch.ones(3)}, "other.pt")
    done = bca_export(*arguments, "--out", "out")
    assert done.exit_code == 2, done.output
    said = " ".join(done.stderr.replace("\n", " ").split())
    assert re.search(message, said), said
    assert "Traceback" not in said
    assert not Path("out").exists()


@pytest.mark.slow
def test_a_model_in_bfloat16_is_judged_by_the_strict_evaluator(tmp_path: Path) -> None:
    kind = KINDS["stack"]
    options = {"dims": dict(kind.dims), "axes": dict(kind.axes), "precision": ["bf16"]}
    bundle = bca_deploy.export(kind.make(), tmp_path / "model", inputs=kind.pair(), **options)
    (model,) = bundle.manifest.models
    assert (model.precision, model.parity.passed, model.parity.runtimes) == ("bf16", True, ("strict evaluator",))
