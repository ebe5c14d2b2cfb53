"""What a receipt may quote of a log."""

import pytest

from qwenfit.planner.logs.redaction import MAX_QUOTED, file_name, model_name, redact


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("started with --api-key sk-live-1234567890", "1234567890"),
        ("Authorization: Bearer abcdef0123456789", "abcdef0123456789"),
        ("HF_TOKEN=hf_abcdefghijklmnop failed", "abcdefghij"),
        ("token hf_abcdefghijklmnopqrst", "abcdefghij"),
        ("'password': 'hunter2!'", "hunter2"),
        ("at /home/jane/models/secret-project/x.gguf", "jane"),
        (r"at C:\Users\Jane\models\x.gguf", "Jane"),
        ("in ~/projects/client-a/model", "client-a"),
        ("listening on 192.168.1.17:8080", "192.168"),
        ("peer [fe80:0:0:0:1:2:3:4]:8080", "fe80"),
        ("see https://internal.example.com/x?key=1", "internal"),
        ("mail jane@example.com", "jane"),
        ("id=GPU-22e15c16-4a8d-b130-9dda-d5c054898aee", "22e15c16"),
    ],
)
def test_no_secret_survives(text: str, secret: str) -> None:
    assert secret not in redact(text)


@pytest.mark.parametrize(
    "text",
    [
        "CUDA out of memory. Tried to allocate 1.02 GiB. GPU 0 has a total capacity of 23.52 GiB",
        "Explicitly set (1.0/23.54) GiB for KV cache on node",
        "model requires more system memory (56.0 GiB) than is available (50.3 GiB)",
        "INFO 05-09 16:24:05 torch.compile took 1.61 s",
    ],
)
def test_figures_stay(text: str) -> None:
    assert redact(text) == text


def test_quotes_are_one_short_line() -> None:
    told = redact("a\nb\x00" + "c " * 5000)
    assert len(told) <= MAX_QUOTED and told.isprintable()


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("Qwen/Qwen3.5-9B", "Qwen/Qwen3.5-9B"),
        ("/home/jane/m/Qwen3.6-27B-AWQ/", "Qwen3.6-27B-AWQ"),
        ("~/.cache/huggingface/qwen3.6-35b-a3b-nvfp4", "qwen3.6-35b-a3b-nvfp4"),
        ("/x/hub/models--unsloth--Qwen3.5-2B-GGUF/snapshots/f6d/x.gguf", "unsloth/Qwen3.5-2B-GGUF"),
        (r"C:\Users\Jane\Qwen3.5-9B-Q4_K_M.gguf", "Qwen3.5-9B-Q4_K_M.gguf"),
        ("jane/Qwen3.5-9B-Q4_K_M.gguf", "Qwen3.5-9B-Q4_K_M.gguf"),
        ("///", None),
    ],
)
def test_a_model_is_named_without_its_place(path: str, name: str | None) -> None:
    assert model_name(path) == name


def test_a_file_is_named_without_its_place() -> None:
    assert file_name("/x/models--a--b/snapshots/f6d/Qwen3.5-2B-Q8_0.gguf") == "Qwen3.5-2B-Q8_0.gguf"
