"""Control flow: modules in a graph that branch by mode or run a subgraph in a context; each is one node."""

from __future__ import annotations

from torch import fx, nn


class ControlFlow(nn.Module):
    """A base class of such modules. The nodes of a graph run unconditionally, so these run as modules instead.

    Attributes:
        depends_on_mode: whether the output depends on the mode of the module.
    """

    depends_on_mode = False

    def subgraphs(self) -> tuple[fx.GraphModule, ...]:
        """The graphs of which it runs one, each on all of its arguments."""
        return ()

    def describe(self, owner: str) -> str:
        """Describe it in a message, given a description of the module that contains it."""
        return f"the part of {owner} that depends on its mode"


def control_flow_of(bio: nn.Module, node: fx.Node) -> ControlFlow | None:
    """Return the control flow module that a node calls, or None if it calls something else."""
    module = bio.get_submodule(str(node.target)) if node.op == "call_module" else None
    return module if isinstance(module, ControlFlow) else None


def describe_control_flow(bio: nn.Module, node: fx.Node) -> str | None:
    """Describe the control flow module that a node calls; None if it calls something else."""
    module = control_flow_of(bio, node)
    return None if module is None else module.describe(str(node.target).rpartition(".")[0] or "the model")
