"""Prompts from a file: CSV, JSONL or JSON.

Own columns: `clean`, `answer`, and optionally `corrupt`, `wrong_answer`, `group`, `cluster`, `template`, `label` (for
probes: a class, or a number in JSON and JSONL) and any `span_NAME` (a text that occurs once in `clean`). In JSON and
JSONL an answer may be a list (a set), or a token id, and `spans` may be an object. Two public layouts are read too: CSV
with `clean, corrupted, correct_idx, incorrect_idx` (token ids; EAP-IG), and JSON with
`prompts: [{clean, corrupt, answers, wrong_answers}]` (auto-circuit; its `word_idxs` are not read, since they hold for
one tokenizer only).
"""

from typing import ClassVar, Literal

from mechinterp_cli.config.types import Count, Text
from mechinterp_cli.tasks.items import build_items
from mechinterp_cli.tasks.layouts import items_of
from mechinterp_cli.tasks.options import CommonOptions
from mechinterp_cli.tasks.reading import read_rows
from mechinterp_cli.tasks.registry import Built, builds
from mechinterp_cli.tasks.tokenise import Encoder


class FileOptions(CommonOptions):
    """Options of `file`: the prompts stand in a file."""

    task_name: ClassVar[str] = "file"
    name: Literal["file"] = "file"
    """The task; the key `file` chooses it too."""
    n: Count | None = None
    """Take a seeded sample of so many rows; null takes all."""
    file: Text
    """Path of a .csv, .jsonl or .json file, from the folder the command runs in."""


@builds(FileOptions)
def build_file(options: FileOptions, encoder: Encoder) -> Built:
    """Build the prompts of the file, in its order."""
    return build_items(items_of(read_rows(options.file)), options, encoder)
