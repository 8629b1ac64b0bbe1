"""How a model is trained: state, step, sharding, loop, checkpoints."""

from mpjax.train.build import build
from mpjax.train.schedule.switch import SwitchingStep
from mpjax.train.sharding import ShardActivations, parse_mesh, state_shardings
from mpjax.train.step import TrainState, TrainStep, init_state, make_train_step

__all__ = [
    "ShardActivations",
    "SwitchingStep",
    "TrainState",
    "TrainStep",
    "build",
    "init_state",
    "make_train_step",
    "parse_mesh",
    "state_shardings",
]
