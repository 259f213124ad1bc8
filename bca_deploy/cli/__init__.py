"""Where `bca`, `bca-export` and `python -m bca_deploy` begin: ready for ctrl-C before anything slow is imported."""

import sys

from bca_deploy import ending


def main() -> None:
    """Run `bca`."""
    _run("app")


def main_export() -> None:
    """Run `bca-export`."""
    _run("export_app")


def _run(name: str) -> None:
    with ending.at_once():
        from bca_deploy.cli import commands

        out, code = sys.stdout, 0
        try:
            getattr(commands, name)()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        sys.exit(ending.code_for(out, code))


def __getattr__(name: str) -> object:
    """Give the applications to who asks for them here; importing them takes a while."""
    if name not in ("app", "export_app"):
        raise AttributeError(f"module 'bca_deploy.cli' has no attribute {name!r}")
    from bca_deploy.cli import commands

    return getattr(commands, name)
