"""The wavefront: one pass over the layers for all trials of a work unit.

Layers are the outer loop, trials the inner one. The streams pass a layer first and leave their keys,
values and what the layer's edits read; then the trials whose first edit lies there are admitted with the
stream's own hidden state, edited, and passed through the layer together with all that are under way.
Two layouts share this loop: *packed* rows from the first edited position on, and whole prompts as a batch
(layer resume, for models whose layers cannot be called row by row). Packed prompts that begin alike share rows, and
in the last layer only the rows that are read go on after attention.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mechinterp_cli.engine.early import ending_in_attention
from mechinterp_cli.engine.edits import Bucket, Edit, Rows, Site, Trial, edited, needed
from mechinterp_cli.engine.gather import Roles, RowIndex, axis_roles, batched_call, packed_call
from mechinterp_cli.engine.groups import Group, Piece, edits_in, group_trials, only_rows, pieces_of
from mechinterp_cli.engine.instrument import Reader, interface_handler, layer_of, module_hooks, visit_heads
from mechinterp_cli.engine.packed_attention import (
    OpenAttention,
    Segment,
    StreamAttention,
    merged_attention,
    native_attention,
)
from mechinterp_cli.errors import RunError
from mechinterp_cli.models.anatomy import Anatomy, device_of
from mechinterp_cli.models.head import narrow_head
from mechinterp_cli.models.interface import AttentionCall, intercepted
from mechinterp_cli.models.walk import LayerCall

Measure = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits [n, vocab], prompt [n], read [n]) to metrics [n, metrics]."""

LAYER_ENDS = frozenset({"embed", "resid_pre", "resid_post"})
CPU_LOGITS_BYTES = 3 * 2**23
"""Below the 32 MiB from which on glibc gives memory back to the system at once, only to be asked for it again."""
GPU_LOGITS_BYTES = 2**27


@dataclass(frozen=True)
class Settings:
    """How an executor works, fixed before anything runs.

    Args:
        rows_per_call: Rows that a layer is called on at once; 512 to 1,024 keep a CPU's caches warm.
        check_finite: Whether NaN or infinity stops the run, with the layer's name.
        tokens: Ids of the tokens whose logits are computed, so that measures are given [n, tokens]; None for the whole
            vocabulary. Plain hooks compute the whole vocabulary whatever it says.
    """

    rows_per_call: int = 1024
    check_finite: bool = True
    tokens: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class Values:
    """What an executor gives: metrics of trials and of the streams they started from.

    Args:
        trials: [trials, prompts, reads, metrics]; NaN for prompts that a trial does not compute.
        streams: Stream name to [prompts, reads, metrics].
    """

    trials: Tensor
    streams: Mapping[str, Tensor]


@dataclass(eq=False)
class Stream:
    """One unedited pass, held at the input of the next layer."""

    calls: list[LayerCall]
    hidden: Tensor
    attention: StreamAttention | None = None
    attended: int = 0
    """How often the last layer that it passed called attention."""


def check_finite(hidden: Tensor, layer: int, what: str) -> None:
    """Stop at the first layer whose output is not finite.

    Raises:
        RunError: NaN or infinity; names the layer.
    """
    if not torch.isfinite(hidden.sum()) and not bool(torch.isfinite(hidden).all()):
        raise RunError(
            f"layer {layer} gives NaN or infinity in {what}",
            "Try model.dtype: float32, or engine.on_nan: record to keep going and mark the rows.",
        )


def logits_chunk(device: torch.device, width: int) -> int:
    """Rows that are unembedded at once where each has so many numbers, most of them its logits."""
    return max(1, (CPU_LOGITS_BYTES if device.type == "cpu" else GPU_LOGITS_BYTES) // (width * 4))


class Wavefront:
    """Executes trials layer by layer; see the module's text.

    Args:
        model: The model, in evaluation mode.
        anatomy: Its anatomy; its layers must be chained.
        packed: Rows from the first edited position on, or whole prompts.
        settings: Sizes.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, *, packed: bool, settings: Settings | None = None) -> None:
        self.model = model
        self.anatomy = anatomy
        self.packed = packed
        self.settings = settings or Settings()
        self.walker = anatomy.walker(model)
        self.device = device_of(model)
        tokens = self.settings.tokens
        self._tokens = None if tokens is None else torch.tensor(tokens, device=self.device)
        self._layer_of = layer_of(model, anatomy)
        self._handler: Callable[[AttentionCall], tuple[Tensor, Tensor | None]] | None = None
        self._activations: dict[tuple[str, Site], Tensor] = {}
        self._edits: dict[Site, list[tuple[Edit, Rows]]] = {}

    def run(
        self,
        bucket: Bucket,
        trials: Sequence[Trial],
        measure: Measure,
        tick: Callable[[int], None] = lambda layer: None,
    ) -> Values:
        """Compute every trial's metrics on the bucket.

        Args:
            bucket: Prompts and streams.
            trials: Trials on this bucket.
            measure: Turns logits into metrics.
            tick: Called after each layer with its index.

        Raises:
            RunError: NaN or infinity in a layer.
            NotGatherable: The model's layers cannot be called row by row (packed only).
        """
        try:
            with torch.no_grad(), intercepted(self.model, self._attend), narrow_head(self.model, self._tokens):
                return self._run(bucket, trials, measure, tick)
        finally:  # these hold the streams' keys, values and activations
            self._handler = None
            self._activations.clear()
            self._edits = {}

    def _run(self, bucket: Bucket, trials: Sequence[Trial], measure: Measure, tick: Callable[[int], None]) -> Values:
        reads = needed(trials)
        names = sorted({trial.stream for trial in trials} | {name for name, _ in reads} | set(bucket.tokens))
        streams = {name: self._begin(bucket, name) for name in names}
        groups = group_trials(trials, bucket, packed=self.packed)
        for group in groups:
            group.place(bucket.read.to(self.device), next(iter(streams.values())).hidden)
        roles = axis_roles(self.walker, bucket.length, self.anatomy.vocab_size, self.device)
        for layer in range(self.anatomy.n_layers + 1):
            self._between(layer, streams, groups, reads)
            if layer == self.anatomy.n_layers:
                break
            for name, stream in streams.items():
                self._advance(layer, name, stream, reads)
            for name in names:
                active = [g for g in groups if g.stream == name and g.active]
                for pieces in pieces_of(active, self.settings.rows_per_call):
                    self._call(layer, streams[name], pieces, roles[layer], bucket.length)
            tick(layer)
        self._activations.clear()
        return self._measure(bucket, trials, groups, streams, measure)

    def _begin(self, bucket: Bucket, name: str) -> Stream:
        calls = self.walker.calls(bucket.tokens[name].to(self.device))
        noise = bucket.noise.get(name)
        hidden = calls[0].hidden
        return Stream(calls, hidden if noise is None else hidden + noise.to(hidden))

    def _between(
        self, layer: int, streams: Mapping[str, Stream], groups: Sequence[Group], reads: set[tuple[str, Site]]
    ) -> None:
        """Admit this layer's trials and make the edits that lie between the layers."""
        sites = [Site("resid_post", layer - 1), Site("resid_pre", layer)] + [Site("embed", 0)] * (layer == 0)
        self._activations.clear()
        for name, stream in streams.items():
            self._activations.update({(name, site): stream.hidden for site in sites if (name, site) in reads})
        for group in groups:
            base = streams[group.stream].hidden
            while group.active < len(group.parts) and group.parts[group.active].first <= layer:
                group.state[group.active] = base[group.prompt_of_row, group.position_of_row]
                group.active += 1
            if group.active:
                self._edit_state(group, frozenset(sites))

    def _edit_state(self, group: Group, sites: frozenset[Site]) -> None:
        flat = group.state[: group.active].view(-1, group.state.shape[-1])
        edits = edits_in([Piece(group, 0, group.active, 0)], sites, self.device)
        for site in (s for s in sorted(sites, key=lambda s: (s.layer, s.kind != "embed")) if s in edits):
            for edit, rows in edits[site]:
                edited(flat, edit, rows, self._activations)

    def _advance(self, layer: int, name: str, stream: Stream, reads: set[tuple[str, Site]]) -> None:
        """Pass one stream through a layer, keeping what edits read and what trials attend to."""
        kinds = frozenset(s.kind for n, s in reads if n == name and s.layer == layer) - LAYER_ENDS
        reader = Reader()
        inner = interface_handler(self.model, self.anatomy, {layer: kinds}, reader)

        def handler(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
            stream.attention = StreamAttention(call.k, call.v, call.mask)
            stream.attended += 1
            return inner(call)

        self._handler, stream.attended = handler, 0
        with module_hooks(self.model, self.anatomy.layers[layer], kinds, reader, layer_ends=False):
            stream.hidden = self.walker.run(layer, stream.calls[layer], stream.hidden)
        if self.settings.check_finite:
            check_finite(stream.hidden, layer, f"the {name} stream")
        self._activations.update({(name, site): x for site, x in reader.seen.items()})

    def _call(self, layer: int, stream: Stream, pieces: list[Piece], roles: Roles, length: int) -> None:
        """Pass some rows through a layer with the edits that lie inside it."""
        kinds = self.anatomy.layers[layer].sites
        sites = frozenset(Site(kind, layer) for kind in kinds if kind not in LAYER_ENDS)
        self._edits = edits_in(pieces, sites, self.device)
        edited_kinds = frozenset(site.kind for site in self._edits)
        rows = torch.cat([piece.state.reshape(-1, piece.state.shape[-1]) for piece in pieces])
        prompt = torch.cat([piece.prompt_of_rows() for piece in pieces])
        if self.packed:
            index = RowIndex(prompt, torch.cat([piece.position_of_rows() for piece in pieces]), length)
            self._handler = self._packed_handler(layer, stream, pieces, edited_kinds)
            read = torch.cat([piece.read_rows() for piece in pieces])
            if layer == self.anatomy.n_layers - 1 and stream.attended == 1 and 2 * len(read) <= len(rows):
                out = self._last(stream, roles, rows, index, read, edited_kinds)
            else:
                call = packed_call(stream.calls[layer], roles, index)
                out = self._through(layer, call, rows[None], edited_kinds)
        else:
            call = batched_call(stream.calls[layer], roles, prompt[::length])
            self._handler = interface_handler(self.model, self.anatomy, {layer: edited_kinds}, self._visit)
            out = self._through(layer, call, torch.unflatten(rows, 0, (-1, length)), edited_kinds)
        if self.settings.check_finite:
            check_finite(out, layer, "an edited pass")
        for piece in pieces:
            piece.state.copy_(out[piece.row : piece.row + piece.rows].view_as(piece.state))

    def _through(self, layer: int, call: LayerCall, hidden: Tensor, kinds: frozenset[str]) -> Tensor:
        """A layer's output as rows [rows, d_model], the edits of these kinds made."""
        with module_hooks(self.model, self.anatomy.layers[layer], kinds, self._visit, layer_ends=False):
            return self.walker.run(layer, call, hidden).reshape(-1, hidden.shape[-1])

    def _last(
        self, stream: Stream, roles: Roles, rows: Tensor, index: RowIndex, read: Tensor, kinds: frozenset[str]
    ) -> Tensor:
        """The last layer: after its attention nobody looks across rows, so only rows that are read go on.

        The others come back as they went in.
        """
        layer = self.anatomy.n_layers - 1
        call, attend = stream.calls[layer], self._handler
        assert attend is not None
        if not len(read):
            return rows
        with ending_in_attention(attend) as known:
            self._handler = known.handler
            self.walker.run(layer, packed_call(call, roles, index), rows[None])
        self._handler = lambda _call: (known.z[:, read], None)
        self._edits = only_rows(self._edits, read, len(rows))
        index = RowIndex(index.prompt[read], index.position[read], index.length)
        return rows.index_copy(0, read, self._through(layer, packed_call(call, roles, index), rows[None, read], kinds))

    def _visit(self, site: Site, activation: Tensor) -> Tensor | None:
        """Make this call's edits at a site."""
        edits = self._edits.get(site)
        if not edits:
            return None
        flat = activation.reshape(-1, *activation.shape[2:]).clone()
        for edit, rows in edits:
            edited(flat, edit, rows, self._activations)
        return flat.view(activation.shape)

    def _attend(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """Attention calls of decoder layers go to the handler of the moment, all others their own way."""
        if self._handler is None or id(call.module) not in self._layer_of:
            return call.native(call.q, call.k, call.v, call.mask)
        return self._handler(call)

    def _packed_handler(
        self, layer: int, stream: Stream, pieces: list[Piece], kinds: frozenset[str]
    ) -> Callable[[AttentionCall], tuple[Tensor, Tensor | None]]:
        known = self.anatomy.layers[layer].known_softmax
        segments = [
            Segment(p.row, p.row + p.rows, p.high - p.low, g.start, g.prompts, g.width, g.shared)
            for p in pieces
            for g in (p.group,)
        ]

        def handler(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
            assert stream.attention is not None
            q, k, v = (
                visit_heads(self._visit, Site(kind, layer), x) if kind in kinds else x
                for kind, x in (("q", call.q), ("k", call.k), ("v", call.v))
            )
            call = replace(call, q=q, k=k, v=v)
            if kinds & {"scores", "pattern"}:
                z = self._open_attention(layer, OpenAttention(call, stream.attention, segments))
            else:
                z = (merged_attention if known else native_attention)(call, stream.attention, segments)
            new = self._visit(Site("z", layer), z)
            return (z if new is None else new), None

        return handler

    def _open_attention(self, layer: int, attention: OpenAttention) -> Tensor:
        scores = self._visit(Site("scores", layer), attention.scores)
        pattern = attention.pattern(attention.scores if scores is None else scores)
        changed = self._visit(Site("pattern", layer), pattern)
        return attention.z(pattern if changed is None else changed)

    def _measure(
        self,
        bucket: Bucket,
        trials: Sequence[Trial],
        groups: Sequence[Group],
        streams: Mapping[str, Stream],
        measure: Measure,
    ) -> Values:
        """Unembed the last hidden states at the positions that are read, and measure."""
        read = bucket.read.to(self.device)
        prompts = torch.arange(bucket.size, device=self.device)
        finals = {name: stream.hidden[prompts[:, None], read] for name, stream in streams.items()}
        base = {name: self._metrics(final, prompts, measure) for name, final in finals.items()}
        n_metrics = next(iter(base.values())).shape[-1]
        shape = (len(trials), bucket.size, read.shape[1], n_metrics)
        values = torch.full(shape, torch.nan, dtype=torch.float64, device=self.device)
        for slot, trial in enumerate(trials):  # prompts that no edit reaches stay as the stream has them
            values[slot, list(trial.prompts)] = base[trial.stream][list(trial.prompts)]
        for group in groups:
            at = read[group.prompts]
            final, before = group.state[:, group.rows_at(at)], finals[group.stream][group.prompts]
            final = torch.where((at >= group.start)[None, :, :, None], final, before[None])
            slots = torch.tensor([part.slot for part in group.parts], device=self.device)
            metrics = self._metrics(final.flatten(0, 1), group.prompts.repeat(len(group.parts)), measure)
            values[slots[:, None], group.prompts[None]] = torch.unflatten(metrics, 0, (len(group.parts), -1))
        return Values(values.cpu(), {name: x.cpu() for name, x in base.items()})

    @property
    def _width(self) -> int:
        """Numbers of a row on its way through the model's end: its logits, or the norm's three copies of the state."""
        if self._tokens is None:
            return self.anatomy.vocab_size
        return max(len(self._tokens), 3 * self.anatomy.d_model)

    def _metrics(self, final: Tensor, prompts: Tensor, measure: Measure) -> Tensor:
        """Metrics [items, reads, metrics] of final hidden states [items, reads, d_model]."""
        items, reads = final.shape[:2]
        flat = final.reshape(items * reads, -1)
        prompt = prompts.repeat_interleave(reads)
        read = torch.arange(reads, device=self.device).repeat(items)
        chunk = logits_chunk(self.device, self._width)
        parts = [
            measure(self.walker.unembed(flat[i : i + chunk]), prompt[i : i + chunk], read[i : i + chunk]).double()
            for i in range(0, len(flat), chunk)
        ]
        return torch.unflatten(torch.cat(parts), 0, (items, reads))
