"""The command line: `sdfast export | rebuild | generate | serve | validate | bench | info | schedulers | …`.

Each command is a thin layer over the package. What sdfast raises on purpose is shown as one line, with exit
status 1; `--debug` shows the traceback. Heavy imports are inside the commands, so that `--help` is immediate.

Most modules are called like their command: `export.py` has `rebuild` too, `about.py` has `info`, `schedulers`
and `doctor`. `group.py` is what all are below; `options.py`, `pairs.py`, `stages.py` are what several share.
"""

from sdfast.cli import about, bench, demo, export, generate, serve, validate
from sdfast.cli.group import main

__all__ = ["main"]

main.add_command(export.export)
main.add_command(export.rebuild)
main.add_command(generate.generate)
main.add_command(serve.serve)
main.add_command(validate.validate)
main.add_command(bench.bench)
main.add_command(about.info)
main.add_command(about.schedulers)
main.add_command(about.doctor)
main.add_command(demo.demo)
