"""One optimizer step: the gradients of its batches, added up over batches and processes, and what they say.

The loss of a step is the mean over all its samples, in all batches and processes: each batch's loss is divided by the
number of samples of the whole step, and gradients are added up. So neither the number of processes nor short last
batches change what a sample weighs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from library.console import is_stopped, raise_if_stopped
from library.data.items import Batch
from library.lumina.placement import copied_to
from library.training import sigma_bands
from library.training.gradient_sums import GradientSums
from library.training.hooks import Losses
from library.training.processes import Processes, check_finite
from library.training.updater import Updater

_STEPS_BETWEEN_NORMS = 10  # they change slowly, and reading them waits for the device


class TrainStep:
    """Trains on the batches of one step.

    Attributes:
        is_updating: while parameters and optimizer change; where an error leaves it True, they are half-updated.
        is_stopped: whether the user stopped any of the processes by the time of the last step: all of them know it.
    """

    def __init__(self, losses_of: Callable[[Batch], Losses], updater: Updater, processes: Processes) -> None:
        self._losses_of = losses_of
        self._updater = updater
        self._processes = processes
        self._gradients = GradientSums(updater.in_order_of_use(), processes)
        self.is_updating = False
        self.is_stopped = False

    def __call__(self, batches: Sequence[Batch], num_samples: int, step: int) -> dict[str, float]:
        """Trains and returns what is worth logging.

        Args:
            batches: this process's part of the step.
            num_samples: of the step, over all processes.
            step: its number, counted from 1.

        Raises:
            UserError: the loss is no number any more.
        """
        updater = self._updater
        alone = self._processes.count == 1
        # The step's loss, how many processes are to stop, the bands' sums and counts: they go through the processes and to
        # the host together.
        sums = torch.zeros(2 + 2 * sigma_bands.NUM_BANDS, device=updater.parameters[0].device)
        mine = [batch for batch in batches if batch.draws]  # fewer samples than processes: some processes have none
        for number, batch in enumerate(mine, start=1):
            if alone:  # of several, none may leave the others waiting: the loop stops them together
                raise_if_stopped()
            losses, sigma = self._losses_of(batch)
            loss = (losses * copied_to(batch.loss_weights, losses.device)).sum() / num_samples
            if number == len(mine):
                self._gradients.last_backward_follows()
            loss.backward()
            sums[0] += loss.detach()
            sums[2:] += sigma_bands.sums(losses, sigma)
        sums[1].fill_(float(is_stopped()))  # an assignment would copy a number to the device and wait for that
        sums = self._gradients.finish(sums)
        gradient_norm = updater.clip()
        # One wait for the device, not two.
        loss_value, num_stopped, *band_sums, norm_value = torch.cat([sums, gradient_norm.float().reshape(1)]).tolist()
        self.is_stopped = num_stopped > 0
        names = [draw.item.path.name for batch in batches for draw in batch.draws]
        check_finite(loss_value, norm_value, step, names)
        bands = sigma_bands.means(band_sums, "loss/")
        self.is_updating = True
        rates = updater.apply()
        self.is_updating = False
        values = {"loss/current": loss_value, **bands, "norm/gradient": norm_value, **rates}
        return values if step % _STEPS_BETWEEN_NORMS else {**values, **updater.norms()}
