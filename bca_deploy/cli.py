"""The command line: `bca-export`, and `bca` with its commands, which the modules imported here add."""

from bca_deploy import cli_export, cli_running, cli_serving, cli_upkeep  # noqa: F401  (in the order of the help page)
from bca_deploy.cli_common import app, export_app


def main() -> None:
    """Run `bca`."""
    app()


def main_export() -> None:
    """Run `bca-export`."""
    export_app()
