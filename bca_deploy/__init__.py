"""Export bidirectional cross-attention from PyTorch to a validated ONNX bundle, and open it without PyTorch."""

__version__ = "0.1.0"

# Imported on first use: opening a bundle must not import torch or onnx, and `bca --help` must not import numpy.
_PUBLIC = {
    "BcaError": "bca_deploy.errors:BcaError",
    "Bundle": "bca_deploy.bundle.read:Bundle",
    "RemoteSession": "bca_deploy.serving.client:RemoteSession",
    "Session": "bca_deploy.session.session:Session",
    "build": "bca_deploy.exporter.build:build",
    "export": "bca_deploy.exporter.pipeline:export",
    "open": "bca_deploy.session.opening:open_session",
    "prometheus_collector": "bca_deploy.session.metrics:prometheus_collector",
    "refit": "bca_deploy.exporter.refit:refit",
    "verify": "bca_deploy.exporter.verify:verify",
}

__all__ = [
    "BcaError",
    "Bundle",
    "RemoteSession",
    "Session",
    "__version__",
    "build",
    "export",
    "open",
    "prometheus_collector",
    "refit",
    "verify",
]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'bca_deploy' has no attribute {name!r}; it has {', '.join(__all__)}")
    from importlib import import_module  # here: the command line must be ready for ctrl-C soon

    module, _, attribute = _PUBLIC[name].partition(":")
    return getattr(import_module(module), attribute)
