"""A GGUF's model has the dimensions of its metadata and the tensors of its records; test files are written by gguf-
py.
"""

import gguf
import numpy
import pytest

from qwenfit.profiles.errors import BadInput, Unsupported
from qwenfit.profiles.model_catalog import model

SIZE, LAYERS, VOCABULARY = 256, 4, 512  # of the test model; one block in two attends fully
QUERY_HEADS, KEY_HEADS, HEAD_DIM = 4, 2, 64
DELTA_KEYS, DELTA_VALUES, DELTA_DIM = 2, 4, 64
EXPERTS, USED, INNER, SHARED = 4, 2, 256, 256
CONV = 2 * DELTA_KEYS * DELTA_DIM + DELTA_VALUES * DELTA_DIM
Q4_K, Q6_K, F32 = gguf.GGMLQuantizationType.Q4_K, gguf.GGMLQuantizationType.Q6_K, gguf.GGMLQuantizationType.F32


def _tensors(architecture="qwen35", mtp=0, tied=False):
    """name -> (shape, type), the names and types of a Q4_K_M of that architecture (llama.cpp b11434)."""
    found = {"token_embd.weight": ((VOCABULARY, SIZE), Q4_K), "output_norm.weight": ((SIZE,), F32)}
    if not tied:
        found["output.weight"] = ((VOCABULARY, SIZE), Q6_K)
    for block in range(LAYERS + mtp):
        prefix = f"blk.{block}."
        layer = {"attn_norm.weight": ((SIZE,), F32), "post_attention_norm.weight": ((SIZE,), F32)}
        if block % 2 or block >= LAYERS:
            layer |= {
                "attn_q.weight": ((2 * QUERY_HEADS * HEAD_DIM, SIZE), Q4_K),
                "attn_k.weight": ((KEY_HEADS * HEAD_DIM, SIZE), Q4_K),
                "attn_v.weight": ((KEY_HEADS * HEAD_DIM, SIZE), Q6_K),
                "attn_output.weight": ((SIZE, QUERY_HEADS * HEAD_DIM), Q4_K),
                "attn_q_norm.weight": ((HEAD_DIM,), F32),
                "attn_k_norm.weight": ((HEAD_DIM,), F32),
            }
        else:
            if architecture == "qwen3next":
                layer |= {"ssm_ba.weight": ((2 * DELTA_VALUES, SIZE), Q4_K)}
            else:
                layer |= {
                    "ssm_alpha.weight": ((DELTA_VALUES, SIZE), Q4_K),
                    "ssm_beta.weight": ((DELTA_VALUES, SIZE), Q4_K),
                }
            layer |= {
                "attn_qkv.weight": ((CONV, SIZE), Q6_K if block == 0 else Q4_K),
                "attn_gate.weight": ((DELTA_VALUES * DELTA_DIM, SIZE), Q4_K),
                "ssm_conv1d.weight": ((CONV, 4), F32),
                "ssm_a": ((DELTA_VALUES,), F32),
                "ssm_dt.bias": ((DELTA_VALUES,), F32),
                "ssm_norm.weight": ((DELTA_DIM,), F32),
                "ssm_out.weight": ((SIZE, DELTA_VALUES * DELTA_DIM), Q4_K),
            }
        if architecture == "qwen35":
            layer |= {f"ffn_{name}.weight": ((INNER, SIZE), Q4_K) for name in ("gate", "up")}
            layer |= {"ffn_down.weight": ((SIZE, INNER), Q6_K)}
        else:
            layer |= {f"ffn_{name}_exps.weight": ((EXPERTS, INNER, SIZE), Q4_K) for name in ("gate", "up", "down")}
            layer |= {f"ffn_{name}_shexp.weight": ((SHARED, SIZE), Q4_K) for name in ("gate", "up", "down")}
            layer |= {"ffn_gate_inp.weight": ((EXPERTS, SIZE), F32), "ffn_gate_inp_shexp.weight": ((SIZE,), F32)}
        if block >= LAYERS:
            layer |= {
                "nextn.eh_proj.weight": ((SIZE, 2 * SIZE), Q4_K),
                "nextn.enorm.weight": ((SIZE,), F32),
                "nextn.hnorm.weight": ((SIZE,), F32),
                "nextn.shared_head_norm.weight": ((SIZE,), F32),
            }
        found |= {prefix + name: described for name, described in layer.items()}
    return found


def _metadata(architecture="qwen35", mtp=0):
    found = {
        "block_count": LAYERS + mtp,
        "context_length": 4096,
        "embedding_length": SIZE,
        "attention.head_count": QUERY_HEADS,
        "attention.head_count_kv": KEY_HEADS,
        "attention.key_length": HEAD_DIM,
        "attention.value_length": HEAD_DIM,
        "ssm.conv_kernel": 4,
        "ssm.state_size": DELTA_DIM,
        "ssm.group_count": DELTA_KEYS,
        "ssm.time_step_rank": DELTA_VALUES,
        "ssm.inner_size": DELTA_VALUES * DELTA_DIM,
    }
    if mtp:
        found["nextn_predict_layers"] = mtp
    if architecture == "qwen35":
        found["feed_forward_length"] = INNER
    else:
        found |= {
            "expert_count": EXPERTS,
            "expert_used_count": USED,
            "expert_feed_forward_length": INNER,
            "expert_shared_feed_forward_length": SHARED,
        }
    return found


def _write(path, architecture="qwen35", metadata=None, tensors=None, extra=None):
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (_metadata(architecture) if metadata is None else metadata).items():
        if isinstance(value, list):
            writer.add_array(f"{architecture}.{key}", value)
        else:
            writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.rope.freq_base", 1e7)
    writer.add_file_type(15)
    writer.add_array("tokenizer.ggml.tokens", [f"t{number}" for number in range(VOCABULARY)])
    for key, value in (extra or {}).items():
        writer.add_uint16(key, value)
    for name, (shape, kind) in (_tensors(architecture) if tensors is None else tensors).items():
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        raw = numpy.zeros((*shape[:-1], shape[-1] // elements * size), numpy.uint8)
        if kind == F32:
            writer.add_tensor(name, numpy.zeros(shape, numpy.float32))
        else:
            writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


@pytest.mark.parametrize(
    ("architecture", "ours"), [("qwen35", "qwen3_5"), ("qwen35moe", "qwen3_5_moe"), ("qwen3next", "qwen3_next")]
)
@pytest.mark.parametrize("mtp", [0, 1])
def test_the_three_architectures(tmp_path, architecture, ours, mtp):
    tensors = _tensors(architecture, mtp)
    path = _write(tmp_path / "Tiny-Q4_K_M.gguf", architecture, _metadata(architecture, mtp), tensors)
    found = model(path)
    assert (found.name, found.architecture, found.stored, found.path) == ("tiny-q4_k_m", ours, "checkpoint", path)
    assert found.checkpoint_bytes == sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors)
    assert {name: tensor.shape for name, tensor in found.expanded()} == {
        name: shape for name, (shape, _) in tensors.items()
    }
    assert not [tensor.name for tensor in found.tensors if tensor.role == "other"]
    assert found.layer_types == ("linear_attention", "full_attention") * 2
    assert (found.num_attention_heads, found.num_key_value_heads, found.head_dim) == (4, 2, 64)
    assert (found.conv_dim, found.state_elements, found.vocab_size) == (CONV, 4 * 64 * 64, VOCABULARY)
    assert (found.mtp_num_hidden_layers, found.has_vision, found.mamba_ssm_dtype) == (mtp, False, "float32")
    assert found.is_moe == (architecture != "qwen35")
    assert found.rope == {"rope_theta": 1e7} and found.quantization == {"method": "gguf", "file_type": 15}
    assert {tensor.part for tensor in found.tensors} == ({"text", "mtp"} if mtp else {"text"})
    # Parameters are those of the same model unquantized; here the element counts of the file itself.
    assert found.parameters == sum(int(tensor.n_elements) for tensor in gguf.GGUFReader(path).tensors)


def test_blocks_of_unlike_type_are_told_apart(tmp_path):
    found = model(_write(tmp_path / "x.gguf"))
    qkv = {tensor.dtype: tensor.layers for tensor in found.tensors if tensor.role == "linear_attn.in_proj_qkv"}
    assert qkv == {"Q6_K": (0,), "Q4_K": (2,)}


def test_tied_models_have_no_output(tmp_path):
    found = model(_write(tmp_path / "x.gguf", tensors=_tensors(tied=True)))
    assert found.tie_word_embeddings and found.parameters == sum(
        tensor.elements * tensor.count for tensor in found.tensors
    )
    assert not model(_write(tmp_path / "y.gguf")).tie_word_embeddings


def test_numbers_that_are_given_per_layer(tmp_path):
    metadata = _metadata() | {"attention.head_count_kv": [0, 2, 0, 2]}
    assert model(_write(tmp_path / "x.gguf", metadata=metadata)).num_key_value_heads == 2


def test_split_files_are_summed(tmp_path):
    tensors = _tensors()
    names = list(tensors)
    first = tmp_path / "x-00001-of-00002.gguf"
    second = tmp_path / "x-00002-of-00002.gguf"
    _write(first, tensors={name: tensors[name] for name in names[:20]}, extra={"split.no": 0, "split.count": 2})
    with pytest.raises(BadInput, match=r"x-00002-of-00002\.gguf is missing, one of the 2 parts"):
        model(str(first))
    rest = {name: tensors[name] for name in names[20:]}
    _write(second, metadata={}, tensors=rest, extra={"split.no": 1, "split.count": 2})
    whole = model(_write(tmp_path / "whole.gguf"))
    assert model(str(first)).checkpoint_bytes == whole.checkpoint_bytes
    assert model(str(first)).layer_types == whole.layer_types
    with pytest.raises(BadInput, match="is a later part of a split GGUF; give the part whose name has -00001-of-"):
        model(str(second))
    renamed = first.rename(tmp_path / "renamed.gguf")
    with pytest.raises(BadInput, match=r"its name should end in -00001-of-00002\.gguf"):
        model(str(renamed))
    _write(first, tensors=tensors, extra={"split.no": 0, "split.count": 2})
    with pytest.raises(BadInput, match="is there twice"):
        model(str(first))


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "qwen2", "clip", "qwen3moe"])
def test_other_architectures_are_refused_by_name(tmp_path, architecture):
    path = _write(tmp_path / "x.gguf", architecture, metadata={}, tensors={"token_embd.weight": ((4, 256), Q4_K)})
    with pytest.raises(Unsupported, match=f"is a GGUF of architecture '{architecture}'; qwenfit takes qwen35, "):
        model(path)


@pytest.mark.parametrize("key", list(_metadata()))
def test_every_missing_key_is_named(tmp_path, key):
    path = _write(tmp_path / "x.gguf", metadata={name: value for name, value in _metadata().items() if name != key})
    if key == "attention.value_length":  # nothing follows from it
        assert model(path).head_dim == HEAD_DIM
        return
    with pytest.raises(BadInput, match=rf"x\.gguf: qwen35\.{key} is missing"):
        model(path)


@pytest.mark.parametrize("key", ["expert_count", "expert_used_count", "expert_feed_forward_length"])
def test_every_missing_key_of_a_mixture_of_experts_is_named(tmp_path, key):
    metadata = {name: value for name, value in _metadata("qwen35moe").items() if name != key}
    with pytest.raises(BadInput, match=rf"qwen35moe\.{key}|qwen35moe\.expert_count"):
        model(_write(tmp_path / "x.gguf", "qwen35moe", metadata))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"block_count": 10**9}, r"qwen35\.block_count is 1000000000, not a number from 1 to"),
        ({"embedding_length": 0}, r"qwen35\.embedding_length is 0"),
        ({"embedding_length": 128}, r"its rows are not qwen35\.embedding_length long"),
        ({"block_count": 5}, "block 4 has the tensors of no attention"),
        ({"nextn_predict_layers": 4}, "leaves no layer"),
        ({"ssm.inner_size": 255}, r"inner_size is no multiple of qwen35\.ssm\.time_step_rank"),
        ({"ssm.group_count": 3}, r"time_step_rank is no multiple of qwen35\.ssm\.group_count"),
        ({"attention.head_count_kv": 3}, r"head_count is no multiple of qwen35\.attention\.head_count_kv"),
        ({"attention.head_count_kv": [1, 2, 1, 2]}, r"head_count_kv is a list of 4"),
    ],
)
def test_every_contradiction_is_named(tmp_path, change, words):
    with pytest.raises(BadInput, match=words):
        model(_write(tmp_path / "x.gguf", metadata=_metadata() | change))


def test_one_kind_of_attention_alone(tmp_path):
    tensors = {
        name: described for name, described in _tensors().items() if not name.startswith(("blk.1.", "blk.2.", "blk.3."))
    }
    with pytest.raises(BadInput, match="has only one kind of attention"):
        model(_write(tmp_path / "x.gguf", metadata=_metadata() | {"block_count": 1}, tensors=tensors))


def test_tensors_that_are_missing(tmp_path):
    tensors = _tensors()
    without = {name: described for name, described in tensors.items() if not name.startswith("blk.2.")}
    with pytest.raises(BadInput, match="block 2 has the tensors of no attention"):
        model(_write(tmp_path / "x.gguf", tensors=without))
    del tensors["token_embd.weight"]
    with pytest.raises(BadInput, match=r"token_embd\.weight is missing"):
        model(_write(tmp_path / "y.gguf", tensors=tensors))
