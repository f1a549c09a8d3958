"""Pure tensor functions. They know neither methods nor models."""
