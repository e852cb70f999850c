"""Holds an example of a federation's file with a comment on every key."""

from __future__ import annotations

EXAMPLE = """\
# The file of a federation, for: fedlora deploy ENGINE clinics.yaml --output DIR
# Which engine carries the messages does not stand here. Only name, server: host, sites and admins
# are needed.

name: clinics                      # letters, digits and -

server:
  host: localhost                  # name or address at which all sites and admins reach it
  port: 8002                       # that sites connect to; they themselves open none
  admin_port: 8003                 # that admins connect to
  # organization: server           # that runs it: letters, digits and _

sites:                             # name -> what is known of it; all of it may be left out
  alpha:
    # host: alpha.example.org      # its machine, for the list of who is where
    # organization: alpha          # whose it is; none: the name of the site
    # rank: 8                      # of its adapter, whatever the server asks; or
    # max_rank: 16                 # train what the server asks, but no higher rank than this
    bounds:                        # what the server may set at most here; the site has the last
      lora_r: 16                   # word: it can change them in its own file
      max_steps: 500               # steps of a round
      # num_train_epochs: 3
      max_length: 1024             # tokens of a sample
      # learning_rate: 1.0e-2
      # lora_target_modules: [all-linear]
      # model_name_or_path: [Qwen/Qwen2.5-0.5B]
    # Any key of a site's own file (fedlora worker --example) that is known already:
    # model_name_or_path: Qwen/Qwen2.5-0.5B
    # train_file: rows.jsonl
  beta:
  gamma:

admins:                            # e-mail address -> role
  ada@example.org: lead            # project_admin: all; lead: starts and stops runs; member: looks
  # grace@example.org: {role: member, organization: alpha}

certificate_days: 360              # that the federation's certificates are valid
"""
"""It is read by a test, so that it stays true."""
