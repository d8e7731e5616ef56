"""Rollout, optimizer step, training loop, checkpoints, telemetry and the report."""
