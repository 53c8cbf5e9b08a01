"""A training run as a sequence of named steps; what depends on the model is in the hooks of a model family.

``NetworkTrainer.train`` is the table of contents. The order keeps memory small: pictures are encoded and the autoencoder
is let go, captions are encoded and the text encoder is let go, and only then is the large model read. Modules that import
torch are imported where they are used, so that an entry script can check its command line at once.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from library.errors import DatasetError, SettingsError
from library.files import check_writable
from library.importing import uncollected_imports
from library.memory.room import Peak
from library.picture_text import DrawnWith, LoraInUse, name_of_model
from library.prompts import Prompt, read_prompt_file
from library.training.arguments import TrainConfig
from library.training.flag_notices import give_notices
from library.training.frozen_models import FrozenModels
from library.training.network_building import NetworkBuilder, rank_and_alpha
from library.training.optimizer_names import require_package
from library.training.other_networks import run_under_autocast
from library.training.out_of_memory import raise_where_memory_was_short
from library.training.output_files import warn_of_older_files
from library.training.output_preservation import check_can_be_switched_off, warn_where_nothing_is_learned
from library.training.report import RunPlan, log_plan
from library.training.resuming import Resuming
from library.training.state import StateNames

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image

    from library.data.dataset import TrainingData
    from library.memory.attention import Workload
    from library.training.lora_writer import LoraWriter

logger = logging.getLogger(__name__)


class NetworkTrainer(FrozenModels):
    """Trains a network (LoRA) on a frozen model."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self.peak = Peak()
        self.prompts: list[Prompt] = []
        self.seed = 0
        self.network: Any = None
        self.networks = NetworkBuilder(config)
        self.resuming = Resuming(config)

    def train(self) -> None:
        """Runs the whole training.

        Raises:
            UserError: something the user gave cannot work; as far as possible before a model is read.
        """
        self.check_inputs()
        self.start()
        try:
            self.rehearse_network()
            self.build_data()
            if self.config.data.debug_dataset:
                self.plan_steps()
                self.show_data()
                self.finish()
                return
            self.look_for_older_files()
            self.fit_memory()
            self.log_settings()
            self.cache_latents()
            self.plan_steps()
            self.cache_text()
            self.load_models()
            self.peak.note(self.device, "reading the models")
            self.build_network()
            self.build_optimizer()
            self.report_plan()
            self.restore_state()
            self.build_loop()
            self.run_epochs()
            self.report_memory()
        except BaseException as error:
            self.trackers.flush()  # what has been reported so far must not be lost
            raise_where_memory_was_short(error, self.config, self.device)
            raise
        self.finish()

    def check_inputs(self) -> None:
        """Checks everything that can be checked before torch is imported or a model is read."""
        give_notices(self.config)
        self.networks.check_module()
        require_package(self.config.optimizer)
        self.resuming.check()
        samples = self.config.samples
        if samples.sample_prompts is not None:
            # A front end names a prompt file that it leaves empty where no previews are wanted.
            self.prompts = read_prompt_file(samples.sample_prompts, may_be_empty=not samples.draws)
        from library.data.config import load_dataset_config

        self.dataset_configs = load_dataset_config(self.config.data, self.config.typed)
        self.inspect_models()

    def start(self) -> None:
        """Starts torch, the processes and the trackers, and looks the optimizer up."""
        config = self.config
        with uncollected_imports():
            import torch

            from library.keyed_random import key
            from library.lumina.elementwise_trial import announce_kernels
            from library.memory.attention import choose_attention
            from library.memory.quantised import require_quantisation
            from library.training import optimizers
            from library.training.device_use import use_device
            from library.training.hub import HubUploads
            from library.training.processes import Processes, start_accelerator, warn_of_launcher
            from library.training.trackers import Trackers

            optimizers.rehearse(config.optimizer)
            warn_of_launcher(config.memory)
            self.accelerator = start_accelerator(config.memory.mixed_precision, config.schedule.ddp_timeout, config.log)
        self.processes = Processes(self.accelerator)
        self.device = self.accelerator.device
        if config.memory.torch_compile:
            from library.memory.compilation import check_backend

            check_backend(config.memory.dynamo_backend, self.device)
        require_quantisation(config.quantisation.transformer, self.device)
        self.weight_dtype = torch.bfloat16 if config.memory.mixed_precision == "bf16" else torch.float32
        self.resuming.find(self.processes, StateNames(self.output_dir(), config.output.output_name))
        seed = config.schedule.seed if config.schedule.seed is not None else self.resuming.seed
        if seed is None:
            seed = self.processes.gather([torch.seed() % 2**32])[0][0]
        self.seed = seed
        # Our own draws are keyed; this is for network modules that draw from torch's global generators.
        torch.manual_seed(key("torch", seed))
        # Tried before anything is read or encoded: what is missing must show now.
        self.attention = choose_attention(config.attention, self._attention_work(), "--mixed_precision bf16")
        announce_kernels(self.device, self.weight_dtype)
        self.trackers = Trackers(self.accelerator, config.log)
        uploads = self.processes.is_main and not config.data.debug_dataset
        self.uploads = HubUploads(config.hub) if uploads else None
        use_device(config.memory, self.device, self.processes.count, seed)

    def _attention_work(self) -> Workload:
        import torch

        from library.memory.attention import Workload

        dtype = torch.float16 if self.config.memory.in_halves else self.weight_dtype
        return Workload(self.device, dtype, *self.attention_heads(), training=True)

    def build_data(self) -> None:
        """Lists pictures and captions and sorts them into buckets."""
        from library.data.dataset import TrainingData

        sharing = self.processes.sharing()
        self.data: TrainingData = TrainingData.build(self.config.data, self.seed, self.dataset_configs, sharing=sharing)
        self.check_captions()
        check_writable("--output_dir", self.output_dir())

    def look_for_older_files(self) -> None:
        """Says what of an earlier run a new one is going to overwrite, as far as its length is known by now."""
        num_batches = self.data.num_batches(self.processes.count)
        if self.processes.is_main and self.resuming.is_new and num_batches:
            warn_of_older_files(self.config, RunPlan.of(self.config.schedule, num_batches))

    def fit_memory(self) -> None:
        """Chooses the memory flags that ``--vram_gb`` leaves open: from here on they are the run's settings.

        Raises:
            SettingsError: the run does not fit with any.
        """
        asked = self.config.memory.vram_gb
        if asked is None:
            return
        from library.memory.quantised import require_quantisation
        from library.training.memory_fit import fitted_settings

        memory, quantisation = fitted_settings(self, asked)
        require_quantisation(quantisation.transformer, self.device)
        self.config = dataclasses.replace(self.config, memory=memory, quantisation=quantisation)

    def log_settings(self) -> None:
        """Stores the run's settings in the trackers, where asked for: the final ones."""
        from library.training.trackers import logged_settings

        if self.config.log.log_config:
            self.trackers.log_settings(logged_settings(self.config))

    def show_data(self) -> None:
        """Writes a page that shows what the model would see in the first epoch."""
        from library.data.debug_page import write_debug_page

        if not self.processes.is_main:
            return
        path = self.output_dir() / "debug_dataset.html"
        summary = write_debug_page(path, self.data, self.caption_tokens, self.processes.count)
        if summary.num_broken:
            logger.warning("%d pictures or masks on the page cannot be read; it says which", summary.num_broken)
        logger.info(
            "%d of the %d showings of epoch 1 are shown in %s; open it in a browser. Nothing is trained with"
            " --debug_dataset",
            summary.num_shown,
            summary.num_showings,
            path,
        )

    def output_dir(self) -> Path:
        """Returns the folder for the run's files."""
        if self.config.output.output_dir is None:  # OutputSettings refuses that; stated for the type checker
            raise SettingsError("--output_dir is missing")
        return self.config.output.output_dir

    def cache_latents(self) -> None:
        """Encodes the pictures that have no cache entry yet, if they are to be cached, and lets the autoencoder go."""
        if not self.config.data.cache_latents:
            return
        self.data.fill_latents(self.encode_pictures, self.latent_fingerprint, self.processes.sharing())
        self.peak.note(self.device, "encoding pictures")
        self.autoencoder = None
        self._free()

    def plan_steps(self) -> None:
        """Counts batches, steps and epochs; pictures that could not be read are out by now."""
        num_batches = self.data.num_batches(self.processes.count)
        if num_batches == 0:
            raise DatasetError("no picture is left to train on; the warnings above name those that could not be read")
        self.plan = plan = RunPlan.of(self.config.schedule, num_batches)
        accumulation = self.config.schedule.gradient_accumulation_steps
        self.data.set_clock(plan.steps_per_epoch, accumulation, plan.num_steps, self.processes.count)

    def cache_text(self) -> None:
        """Encodes the captions that have no cache entry yet, if they are to be cached, and lets the text encoder go."""
        if not self.config.data.cache_text_encoder_outputs:
            return

        from library.training.caption_report import warn_of_many_captions

        warn_of_many_captions(self.data, self.plan.num_epochs, self.text_cache_bytes)
        self.data.fill_captions(
            range(1, self.plan.num_epochs + 1),
            self.encode_captions,
            self.text_fingerprint(),
            self.processes.sharing(),
            length_of=lambda caption: self.text_cache_bytes([caption]),
        )
        self.encode_prompts()
        self.peak.note(self.device, "encoding captions")
        if self.text_stream is not None:
            self.text_stream.free()
        self.text_encoder = self.text_stream = None
        self._free()

    def rehearse_network(self) -> None:
        """Makes network and base weights once on models without weights, where they could turn out wrong."""
        with self.networks.rehearsing():
            self.base_weights.check(self.networks.has_companion, self.config.data.cache_text_encoder_outputs)
            if self.networks.can_turn_out_wrong:
                encoders = [self.empty_text_encoder()] if self.config.trains_text_encoder else []
                self.networks.rehearse(encoders, self.empty_model())

    def build_network(self) -> None:
        """Makes the network, attaches it, and sets up behind it what saves memory."""
        import torch

        from library.memory.prepare import prepare_blocks

        trained_encoders = [self.ready_text_encoder().model] if self.config.trains_text_encoder else []
        self.network = self.networks.make(trained_encoders, self.model)
        check_can_be_switched_off(self.network, self.dataset_configs, str(self.config.network.network_module))
        warn_where_nothing_is_learned(self.dataset_configs)
        if self.config.network.network_weights is not None:
            logger.info("Training goes on from %s", self.config.network.network_weights)
        self.network.to(self.device, torch.bfloat16 if self.config.memory.full_bf16 else torch.float32)
        if not self.networks.has_companion:
            run_under_autocast([self.model, *trained_encoders], self.device, self.weight_dtype)
        prepare_blocks(
            self.blocks(),
            self.config.memory,
            self.device,
            streamed=self._streamed_blocks(),
            resident=self.network.parameters(),
            preserve_rng_state=not hasattr(self.network, "set_dropout_keys"),
        )

    def build_optimizer(self) -> None:
        """Makes parameter groups, optimizer and schedule."""
        from library.training import optimizers
        from library.training.ema import MovingAverage
        from library.training.updater import Updater
        from library.training.weights import Weights

        settings = self.config.optimizer
        groups, names = optimizers.parameter_groups(self.network, settings)
        self.group_names = names
        self.optimizer = optimizers.build_optimizer(settings, groups)
        self.scheduler = optimizers.build_scheduler(settings, self.optimizer, self.plan.num_steps)
        average = None
        if settings.ema_decay is not None:
            parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
            average = MovingAverage(parameters, settings.ema_decay)
        self.weights = Weights(self.network, self.optimizer, average)
        self.updater = Updater(
            self.network,
            self.optimizer,
            self.scheduler,
            self.group_names,
            settings.max_grad_norm,
            self.config.network.scale_weight_norms,
            average,
        )
        self.network.train()

    def report_plan(self) -> None:
        """Says what is about to happen, before the first step."""
        log_plan(self.config, self.data, self.network, self.optimizer, self.group_names, self.plan)

    def restore_state(self) -> None:
        """Continues the run that ``--resume`` names, or starts where ``--initial_step`` says."""
        from library.training.run_facts import plain_settings, run_facts

        config = self.config
        self.settings_in_effect = plain_settings(config)
        self.facts = run_facts(
            self.seed,
            self.plan,
            config.schedule.gradient_accumulation_steps,
            self.processes.count,
            self.data,
            self.optimizer,
            self.device.type,
            self.attention.description,
        )
        self.start_position = self.resuming.restore(
            self.network, self.updater, self.plan, self.facts, self.settings_in_effect
        )

    def build_loop(self) -> None:
        """Makes the loop, and what happens around its steps."""
        from library.training.events import RunEvents
        from library.training.loop import Loop, LoopParts, LoopSettings
        from library.training.previews import Previews
        from library.training.progress import Progress
        from library.training.saving import Saver
        from library.training.state_writer import StateWriter
        from library.training.step import TrainStep
        from library.training.validation import Validation, levels

        config, processes = self.config, self.processes
        progress = Progress(self.plan, visible=processes.is_main, device=self.device)
        self.resuming.load_progress(progress)
        validation = Validation(
            config.validation,
            self.data,
            self.validation_losses,
            self.weights,
            processes,
            levels(config.flow.timestep_range),
            averaged_too=config.optimizer.ema_decay is not None,
            on_measured=self.updater.after_validation,
        )
        previews = Previews(
            config.samples,
            self.prompts,
            self.seed,
            self.output_dir(),
            config.output.output_name,
            processes,
            self.trackers,
            self._draw_preview,
            self._drawn_with(),
            max(dataset.batch_size for dataset in self.dataset_configs),
        )
        parts = LoopParts(self.data, TrainStep(self.losses_of, self.updater, processes), progress, processes)
        accumulation, readers = config.schedule.gradient_accumulation_steps, config.data.max_data_loader_n_workers
        self.loop = Loop(parts, LoopSettings(self.plan, accumulation, readers), self.start_position)
        states = StateWriter(
            self.resuming.run,
            self.facts,
            self.settings_in_effect,
            self.network,
            self.updater,
            self.loop,
            processes.on_cuda,
        )
        saver = Saver(config.output, self.plan.num_epochs, self._lora_writer(), config.state, states, self.uploads)
        self.events = RunEvents(
            self.loop, self.updater, self.trackers, validation, previews, saver, self._put_autoencoder_away
        )

    def run_epochs(self) -> None:
        """Trains, saving and drawing on the way, and writes the final file.

        Where the run ends before its time, by Ctrl+C or by an error, what has been trained is saved first.
        """
        self.events.before_steps(self.resuming.continues_at(self.loop.step))
        # The first step is where the GPUs' own exchange begins, which gives up after minutes: one process may read its model
        # from a slower disk than the others.
        self.processes.wait()
        try:
            self.loop.run(self.events)
        except BaseException:
            self.events.at_interrupt()
            raise
        self.events.at_end()

    def _draw_preview(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Image]:
        self.peak.note(self.device, "training" if self.loop.step else "setting up")
        try:
            return self._draw_in_use(prompts, seeds)
        finally:
            self.peak.note(self.device, "drawing previews")

    def _drawn_with(self) -> DrawnWith:
        config = self.config
        base = [LoraInUse(weight.file.stem, weight.multiplier) for weight in self.base_weights.weights]
        return DrawnWith(
            name_of_model(config.model.pretrained_model_name_or_path),
            config.flow.discrete_flow_shift,
            config.model.system_prompt,
            (*base, LoraInUse(config.output.output_name or "last", 1.0)),
        )

    def _draw_in_use(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Image]:
        with self.weights.in_use(averaged=self.config.draws_averaged):
            return self.draw(prompts, seeds)

    def _lora_writer(self) -> LoraWriter:
        from library.training.lora_writer import LoraWriter
        from library.training.metadata import FileHashes, RunFacts, RunMetadata, dataset_entries
        from library.training.optimizers import describe_optimizer

        config = self.config
        rank, alpha = rank_and_alpha(config.network, self.network)
        facts = RunFacts(
            seed=self.seed,
            network_dim=rank,
            network_alpha=alpha,
            num_steps=self.plan.num_steps,
            num_epochs=self.plan.num_epochs,
            num_batches_per_epoch=self.plan.num_batches,
            optimizer=describe_optimizer(config.optimizer),
            dataset=dataset_entries(self.data, self.processes.count, config.data.dataset_config is not None),
            resolution_px=self.data.datasets[0].resolution,
            of_model={**self.model_metadata(), **self.base_weights.metadata()},
        )
        wanted = self.processes.is_main and not config.output.no_metadata
        hashes = FileHashes(self.hashed_files()) if wanted else None
        return LoraWriter(config, self.network, self.weights, RunMetadata(config, facts, hashes))

    def report_memory(self) -> None:
        """Says how much memory the whole program took on a GPU, caching and previews included."""
        self.peak.note(self.device, "training")
        self.peak.report(self.device)

    def finish(self) -> None:
        """Ends uploads, trackers and processes together."""
        if self.uploads is not None:
            self.uploads.finish()
        self.processes.end()
