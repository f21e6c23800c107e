"""Prompts, with or without a right and a wrong answer: built-in tasks, files, templates, alignment, spans."""
