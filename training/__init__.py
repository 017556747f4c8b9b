"""What surrounds a training step, never the step itself: config, run folder, log, evaluation."""
