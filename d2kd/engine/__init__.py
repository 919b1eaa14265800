"""Training: the trainer, its hooks, schedules of the losses."""
