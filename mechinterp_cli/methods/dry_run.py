"""What a job will take, without computing it."""

import time
from typing import Any

import torch

from mechinterp_cli.config.schema import EngineOptions
from mechinterp_cli.engine.execute import EXECUTORS
from mechinterp_cli.engine.narrow import whole_reason
from mechinterp_cli.engine.plan import cost
from mechinterp_cli.engine.proof import unfit
from mechinterp_cli.methods.bench import plan_of
from mechinterp_cli.methods.job import Job
from mechinterp_cli.models.anatomy import device_of
from mechinterp_cli.models.loaded import LoadedModel


def cost_of(engine: EngineOptions, model: LoadedModel, job: Job) -> dict[str, Any]:
    """Executor, trials, units, rows, FLOPs, bytes and seconds of a job; one matrix product is timed."""
    candidates = EXECUTORS if engine.executor == "auto" else (engine.executor,)
    executor = next((name for name in candidates if unfit(name, model.anatomy) is None), candidates[-1])
    tokens = job.tokens
    whole = tokens is None or whole_reason(model.model, model.anatomy, tokens, executor) is not None
    columns = None if tokens is None or whole else len(tokens)
    costs = [cost(model.model, model.anatomy, work, executor, columns) for work in job.works]
    total = sum(costs[1:], costs[0])
    return {
        "executor": f"{executor}, if it proves itself",
        "trials": job.trials,
        "computed": total.items,
        "units": len(plan_of(engine, model, job, executor).units),
        "rows": total.rows,
        "flops": total.flops,
        "bytes": total.bytes,
        "seconds": round(total.flops / matmul_rate(device_of(model.model)), 1),
    }


def matmul_rate(device: torch.device) -> float:
    """FLOP/s of one float32 matrix product of a layer's size, measured now; an estimate's denominator."""
    a, b = torch.ones(1024, 512, device=device), torch.ones(512, 2048, device=device)
    (a @ b).sum().item()
    start = time.perf_counter()
    for _ in range(4):
        (a @ b).sum().item()
    return 4 * 2 * a.shape[0] * a.shape[1] * b.shape[1] / (time.perf_counter() - start)
