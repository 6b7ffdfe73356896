"""Optimizers that keep copies of the weights."""

import torch


class ScheduleFree(torch.optim.Optimizer):
    """Schedule-free SGD (Defazio et al. 2024): the parameters lie between an average and a fast copy."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            z, k = state.setdefault("z", p.clone()), state.setdefault("k", 0)
            p.lerp_(z, 1 / (k + 1))
            p.add_(p.grad, alpha=self.param_groups[0]["lr"] * (0.9 * (1 - 1 / (k + 1)) - 1))
            z.sub_(p.grad, alpha=self.param_groups[0]["lr"])
            state["k"] = k + 1


class Lookahead(torch.optim.Optimizer):
    """SGD with a slow copy, to which the weights return every fifth step (Zhang et al. 2019)."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            slow = state.setdefault("slow", p.clone())
            state["k"] = state.get("k", 0) + 1
            p.sub_(p.grad, alpha=self.param_groups[0]["lr"])
            if state["k"] % 5 == 0:
                slow.lerp_(p, 0.5)
                p.copy_(slow)


class Master(torch.optim.Optimizer):
    """SGD on a copy of the weights in double precision."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            master = self.state[p].setdefault("master", p.double().clone())
            master.sub_(p.grad, alpha=self.param_groups[0]["lr"])
            p.copy_(master)
