"""Configuration of training and evaluation runs: one YAML file, dotted overrides, no silent mistakes.

A key that does not exist, a value of the wrong type and a missing value are errors that name the file, the key and
the cure. `schema` holds what can be configured, `reading` how it is read.
"""

from omnisieve.config.keys import ConfigError
from omnisieve.config.reading import check_fields, describe, load_config, read_config, read_yaml, save_config, to_yaml
from omnisieve.config.schema import (
    AudioSection,
    DataSection,
    EstimatorSection,
    EvalConfig,
    LlmSection,
    LoraSection,
    MediaSection,
    ModelSection,
    OffloadSection,
    RatioSection,
    TrainConfig,
    TrainSection,
    WarmStartSection,
)

__all__ = [
    "AudioSection",
    "ConfigError",
    "DataSection",
    "EstimatorSection",
    "EvalConfig",
    "LlmSection",
    "LoraSection",
    "MediaSection",
    "ModelSection",
    "OffloadSection",
    "RatioSection",
    "TrainConfig",
    "TrainSection",
    "WarmStartSection",
    "check_fields",
    "describe",
    "load_config",
    "read_config",
    "read_yaml",
    "save_config",
    "to_yaml",
]
