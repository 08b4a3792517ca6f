"""One attempt on one shard in a worker process: start it, watch it, retry it."""
