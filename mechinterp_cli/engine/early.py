"""A forward pass, or a layer's call, that ends as soon as what it was run for is known."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mechinterp_cli.models.anatomy import device_of
from mechinterp_cli.models.interface import AttentionCall, Handler
from mechinterp_cli.models.record import hooked
from mechinterp_cli.models.walk import forward


class _Stop(BaseException):
    """Ends one pass; not an `Exception`, so that no model code takes it for a failure of its own."""


@torch.no_grad()
def forward_until(model: nn.Module, tokens: Tensor, module: nn.Module, done: Callable[[Any], bool]) -> None:
    """Run the model on `tokens` and stop when `module` has returned and `done(its output)` is true.

    Args:
        model: The model, in evaluation mode.
        tokens: Ids [prompts, positions].
        module: One of its modules.
        done: As in `run_until`.
    """
    run_until(lambda: forward(model, tokens.to(device_of(model)), last_only=True), module, done)


def run_until(run: Callable[[], Any], module: nn.Module, done: Callable[[Any], bool]) -> None:
    """Call `run` and end it when `module` has returned and `done(its output)` is true.

    The module ends as it always does, hooks of others included (those that move weights too). Exceptions of
    anyone else pass through.

    Args:
        run: Runs the module, among others.
        module: What is waited for.
        done: Whether the call may end; asked each time that the module returns.
    """
    stop = _Stop()

    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        if done(output):
            raise stop

    with hooked([module.register_forward_hook(hook)]):
        _run(run, stop)


@torch.no_grad()
def forward_up_to(model: nn.Module, tokens: Tensor, module: nn.Module) -> None:
    """Run the model on `tokens` and stop when `module` would begin; its hooks from before this call see its input.

    Args:
        model: The model, in evaluation mode.
        tokens: Ids [prompts, positions].
        module: One of its modules.
    """
    stop = _Stop()

    def hook(_module: nn.Module, _args: Any) -> None:
        raise stop

    with hooked([module.register_forward_pre_hook(hook)]):
        _run(lambda: forward(model, tokens.to(device_of(model)), last_only=True), stop)


def _run(run: Callable[[], Any], stop: _Stop) -> None:
    try:
        run()
    except _Stop as caught:
        if caught is not stop:
            raise
    finally:
        stop.__traceback__ = None  # its frames hold the pass's activations


class Attended:
    """Answers one attention call, keeps z and ends what called it.

    Args:
        attend: Computes attention.
    """

    def __init__(self, attend: Handler) -> None:
        self.stop = _Stop()
        self._attend = attend
        self._z: Tensor | None = None

    @property
    def z(self) -> Tensor:
        """What attention gave."""
        assert self._z is not None, "attention was not called"
        return self._z

    def handler(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """Stands in for `attend`; does not return."""
        self._z = self._attend(call)[0]
        raise self.stop


@contextmanager
def ending_in_attention(attend: Handler) -> Iterator[Attended]:
    """Run one layer inside, with the handler of what this gives; it ends when its attention is known.

    The layer's modules do not come to their end: whoever keeps weights elsewhere lets the layer run again, whole.
    """
    known = Attended(attend)
    try:
        yield known
    except _Stop as caught:
        if caught is not known.stop:
            raise
    finally:
        known.stop.__traceback__ = None  # its frames hold the layer's activations
