"""CUDA graphs: a network's forward pass, and its backward pass, as one launch each instead of one per kernel.

The host launches the kernels of a small network more slowly than a GPU executes them. A graph holds the launches of a
pass with the addresses that they read and write, and a replay repeats all of them:

    first step      three passes to warm up, then the forward and the backward pass are recorded
    every step      views -> static views;  replay forward;   loss on its outputs, eagerly
                    gradients of the outputs -> static ones;  replay backward;  optimizer step, eagerly
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

from .grad_cache import buffers_restored

WARM_UP_PASSES = 3
"""Before the capture: cuDNN measures its algorithms, libraries allocate workspaces, torch.compile compiles."""


class GraphedForward:
    """`forward` of a module on a CUDA device, whose passes in training are captured at the first call and replayed.

    Views of another shape are captured again, and the graphs of the shape before are freed. Evaluation mode and calls
    without gradients run the original forward. Outputs, and gradients of the parameters, occupy the same memory in
    every step: each forward pass must be followed by its backward pass, and gradients must be used before the next one.
    Captured code must not wait for the device, read numbers of the host that change, or issue collectives; batch norm
    updates its buffers in place, and dropout follows `torch.manual_seed`.

    Args:
        module: its forward maps views of one shape to differentiable tensors, or a tuple of those and None. Parameters
            that the forward does not use, such as a temperature, may receive their gradients elsewhere.
    """

    def __init__(self, module: nn.Module):
        self.module, self.forward = module, module.forward
        self.passes: CapturedPasses | None = None

    def __call__(self, views: Tensor) -> Any:
        if not (self.module.training and torch.is_grad_enabled()):
            return self.forward(views)
        if self.passes is None or self.passes.views.shape != views.shape:
            self.passes = None  # first, because the activations of both shapes may not fit
            self.passes = CapturedPasses(self.module, self.forward, views)
        return self.passes(views)


class CapturedPasses:
    """The graphs of a forward and a backward pass, and the tensors that they read and write.

    Args:
        module: owner of the parameters and buffers; buffers are not changed.
        forward: views (N, 3, H, W) -> outputs; run in the caller's autocast.
        views: first batch.
    """

    def __init__(self, module: nn.Module, forward: Any, views: Tensor):
        kind = views.device.type
        self.views = views.clone()
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        # Weights are cast inside of the graph, and their casts must not come from a cache filled before.
        autocast = torch.autocast(
            kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False
        )

        def encode() -> list[Tensor]:
            with autocast:
                leaves, self.structure = tree_flatten(forward(self.views))
            self.present = [leaf is not None for leaf in leaves]
            return [leaf for leaf in leaves if leaf is not None]

        def differentiate(outputs: list[Tensor], gradients: list[Tensor]) -> tuple[Tensor | None, ...]:
            return torch.autograd.grad(outputs, self.parameters, gradients, allow_unused=True)

        stream = torch.cuda.Stream(views.device)
        # the backward pass belongs outside of autocast
        with buffers_restored(module), torch.autocast(kind, enabled=False):
            # after the copies of the buffers, which the passes change
            stream.wait_stream(torch.cuda.current_stream(views.device))
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP_PASSES):
                    outputs = encode()
                    differentiate(outputs, [torch.zeros_like(output) for output in outputs])
            torch.cuda.current_stream(views.device).wait_stream(stream)
            # "thread_local": the loader's threads allocate and wait meanwhile, on streams of their own
            how = {"stream": stream, "capture_error_mode": "thread_local"}
            self.forward_graph, self.backward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.forward_graph, **how):
                outputs = encode()
            self.output_gradients = [torch.zeros_like(output) for output in outputs]
            with torch.cuda.graph(self.backward_graph, pool=self.forward_graph.pool(), **how):
                self.gradients = differentiate(outputs, self.output_gradients)
        # without its autograd graph, whose last nodes would stay on the stream of the capture
        self.outputs = [output.detach() for output in outputs]
        torch.manual_seed(torch.initial_seed())  # the first step draws the same random numbers as without a capture

    def __call__(self, views: Tensor) -> Any:
        outputs = iter(Replay.apply(views, *self.parameters, self))
        return tree_unflatten([next(outputs) if there else None for there in self.present], self.structure)


class Replay(torch.autograd.Function):
    """forward(views, *parameters, `CapturedPasses`) -> outputs; replays the graphs of both passes."""

    @staticmethod
    def forward(ctx, *inputs):
        views, *_, passes = inputs
        ctx.passes = passes
        passes.views.copy_(views)
        passes.forward_graph.replay()
        return tuple(output.detach() for output in passes.outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        passes, ctx.passes = ctx.passes, None  # the caller may keep the outputs, which must not keep the graphs
        for static, gradient in zip(passes.output_gradients, gradients, strict=True):
            static.copy_(gradient)
        passes.backward_graph.replay()
        return None, *(None if gradient is None else gradient.detach() for gradient in passes.gradients), None
