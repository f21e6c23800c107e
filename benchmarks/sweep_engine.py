"""The engine's side of the benchmark: a sweep planned and executed as a run would."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.sweep_cases import Sweep
from mechinterp_cli.engine.execute import execute, executor_named
from mechinterp_cli.engine.plan import Work, free_memory, make_plan
from mechinterp_cli.engine.proof import prove
from mechinterp_cli.engine.wavefront import Settings
from mechinterp_cli.models.loaded import LoadedModel

MEMORY_SHARE = 0.7
"""Of the free memory, as the engine's own default is."""


@dataclass(frozen=True, eq=False)
class Engine:
    """The engine on one model, with an executor that has proved itself."""

    loaded: LoadedModel
    executor: str
    settings: Settings

    def values(self, sweep: Sweep, *, skip: bool) -> Tensor:
        """Logits of answer and wrong answer [trials, prompts, 2]; what is not computed is as in the corrupt prompt."""
        values, corrupt = self.run(sweep, sweep.work(skip=skip))
        return torch.where(values.isnan(), corrupt, values)

    def run(self, sweep: Sweep, work: Work) -> tuple[Tensor, Tensor]:
        """Plan and execute; the trials' values (NaN where not computed) and the corrupt stream's."""
        model, anatomy = self.loaded.model, self.loaded.anatomy
        budget = int(MEMORY_SHARE * free_memory(model.device))
        rows = self.settings.rows_per_call
        plan = make_plan(model, anatomy, [work], executor=self.executor, rows_per_call=rows, budget=budget)
        executor = executor_named(self.executor, model, anatomy, self.settings)
        values = torch.full((len(sweep.patches), sweep.pairs.size, 2), torch.nan, dtype=torch.float64)
        corrupt = torch.full(values.shape[1:], torch.nan, dtype=torch.float64)
        for done in execute(executor, plan, [work], [self._measure(sweep)]):
            values[[work.trials[i].index for i in done.unit.trials]] = done.values.trials[:, :, 0]
            corrupt = done.values.streams["corrupt"][:, 0]
        return values, corrupt

    def streams(self, sweep: Sweep) -> None:
        """Only the two unedited passes, which a sweep has whatever its trials."""
        executor = executor_named(self.executor, self.loaded.model, self.loaded.anatomy, self.settings)
        executor.run(sweep.bucket, [], self._measure(sweep))

    def _measure(self, sweep: Sweep) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        answers = sweep.pairs.answers.to(self.loaded.model.device)
        return lambda logits, prompt, _read: logits.gather(1, answers[prompt])


def proved_engine(loaded: LoadedModel, sweep: Sweep, rows_per_call: int) -> Engine:
    """The engine with the first executor that proves itself on this sweep."""
    settings = Settings(rows_per_call=rows_per_call)
    proof = prove(loaded.model, loaded.anatomy, [sweep.work(skip=True)], settings=settings)
    return Engine(loaded, proof.executor, settings)
