"""Training of compressors with DeepSpeed."""

from omnisieve.training.build import USER_ERRORS, build_trainer
from omnisieve.training.checks import check_run
from omnisieve.training.distributed import Ranks, connect, leave
from omnisieve.training.ending import summary
from omnisieve.training.errors import CheckpointError, TrainingError
from omnisieve.training.objective import TrainingModule
from omnisieve.training.rehearsal import rehearse
from omnisieve.training.trainer import Trainer

__all__ = [
    "USER_ERRORS",
    "CheckpointError",
    "Ranks",
    "Trainer",
    "TrainingError",
    "TrainingModule",
    "build_trainer",
    "check_run",
    "connect",
    "leave",
    "rehearse",
    "summary",
]
