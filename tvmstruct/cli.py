"""The command line: each command imports heavy modules when it is used."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated

import typer

from tvmstruct.commands import compile, demo, models, profile, report, run, tune
from tvmstruct.errors import TvmstructError
from tvmstruct.vta.command import vta

FAILED, MISUSED = 1, 2

app = typer.Typer(
    help="Compile trained NLP models to small, fast ones.",
    epilog="Example: tvmstruct compile model.onnx -o model.tvms",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("compile", epilog=compile.EXAMPLE)(compile.compile_model)
app.command("run", epilog=run.EXAMPLE)(run.run)
app.command("report", epilog=report.EXAMPLE)(report.report)
app.command("tune", epilog=tune.EXAMPLE)(tune.tune)
app.command("models", epilog=models.EXAMPLE)(models.list_models)
app.command("demo", epilog=demo.EXAMPLE)(demo.demo)
app.command("profile", epilog=profile.EXAMPLE)(profile.profile)
app.add_typer(vta, name="vta")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exit 1 on an error of ours or of the system, 2 on misuse."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="tvmstruct")
    except (TvmstructError, OSError) as error:
        sys.stderr.write(f"tvmstruct: {error}\n")
        sys.exit(FAILED)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tvmstruct {version('tvmstruct')} (apache-tvm {version('apache-tvm')})")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show it.")
    ] = False,
) -> None:
    """Compile trained NLP models to small, fast ones."""
