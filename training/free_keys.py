"""Keys that do not change what is learned. Unlike `training.config`, it imports no torch."""

# Keys that may differ between a run and its continuation: they do not change what is learned.
FREE_AT_RESUME = (
    "out_dir",
    "save_every",
    "process_timeout",
    "weights_format",
    "tracker",
    "data.root",
    "data.workers",
    "data.worker_timeout",
    "data.cache",
    "data.cache_gb",
    "data.storage",
)
