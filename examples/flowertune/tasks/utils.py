"""Makes FlowerTune's finance questions of their data sets' rows, for lm-evaluation-harness."""

from __future__ import annotations

from typing import Any

from datasets import Dataset, concatenate_datasets, load_dataset

FPB = "Sentences_50Agree.txt"
"""Financial PhraseBank as its authors publish it: `sentence@label` in Latin-1, a line each."""

LABELS = ("negative", "neutral", "positive")


def fpb(**_: Any) -> dict[str, Any]:
    """Financial PhraseBank, from a file in the working directory (the hub has a script alone)."""
    with open(FPB, encoding="latin-1") as file:
        pairs = [line.strip().rpartition("@") for line in file if line.strip()]
    rows = {"text": [p[0] for p in pairs], "label": [LABELS.index(p[2]) for p in pairs]}
    return {"test": _questions(_quarter(Dataset.from_dict(rows)), lambda row: "news")}


def fiqa(**_: Any) -> dict[str, Any]:
    """FiQA 2018: headlines and posts, whose score is read as FlowerTune's script reads it."""
    splits = load_dataset("pauri32/fiqa-2018")
    rows = concatenate_datasets([splits[name] for name in ("train", "validation", "test")])
    rows = rows.map(lambda row: {"text": row["sentence"], "label": of_score(row)})
    kinds = {"post": "tweet"}
    return {"test": _questions(_quarter(rows), lambda row: kinds.get(row["format"], "news"))}


def tfns(**_: Any) -> dict[str, Any]:
    """Twitter Financial News Sentiment, which numbers its classes otherwise."""
    rows = load_dataset("zeroshot/twitter-financial-news-sentiment", split="validation")
    rows = rows.map(lambda row: {"label": (0, 2, 1)[int(row["label"])]})
    return {"test": _questions(rows, lambda row: "tweet")}


def of_score(row: dict[str, Any]) -> int:
    """The label of a score from -1 to 1."""
    score = float(row["sentiment_score"])
    return 0 if score < -0.1 else 1 if score < 0.1 else 2


def _quarter(rows: Any) -> Any:
    """The rows that FlowerTune's script measures on."""
    return rows.train_test_split(0.25, seed=42)["test"]


def _questions(rows: Any, kind: Any) -> Any:
    """`query` and `gold` of every row."""

    def question(row: dict[str, Any]) -> dict[str, Any]:
        asked = f"What is the sentiment of this {kind(row)}? "
        asked += "Please choose an answer from {negative/neutral/positive}."
        return {
            "query": f"Instruction: {asked}\nInput: {row['text']}\nAnswer:",
            "gold": int(row["label"]),
        }

    return rows.map(question)
