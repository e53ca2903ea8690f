"""The state of a model and its optimisers, to write to a checkpoint and to load from one."""

import math

import torch

from kernels import RowAdam
from runtime.checkpoint import read_checkpoint
from runtime.files import explain_errors
from runtime.sharded_pool import own_columns, whole_table


def whole_state(model, optimizers):
    """Return state_dicts of a model and its optimisers. All ranks must call this. Rank 0 gets
    the whole table if processes share it."""
    weights = model.state_dict()
    if model.pool is not None:
        weights["pool.values"] = whole_table(model.pool, weights["pool.values"])
    states = []
    for optimizer in optimizers:
        state = optimizer.state_dict()
        if isinstance(optimizer, RowAdam):
            moments = dict(state["state"][0])  # a copy: the optimiser keeps its own
            moments["means"] = whole_table(optimizer.pool, moments["means"])
            moments["squares"] = whole_table(optimizer.pool, moments["squares"])
            state["state"] = {0: moments}
        states.append(state)
    return weights, states


def restore_optimizers(path, optimizers):
    """Load the optimisers' moments from a checkpoint. Rates and decays stay as they are. Raises
    ValueError if the saved state is wrong."""
    checkpoint = read_checkpoint(path, tensors=True)
    with explain_errors(f"{path}: its optimisers have a wrong state", "continue from another one"):
        for optimizer, saved in zip(optimizers, checkpoint["optimizers"], strict=True):
            names = ("exp_avg", "exp_avg_sq")
            if isinstance(optimizer, RowAdam):
                names = ("means", "squares")
                for state in saved["state"].values():
                    for name in names:
                        state[name] = own_columns(optimizer.pool, state[name])
            saved["param_groups"] = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict(saved)
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    state = optimizer.state[parameter]
                    check_moments(state, names, parameter, checkpoint["iter"])
                    copy_tensors(state)


def copy_tensors(state):
    """Replace AdamW's views of the checkpoint by tensors of its own: see read_tensors."""
    for name, x in state.items():
        if torch.is_tensor(x):
            state[name] = x.clone()


def check_moments(state, names, parameter, steps):
    if set(state) != {"step", *names}:
        raise ValueError("a parameter does not have two moments")
    for name in names:
        moment = state[name]
        if moment.dtype != torch.float32 or moment.layout != torch.strided:
            raise ValueError(f"{name} is not a table of float32")
        if moment.shape != parameter.shape:
            raise ValueError(f"{name} does not have the shape of its parameter")
        if not math.isfinite(moment.norm(math.inf)):  # NaN if one is NaN
            raise ValueError(f"{name} is not finite")
    if state[names[1]].min() < 0:
        raise ValueError(f"{names[1]} has negative squares")
    if state["step"] != steps:
        raise ValueError(f"an optimiser has done {state['step']} steps, but the run {steps}")
