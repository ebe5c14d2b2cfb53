"""A decode step of the whole model as one program in C: no Python, no torch and no barrier between its operations.

A step of the 0.8B model is 250 operations; called one by one from Python each costs some 20 us beside its work, 5 ms of
a step that takes 25. So for given weights, buffers, B sequences and S tokens the operations are written down once (10
per linear-attention layer, 11 per full one) and run by one call. What changes from step to step (tokens, positions,
slots, lengths, cosines) lies in tensors that every call fills first.

Between operations everything is float32 (one or eight rows: no memory to save), rounded to its type where it stays: in
the KV cache, the states and the hidden states that come out. Activations of a matmul become int16 as in
`matmul.py`; a norm and the delta rule hand them over already rounded. One to eight rows take the same sums in the
same order, so that a step that checks drafts computes the same logits as steps without.

A program lives in `buffers.programs` and holds addresses of the model's tensors, which never move. Where `unsupported`
has something to say the model runs its operations one by one.
"""

from dataclasses import replace

import torch
from torch import Tensor

from ..layout.kv_cache import KVCache
from ..layout.rows import Weight
from ..layout.rows import rows_of as matrix_rows
from ..runtime.layers import MLP, DecodeStep, Experts, FullAttention, LinearAttention
from ..runtime.memory import Buffers
from ..runtime.model import Model
from .attention import SPLITS, cache_fields
from .library import CpuLibrary, cpu_library
from .matmul import planes_of
from .operations import address, operation, pointer, rows_of, slots_of
from .writer import Source, Writer, matrix_of, side_by_side, vector_of

MOST_EXPERTS = 1024


def decode(model: Model, tokens: Tensor, step: DecodeStep, buffers: Buffers) -> Tensor:
    """One step: tokens int64 [B S] -> hidden states after the final norm [B S, E]; caches and states are brought up to
    date."""
    library = cpu_library()
    if unsupported(model, library):
        from ..runtime.model import forward

        return forward(replace(model, operations=replace(model.operations, decode=None)), tokens, step, buffers)
    batch, steps = step.target.shape
    key = ("cpu", id(model), batch, steps, library.isa)
    program = buffers.programs.get(key)
    if program is None or program.norm is not model.norm:  # another model may have come to lie where one was
        program = buffers.programs[key] = DecodeProgram(model, buffers, batch, steps, library)
    return program.run(tokens, step)


def unsupported(model: Model, library: CpuLibrary) -> str | None:
    """Why a decode step cannot be one program; None if it can."""
    configuration = model.configuration
    if library.path != "c":
        return library.reason
    if model.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the program computes in float32, not {model.dtype}"
    for name in ("head_dim", "linear_key_head_dim", "linear_value_head_dim"):
        size = getattr(configuration, name)
        if size % 16 or size > (512 if name == "head_dim" else 256):
            return f"{name} is {size}: the program wants a multiple of 16"
    if configuration.linear_conv_kernel_dim > 4 or configuration.num_experts > MOST_EXPERTS:
        return "more than four taps or 1024 experts"
    return None


class DecodeProgram:
    """The program of one model, its buffers, B sequences and S tokens of each. Rows R = B S."""

    def __init__(self, model: Model, buffers: Buffers, batch: int, steps: int, library: CpuLibrary) -> None:
        self.norm, self.configuration = model.norm, model.configuration
        self.batch, self.steps, self.rows = batch, steps, batch * steps
        self.writer = Writer(library, self.rows, planes_of(model.dtype))
        self._prepare_inputs()
        self.hidden = torch.empty(self.rows, self.configuration.hidden_size, dtype=model.dtype)
        self._write(model, buffers)

    def run(self, tokens: Tensor, step: DecodeStep) -> Tensor:
        self.tokens.copy_(tokens)
        for name, index in self.indices.items():
            index.copy_(getattr(step, name).view(-1))
        self.cos.copy_(step.cos)
        self.sin.copy_(step.sin)
        self.writer.program.run()
        return self.hidden.clone()

    def _prepare_inputs(self) -> None:
        def integers(count: int) -> Tensor:
            return torch.zeros(count, dtype=torch.int32)

        self.tokens = integers(self.rows)
        self.indices = {name: integers(self.batch) for name in ("sequences", "lengths", "source")}
        self.indices |= {name: integers(self.rows) for name in ("target", "token_sequences", "positions")}
        fraction = self.configuration.rope.get("partial_rotary_factor", 1.0)
        half = int(self.configuration.head_dim * fraction) // 2
        self.cos, self.sin = torch.zeros(self.rows, half), torch.zeros(self.rows, half)

    def _write(self, model: Model, buffers: Buffers) -> None:
        writer, eps = self.writer, self.configuration.rms_norm_eps
        residual = writer.buffer("residual", self.configuration.hidden_size)
        table, held = matrix_of(model.embedding, residual)
        embed = operation(
            "EMBED", tokens=pointer(self.tokens), count=self.rows, matrix=address(table), y=rows_of(residual)
        )
        writer.program.add(embed, table, held)
        caches, states = iter(buffers.caches), iter(zip(buffers.states, buffers.conv_states, strict=True))
        x: Tensor | None = None
        for layer in model.layers:
            attention, mlp = layer.attention, layer.mlp
            source = writer.norm(x, residual, layer.input_norm, eps, _readers(attention))
            if isinstance(attention, LinearAttention):
                x = self._linear_attention(attention, source, *next(states))
            else:
                x = self._full_attention(attention, source, next(caches))
            source = writer.norm(x, residual, layer.post_norm, eps, _readers(mlp))
            x = self._mlp(mlp, source) if isinstance(mlp, MLP) else self._experts(mlp, source)
        writer.norm(x, residual, model.norm, eps, (), self.hidden)

    def _linear_attention(self, layer: LinearAttention, source: Source, state: Tensor, conv_state: Tensor) -> Tensor:
        writer, configuration = self.writer, self.configuration
        channels, values = configuration.conv_dim, configuration.value_dim
        heads, head_dim = configuration.linear_num_value_heads, configuration.linear_value_head_dim
        projected, ba = writer.buffer("linear_in", channels + values), writer.buffer("ba", 2 * heads)
        writer.linear(source, [*side_by_side(layer.in_proj, projected), *side_by_side(layer.in_proj_ba, ba)])
        mixed, taps = writer.buffer("mixed", channels), layer.conv1d.contiguous()
        where = {"source": pointer(self.indices["source"]), "target": pointer(self.indices["target"])}
        where |= {"sequences": self.batch, "steps": self.steps}
        convolution = operation(
            "CONV_UPDATE",
            x=rows_of(projected),
            weight=rows_of(taps),
            y=rows_of(mixed),
            state=slots_of(conv_state),
            channels=channels,
            taps=taps.shape[1],
            **where,
        )
        writer.program.add(convolution, None if taps is layer.conv1d else taps)
        reader, out = layer.out_proj, writer.buffer("delta_out", values)
        rounded = writer.rounds("delta_out", values, (reader,))
        is_block = head_dim == 128 and len(rounded) > 0  # a head is a block of activations: rounded where it is made
        a_log, dt_bias = (x.float().contiguous() for x in (layer.A_log, layer.dt_bias))
        rule = operation(
            "DELTA_STEP",
            qkv=rows_of(mixed),
            a=rows_of(ba[:, heads:]),
            b=rows_of(ba[:, :heads]),
            state=slots_of(state),
            y=rows_of(out),
            a_log=pointer(a_log),
            dt_bias=pointer(dt_bias),
            key_heads=configuration.linear_num_key_heads,
            value_heads=heads,
            key_dim=configuration.linear_key_head_dim,
            value_dim=head_dim,
            norm_weight=vector_of(layer.norm),
            gate=rows_of(projected[:, channels:]),
            eps=configuration.rms_norm_eps,
            rounded=address(next(iter(rounded.values()))) if is_block else None,
            **where,
        )
        writer.program.add(rule, *(x for x in (a_log, dt_bias) if x is not layer.A_log and x is not layer.dt_bias))
        return self._out(reader, Source(out, rounded) if is_block else writer.unrounded(out, rounded))

    def _full_attention(self, layer: FullAttention, source: Source, cache: KVCache) -> Tensor:
        writer, configuration = self.writer, self.configuration
        heads, kv_heads, size = (
            configuration.num_attention_heads,
            configuration.num_key_value_heads,
            configuration.head_dim,
        )
        width, kv_width = heads * size, kv_heads * size
        projected = writer.buffer("attention_in", 2 * width + 2 * kv_width)
        writer.linear(source, side_by_side(layer.in_proj, projected))
        q, gate, k, v = projected.split((width, width, kv_width, kv_width), dim=-1)
        turned, out = writer.buffer("turned", width), writer.buffer("attention_out", width)
        shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": size, **cache_fields(cache)}
        store = operation(
            "ROPE_STORE",
            q=rows_of(q),
            k=rows_of(k),
            v=rows_of(v),
            q_out=rows_of(turned),
            q_head_stride=size,
            q_norm=vector_of(layer.q_norm),
            k_norm=vector_of(layer.k_norm),
            cosines=pointer(self.cos),
            sines=pointer(self.sin),
            slots=pointer(self.indices["token_sequences"]),
            positions=pointer(self.indices["positions"]),
            tokens=self.rows,
            half=self.cos.shape[1],
            eps=configuration.rms_norm_eps,
            **shape,
        )
        writer.program.add(store)
        partial = writer.buffer("partial", heads * SPLITS * (size + 2))
        for name in ("ATTENTION", "ATTENTION_JOIN"):
            attention = operation(
                name,
                q=rows_of(turned),
                gate=rows_of(gate),
                y=rows_of(out),
                gate_head_stride=size,
                slots=pointer(self.indices["sequences"]),
                lengths=pointer(self.indices["lengths"]),
                sequences=self.batch,
                steps=self.steps,
                splits=SPLITS,
                partial=pointer(partial),
                **shape,
            )
            writer.program.add(attention)
        rounded = writer.rounds("attention_out", width, (layer.out_proj,))
        return self._out(layer.out_proj, writer.unrounded(out, rounded))

    def _out(self, weight: Weight, source: Source) -> Tensor:
        """An output projection."""
        y = self.writer.buffer("out", self.configuration.hidden_size)
        self.writer.linear(source, [(weight, y)])
        return y

    def _mlp(self, layer: MLP, source: Source, name: str = "mlp") -> Tensor:
        writer = self.writer
        both = writer.buffer(f"{name}_both", sum(map(matrix_rows, layer.gate_up)))
        writer.linear(source, side_by_side(layer.gate_up, both))
        y = writer.buffer(f"{name}_out", self.configuration.hidden_size)
        writer.linear(writer.gated(f"{name}_inner", both, (layer.down,)), [(layer.down, y)])
        return y

    def _experts(self, layer: Experts, source: Source) -> Tensor:
        writer, hidden, rows = self.writer, self.configuration.hidden_size, self.rows * layer.per_token
        experts = layer.router.shape[0]
        logits, shared_gate = writer.buffer("router", experts), writer.buffer("shared_gate", 1)
        writer.linear(source, [(layer.router, logits), (layer.shared_gate, shared_gate)])
        shared = self._mlp(layer.shared, source, "shared")
        gather, chosen, offsets, active = (torch.zeros(n, dtype=torch.int32) for n in (rows, rows, rows + 1, 2))
        weights = torch.zeros(rows)
        routes = {"gather": pointer(gather), "weights": pointer(weights), "tokens": self.rows}
        route = operation(
            "ROUTE",
            logits=pointer(logits),
            experts_count=experts,
            top=layer.per_token,
            offsets=pointer(offsets),
            experts=pointer(chosen),
            active=pointer(active),
            **routes,
        )
        writer.program.add(route, gather, chosen, offsets, active, weights)
        floats, rounded = (
            writer.buffer("routed_in", hidden, rows),
            writer.rounds("routed_in", hidden, layer.gate_up, rows),
        )
        for out in rounded.values() or [None]:
            writer.program.add(writer.rounding(rows_of(source.floats), hidden, out, y=floats, gather=gather, rows=rows))
        routing = {"offsets": offsets, "experts": chosen, "active": active}
        both = writer.buffer("routed_both", sum(map(matrix_rows, layer.gate_up)), rows)
        writer.linear(Source(floats, rounded), side_by_side(layer.gate_up, both), routing)
        routed = writer.buffer("routed_out", hidden, rows)
        writer.linear(writer.gated("routed_inner", both, (layer.down,)), [(layer.down, routed)], routing)
        y = writer.buffer("experts_out", hidden)
        combine = operation(
            "COMBINE",
            x=rows_of(routed),
            shared=rows_of(shared),
            shared_gate=rows_of(shared_gate),
            y=rows_of(y),
            rows=rows,
            columns=hidden,
            **routes,
        )
        writer.program.add(combine)
        return y


def _readers(part: LinearAttention | FullAttention | MLP | Experts) -> tuple[Weight, ...]:
    """The weights that read a norm's result."""
    if isinstance(part, LinearAttention):
        return (*part.in_proj, *part.in_proj_ba)
    if isinstance(part, FullAttention):
        return part.in_proj
    return part.gate_up if isinstance(part, MLP) else part.shared.gate_up
