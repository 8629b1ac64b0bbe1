"""How a model is trained: state, step, sharding, loop, checkpoints."""

from mpjax.train.sharding import ShardActivations, parse_mesh, state_shardings
from mpjax.train.step import TrainState, TrainStep, build, init_state, make_train_step

__all__ = [
    "ShardActivations",
    "TrainState",
    "TrainStep",
    "build",
    "init_state",
    "make_train_step",
    "parse_mesh",
    "state_shardings",
]
