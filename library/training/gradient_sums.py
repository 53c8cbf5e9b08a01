"""Gradients added up over processes, while backward is still busy with the rest of them.

Gradients are laid into a few flat buckets, in about the order in which backward completes them, and each bucket goes on
its way as soon as it is complete in the last backward of a step. What only the end of backward completes is the last
bucket, so it is the smallest: that much of the exchange is waited for.

Every process must start the same exchanges in the same order, or all of them hang. Gradients may be completed in another
order on another process, or not at all: one without a picture runs no backward, and a module may have been left out. So
a bucket starts only behind all buckets before it, whatever is complete, and what backward did not start is started
behind it, with zeros for gradients that are missing. The buckets follow from the network alone, never from the order
that a first step showed: sums of more than two numbers round by their place in a bucket, and a continued run is to round
as the uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed
from torch.nn import Parameter

from library.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import Work

    from library.training.processes import Processes

_SHARES = (0.4, 0.3, 0.2, 0.1)
_SMALL_NETWORK = 2**18  # numbers (1 MiB): below, starting an exchange takes longer than the exchange


def in_buckets(sizes: Sequence[int], shares: Sequence[float]) -> list[int]:
    """Returns the bucket of each size, in their order; buckets are about as large as ``shares``, and none is empty."""
    total, before, bucket, buckets = sum(sizes), 0, 0, []
    for size in sizes:
        if bucket + 1 < len(shares) and before >= total * sum(shares[: bucket + 1]):
            bucket += 1
        buckets.append(bucket)
        before += size
    return buckets


class GradientSums:
    """Adds up the gradients of a step over all processes; all of them drive it in the same way."""

    def __init__(self, parameters: Sequence[Parameter], processes: Processes, small: int = _SMALL_NETWORK) -> None:
        """Lays out the buckets and begins to watch the gradients.

        Args:
            parameters: everything that is trained, about in the order that a forward pass uses it in; on one device.
            processes: that take part. One alone has nothing to add, and nothing is watched.
            small: networks of fewer numbers go in one bucket.
        """
        self._processes = processes
        self._buckets: list[list[Parameter]] = []
        self._bucket_of: dict[int, int] = {}
        self._awaited: list[set[int]] = []
        self._sent: list[tuple[Tensor, Work]] = []
        if processes.count == 1:
            return
        as_completed = list(reversed(parameters))
        sizes = [parameter.numel() for parameter in as_completed]
        numbers = in_buckets(sizes, _SHARES if sum(sizes) >= small else (1.0,))
        self._buckets = [[] for _ in range(numbers[-1] + 1)]
        for parameter, number in zip(as_completed, numbers, strict=True):
            self._buckets[number].append(parameter)
            self._bucket_of[id(parameter)] = number
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._take)

    def last_backward_follows(self) -> None:
        """Tells that the next backward completes this process's gradients of the step."""
        self._awaited = [{id(parameter) for parameter in bucket if parameter.requires_grad} for bucket in self._buckets]

    def finish(self, values: Tensor) -> Tensor:
        """Replaces the gradients by their sums over all processes, and returns the sums of further values.

        A parameter without a gradient in any process gets a zero gradient, as it would where another process had one.

        Args:
            values: (V,) float32 on the gradients' device; they travel with the last bucket.

        Raises:
            UserError: another process has ended in the midst of the step.
        """
        if self._processes.count == 1:
            return values
        while len(self._sent) < len(self._buckets):
            self._send(values.detach().float() if len(self._sent) == len(self._buckets) - 1 else None)
        for bucket, (flat, work) in zip(self._buckets, self._sent, strict=True):
            try:
                work.wait()  # on CUDA the device waits, and the host goes on
            except RuntimeError as error:
                # gloo raises RuntimeError itself; other classes than these two, as of a device, mean something else.
                if type(error) is not RuntimeError and not isinstance(error, distributed.DistError):
                    raise
                raise UserError(
                    f"gradients could not be added up, because another process of this run has ended ({_first_line(error)});"
                    " its own message, where it could leave one, says why. A process that the system killed had too little"
                    " memory, as a rule. --resume goes on from a training state"
                ) from error
            for parameter, part in _parts(bucket, flat):
                parameter.grad = part.to(parameter.dtype)
        sums = self._sent[-1][0][-values.numel() :]
        self._sent, self._awaited = [], []
        return sums

    def _take(self, parameter: Parameter) -> None:
        """Called in backward, each time that a parameter's gradient has been added to."""
        if not self._awaited:  # of further backwards of this step
            return
        number = self._bucket_of[id(parameter)]
        if number < len(self._sent):
            raise RuntimeError("one backward added to a gradient twice, and its first part is on its way already")
        self._awaited[number].discard(id(parameter))
        # The last bucket takes the step's values along, which are known when backward is over.
        while len(self._sent) < len(self._buckets) - 1 and not self._awaited[len(self._sent)]:
            self._send(None)

    def _send(self, values: Tensor | None) -> None:
        """Starts the exchange of the next bucket, in float32, with ``values`` behind its gradients."""
        bucket = self._buckets[len(self._sent)]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = torch.cat([*(g.detach().flatten().float() for g in gradients), *([] if values is None else [values])])
        for parameter, part in _parts(bucket, flat):
            # What has been copied is let go now, not at the end: the buckets are as large as all gradients.
            parameter.grad = part if parameter.dtype == torch.float32 else None
        self._sent.append((flat, self._processes.add_up(flat)))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _parts(bucket: Sequence[Parameter], flat: Tensor) -> list[tuple[Parameter, Tensor]]:
    """Returns each parameter with its part of a flat buffer, as a view of its shape."""
    parts = flat[: sum(parameter.numel() for parameter in bucket)].split([parameter.numel() for parameter in bucket])
    return [(parameter, part.view_as(parameter)) for parameter, part in zip(bucket, parts, strict=True)]
