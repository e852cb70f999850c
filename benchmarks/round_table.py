"""The tables of benchmarks/round.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Case = Mapping[str, Any]
TITLES = {
    "fedlora": "fedlora, same dtype",
    "defaults": "fedlora, defaults",
    "peft": "PEFT + Trainer",
    "flower": "flwr simulation",
}


OURS = ("fedlora", "defaults")
_CPU = {"same dtype": 2.5, "defaults": 4.0, "memory": 1.3}
GOALS: Mapping[str, Mapping[str, float]] = {
    "embedded": {**_CPU, "flwr": 6.0},
    "22m": _CPU,
    "110m": {**_CPU, "limit": 0.5, "outside": 0.02},
    "1.1b": {"same dtype": 3.0, "limit": 0.45, "memory": 1.3},
    "tiny": {},
}
"""What is to be reached, on two cores and (1.1b) on a GPU."""


def table(found: Mapping[str, Any], notes: Sequence[str], seconds: float) -> str:
    """All results as Markdown.

    Args:
        found: model -> its `spec` and the `results` of its cases.
        notes: what was left out, and why.
        seconds: the benchmark took.
    """
    from common import machine

    lines = [
        "# A round: fedlora, its peers and the arithmetic",
        "",
        f"`benchmarks/round.py`, {machine()}, {seconds / 60:.1f} minutes.",
        "Ten clients of ranks 64 to 4, all linear layers, method `flora`; the same rows, batches",
        "and starts everywhere.",
        "",
        "Seconds per round are those of training, aggregation and, for fedlora, the checkpoint,",
        "without evaluation; of three rounds or more the first is left out as warm-up. Tokens are",
        "those without padding. Limit: useful operations over the GEMM rate of the same process",
        "and dtype (`round_limit.py`); for peers that of fedlora in the same dtype. Outside:",
        "neither in the clients' own training nor in evaluation. Start-up: until the first round.",
    ]
    lines += ["", *(f"- {note}" for note in notes)] if notes else []
    lines += _goals(found)
    for part in found.values():
        lines += _model(part["spec"], [x for x in part["results"] if not x.get("failed")])
        for failed in (x for x in part["results"] if x.get("failed")):
            lines.append(f"\n{failed['case']}: failed.")
    return "\n".join(lines) + "\n"


def _model(spec: Mapping[str, Any], results: Sequence[Case]) -> list[str]:
    by_name = {x["case"]: x for x in results if x["case"] != "flower"}
    flowers = sorted((x for x in results if x["case"] == "flower"), key=lambda x: x["whole"])
    ours, peft = by_name.get("fedlora"), by_name.get("peft")
    lines = [
        "",
        f"## {spec['title']}",
        "",
        f"{spec['parameters'] / 1e6:.1f} M parameters, {spec['rounds']} rounds of {spec['steps']} "
        f"steps of {spec['batch']} rows, {spec['threads'] or 'all'} threads.",
        "",
        "| | dtype | s / round | tokens / s | x PEFT + Trainer | of the limit | outside | peak MB "
        "| start-up s | whole process s |",
        "|---" * 10 + "|",
    ]
    limits = ours or by_name.get("defaults")
    shown = [by_name[name] for name in TITLES if name in by_name] + list(flowers[:1])
    for case in shown:
        limit = case.get("limit") or (limits["limit"] if limits else None)
        same = case.get("limit") or (limits and case["dtype"] == limits["dtype"])
        counted = _counted(case)
        seconds = _seconds(case)
        title = TITLES[case["case"]]
        if case["case"] == "flower":
            title += f", {case['actors']} at a time"
        cells = [
            title,
            case["dtype"],
            f"{seconds:.2f}",
            f"{_mean([limit['tokens'][i] for i in counted]) / seconds:,.0f}" if limit else "-",
            f"{_seconds(peft) / seconds:.2f}" if peft else "-",
            f"{_share(case, limit):.0%}" if limit and same else "-",
            f"{_outside(case):.1%}" if "client_seconds" in case["rounds"][0] else "-",
            f"{case['peak'] / 1e6:,.0f}"
            + (f" + {case['peak_device'] / 1e6:,.0f} GPU" if "peak_device" in case else ""),
            f"{case['load']:.1f}" if "load" in case else "-",
            f"{case['whole']:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, "", *_remarks(spec, by_name, flowers)]


def _remarks(
    spec: Mapping[str, Any], by_name: Mapping[str, Case], flowers: Sequence[Case]
) -> list[str]:
    out = []
    ours, peft = by_name.get("fedlora"), by_name.get("peft")
    for name in OURS:
        if name in by_name:
            limit = by_name[name]["limit"]
            out.append(
                f"- {TITLES[name]}: GEMM rate in {by_name[name]['dtype']} "
                f"{limit['rate'] / 1e9:,.0f} GFLOP/s at {limit['gemm_tokens']} rows of width "
                f"{spec['hidden']}; a round needs {_mean(limit['flops']) / 1e9:,.0f} GFLOP"
                f"{_concerns(by_name[name])}."
            )
    if ours and [x["tokens"] for x in ours["rounds"]] != ours["limit"]["tokens"]:
        out.append("- **fedlora trained on other rows than were counted here.**")
    if len(flowers) > 1:
        slower = ", ".join(f"{x['whole']:.1f} s with {x['actors']}" for x in flowers[1:])
        out.append(f"- flwr with other numbers of clients at a time: {slower}.")
    for name in OURS:
        if flowers and name in by_name:
            ratio = flowers[0]["whole"] / by_name[name]["whole"]
            out.append(
                f"- {TITLES[name]}: {ratio:.1f} x flwr over {spec['rounds']} rounds, start-up "
                "included."
            )
    out += _memory(by_name)
    if ours and peft:
        out += _same_training(ours, peft)
    return out


def _goals(found: Mapping[str, Any]) -> list[str]:
    """What was to be reached, and what was."""
    lines = list[str]()

    def goal(title: str, what: str, reached: float, wanted: float, least: bool, form: str) -> None:
        met = reached >= wanted if least else reached <= wanted
        sign = "at least" if least else "at most"
        lines.append(
            f"| {title} | {what} | {reached:{form}} | {sign} {wanted:{form}} | "
            f"{'yes' if met else 'no'} |"
        )

    for name, part in found.items():
        cases = {x["case"]: x for x in part["results"] if not x.get("failed")}
        title, goals = part["spec"]["title"], GOALS[name]
        ours, peft = cases.get("fedlora"), cases.get("peft")
        for case, key in (("fedlora", "same dtype"), ("defaults", "defaults")):
            if case in cases and peft and key in goals:
                ratio = _seconds(peft) / _seconds(cases[case])
                goal(title, f"x PEFT + Trainer, {key}", ratio, goals[key], True, ".2f")
        flowers = [x["whole"] for x in part["results"] if x["case"] == "flower" and "whole" in x]
        if flowers and "defaults" in cases and "flwr" in goals:
            ratio = min(flowers) / cases["defaults"]["whole"]
            goal(title, "x flwr, start-up included, defaults", ratio, goals["flwr"], True, ".2f")
        if ours and "limit" in goals:
            goal(title, "of the limit", _share(ours, ours["limit"]), goals["limit"], True, ".0%")
        if ours and "outside" in goals:
            goal(title, "outside", _outside(ours), goals["outside"], False, ".1%")
        one, ten = cases.get("memory-one"), cases.get("memory-ten")
        if one and ten and "memory" in goals:
            ratio = ten[_peak(ten)] / one[_peak(one)]
            goal(title, "peak memory of ten clients, x one", ratio, goals["memory"], False, ".2f")
        auto = cases.get("memory-auto")
        if auto and "memory" in goals:
            share = (auto[_peak(auto)] - auto["before"]) / auto["budget"]
            goal(title, "peak above the start, of the budget", share, 1.0, False, ".0%")
    if not lines:
        return []
    return ["", "| | | reached | wanted | |", "|---" * 5 + "|", *lines]


def _concerns(case: Case) -> str:
    """What the run settled about cohorts."""
    return "".join(f"; `{key}: {value}`" for key, value in case["concerns"].items())


def _peak(case: Case) -> str:
    return "peak_device" if "peak_device" in case else "peak"


def _memory(by_name: Mapping[str, Case]) -> list[str]:
    one, ten, auto = (by_name.get(f"memory-{kind}") for kind in ("one", "ten", "auto"))
    out = []
    if one and ten:
        kind = _peak(one)
        out.append(
            f"- Peak memory with `cohort_size: 1`, batches of full length: one client "
            f"{one[kind] / 1e6:,.0f} MB, ten {ten[kind] / 1e6:,.0f} MB, "
            f"{ten[kind] / one[kind]:.2f} x."
        )
        if auto:
            out.append(
                f"- With `cohort_size: auto` in a budget of {auto['budget'] / 1e6:,.0f} MB: "
                f"{auto[kind] / 1e6:,.0f} MB, which is {(auto[kind] - auto['before']) / 1e6:,.0f} "
                f"MB more than before the first round{_concerns(auto)}."
            )
    return out


def _same_training(ours: Case, peft: Case) -> list[str]:
    """The losses of every client's last step, and how far they lie apart, round by round.

    Rounding grows with the steps, so that only the first round says that both train the same.
    """
    out, apart = list[str](), list[float]()
    for x, y in zip(ours["rounds"], peft["rounds"], strict=True):
        apart.append(max(abs(a - b) for a, b in zip(x["losses"], y["losses"], strict=True)))
    for case in (ours, peft):
        losses = case["rounds"][0]["losses"]
        out.append(
            f"- {TITLES[case['case']]}: losses of the clients' last steps of round 1 "
            f"{_listed(losses, '.4f')}; their mean by round "
            f"{_listed([_mean(x['losses']) for x in case['rounds']], '.4f')}."
        )
    return [*out, f"- Largest difference of these losses by round: {_listed(apart, '.1e')}."]


def _listed(values: Sequence[float], form: str) -> str:
    return " ".join(f"{value:{form}}" for value in values)


def _counted(case: Case) -> list[int]:
    """The rounds that are timed."""
    number = len(case["rounds"])
    return list(range(1 if number > 2 else 0, number))


def _seconds(case: Case) -> float:
    """Of a round, without evaluation."""
    rounds = [case["rounds"][i] for i in _counted(case)]
    return _mean([x["seconds"] - x["evaluate"] for x in rounds])


def _share(case: Case, limit: Mapping[str, Any]) -> float:
    """Of the arithmetic limit."""
    return _mean([limit["flops"][i] for i in _counted(case)]) / limit["rate"] / _seconds(case)


def _outside(case: Case) -> float:
    """The share of a round that is neither in the clients' own training nor in evaluation."""
    rounds = [case["rounds"][i] for i in _counted(case)]
    whole = sum(x["seconds"] - x["evaluate"] for x in rounds)
    return 1 - sum(x["client_seconds"] for x in rounds) / whole


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
