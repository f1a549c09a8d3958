"""Training of compressors with DeepSpeed."""
