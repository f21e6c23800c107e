"""One module per task; a module put here is found and registered when `tasks.build` is imported."""
