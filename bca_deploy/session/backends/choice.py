"""Which backend a session runs on: the choice among what this machine and this bundle really have."""

from collections.abc import Callable

from bca_deploy.bundle.manifest import ModelEntry, signature_of
from bca_deploy.bundle.read import Bundle
from bca_deploy.engines.gpus import query
from bca_deploy.errors import BcaError, EngineError, InputError, check_one_of
from bca_deploy.optional import providers
from bca_deploy.session.backends.backend import NAMES, Backend, Explanation, Name, Options
from bca_deploy.spec import EngineLibrary, Precision


def choose(bundle: Bundle, name: str, options: Options) -> tuple[Backend, Explanation]:
    """Return the backend to use.

    Args:
        bundle: the open bundle.
        name: one of ``NAMES``, or ``auto`` for the first of them that works.
        options: how to run.

    Raises:
        InputError: the name is not known.
        BcaError: the backend asked for does not work here (it never falls back), or none does.
    """
    if name != "auto":
        check_one_of("backend", name, ("auto", *NAMES))
        backend = _OPENERS[name](bundle, options)
        return backend, Explanation(f"{backend.name}: {backend.what}", ())
    reasons: list[tuple[Name, str]] = []
    for candidate in NAMES:
        try:
            backend = _OPENERS[candidate](bundle, options)
        except BcaError as error:
            reasons.append((candidate, str(error)))
            continue
        return backend, Explanation(f"{backend.name}: {backend.what}", tuple(reasons))
    raise BcaError("nothing here runs this bundle: " + "; ".join(f"{name}: {reason}" for name, reason in reasons))


def _engine(library: EngineLibrary) -> Callable[[Bundle, Options], Backend]:
    def open_it(bundle: Bundle, options: Options) -> Backend:
        from bca_deploy.session.backends.engine import open_engine

        return open_engine(library, bundle, options)

    return open_it


def _cuda(bundle: Bundle, options: Options) -> Backend:
    from bca_deploy.session.backends.ort import OrtBackend

    _need_provider("CUDA")
    return OrtBackend(bundle, _portable(bundle, options, ("fp16", "bf16", "fp32")), options, "onnxruntime-cuda")


def _tensorrt(bundle: Bundle, options: Options) -> Backend:
    from bca_deploy.session.backends.ort import OrtBackend

    if options.precision not in (None, "fp32"):
        raise InputError(
            f"precision {options.precision} with onnxruntime-tensorrt: that provider lets TensorRT round what a half graph "
            f"keeps in float32; use precision='fp32', or an engine: bca build {bundle.source} --engine tensorrt"
        )
    _need_provider("Tensorrt")
    return OrtBackend(bundle, _portable(bundle, options, ("fp32",)), options, "onnxruntime-tensorrt")


def _need_provider(kind: str) -> None:
    if f"{kind}ExecutionProvider" not in providers():
        raise EngineError(f"this onnxruntime has no {kind} provider; run: pip install 'bca-deploy[gpu]' on the GPU machine")
    if not (gpus := query()).found:
        raise EngineError(f"no GPU: {gpus.why_none}")


def _cpu(bundle: Bundle, options: Options) -> Backend:
    from bca_deploy.session.backends.ort import OrtBackend

    if options.precision == "bf16":
        raise InputError("onnxruntime has no bfloat16 products on the CPU; open with precision='fp32' or 'fp16', or on a GPU")
    own = [m for m in bundle.manifest.models if m.runtime == "onnxruntime-cpu" and options.precision in (None, m.precision)]
    return OrtBackend(bundle, own[0] if own else _portable(bundle, options, ("fp32", "fp16")), options, "onnxruntime-cpu")


def _portable(bundle: Bundle, options: Options, order: tuple[Precision, ...]) -> ModelEntry:
    models = {model.precision: model for model in bundle.manifest.models if model.runtime == "portable"}
    for precision in (options.precision,) if options.precision else order:
        if precision in models and (options.precision or _has_numpy_edges(bundle, models[precision])):
            return _with_numpy_edges(bundle, models[precision])
    has = ", ".join(models)
    raise InputError(
        f"precision {options.precision or ' or '.join(order)} is not in the bundle, which has {has}; export it with "
        f"--precision {options.precision or order[0]}"
    )


def _with_numpy_edges(bundle: Bundle, model: ModelEntry) -> ModelEntry:
    if not _has_numpy_edges(bundle, model):
        raise InputError(
            f"{model.file} takes bfloat16, which onnxruntime does not take from numpy; export it with --keep-io-types, or "
            "choose another precision"
        )
    return model


def _has_numpy_edges(bundle: Bundle, model: ModelEntry) -> bool:
    signature = signature_of(bundle.manifest, model)
    return all(tensor.dtype != "bfloat16" for tensor in (*signature.inputs, *signature.outputs))


_OPENERS: dict[str, Callable[[Bundle, Options], Backend]] = {
    "tensorrt": _engine("tensorrt"),
    "rtx": _engine("rtx"),
    "onnxruntime-cuda": _cuda,
    "onnxruntime-tensorrt": _tensorrt,
    "onnxruntime-cpu": _cpu,
}
