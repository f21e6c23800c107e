"""Importing every task and method, so that their options are registered; a new module needs no line here."""

import importlib
import pkgutil

import mechinterp_cli.methods
import mechinterp_cli.tasks.build


def register_all() -> None:
    """Import the modules of `methods/`; `tasks.build` has imported the tasks."""
    for module in pkgutil.iter_modules(mechinterp_cli.methods.__path__, f"{mechinterp_cli.methods.__name__}."):
        importlib.import_module(module.name)
