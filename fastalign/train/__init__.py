"""The training loop and what it stands on: config, step, optimizer, checkpoints, metrics, report."""
