"""What travels in three rounds, as a share of full fine-tuning: FLoRA's figure (arXiv 2409.05976).

    .venv/bin/python benchmarks/communication.py
    .venv/bin/python benchmarks/communication.py --late

`--late` counts rounds 3 and 50 of the rules that send what changed, at Llama-2-7B's q and v: one
module of 4096 x 4096, times 64. Round 50 follows on a state as after 48 rounds (a full matrix of
random numbers in the place of what was learnt) and a real round 49. A minute on a quiet machine.

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
    from fedlora.federation.exchange import Agreement
    from fedlora.federation.participants import Federation
    from fedlora.federation.server import Server, initial_state
    from fedlora.methods import METHODS as RULES
    from fedlora.runs.planning.simulated_traffic import moved_update

    rule = RULES[method]
    agreement = Agreement(rule, rule.options(), shapes)
    federation = Federation(ranks, [100] * len(ranks), agreement)
    server = Server(federation, initial_state(federation), Mean())
    g = torch.Generator().manual_seed(0)
    up = down = 0
    for _ in range(rounds):
        for sent in server.plan().values():
            server.accept(moved_update(server, sent, g))
        record = server.commit()
        up, down = up + record.bytes_up, down + record.bytes_down
    return up, down


def late(method: str, ranks: list[int], size: int, modules: int) -> list[str]:
    """Lines on rounds 3 and 50: bytes of one client, against what the round's stack has."""
    from dataclasses import replace

    import torch

    from fedlora.federation.aggregators.mean import Mean
    from fedlora.federation.exchange import Agreement
    from fedlora.federation.participants import Federation
    from fedlora.federation.server import Server, initial_state
    from fedlora.lowrank import Dense
    from fedlora.methods import METHODS as RULES
    from fedlora.methods.tracking import with_images
    from fedlora.runs.planning.simulated_traffic import moved_update

    rule = RULES[method]
    agreement = Agreement(rule, rule.options(), {"layer": (size, size)})
    federation = Federation(ranks, [100] * len(ranks), agreement)
    server = Server(federation, initial_state(federation), Mean())
    g = torch.Generator().manual_seed(0)
    stack, lines = 4 * modules * sum(ranks) * 2 * size, []

    def play() -> None:
        for sent in server.plan().values():
            server.accept(moved_update(server, sent, g))
        server.commit()

    for number in (3, 50):
        if number == 50:
            learnt = {"layer": Dense(torch.randn(size, size, generator=g) / size)}
            rows = {name: x.A for name, x in server.state.leading.items()}
            state = replace(
                server.state,
                round=48,
                last_seen=dict.fromkeys(range(len(ranks)), 48),
                leading={name: with_images(learnt[name], x) for name, x in rows.items()},
                **{"adapter" if rule.followed(agreement.options) else "base_delta": learnt},
            )
            server = Server(federation, state, Mean())
        while server.state.round < number - 1:
            play()
        sent = server.plan()
        down = {modules * broadcast.nbytes for broadcast in sent.values()}
        whole = {modules * server.lacking(client, None).nbytes for client in sent}
        assert len(down) == len(whole) == 1, "clients of every rank are sent the same"
        one, all_of_it = down.pop(), whole.pop()
        lines.append(
            f"| {method} | {number} | {stack / 1e6:.1f} | {one / 1e6:.1f} | {one / stack:.3f} | "
            f"{all_of_it / 1e6:.0f} |"
        )
    return lines


def write_late() -> None:
    """Count rounds 3 and 50, write the table."""
    lines = [
        "# What one client is sent in rounds 3 and 50",
        "",
        "`benchmarks/communication.py --late`; Llama-2-7B's q and v (one module of 4096 x 4096,",
        "times 64), float32, ten clients, all in every round. MB of one client and round;",
        "all are sent the same, and make their start from it. Stack: the factors of the round",
        "before, all ranks together. Whole: what one who holds nothing is sent.",
        "",
        "| ranks | method | round | stack | down | down / stack | whole |",
        "|---|---|---|---|---|---|---|",
    ]
    for called, ranks in RANKS.items():
        for method in ("flora", "exact"):
            lines += [f"| {called} {line}" for line in late(method, ranks, 4096, 64)]
            print("\n".join(lines[-2:]), flush=True)
    write("downlink.md", "\n".join(lines) + "\n")


def main() -> None:
    """Count, write the table."""
    import argparse

    import torch

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--late", action="store_true", help="rounds 3 and 50 instead")
    torch.set_num_threads(1)
    if parser.parse_args().late:
        write_late()
        return
    from transformers import AutoModelForCausalLM, LlamaConfig

    from fedlora.methods import METHODS as RULES

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
