"""How good the results of a run are: the harness, MMLU, MT-bench, forgetting, answers side by side.

`fedlora eval` and `fedlora generate`. Models are loaded as a user of the results would load them,
by transformers and PEFT: one base, and every adapter beside it.
"""
