"""From annotation files and videos to shards, and from shards to batches."""
