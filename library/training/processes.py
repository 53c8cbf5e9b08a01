"""The processes of a run: starting them through accelerate, exchanging what they found, adding up gradients, ending."""

from __future__ import annotations

import gc
import logging
import math
import os
import shutil
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from library.data.sharing import Sharing
from library.errors import SettingsError, UserError
from library.memory.half_products import multiplies_bf16
from library.training.settings import LogSettings
from library.training.trackers import accelerate_arguments

if TYPE_CHECKING:
    from accelerate import Accelerator

    from library.memory.settings import MemorySettings

logger = logging.getLogger(__name__)


# How accelerate hands its configuration over, and what it then shares out between GPUs.
_SHARDING = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}


def _leave_sharding_out() -> None:
    """Turns off, with a warning, what accelerate's configuration asks for beyond one process a GPU.

    It would have to be given models to share out, and gets none; but it changes how other packages read files.
    """
    for variable, name in _SHARDING.items():
        if os.environ.get(variable, "").lower() in ("true", "1"):
            del os.environ[variable]
            logger.warning(
                "accelerate is configured for %s, which has no effect: only the LoRA is trained, and every GPU has the whole"
                " frozen model. distributed_type: MULTI_GPU asks for what is done; docs/multi_gpu.md says what makes the"
                " frozen model smaller",
                name,
            )


def warn_of_launcher(memory: MemorySettings) -> None:
    """Warns where accelerate's configuration asks for a precision or a compiler that this program's flags do not.

    Both would act on models that are handed over to accelerate, and none is.
    """
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in ("", "no", memory.mixed_precision):
        logger.warning(
            "accelerate is configured for the mixed precision %s, which has no effect: --mixed_precision of this program is"
            " %s; add --mixed_precision %s there if you want that",
            precision,
            memory.mixed_precision,
            precision if precision == "fp16" else "bf16",
        )
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend not in ("", "no") and not memory.torch_compile:
        logger.warning(
            "accelerate is configured for the compiler %s, which has no effect: this program compiles with --torch_compile",
            backend,
        )


def start_accelerator(precision: str, timeout_minutes: int | None, log: LogSettings) -> Accelerator:
    """Returns accelerate's view of this process, with the process group started.

    Raises:
        SettingsError: the launcher started more processes than accelerate sees, or the device lacks the precision.
    """
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    _leave_sharding_out()
    handlers = []
    if timeout_minutes is not None:
        handlers.append(InitProcessGroupKwargs(timeout=timedelta(minutes=timeout_minutes)))
    trackers = accelerate_arguments(log)
    # fp16 is our own affair: accelerate would scale losses and leave steps out.
    known = "no" if precision == "fp16" else precision
    try:
        accelerator = Accelerator(mixed_precision=known, kwargs_handlers=handlers, **trackers)
    except ValueError as error:  # accelerate refuses precisions that the device does not have
        raise SettingsError(f"--mixed_precision {precision}: {error}") from error
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > accelerator.num_processes:
        raise SettingsError(
            f"the launcher started {started} processes, but accelerate sees {accelerator.num_processes}: each would train"
            " alone and overwrite the others' files. Start several processes with `accelerate launch --multi_gpu"
            " --num_processes N` (on CPUs with ACCELERATE_USE_CPU=true in the environment)"
        )
    if precision == "bf16" and not multiplies_bf16(accelerator.device):
        logger.warning(
            "%s has no bf16 units: torch computes bf16 in a slow detour; --mixed_precision fp16 is made for such cards",
            torch.cuda.get_device_name(),
        )
    if precision == "fp16" and multiplies_bf16(accelerator.device):
        logger.warning(
            "--mixed_precision fp16 is for cards without bf16 units; here bf16 is faster and needs less memory"
        )
    if accelerator.device.type == "cpu" and shutil.which("nvidia-smi") and torch.version.cuda is None:
        logger.warning(
            "An NVIDIA driver is installed, but this torch (%s) was built without CUDA: training runs on the CPU and is"
            " very slow. README.md says how to install the CUDA build.",
            torch.__version__,
        )
    return accelerator


class Processes:
    """All processes of the run, seen from this one."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.rank: int = accelerator.process_index
        self.count: int = accelerator.num_processes
        self.is_main: bool = accelerator.is_main_process
        self.on_cuda: bool = accelerator.device.type == "cuda"
        self._accelerator = accelerator
        # Lists are exchanged on the host, also where gradients go from GPU to GPU, and may be waited for as long as one
        # process encodes or draws; the launcher ends all of them when one fails.
        self._host_group = distributed.new_group(backend="gloo", timeout=timedelta(days=1)) if self.count > 1 else None
        self._num_tallies = 0

    def gather(self, values: list[Any]) -> list[list[Any]]:
        """Returns every process's list, in the order of ranks; tensors in it must be on the CPU."""
        if self.count == 1:
            return [values]
        result: list[Any] = [None] * self.count
        distributed.all_gather_object(result, values, group=self._host_group)
        return result

    def wait(self) -> None:
        """Returns when every process has come here, however long one of them saves or uploads."""
        if self.count > 1:  # on the host: between GPUs waiting ends the run after some minutes
            distributed.barrier(group=self._host_group)

    def new_tally(self) -> Callable[[int], int]:
        """Returns what adds to a number that all processes share, and tells what it is now; it waits for nobody.

        All processes call this in the same order, and so mean the same number. It begins at 0.
        """
        # The store that the processes found each other by; torch has no public name for it.
        store = distributed.distributed_c10d._get_default_store()
        self._num_tallies += 1
        name = f"lumina_tally_{self._num_tallies}"
        return lambda amount: int(store.add(name, amount))

    def sharing(self) -> Sharing:
        """Returns how the processes share the work of filling a cache."""
        return Sharing(self.rank, self.count, self.gather, self.is_main, new_tally=self.new_tally)

    def add_up(self, flat: Tensor) -> distributed.Work:
        """Begins to add a flat buffer up over all processes, in place; all of them begin the same ones in the same order.

        Returns:
            What to ``wait()`` for before the sums are used.
        """
        work = distributed.all_reduce(flat, async_op=True)
        if work is None:
            raise RuntimeError("this process is not part of the process group")
        return work

    def end(self) -> None:
        """Ends the trackers and the process group: all together, with nothing left that still holds the group."""
        self.wait()
        self._accelerator.end_training()
        # A group that lives on is torn down while Python ends, and its threads may then end the process with an error.
        self._host_group = None
        gc.collect()
        if distributed.is_initialized():
            distributed.destroy_process_group()


def check_finite(loss: float, gradient_norm: float, step: int, names: Sequence[str]) -> None:
    """Ends the run where loss or gradient are no numbers any more, before they spoil the LoRA.

    Raises:
        UserError: one of the two is NaN or infinite.
    """
    for what, value in (("loss", loss), ("gradient's norm", gradient_norm)):
        if not math.isfinite(value):
            advice = (
                "nothing has been learned yet, so a model file, --network_weights or a setting such as --network_alpha is"
                " the cause"
                if step == 1
                else "a lower --learning_rate usually helps"
            )
            raise UserError(
                f"the {what} of step {step} is {value}, so training cannot go on (pictures of this step:"
                f" {', '.join(names)}); {advice}"
            )
