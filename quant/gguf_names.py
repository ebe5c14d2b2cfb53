"""Qwen3.5's tensors as llama.cpp wants them: their names in a GGUF file, and what is done to each on the way.

The rules are those of llama.cpp b11434 `conversion/qwen.py` (_QwenMtpMixin, Qwen3NextModel and
_LinearAttentionVReorderBase, modify_tensors) and `conversion/base.py` (prepare_tensors): RMSNorm weights plus one, but
for the gated norm of the DeltaNet; A_log as -exp; conv1d without its middle dimension; and value heads in another
order. A checkpoint has the value heads of one key head side by side; ggml repeats key heads as a whole, so value head
v of key head k moves from k r + v to v K + k (K key heads, r value heads each). That permutes rows of in_proj_qkv (its
value part), in_proj_z, in_proj_a, in_proj_b, conv1d, A_log and dt_bias, and the columns of out_proj: its groups are
those of the new order, so it has to be permuted before it is calibrated (`column_order`).
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..profiles.errors import Unsupported
from ..profiles.json_file import short
from ..profiles.model import Model
from .source import Source

_LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "linear_attn.in_proj_qkv.weight": "attn_qkv.weight",
    "linear_attn.in_proj_z.weight": "attn_gate.weight",
    "linear_attn.in_proj_a.weight": "ssm_alpha.weight",
    "linear_attn.in_proj_b.weight": "ssm_beta.weight",
    "linear_attn.conv1d.weight": "ssm_conv1d.weight",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "linear_attn.A_log": "ssm_a",
    "linear_attn.norm.weight": "ssm_norm.weight",
    "linear_attn.out_proj.weight": "ssm_out.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.shared_expert_gate.weight": "ffn_gate_inp_shexp.weight",
    "mlp.shared_expert.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_expert.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_expert.down_proj.weight": "ffn_down_shexp.weight",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
}
_EXPERT_NAMES = {"gate": "ffn_gate_exps.weight", "up": "ffn_up_exps.weight", "down": "ffn_down_exps.weight"}
_TEXT_NAMES = {
    "embed_tokens.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_MTP_NAMES = {
    "fc.weight": "nextn.eh_proj.weight",
    "pre_fc_norm_embedding.weight": "nextn.enorm.weight",
    "pre_fc_norm_hidden.weight": "nextn.hnorm.weight",
    "norm.weight": "nextn.shared_head_norm.weight",
}
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")
# Small or sensitive: the reader of these takes F32 (`conversion/base.py`), and in_proj_a and in_proj_b set the decay.
_FLOAT32 = ("ssm_alpha.weight", "ssm_beta.weight", "ssm_conv1d.weight", "ffn_gate_inp.weight")


class Piece(NamedTuple):
    """A tensor of the source, or part of one, and where it goes in the GGUF file.

    shape: of the whole GGUF tensor, row length last. rows: which rows of every matrix of the source tensor (the gate or
    the up half of fused experts); None: all. expert: the matrix of the GGUF tensor that it fills; None: all of it.
    """

    name: str
    shape: tuple[int, ...]
    source: str
    rows: slice | None = None
    expert: int | None = None

    @property
    def is_matrix(self) -> bool:
        """Whether it may be quantized: a matrix or a stack of them that llama.cpp does not want in F32."""
        return len(self.shape) > 1 and not self.name.endswith(_FLOAT32)


def pieces(source: Source) -> tuple[Piece, ...]:
    """All text and prediction tensors of a checkpoint, in its order. llama.cpp keeps vision in a file of its own.

    `Unsupported` for a tensor that has no place in a GGUF file, and for Qwen3-Next.
    """
    if source.model.architecture not in ("qwen3_5", "qwen3_5_moe"):
        raise Unsupported(
            f"{source.folder} is {source.model.architecture}; GGUF files are written of Qwen3.5: take another format"
        )
    return tuple(piece for name in source.names() for piece in _pieces_of(name, source))


def _pieces_of(name: str, source: Source) -> Iterator[Piece]:
    model, shape = source.model, source.shape(name)
    bare = name.removeprefix("model.").removeprefix("language_model.")
    if bare.startswith("visual."):
        return
    is_mtp = bare.startswith("mtp.")
    bare = bare.removeprefix("mtp.")
    layer = _LAYER.fullmatch(bare)
    if layer is None:
        known = _MTP_NAMES if is_mtp else _TEXT_NAMES
        if bare in known:
            prefix = f"blk.{model.num_layers}." if is_mtp else ""
            yield Piece(prefix + known[bare], shape, name)
            return
    else:
        block, leaf = f"blk.{int(layer[1]) + model.num_layers * is_mtp}.", layer[2]
        expert = _EXPERT.fullmatch(leaf)
        if leaf == "mlp.experts.gate_up_proj":
            half = shape[1] // 2
            for part, rows in (("gate", slice(0, half)), ("up", slice(half, 2 * half))):
                yield Piece(block + _EXPERT_NAMES[part], (shape[0], half, shape[2]), name, rows)
            return
        if expert is not None:
            whole = (model.num_experts, *shape)
            yield Piece(block + _EXPERT_NAMES[expert[2]], whole, name, expert=int(expert[1]))
            return
        if leaf in _LAYER_NAMES:
            squeezed = tuple(size for size in shape if size != 1) if len(shape) > 1 else shape
            yield Piece(block + _LAYER_NAMES[leaf], squeezed, name)
            return
    raise Unsupported(f"tensor {short(name)} of {source.folder} has no place in a GGUF file; take another format")


def converted(piece: Piece, tensor: Tensor, model: Model) -> Tensor:
    """A source tensor as its piece of the GGUF tensor: parts chosen, heads in order, numbers as llama.cpp has them.

    Matrices keep their dtype, vectors become float32.
    """
    if piece.rows is not None:
        tensor = tensor[..., piece.rows, :]
    name = piece.source
    if name.endswith("linear_attn.conv1d.weight"):
        tensor = tensor.squeeze(1)
    rows, columns = row_order(name, model), column_order(name, model)
    if rows is not None:
        tensor = tensor[rows]
    if columns is not None:
        tensor = tensor[:, columns]
    if name.endswith("A_log"):
        return -tensor.float().exp()
    # Norms of the prediction layer's inputs are called pre_fc_norm_embedding and pre_fc_norm_hidden.
    is_norm = name.endswith("norm.weight") or "pre_fc_norm_" in name
    if is_norm and not name.endswith("linear_attn.norm.weight"):
        return tensor.float() + 1
    return tensor if piece.is_matrix else tensor.float().reshape(piece.shape)


def value_head_order(model: Model) -> Tensor | None:
    """int64 [value heads]: which head of the checkpoint stands at each place of the GGUF file; None: as they are."""
    keys, values = model.linear_num_key_heads, model.linear_num_value_heads
    if keys == values or not keys:
        return None
    return torch.arange(values).view(keys, values // keys).t().flatten()


def row_order(name: str, model: Model) -> Tensor | None:
    """int64 [rows]: which row of a source tensor stands at each place of the GGUF one; None: as they are.

    name: with or without `.weight` and prefixes.
    """
    order, leaf = value_head_order(model), _linear_attention_leaf(name)
    if order is None or leaf is None:
        return None
    if leaf in ("in_proj_a", "in_proj_b", "A_log", "dt_bias"):
        return order
    wide = _by_columns(order, model.linear_value_head_dim)
    if leaf == "in_proj_z":
        return wide
    if leaf in ("in_proj_qkv", "conv1d"):
        fixed = 2 * model.linear_num_key_heads * model.linear_key_head_dim
        return torch.cat((torch.arange(fixed), fixed + wide))
    return None


def column_order(name: str, model: Model) -> Tensor | None:
    """int64 [columns] of the same kind: only out_proj has one. Its Hessian is permuted alike, rows and columns."""
    order = value_head_order(model)
    if order is None or _linear_attention_leaf(name) != "out_proj":
        return None
    return _by_columns(order, model.linear_value_head_dim)


def _linear_attention_leaf(name: str) -> str | None:
    _, found, leaf = name.rpartition("linear_attn.")
    return leaf.removesuffix(".weight") if found else None


def _by_columns(order: Tensor, width: int) -> Tensor:
    return (order[:, None] * width + torch.arange(width)).flatten()
