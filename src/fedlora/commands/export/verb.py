"""Runs `fedlora export`: a run's model as an adapter of one rank, or merged into its base."""

from __future__ import annotations

from fedlora.commands.export.request import SYNTAX, read_request
from fedlora.commands.json_lines import Emit

HELP = """\
fedlora export RUN_OR_ADAPTER [--round N] [--json]
fedlora export RUN_OR_ADAPTER --format peft|merged|gguf --output DIR [--round N]
               [--key value ...] [--json]

Takes a model away. RUN_OR_ADAPTER is a run's directory, its round-N/ or final/, or any PEFT
directory (what fedlora aggregate writes, for example). First comes a table of what a smaller rank
costs: error and energy over all modules, bytes, and the loss at each rank where there are held-out
rows. Without --format and --output that is all. Everything that is written is read back and
compared with the model it came from before it counts as done.

  --format peft          one adapter for the untouched base, in full or cut:
    --rank R               at most R singular directions in every module
    --energy 0.99          the smallest rank that keeps this share of the squared singular values
    --for READER           peft (ranks may differ by module), or a program that wants one rank in
                           all modules: vllm (the next rank it can be started with), llama.cpp,
                           ollama (with a Modelfile), mlx (MLX's own files); prints what to type
  --format merged        a whole model: the update added to the base's weights in float32
    --dtype D              auto (the base's own), float32, bfloat16, float16
    --max_shard_size 5GB   of one file
  --format gguf          for llama.cpp and what is built on it (Llama, Mistral, Qwen2, Qwen3):
    --parts P              adapter (adapter.gguf, one rank), merged (model.gguf), or both
    --rank, --energy       of the adapter; --dtype of the merged model; --for ollama a Modelfile
  --output DIR           a new directory; --overwrite replaces an earlier export
  --round N              a round of the run that is still there, instead of the final model
  --model client-K       a client's own model, where the run keeps them
  --eval_file F          rows to measure the loss on, instead of the run's held-out ones
  --limit N              rows to measure on: a number (256) or a share; --batch_size N at once
  --held_out false       measure no losses
  --check HOW            compare logits, or weights alone (less memory); auto: logits if it fits
  --push_to_hub REPO     upload what was written; a repository that is made is private, unless
                         --private false
  --dry_run              list what would be uploaded, and upload nothing
  --json                 one JSON object a line: the table, what was written, what was uploaded
  --base B               another base than the one named there; a written adapter names this one
  --use_cpu or --device cpu|cuda, --num_threads, --chat_template_path, --trust_remote_code
                         as with fedlora eval

Examples:
  fedlora export out                                          # the table alone
  fedlora export out --format peft --for vllm --rank 64 --output adapter
  fedlora export out --format merged --dtype bfloat16 --output model
  fedlora export out --format gguf --dtype float16 --output gguf
  fedlora export out --format peft --energy 0.99 --output adapter --push_to_hub me/adapter --dry_run
"""

__all__ = ["HELP", "SYNTAX", "verb"]


def verb(arguments: list[str], emit: Emit | None = None) -> int:
    """`fedlora export`."""
    request = read_request(arguments)
    from fedlora.commands.console import quiet_libraries

    quiet_libraries()
    from rich.console import Console

    from fedlora.commands.export.work import export

    export(request, Console(), emit)
    return 0
