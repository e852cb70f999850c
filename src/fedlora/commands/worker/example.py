"""Holds an example of a site's file with a comment on every key."""

from __future__ import annotations

EXAMPLE = """\
# The file of a site, for: fedlora worker --site clinic.yaml
# Relative paths count from the directory of this file. Only `name` and the rows are needed.

name: clinic                       # as the server calls this site

# --- the site's rows: the keys that `fedlora config` lists, and their meaning ---
train_file: rows.jsonl             # JSON, JSONL, CSV or Parquet; or dataset_name, dataset_config,
                                   # dataset_train_split, dataset_test_split
# eval_file: held-out.jsonl        # rows that the global model is evaluated on here
client_eval_fraction: 0.1          # and/or this share of the rows above is held out for it
# max_train_samples: 5000          # rows drawn of them; also max_eval_samples
# template: auto                   # how a row becomes text; custom: with prompt_template and
                                   # completion_template
# label_column_name: label         # of a classifier, with text_column_names: [text], and
# label_names: [negative, positive]  # all labels of the federation, in the same order everywhere

# --- the model; without it the server names one, where bounds allow that ---
# model_name_or_path: models/base  # hub name or directory; also model_revision, tokenizer_name,
                                   # chat_template_path
# trust_remote_code: false         # a server cannot set this

# --- the machine ---
# use_cpu: true                    # none: a GPU if there is one
num_threads: 1                     # of torch
# gradient_checkpointing: false    # less memory, a third slower
# train_function: my_training:sft  # local training of your own, from my_training.py beside this
                                   # file or from an installed module; a server cannot set this
# load_in_4bit: true               # hold the base in 4 bits; also load_in_8bit, or dtype
# rank: 8                          # of the adapter trained here, whatever the server asks; or
max_rank: 16                       # train what the server asks, but no higher rank than this

# --- where it is called, and what it keeps ---
state_dir: clinic-state            # what a run needs to go on; none: NAME-state
socket: clinic-state/worker.sock   # for this user alone; none: worker.sock in state_dir
# port: 8765                       # of 127.0.0.1 instead; the file `socket` then holds port and
                                   # token for whoever may read it: this user alone

# --- what a server may set at most; it is refused, with the bound, before anything is loaded ---
bounds:
  lora_r: 32                       # rank (not needed beside `rank`)
  max_steps: 500                   # steps of a round, counted or of epochs
  num_train_epochs: 3
  max_length: 1024                 # tokens of a sample
  learning_rate: 1.0e-2
  lora_target_modules: [all-linear, q_proj, k_proj, v_proj, o_proj]   # what it may ask to train
  # model_name_or_path: [Qwen/Qwen2.5-0.5B]   # names it may ask for; needed without a model above
"""
"""It is read by a test, so that it stays true."""
