"""The plan fits the budget and covers every trial; running it survives a lack of memory and stops at NaN."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from transformers import PreTrainedModel

from mechinterp_cli.engine.edits import Bucket, Edit, Site, Trial
from mechinterp_cli.engine.execute import EXECUTORS, Done, Executor, execute, executor_named
from mechinterp_cli.engine.plan import Cost, Plan, Unit, Work, cost, fixed_bytes, make_plan
from mechinterp_cli.engine.wavefront import Measure, Settings, Values
from mechinterp_cli.errors import ExitCode, RunError, UserError
from mechinterp_cli.models.anatomy import Anatomy, find_anatomy
from tests.engine_trials import LENGTH, PROMPTS, deviation, logits_measure, run, sweep, two_streams
from tests.families import build

EVERY = tuple(range(PROMPTS))


@pytest.fixture(scope="module")
def llama() -> tuple[PreTrainedModel, Anatomy]:
    model = build("llama")
    return model, find_anatomy(model)


def zero(layer: int, *positions: int, kind: str = "resid_pre", prompts: tuple[int, ...] = EVERY) -> Trial:
    return Trial(0, "corrupt", (Edit(Site(kind, layer), "zero", (positions,) * PROMPTS),), prompts)


PER_ROW = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64) + 4 * LENGTH * 4 * 8
"""FLOPs of a row in a layer of the tiny Llama: q, k and v, o, three MLP matrices; scores and values of 4 heads × 8."""
STREAMS = 2 * PROMPTS * LENGTH * 3
UNEMBED = 2 * 97 * 32


@pytest.mark.parametrize(
    ("executor", "trial", "rows", "layers"),
    [
        ("packed", zero(1, 5, 9), 11 * PROMPTS, 2),
        ("packed", zero(2, 15, kind="resid_post"), PROMPTS, 0),
        ("packed", zero(0, 5, prompts=(1,)), 11, 3),
        ("resume", zero(1, 5), LENGTH * PROMPTS, 2),
        ("hooks", zero(1, 5), LENGTH * PROMPTS, 3),
        ("hooks", zero(1, 5, prompts=(1,)), LENGTH * PROMPTS, 3),
    ],
)
def test_the_cost_of_a_trial_is_what_one_counts_by_hand(
    llama: tuple[PreTrainedModel, Anatomy], executor: str, trial: Trial, rows: int, layers: int
) -> None:
    found = cost(*llama, Work(two_streams(), (trial,)), executor)
    assert (found.trials, found.rows, found.row_layers, found.items) == (1, rows, rows * layers, len(trial.prompts))
    assert found.flops == PER_ROW * (rows * layers + STREAMS) + UNEMBED * LENGTH * len(trial.prompts)
    assert found.bytes == rows * 32 * 4


def test_costs_add_up_and_of_bytes_the_larger_counts() -> None:
    assert Cost(1, 2, 3, 4, 5.0, 6) + Cost(10, 20, 30, 40, 50.0, 5) == Cost(11, 22, 33, 44, 55.0, 6)


@pytest.mark.parametrize("extra", [200_000, 1_000_000, 10**9])
@pytest.mark.parametrize("executor", EXECUTORS)
def test_units_cover_every_trial_once_and_fit_the_budget(
    llama: tuple[PreTrainedModel, Anatomy], executor: str, extra: int
) -> None:
    model, anatomy = llama
    works = [Work(two_streams(length=n), tuple(zero(i % 3, i % n) for i in range(40))) for n in (LENGTH, 12)]
    fixed = [fixed_bytes(model, anatomy, work, 64) for work in works]
    plan = make_plan(model, anatomy, works, executor=executor, rows_per_call=64, budget=max(fixed) + extra)
    for bucket, work in enumerate(works):
        units = [unit for unit in plan.units if unit.bucket == bucket]
        assert sorted(i for unit in units for i in unit.trials) == list(range(40))
        sizes = [
            cost(model, anatomy, Work(work.bucket, tuple(work.trials[i] for i in u.trials)), executor) for u in units
        ]
        assert all(3 * size.bytes <= max(fixed) + extra - fixed[bucket] for size in sizes)
    assert (len(plan.units) > 2) == (extra == 200_000)
    assert Plan(**{**plan.to_json(), "units": tuple(Unit(**u) for u in plan.to_json()["units"])}) == plan


def test_a_budget_that_one_trial_does_not_fit_is_the_users_to_raise(llama: tuple[PreTrainedModel, Anatomy]) -> None:
    work = Work(two_streams(), (zero(0, 0),))
    with pytest.raises(
        UserError, match=r"engine.max_memory: one trial on 3 prompts of 16 tokens needs [\d.]+ MiB, 0.2 MiB"
    ):
        make_plan(*llama, [work], executor="packed", rows_per_call=64, budget=200_000)
    needed = fixed_bytes(*llama, work, 64) + PROMPTS * LENGTH * 32 * 4 * 3
    make_plan(*llama, [work], executor="packed", rows_per_call=64, budget=needed)
    with pytest.raises(UserError):
        make_plan(*llama, [work], executor="packed", rows_per_call=64, budget=needed - 1)


@dataclass
class Narrow:
    """Runs out of memory on more than `room` trials."""

    inner: Executor
    room: int
    error: Exception
    sizes: list[int] = field(default_factory=list)

    def run(
        self, bucket: Bucket, trials: Sequence[Trial], measure: Measure, tick: Callable[[int], None] = lambda _: None
    ) -> Values:
        self.sizes.append(len(trials))
        if len(trials) > self.room:
            raise self.error
        return self.inner.run(bucket, trials, measure, tick)


LACKS = [
    torch.OutOfMemoryError("CUDA out of memory"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: not enough memory: you tried to allocate"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize("lack", LACKS, ids=lambda error: type(error).__name__)
def test_a_unit_that_runs_out_of_memory_is_halved_and_gives_the_same(
    llama: tuple[PreTrainedModel, Anatomy], lack: Exception
) -> None:
    model, anatomy = llama
    trials = sweep(anatomy)[:11]
    works, plan = [Work(two_streams(), tuple(trials))], Plan("packed", 256, (Unit(0, tuple(range(11))),))
    narrow = Narrow(executor_named("packed", model, anatomy, Settings(256)), 4, lack)
    ticks: list[tuple[int, int]] = []
    done = list(execute(narrow, plan, works, [logits_measure], lambda unit, layer: ticks.append((unit, layer))))
    assert narrow.sizes == [11, 5, 2, 3, 6, 3, 3]
    assert [d.unit.trials for d in done] == [(0, 1), (2, 3, 4), (5, 6, 7), (8, 9, 10)]
    assert [unit for unit, layer in ticks if layer == 2] == [0, 1, 2, 3]
    joined = Values(torch.cat([d.values.trials for d in done]), done[0].values.streams)
    assert deviation(joined, run("packed", model, anatomy, two_streams(), trials)) <= 1e-6


def test_one_trial_that_runs_out_of_memory_ends_the_run(llama: tuple[PreTrainedModel, Anatomy]) -> None:
    works, plan = [Work(two_streams(), (zero(0, 1), zero(1, 1)))], Plan("packed", 256, (Unit(0, (0, 1)),))
    narrow = Narrow(executor_named("packed", *llama, Settings(256)), 0, LACKS[0])
    with pytest.raises(RunError, match="one trial on 3 prompts of 16 tokens runs out of memory") as error:
        list(execute(narrow, plan, works, [logits_measure]))
    assert error.value.exit_code == ExitCode.FAILED
    assert "task.n" in error.value.remedy


def test_other_runtime_errors_are_not_taken_for_a_lack_of_memory(llama: tuple[PreTrainedModel, Anatomy]) -> None:
    works, plan = [Work(two_streams(), (zero(0, 1), zero(1, 1)))], Plan("packed", 256, (Unit(0, (0, 1)),))
    narrow = Narrow(executor_named("packed", *llama, Settings(256)), 0, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        list(execute(narrow, plan, works, [logits_measure]))
    assert narrow.sizes == [2]


def test_each_unit_can_be_saved_before_the_next_one_begins(llama: tuple[PreTrainedModel, Anatomy]) -> None:
    works = [Work(two_streams(), (zero(0, 1), zero(1, 1)))]
    plan = Plan("packed", 256, (Unit(0, (1,)), Unit(0, (0,))))
    wide = Narrow(executor_named("packed", *llama, Settings(256)), 9, LACKS[0])
    running = execute(wide, plan, works, [logits_measure])
    first: Done = next(running)
    assert (first.unit, wide.sizes) == (Unit(0, (1,)), [1])
    assert [d.unit for d in running] == [Unit(0, (0,))]


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("layer", [0, 2])
def test_a_nan_weight_stops_the_run_and_names_the_layer(executor: str, layer: int) -> None:
    model = build("llama")
    anatomy = find_anatomy(model)
    run(executor, model, anatomy, two_streams(), [zero(0, 3)])
    model.get_parameter(anatomy.layers[layer].module + ".mlp.down_proj.weight")[1, 1] = torch.nan
    with pytest.raises(RunError, match=f"layer {layer} gives NaN or infinity") as error:
        run(executor, model, anatomy, two_streams(), [zero(0, 3)])
    assert error.value.exit_code == ExitCode.FAILED


@pytest.mark.parametrize("executor", EXECUTORS)
def test_an_edit_that_makes_infinity_stops_the_run_unless_told_to_keep_going(
    llama: tuple[PreTrainedModel, Anatomy], executor: str
) -> None:
    edit = Edit(Site("mlp_out", 1), "constant", ((3,),) * PROMPTS, values=torch.full((1, 1, 32), torch.inf))
    trials = [Trial(0, "corrupt", (edit,), EVERY)]
    with pytest.raises(RunError, match="layer 1 gives NaN or infinity"):
        run(executor, *llama, two_streams(), trials)
    lenient = executor_named(executor, *llama, Settings(check_finite=False))
    values = lenient.run(two_streams(), trials, logits_measure).trials[0]
    assert values[:, 3].isnan().all()
