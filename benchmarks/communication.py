"""What travels in three rounds, as a share of full fine-tuning: FLoRA's figure (arXiv 2409.05976).

    .venv/bin/python benchmarks/communication.py

A server of fedlora counts the bytes of three rounds with ten clients; the updates are random, in
the shapes of one decoder layer, times the number of layers. Full fine-tuning sends every parameter
down and up in every round. The paper prints 0.177 for FedIT and 0.215 for FLoRA; the download of
the base, once to every client, is a sixth of full fine-tuning in three rounds. Under a minute.
"""

from __future__ import annotations

from typing import Any

from common import write

MODELS: dict[str, dict[str, Any]] = {
    "TinyLlama-1.1B": {
        "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632,
        "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
    },
    "Llama-2-7B": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    },
}  # fmt: skip
TARGETS = {"q and v": ("q_proj", "v_proj"), "all linear layers": None}
RANKS = {"equal 16": [16] * 10, "mixed": [64, 32, 16, 16, 8, 8, 4, 4, 4, 4]}
METHODS = ("fedit", "zero_pad", "ffa", "flora", "exact")
ROUNDS = 3


def traffic(
    shapes: dict[str, tuple[int, int]], ranks: list[int], method: str, rounds: int
) -> tuple[int, int]:
    """Bytes up and down of all clients over the rounds."""
    import torch

    from fedlora.federation.aggregators.mean import Mean
    from fedlora.federation.exchange import Agreement, client_start
    from fedlora.federation.messages import ClientUpdate
    from fedlora.federation.participants import Federation
    from fedlora.federation.server import Server, initial_state
    from fedlora.lowrank import LowRank
    from fedlora.methods import METHODS as RULES

    rule = RULES[method]
    options = rule.options()
    agreement = Agreement(rule, options, shapes)
    federation = Federation(ranks, [100] * len(ranks), agreement)
    server = Server(federation, initial_state(federation), Mean())
    g = torch.Generator().manual_seed(0)
    up = down = 0
    for number in range(1, rounds + 1):
        for client, sent in server.plan().items():
            start = client_start(sent, agreement)
            trained = {
                name: LowRank(x.A, x.B + 0.01 * torch.randn(x.B.shape, generator=g))
                for name, x in start.adapter.items()
            }
            sends = rule.training(options).sent(number)
            server.accept(ClientUpdate(client, number, trained, 100, sends=sends))
        record = server.commit()
        up, down = up + record.bytes_up, down + record.bytes_down
    return up, down


def main() -> None:
    """Count, write the table."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from fedlora.methods import METHODS as RULES

    torch.set_num_threads(1)
    lines = [
        "# Bytes of three rounds as a share of full fine-tuning",
        "",
        "`benchmarks/communication.py`; ten clients, all in every round, everything in float32.",
        "*With*: the download of the base, once to every client, counted too. Up and down: MB of",
        "one client in one round.",
        "",
        "| model | target modules | ranks | method | without | with | up | down |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, sizes in MODELS.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes))
        base = 4 * sum(p.numel() for p in model.parameters())
        layers = sizes["num_hidden_layers"]
        for targets, ends in TARGETS.items():
            shapes = {
                path: (module.out_features, module.in_features)
                for path, module in model.named_modules()
                if isinstance(module, torch.nn.Linear) and path.startswith("model.layers.0.")
                if ends is None or path.endswith(ends)
            }
            for called, ranks in RANKS.items():
                for method in METHODS:
                    if not RULES[method].mixed_ranks and called == "mixed":
                        continue
                    up, down = (layers * x for x in traffic(shapes, ranks, method, ROUNDS))
                    full = 2 * ROUNDS * len(ranks) * base
                    share = (up + down) / full
                    each = 1e6 * ROUNDS * len(ranks)
                    lines.append(
                        f"| {name} | {targets} | {called} | `{method}` | {share:.4f} | "
                        f"{share + 1 / (2 * ROUNDS):.4f} | {up / each:.1f} | {down / each:.1f} |"
                    )
                    print(lines[-1], flush=True)
    write("communication.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
