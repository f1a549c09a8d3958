"""What is wrong with a run, as far as it can be known before processes connect and the LLM is loaded."""

from __future__ import annotations

import tempfile
from pathlib import Path

from omnisieve.artifact import check_place
from omnisieve.backbones.loading import hidden_size_of
from omnisieve.backbones.media import check_media
from omnisieve.config import TrainConfig
from omnisieve.data.manifest import Manifest
from omnisieve.training.build import make_compressor
from omnisieve.training.checkpoint import BEST, LAST, find_checkpoint
from omnisieve.training.deepspeed_settings import check_deepspeed
from omnisieve.training.errors import writing
from omnisieve.training.streams import check_manifests
from omnisieve.training.trainer import CONFIG_FILE


def check_run(config: TrainConfig) -> list[str]:
    """Look at everything that needs neither the other processes nor the LLM, manifests last: they may be long.

    Returns:
        what the run should say before it starts: samples that will be replaced.

    Raises:
        ConfigError, BackboneError, CompressorError, DataError: what the configuration names is not there or does not
            fit.
        CheckpointError: the checkpoint to resume from is not there, or the run's folder holds another run.
        OutputError: the run's folder cannot be written.
        ArtifactError: something else lies where the run exports to.
    """
    for path in (config.data.train, config.data.val):
        if path is not None and not Path(path).is_file():
            Manifest(path)  # says so, before a hub is asked for the model
    check_deepspeed(config)
    make_compressor(config, hidden_size_of(config.model.path))
    check_media(config.model.path, config.data)
    find_checkpoint(Path(config.output_dir), config.train.resume)
    found = check_manifests(config.data, config.train)
    check_writable(Path(config.output_dir))
    for name in (LAST, BEST):
        check_place(Path(config.output_dir) / name)
    return found


def check_writable(directory: Path) -> None:
    """Make the run's folder and write something there.

    Raises:
        OutputError: it cannot be written.
    """
    with writing("the configuration", directory / CONFIG_FILE):
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
