"""Optimizers, schedules and measurement for the training loop."""
