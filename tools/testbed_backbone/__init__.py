"""Builds and trains the tiny Qwen2.5-Omni backbone of the testbed; see `train_testbed_backbone.py`."""
