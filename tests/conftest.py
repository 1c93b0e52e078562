"""What every test process does once and not again and again."""

from __future__ import annotations

import functools

import typer.main

# A command line in this process builds all of Hansa's commands; what their functions take is read off the annotations once. A real
# process has one command line, and tests/e2e starts many.
typer.main.get_params_from_function = functools.cache(typer.main.get_params_from_function)
