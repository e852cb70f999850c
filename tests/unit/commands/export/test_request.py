"""The command line of `fedlora export`: what is read, and what does not go together."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlora.commands.export.request import LIMIT, read_request
from fedlora.errors import InputError


def test_nothing_but_a_run_asks_for_the_table() -> None:
    request = read_request(["out"])
    assert request.loading.name == "out"
    assert request.loading.dtype == "float32"
    assert (request.format, request.output, request.reader) == (None, None, "peft")
    assert (request.limit, request.held_out, request.private) == (LIMIT, True, True)


def test_all_that_can_be_said() -> None:
    words = "out --format merged --output m --dtype bfloat16 --max-shard-size 2GB --for vllm"
    words += " --round 3 --held_out false --limit 0.5 --check weights --use_cpu true"
    words += " --push_to_hub me/x --private false --dry_run --overwrite --batch_size 4"
    request = read_request(words.split())
    assert (request.format, request.output) == ("merged", Path("m"))
    assert (request.dtype, request.max_shard_size, request.reader) == ("bfloat16", "2GB", "vllm")
    assert (request.loading.round, request.loading.use_cpu) == (3, True)
    assert request.loading.dtype == "float32"
    assert (request.limit, request.held_out, request.check) == (0.5, False, "weights")
    assert (request.repo, request.private, request.dry_run) == ("me/x", False, True)
    assert (request.overwrite, request.batch_size) == (True, 4)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("", "name a run, its round-N or final, or a PEFT directory"),
        ("--format peft", "name a run"),
        ("out --format gguf --output x --for vllm", "--for vllm: does not read GGUF files"),
        ("out --format gguf --output x --check logits", "transformers does not compute with GGUF"),
        ("out --format gguf --output x --parts all", "--parts: 'all': expected both, adapter"),
        ("out --format gguf --output x --parts merged --rank 4", "belong to the adapter"),
        ("out --format gguf --output x --parts adapter --dtype float16", "--dtype belongs to"),
        ("out --format gguf --output x --max_shard_size 1GB", "--max_shard_size belongs to"),
        ("out --format peft --output x --parts merged", "--parts belongs to --format gguf"),
        ("out --format onnx --output x", "--format: 'onnx': expected peft, merged"),
        ("out --format peft", "give --output DIR too"),
        ("out --output x", "give --format peft, merged or gguf too"),
        ("out --rank 4 --energy 0.9", "exclude each other"),
        ("out --rank 0", "expected a whole number of at least 1"),
        ("out --energy 1.5", "expected a share above 0 and at most 1"),
        ("out --energy much", "expected a share above 0 and at most 1"),
        ("out --for lmstudio", "--for: 'lmstudio': expected peft, vllm, llama.cpp, ollama, mlx"),
        ("out --for vlm", "did you mean vllm?"),
        ("out --format merged --output x --rank 4", "belong to --format peft"),
        ("out --format peft --output x --dtype float16", "--dtype belongs to merged weights"),
        ("out --format peft --output x --max_shard_size 1GB", "--max_shard_size belongs to"),
        ("out --format merged --output x --dtype int4", "--dtype: 'int4': expected auto, float32"),
        ("out --dry_run", "--dry_run belongs to --push_to_hub"),
        ("out --private true", "--private belongs to --push_to_hub"),
        ("out --push_to_hub me/x", "say what to upload"),
        ("out --format peft --for mlx --check logits --output x", "compared by weights"),
        ("out --fromat peft", "--fromat: fedlora export has no such option; did you mean format"),
        ("out --eval_file absent.jsonl", "absent.jsonl: no such file"),
    ],
)
def test_mistakes(words: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        read_request(words.split())
