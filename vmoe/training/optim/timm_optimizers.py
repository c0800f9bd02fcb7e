"""timm's optimisers by name. Some are refused with a reason."""

import difflib
import inspect
from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers

from vmoe.errors import UserError
from vmoe.training.config import OptimConfig

# A part of a name -> the reason why such optimisers are refused
_REFUSED = {
    "muon": "it takes the stacked weights of all experts for one matrix; optim.name=muon takes expert by expert",
    "kron": "it draws random numbers that no checkpoint holds, so that a resumed run would differ",
    "adahessian": "it needs second derivatives",
    "fused": "it needs apex, with which this project is not tested",
    "bnb": "it needs bitsandbytes, with which this project is not tested",
}


def timm_optimizer(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser timm:NAME that `config.name` names, for parameter groups with their rates and weight decays.

    Raises:
        UserError: timm has none of that name, it is refused, or it does not accept `config.kwargs`.
    """
    name = checked_name(config.name)
    try:
        made = create_optimizer_v2(groups, opt=name, lr=config.lr, weight_decay=config.weight_decay, **config.kwargs)
    except Exception as error:  # optimisers raise various types for wrong arguments
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        line = f"optim.kwargs={config.kwargs}: {config.name} cannot be made with them ({reason})"
        raise UserError(line, everywhere=True) from error
    for key in config.kwargs:
        # timm uses some arguments for parameter groups or for other optimisers, and silently drops them
        if key not in made.defaults and key in inspect.signature(create_optimizer_v2).parameters:
            raise UserError(
                f"optim.kwargs={config.kwargs}: {config.name} takes no {key}; leave it out", everywhere=True
            )
    return made


def check_optimizer(config: OptimConfig) -> None:
    """Makes one of timm's optimisers for a dummy parameter, so that a run finds mistakes at its start.

    Raises:
        UserError: As `timm_optimizer` does.
    """
    if config.is_of_timm:
        timm_optimizer([{"params": [torch.nn.Parameter(torch.zeros(2, 2))]}], config)


def checked_name(name: str) -> str:
    """The name that timm gives the optimiser timm:NAME.

    Raises:
        UserError: timm has none of that name, or it is refused.
    """
    own = name.removeprefix("timm:").lower().replace("_", "")
    known = [each for each in list_optimizers() if not any(part in each for part in _REFUSED)]
    if own in known:
        return own
    for part, reason in _REFUSED.items():
        if part in own:
            raise UserError(f"optim.name={name}: {reason}", everywhere=True)
    near = difflib.get_close_matches(own, known, n=1)
    hint = f"did you mean timm:{near[0]}?" if near else f"there are {', '.join(known)}"
    raise UserError(f"optim.name={name}: timm has no such optimiser; {hint}", everywhere=True)
