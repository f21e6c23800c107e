"""Keep the loading libraries from writing to the terminal."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partialmethod
from importlib import import_module
from typing import Any

# By name, because none of the three is annotated.
_transformers: Any = import_module("transformers.utils.logging")
_hub: Any = import_module("huggingface_hub.utils.logging")
_tqdm: Any = import_module("tqdm.std").tqdm


@contextmanager
def quiet(*, bars: bool = False) -> Iterator[None]:
    """No log lines below an error from transformers and huggingface_hub, then as before.

    Args:
        bars: Let their progress bars through (they go to stderr).
    """
    levels = _transformers.get_verbosity(), _hub.get_verbosity()
    make_bar = _tqdm.__init__
    _transformers.set_verbosity_error()
    _hub.set_verbosity_error()
    if not bars:
        # transformers makes its GGUF bar from tqdm itself, past its own switch for progress bars.
        _tqdm.__init__ = partialmethod(make_bar, disable=True)
    try:
        yield
    finally:
        _tqdm.__init__ = make_bar
        _transformers.set_verbosity(levels[0])
        _hub.set_verbosity(levels[1])
