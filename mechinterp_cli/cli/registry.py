"""Importing what every task and method says of itself, so that it is registered; a new one needs no line here."""

import importlib
import pkgutil

import mechinterp_cli.methods
import mechinterp_cli.tasks.build


def register_all() -> None:
    """Import the packages of `methods/`: sections and tables, not experiments, and so without torch.

    `tasks.build` has imported the tasks; an experiment is imported when it is run (`methods.experiment`).
    """
    for module in pkgutil.iter_modules(mechinterp_cli.methods.__path__, f"{mechinterp_cli.methods.__name__}."):
        if module.ispkg:
            importlib.import_module(module.name)
