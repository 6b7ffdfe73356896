"""Parts: modules in a graph that stand for what the nodes of one graph cannot do, such as what depends on the mode."""

from __future__ import annotations

from torch import fx, nn


class Part(nn.Module):
    """A part of forward that is one node.

    Attributes:
        chooses: whether it takes the mode to know what it does with what it is given.
    """

    chooses = False

    def graphs(self) -> tuple[fx.GraphModule, ...]:
        """The graphs of which it runs one, each on all of its arguments."""
        return ()

    def described(self, owner: str) -> str:
        """The part in words.

        Args:
            owner: the module that it is in, in words.
        """
        return f"the part of {owner} that depends on its mode"


def part_of(bio: nn.Module, node: fx.Node) -> Part | None:
    """The part that a node calls, or None if it calls something else."""
    module = bio.get_submodule(str(node.target)) if node.op == "call_module" else None
    return module if isinstance(module, Part) else None


def described(bio: nn.Module, node: fx.Node) -> str | None:
    """The part that a node calls, in words, or None if it calls something else."""
    part = part_of(bio, node)
    return None if part is None else part.described(str(node.target).rpartition(".")[0] or "the model")
