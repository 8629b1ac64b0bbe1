"""Several trainings after each other as one plan that a kill anywhere does not end."""

from mpjax.train.stages.outline import check_stages
from mpjax.train.stages.run_stages import Finished, run_stages
from mpjax.train.stages.stage import TAKES, Edit, Stage, Training
from mpjax.train.stages.take_over import TakeOver

__all__ = [
    "TAKES",
    "Edit",
    "Finished",
    "Stage",
    "TakeOver",
    "Training",
    "check_stages",
    "run_stages",
]
