"""From manifests and media files to batches."""
