"""The command line: `cmh-milvus`. Heavy imports stand inside the commands, so that `--help` answers at once."""

from __future__ import annotations

from cmh_milvus.cli.commands import cli


def main() -> None:
    """Run the command line and exit."""
    cli(prog_name="cmh-milvus")


__all__ = ["cli", "main"]
