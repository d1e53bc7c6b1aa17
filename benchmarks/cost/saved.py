"""What compiled code keeps of an activation for backward, over the bytes of the activation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jsonargparse import auto_cli
from torch import Tensor, nn
from torch._inductor.compile_fx import compile_fx
from torch.fx import GraphModule

from benchmarks.common.record import provenance, write_line
from benchmarks.cost.timing import usual_device
from lightning_dropcluster import ClusterDrop

CLUSTER_SIZE = 16


class Block(nn.Module):
    """A conv, what is dropped, a norm and an activation."""

    def __init__(self, channels: int, size: int, fill: str) -> None:
        super().__init__()
        clusters = size * size // CLUSTER_SIZE
        labels = torch.randint(clusters, (channels, size, size))
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.drop = ClusterDrop(labels, 0.15, num_clusters=clusters, fill=fill)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.drop(self.conv(x))))


def saved_bytes(block: Block, x: Tensor) -> dict[str, int]:
    """Compile a step with Inductor's own choice of what to keep, and list what it does: name to bytes.

    What is an input too, such as parameters and labels, is there anyway and left out.
    """
    found: dict[str, int] = {}

    def note(graph: GraphModule, inputs: Any, **options: Any) -> Callable[[list[Any]], Any]:
        if not options.get("is_backward"):
            kept = [node for node in graph.graph.output_node().args[0] if node is not None]  # pyright: ignore[reportGeneralTypeIssues, reportOptionalIterable]
            values = {node.name: node.meta["val"] for node in kept if node.op != "placeholder"}
            found.update({name: value.nbytes for name, value in values.items() if isinstance(value, Tensor)})
        return _boxed(graph)

    torch._dynamo.reset()
    compiled = torch.compile(
        block,
        backend=lambda graph, i: compile_fx(graph, i, inner_compile=note),  # pyright: ignore[reportArgumentType]
    )
    compiled(x)
    torch._dynamo.reset()
    return found


def _boxed(graph: GraphModule) -> Callable[[list[Any]], Any]:
    """Run the graph as it is: nothing need be generated to see what it keeps."""

    def run(arguments: list[Any]) -> Any:
        taken = list(arguments)
        arguments.clear()
        return graph(*taken)

    run._boxed_call = True  # pyright: ignore[reportFunctionMemberAccess]
    return run


def cases(
    samples: int,
    channels: int,
    size: int,
    device: torch.device,
    layouts: Sequence[torch.memory_format] = (torch.contiguous_format, torch.channels_last),
    fills: Sequence[str] = ("zero", "mean"),
) -> Iterator[dict[str, Any]]:
    """Compare a block that drops with the same block that does not."""
    for layout in layouts:
        x = torch.randn(samples, channels, size, size, device=device).to(memory_format=layout)
        for fill in fills:
            block = Block(channels, size, fill).to(device)
            block = block.to(memory_format=layout)  # pyright: ignore[reportCallIssue]
            kept = saved_bytes(block, x.requires_grad_())
            block.drop = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
            plain = saved_bytes(block, x)
            more = sum(kept.values()) - sum(plain.values())
            yield {
                "memory_format": str(layout).removeprefix("torch."),
                "fill": fill,
                "more_than_plain": round(more / x.nbytes, 4),
                "largest": round(max(kept.values()) / x.nbytes, 4),
            }


def main(samples: int = 64, channels: int = 64, size: int = 28, out: str | None = None) -> None:
    """Write a line for each memory format and fill.

    Args:
        samples: of the activation.
        channels: of it.
        size: of its maps.
        out: file to which the records are appended as well.
    """
    device = usual_device()
    for case in cases(samples, channels, size, device):
        write_line({"benchmark": "saved", **case, **provenance(device)}, out)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
