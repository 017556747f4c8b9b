"""One idea a file; plain functions on tensors, class axis 1."""
