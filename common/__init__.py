"""What surrounds a training step, never the step: config, runtime, checkpoint, log, evaluation, schedules."""
