"""Plain hooks: a whole forward pass per trial. Slow, simple, and right wherever modules have names.

This is the oracle of the other executors and the last resort for models that neither fits.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mechinterp_cli.engine.edits import Bucket, Edit, Rows, Site, Trial, edited, needed
from mechinterp_cli.engine.instrument import Reader, Visitor, kinds_by_layer, visiting
from mechinterp_cli.engine.wavefront import Measure, Settings, Values, check_finite
from mechinterp_cli.models.anatomy import Anatomy, device_of
from mechinterp_cli.models.record import hooked
from mechinterp_cli.models.walk import first_tensor, forward


class PlainHooks:
    """Executes each trial as one forward pass of the whole model over all prompts of its bucket.

    Args:
        model: The model, in evaluation mode.
        anatomy: Its anatomy.
        settings: Whether the first layer that gives NaN or infinity stops the run.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.model = model
        self.anatomy = anatomy
        self.device = device_of(model)

    def run(
        self,
        bucket: Bucket,
        trials: Sequence[Trial],
        measure: Measure,
        tick: Callable[[int], None] = lambda trial: None,
    ) -> Values:
        """Compute every trial's metrics on the bucket; `tick` is called after each trial.

        Raises:
            RunError: NaN or infinity in a layer.
        """
        with torch.no_grad(), self._finite():
            streams, activations = self._streams(bucket, trials)
            base = {name: self._measured(bucket, logits, measure) for name, logits in streams.items()}
            rows = []
            for done, trial in enumerate(trials):
                rows.append(self._measured(bucket, self.logits(bucket, trial, activations), measure))
                rows[-1][[i for i in range(bucket.size) if i not in trial.prompts]] = torch.nan
                tick(done)
        shape = next(iter(base.values())).shape
        values = torch.stack(rows) if rows else torch.empty(0, *shape, dtype=torch.float64)
        return Values(values.cpu(), {name: x.cpu() for name, x in base.items()})

    def _finite(self) -> AbstractContextManager[None]:
        """Hooks on all layers that stop at the first output that is not finite."""
        if not self.settings.check_finite:
            return nullcontext()

        def hook(_module: nn.Module, _args: Any, output: Any, index: int = 0) -> None:
            check_finite(first_tensor(output), index, "a forward pass")

        layers = [self.model.get_submodule(layer.module) for layer in self.anatomy.layers]
        return hooked([layer.register_forward_hook(partial(hook, index=i)) for i, layer in enumerate(layers)])

    def logits(self, bucket: Bucket, trial: Trial, activations: dict[tuple[str, Site], Tensor]) -> Tensor:
        """Logits [prompts, reads, vocab] of one trial."""
        sites = {edit.site for edit in trial.edits}

        def visit(site: Site, activation: Tensor) -> Tensor:
            positions = activation.shape[1]
            flat = activation.reshape(-1, *activation.shape[2:]).clone()
            for edit in (e for e in trial.edits if e.site == site):
                edited(flat, edit, all_rows(edit, positions, self.device), activations)
            return flat.view(activation.shape)

        with self._noise(bucket, trial.stream), visiting(self.model, self.anatomy, kinds_by_layer(sites), visit):
            return self._forward(bucket, trial.stream)

    def _forward(self, bucket: Bucket, stream: str) -> Tensor:
        last_only = bool((bucket.read == bucket.length - 1).all()) and bucket.read.shape[1] == 1
        logits = forward(self.model, bucket.tokens[stream].to(self.device), last_only=last_only)
        if last_only:
            return logits
        return logits[torch.arange(bucket.size)[:, None], bucket.read]

    def _noise(self, bucket: Bucket, stream: str) -> AbstractContextManager[None]:
        noise = bucket.noise.get(stream)
        if noise is None:
            return nullcontext()

        def visit(_site: Site, activation: Tensor) -> Tensor:
            return activation + noise.to(activation)

        return visiting(self.model, self.anatomy, {0: frozenset({"embed"})}, visit)

    def _streams(
        self, bucket: Bucket, trials: Sequence[Trial]
    ) -> tuple[dict[str, Tensor], dict[tuple[str, Site], Tensor]]:
        reads = needed(trials)
        activations: dict[tuple[str, Site], Tensor] = {}
        logits: dict[str, Tensor] = {}
        for name in bucket.tokens:
            reader = Reader()
            visitor: Visitor = reader
            wanted = kinds_by_layer({site for stream, site in reads if stream == name})
            with self._noise(bucket, name), visiting(self.model, self.anatomy, wanted, visitor):
                logits[name] = self._forward(bucket, name)
            activations.update({(name, site): x for site, x in reader.seen.items()})
        return logits, activations

    def _measured(self, bucket: Bucket, logits: Tensor, measure: Measure) -> Tensor:
        prompts, reads = logits.shape[:2]
        prompt = torch.arange(prompts, device=self.device).repeat_interleave(reads)
        read = torch.arange(reads, device=self.device).repeat(prompts)
        return torch.unflatten(measure(logits.flatten(0, 1), prompt, read).double(), 0, (prompts, reads))


def all_rows(edit: Edit, positions: int, device: torch.device) -> Rows:
    """Rows of an edit in a batch of all prompts, flat over prompts and positions."""
    pairs = [(prompt, position) for prompt, chosen in enumerate(edit.positions) for position in chosen]
    prompt, position = torch.tensor(pairs, dtype=torch.long, device=device).reshape(-1, 2).unbind(1)
    return Rows(prompt * positions + position, prompt, position)
