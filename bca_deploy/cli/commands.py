"""The commands: `bca-export`, and `bca` with its own, which the modules imported here add in the order of the help page."""

from bca_deploy.cli import export, package, run, serve, upkeep  # noqa: F401  (each adds its commands)
from bca_deploy.cli.common import app, export_app

__all__ = ["app", "export_app"]
