"""Holds questions as MMLU has them, and the harness's own task over a file of them."""

from __future__ import annotations

HUB = [
    {
        "question": f" What is {i} plus {i}? ",
        "choices": [str(2 * i + k) for k in range(4)],
        "answer": i % 4,
        "subject": "elementary_mathematics" if i % 3 else "world_religions",
    }
    for i in range(24)
]


TASK = """\
task: local_{subject}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
    dev: {dev}
test_split: test
fewshot_split: dev
fewshot_config:
  sampler: first_n
num_fewshot: {shots}
output_type: multiple_choice
description: "The following are multiple choice questions (with answers) about {words}.\\n\\n"
doc_to_text: "{{{{question.strip()}}}}\\nA. {{{{choices[0]}}}}\\nB. {{{{choices[1]}}}}\\nC. \
{{{{choices[2]}}}}\\nD. {{{{choices[3]}}}}\\nAnswer:"
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
"""The harness's own MMLU task, over a file."""
