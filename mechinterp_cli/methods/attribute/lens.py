"""Logit lens: what the model's own final norm and head make of residual streams on the way (nostalgebraist 2020)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp_cli.engine.capture import TOKENS_PER_PASS, UNEMBED_TOLERANCE
from mechinterp_cli.engine.edits import Site
from mechinterp_cli.engine.instrument import kinds_by_layer, visiting
from mechinterp_cli.engine.wavefront import check_finite, logits_chunk
from mechinterp_cli.methods.attribute.options import LensOptions
from mechinterp_cli.methods.bench import Bench
from mechinterp_cli.methods.binder import Binder
from mechinterp_cli.methods.experiment import Setting
from mechinterp_cli.methods.tables import look_up
from mechinterp_cli.metrics import Readout, Reference, Targets, at_least_float32, kl, prob, rank
from mechinterp_cli.models.anatomy import device_of
from mechinterp_cli.models.loaded import LoadedModel
from mechinterp_cli.models.walk import forward
from mechinterp_cli.tasks.tokenise import Encoder
from mechinterp_cli.token_sets import TokenSets

PATH = ("attribute", "lens")
STREAM_BYTES = 256 * 2**20
"""Residual streams that are held at once."""

Arrays = dict[str, npt.NDArray[Any]]


def check_lens(options: LensOptions, setting: Setting) -> None:
    """Refuse streams and positions that are not there, before any forward pass.

    Raises:
        UserError: A kind that the model lacks, a layer, position or span that is not there; names file, line and key.
    """
    _Plan(options, setting).check()


@dataclass(frozen=True, eq=False)
class _Plan:
    """Which streams are read, and where.

    Args:
        options: What is asked for.
        setting: Model and prompts.
    """

    options: LensOptions
    setting: Setting

    @cached_property
    def _binder(self) -> Binder:
        return Binder(self.setting.loaded, "attribute", self.setting.model.anatomy, self.setting.prompts)

    def check(self) -> None:
        """Bring everything to the model and the prompts."""
        assert self.sites
        assert self.spots

    @cached_property
    def sites(self) -> list[Site]:
        """The streams, by kind and layer."""
        return [site for number, kind in enumerate(self.options.kinds) for site in self._of_kind(number, kind)]

    def _of_kind(self, number: int, kind: str) -> Iterator[Site]:
        anatomy = self.setting.model.anatomy
        if kind not in anatomy.sites:
            have = ", ".join(name for name in anatomy.sites if name == "embed" or name.startswith("resid"))
            problem = f"{kind}: {anatomy.layers[-1].missing[kind]}"
            raise self.setting.loaded.error((*PATH, "kinds", number), problem, f"Streams of this model: {have}.")
        layers = "all" if kind == "embed" else self.options.layers
        for layer, _ in self._binder.layers((kind,), layers, PATH, kind):
            yield Site(kind, layer)

    @cached_property
    def spots(self) -> list[dict[int, str]]:
        """Of each prompt its positions, rising, with the names of the spans that they were asked for by."""
        found: list[dict[int, list[str]]] = [{} for _ in self.setting.prompts.prompts]
        for place in self._binder.places(self.options.positions, PATH):
            for spots, positions in zip(found, place.positions, strict=True):
                for position in positions or ():
                    spots.setdefault(position, []).extend([place.span] if place.span else [])
        return [{at: ", ".join(dict.fromkeys(spots[at])) for at in sorted(spots)} for spots in found]

    def batches(self) -> Iterator[list[int]]:
        """Prompts of one length, no more than whose streams may be held."""
        anatomy, prompts = self.setting.model.anatomy, self.setting.prompts
        for length, members in prompts.buckets().items():
            most = max(len(self.spots[i]) for i in members)
            bytes_per_prompt = 4 * anatomy.d_model * (len(self.sites) + 1) * max(1, most)
            step = max(1, min(TOKENS_PER_PASS // length, STREAM_BYTES // bytes_per_prompt))
            yield from (list(members[i : i + step]) for i in range(0, len(members), step))


@dataclass(frozen=True, eq=False)
class _Rows:
    """Places in a batch that are read: one row each."""

    member: Int[Tensor, " rows"]
    """Which of the batch."""
    prompt: npt.NDArray[np.int64]
    """Which of the set."""
    position: npt.NDArray[np.int64]

    @classmethod
    def of(cls, plan: _Plan, members: Sequence[int], device: torch.device) -> "_Rows":
        """The rows of some prompts."""
        pairs = [(row, i, at) for row, i in enumerate(members) for at in plan.spots[i]]
        table = np.array(pairs, dtype=np.int64).reshape(-1, 3)
        return cls(torch.from_numpy(table[:, 0].copy()).to(device), table[:, 1], table[:, 2])


def lens_tables(options: LensOptions, setting: Setting, bench: Bench) -> dict[str, Any]:
    """Read the clean prompts' residual streams through the model's own final norm and head.

    A row is one of the likeliest tokens (`rank` 0 is the likeliest) of one stream at one position. Beside it stand
    the answer's probability (of a set: their sum), its rank (how many tokens are strictly likelier than its best) and
    `kl` = Σ_vocab p_output (log p_output − log p_lens), in nats: how far the lens is from what the model puts out at
    that position. The answer is the one to the whole prompt, at whichever position. Soft-capping and multipliers of
    logits are the model's own. Where `engine.on_nan` lets NaN pass, numbers are NaN and the answer's rank is null.

    Args:
        options: Which streams, layers, positions.
        setting: Model and prompts, checked by `check_lens`.
        bench: Told of progress and of what was proved.

    Returns:
        Table `lens`.

    Raises:
        UserError: The last residual stream alone does not give this model's logits.
        RunError: NaN or infinity in a stream.
    """
    bench.stage("reading residual streams through the final norm and head")
    plan = _Plan(options, setting)
    reader = _Reader(plan, setting.model, finite=bench.engine.on_nan == "error")
    parts: list[Arrays] = []
    done, total = 0, len(setting.prompts.prompts)
    for members in plan.batches():
        parts += reader.read(members)
        done += len(members)
        bench.progress.advance(done, total)
    bench.note({"lens": {"deviation": reader.deviation, "tolerance": reader.tolerance}})
    return {"lens": _table(parts, plan)}


class _Reader:
    """Reads batches of prompts.

    Args:
        plan: What is read.
        model: The model.
        finite: Whether NaN and infinity stop it.
    """

    def __init__(self, plan: _Plan, model: LoadedModel, *, finite: bool) -> None:
        self.plan = plan
        self.model = model
        self.finite = finite
        self.device = device_of(model.model)
        self.walker = model.anatomy.walker(model.model)
        self.last = Site("resid_post", model.anatomy.n_layers - 1)
        self.tolerance = max(UNEMBED_TOLERANCE, 3 * torch.finfo(next(model.model.parameters()).dtype).eps)
        self.deviation = 0.0
        """Largest difference of the last stream's logits from the model's own, in parts of the largest logit."""
        self._answers = TokenSets.of([prompt.answer for prompt in plan.setting.prompts.prompts], self.device)

    @torch.no_grad()
    def read(self, members: Sequence[int]) -> Iterator[Arrays]:
        """Columns of the rows of some prompts of one length."""
        rows = _Rows.of(self.plan, members, self.device)
        streams = self._streams(members, rows)
        step = logits_chunk(self.device, self.model.anatomy.vocab_size)
        for start in range(0, len(rows.prompt), step):
            part = slice(start, start + step)
            output = Reference.of(self.walker.unembed(streams[self.last][part]))
            for number, site in enumerate(self.plan.sites):
                logits = at_least_float32(self.walker.unembed(streams[site][part]))
                columns = self._columns(logits, output, rows.prompt[part])
                kept = columns["rank"].shape[1]
                where = {"prompt": rows.prompt[part], "position": rows.position[part]}
                where |= {"site": np.full(len(logits), number)}
                yield {name: np.repeat(own, kept) for name, own in where.items()} | {
                    name: (own if own.ndim == 2 else np.repeat(own[:, None], kept, axis=1)).ravel()
                    for name, own in columns.items()
                }

    def _streams(self, members: Sequence[int], rows: _Rows) -> dict[Site, Float[Tensor, "rows d_model"]]:
        """The streams at the rows, from one pass; the last one is held against the model's own logits."""
        prompts = self.plan.setting.prompts.prompts
        tokens = torch.tensor([prompts[i].clean_tokens for i in members], device=self.device)
        position = torch.from_numpy(rows.position).to(self.device)
        ends: list[Tensor] = []
        seen: dict[Site, Tensor] = {}

        def visit(site: Site, activation: Tensor) -> None:
            seen[site] = activation[rows.member, position]
            if self.finite:
                check_finite(seen[site], site.layer, site.kind)
            if site == self.last:
                ends.append(activation[:, -1].clone())

        with visiting(self.model.model, self.model.anatomy, kinds_by_layer({*self.plan.sites, self.last}), visit):
            native = forward(self.model.model, tokens, last_only=True)[:, -1].float()
        self._prove(ends[0], native)
        return seen

    def _prove(self, ends: Float[Tensor, "prompts d_model"], native: Float[Tensor, "prompts vocab"]) -> None:
        step = logits_chunk(self.device, self.model.anatomy.vocab_size)
        finite = torch.where(native.isfinite(), native, 0)
        own = torch.cat([self.walker.unembed(part).float() for part in torch.split(ends, step)])
        off = (torch.where(native.isfinite(), own, 0) - finite).abs().max() / finite.abs().max()
        if not bool(off <= self.tolerance) and bool(ends.isfinite().all()):
            problem = f"what leaves the last layer does not give this model's own logits (off by {float(off):.1e})"
            raise self.plan.setting.loaded.error(PATH, problem, "Leave lens out for this model.")
        self.deviation = max(self.deviation, float(off))

    def _columns(self, logits: Float[Tensor, "rows vocab"], output: Reference, prompt: npt.NDArray[np.int64]) -> Arrays:
        """What is said of rows, [rows], and of their likeliest tokens, [rows, top]."""
        at = torch.from_numpy(prompt).to(self.device)
        answers = self._answers.at(at)
        readout = Readout(logits, Targets(torch.arange(len(logits), device=self.device), answers, answers, output))
        top = logits.topk(min(self.plan.options.top, logits.shape[1]), dim=-1)
        probability = (top.values.to(readout.log_partition.dtype) - readout.log_partition[:, None]).exp()
        found = {"probability": probability, "kl": kl(readout)}
        if answers.mask.shape[1]:
            found |= {"answer_probability": prob(readout), "answer_rank": rank(readout)}
        found = {name: values + readout.poison.reshape(-1, *[1] * (values.ndim - 1)) for name, values in found.items()}
        columns: Arrays = {name: values.cpu().numpy() for name, values in found.items()}
        columns["token_id"] = top.indices.cpu().numpy()
        columns["rank"] = np.tile(np.arange(top.indices.shape[1]), (len(logits), 1))
        columns["asked"] = answers.mask.any(-1).cpu().numpy()
        return columns


def _table(parts: Sequence[Arrays], plan: _Plan) -> pa.Table:
    """All rows, by prompt, stream, position and rank."""
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.lexsort(tuple(whole[name] for name in ("rank", "position", "site", "prompt")))
    whole = {name: values[order] for name, values in whole.items()}
    asked = whole.pop("asked")
    nothing = np.full(len(asked), np.nan)
    probability, ranks = (whole.pop(name, nothing) for name in ("answer_probability", "answer_rank"))
    prompts = plan.setting.prompts.prompts
    starts = np.cumsum([0, *(prompt.length for prompt in prompts)])[:-1]
    spans = [own.get(at) or None for own, one in zip(plan.spots, prompts, strict=True) for at in range(one.length)]
    named = {
        "site": look_up([site.kind for site in plan.sites], pa.string(), whole["site"]),
        "layer": look_up([site.layer for site in plan.sites], pa.int32(), whole["site"]),
        "span": look_up(spans, pa.string(), starts[whole["prompt"]] + whole["position"]),
        "token": _tokens(plan.setting.model, whole["token_id"]),
        "answer_rank": pa.array(np.nan_to_num(ranks).astype(np.int32), mask=~asked | np.isnan(ranks)),
        "answer_probability": pa.array(probability, mask=~asked, from_pandas=False),
    }
    return pa.table({name: pa.array(values) for name, values in whole.items()} | named)


def _tokens(model: LoadedModel, ids: npt.NDArray[np.int64]) -> pa.ChunkedArray:
    """Tokens as text; each is looked up once."""
    encoder = Encoder.of(model.tokenizer, add_bos=False, vocab_size=model.anatomy.vocab_size)
    distinct, row = np.unique(ids, return_inverse=True)
    return look_up(encoder.strings(tuple(distinct.tolist())), pa.string(), row.reshape(-1))
