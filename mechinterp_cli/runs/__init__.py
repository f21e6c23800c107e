"""Run directories: atomic files, manifest, work-unit store, table schema."""
