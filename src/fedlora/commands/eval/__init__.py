"""Measures the results of a run: the harness, MMLU, MT-bench, forgetting, single answers.

`fedlora eval` and `fedlora generate`. Models are loaded as a user of the results would load them,
by transformers and PEFT: one base, and every adapter beside it.
"""
