"""`sdfast` itself, which its commands are added to."""

from typing import Any

import click

from sdfast import __version__
from sdfast.errors import SdfastError


class OneLineErrors(click.Group):
    """A group whose commands' own errors are one line, unless `--debug` asks for more."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SdfastError as error:
            if ctx.params.get("debug"):
                raise
            raise click.ClickException(" ".join(str(error).split())) from error


@click.group(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(__version__, prog_name="sdfast")
def main(debug: bool) -> None:
    """Export Stable Diffusion once, serve it fast, prove it is the same picture."""
