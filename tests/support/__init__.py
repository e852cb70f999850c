"""What tests share: data, models, runs and helpers of several files."""
