"""A run that was interrupted and continued equals one that was not, bit for bit: losses, tensors, hash."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from e2e.test_two_processes import ON_CPU, TWO
from e2e_helpers import Job, launch, make_job
from resume_helpers import Run, assert_same_files, metadata, train
from safetensors.torch import load_file, save_file

from library.training.run_facts import changes
from library.training.state import read_header

EVERYTHING_DRAWN = [
    "--network_dropout=0.1",
    "--flip_aug",
    "--shuffle_caption",
    "--caption_dropout_rate=0.2",
    "--caption_tag_dropout_rate=0.2",
    "--ip_noise_gamma=0.1",
    "--network_args",
    "rank_dropout=0.1",
    "module_dropout=0.1",
]
STATES = ["--save_state", "--save_every_n_steps=1", "--save_every_n_epochs=1"]
Train = Callable[..., Run]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return make_job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("changed")


@pytest.fixture
def cached(job: Job) -> list[str]:
    return [
        "--cache_latents_to_disk",
        "--cache_text_encoder_outputs_to_disk",
        f"--cache_dir={job.folder / 'cache'}",
        "--max_data_loader_n_workers=3",
    ]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Train:
    def run_it(flags: list[str], stop_after: int | None = None, at_epoch_end: bool = False) -> Run:
        return train(flags, monkeypatch, stop_after, at_epoch_end)

    return run_it


def assert_continues(first: Run, second: Run, step: int) -> None:
    """All that the second run reported after ``step`` is what the first one reported."""
    assert second.error is None, second.error
    later = [number for number in first.logged if number > step]
    assert later
    assert [number for number in second.logged if number > step] == later
    for number in later:
        assert second.logged[number] == first.logged[number]


def test_from_every_kind_of_state_of_a_run(job: Job, cached: list[str], run: Train, tmp_path: Path) -> None:
    # defects 15, 16, 17: counters after a resume, the data order of workers, their random draws.
    # 5 pictures at batch size 1, 2 batches a step: 3 steps an epoch, of which the last has one batch.
    flags = [
        *cached,
        *EVERYTHING_DRAWN,
        *STATES,
        "--gradient_accumulation_steps=2",
        "--scale_weight_norms=0.001",
        "--lr_scheduler=cosine",
        "--lr_warmup_steps=2",
        "--max_train_epochs=3",
        "--ema_decay=0.9",
        "--save_state_on_train_end",
    ]
    whole = run(job.train_flags(tmp_path / "whole", *flags))
    assert whole.error is None
    states = sorted((tmp_path / "whole").glob("*-state"))
    # 8 steps before the last one, the last one, 2 epochs before the last one, and the end.
    assert len(states) == 9 + 2 + 1
    # After the first step, an epoch's last one with its events undone and done, inside of an epoch, and the run's last one.
    chosen = ["my-step00000001-state", "my-step00000003-state", "my-000001-state"]
    for state in [tmp_path / "whole" / name for name in (*chosen, "my-step00000005-state", "my-step00000009-state")]:
        step = json.loads((state / "state.json").read_text())["position"]["step"]
        output = tmp_path / state.name
        again = run(job.train_flags(output, *flags, f"--resume={state}"))
        if step < 9:
            assert_continues(whole, again, step)
        else:  # the last step was done, the end of its epoch was not
            assert again.logged == {9: [whole.logged[9][-1]]}
        # The end of an epoch happens once: behind the state that was written before it, not behind the one after it.
        assert (state.name, [number for number in again.logged if number <= step]) in [
            ("my-step00000001-state", []),
            ("my-step00000003-state", [3]),
            ("my-000001-state", []),
            ("my-step00000005-state", []),
            ("my-step00000009-state", [9]),
        ]
        # Every file of a later moment is there again, with the same name, content and counters.
        for file in (tmp_path / "whole").glob("*.safetensors"):
            name = file.name
            if name in ("my.safetensors", "my-ema.safetensors") or int(metadata(file)["ss_steps"]) > step:
                assert_same_files(file, output / name)
                for entry in ("ss_steps", "ss_epoch", "ss_num_epochs", "ss_max_train_steps", "ss_seed"):
                    assert metadata(output / name)[entry] == metadata(file)[entry]
        again_state = load_file(output / "my-state" / "memory.safetensors")
        for name, tensor in load_file(tmp_path / "whole" / "my-state" / "memory.safetensors").items():
            if "random" not in name:
                assert torch.equal(tensor, again_state[name]), name
        shutil.rmtree(output)


@pytest.mark.parametrize(
    "flags",
    [
        ["--max_data_loader_n_workers=2", "--caption_dropout_rate=0.2"],  # nothing cached, Gemma2 trained
        ["cached", "--optimizer_type=Prodigy", "--learning_rate=1", "--ema_decay=0.9"],
        ["cached", "--optimizer_type=AdamWScheduleFree"],
        ["cached", "--optimizer_type=Lion", "--full_bf16", "--mixed_precision=bf16", "--gradient_checkpointing"],
        ["cached", "--optimizer_type=SGDNesterov", "--train_batch_size=2", "--lr_scheduler_type=CosineAnnealingLR",
         "--lr_scheduler_args", "T_max=7"],
        ["cached", "--optimizer_type=Adafactor"],
    ],
    ids=lambda flags: next((flag.split("=")[1] for flag in flags if "optimizer_type" in flag), "uncached"),
)  # fmt: skip
def test_ctrl_c_and_resume_latest(job: Job, cached: list[str], run: Train, tmp_path: Path, flags: list[str]) -> None:
    # defect 72: nothing was saved on an interrupt.
    flags = [*(cached if flags[0] == "cached" else []), *[flag for flag in flags if flag != "cached"]]
    flags += ["--max_train_epochs=2", "--save_state", "--resume=latest"]
    whole = run(job.train_flags(tmp_path / "whole", *flags))
    assert whole.error is None, whole.error
    # defect 15: --seed left out is the state's, not a new one.
    without_seed = [flag for flag in job.train_flags(tmp_path / "parts", *flags) if not flag.startswith("--seed")]
    stopped = run(job.train_flags(tmp_path / "parts", *flags), stop_after=2)
    assert isinstance(stopped.error, KeyboardInterrupt)
    assert sorted(path.name for path in (tmp_path / "parts").iterdir() if "-ema" not in path.name) == [
        "my-step00000002-state",
        "my-step00000002.safetensors",
    ]
    assert_continues(whole, run(without_seed), 2)
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert_same_files(file, tmp_path / "parts" / file.name)


def test_ctrl_c_at_the_end_of_an_epoch_that_the_schedule_goes_by(
    job: Job, cached: list[str], run: Train, tmp_path: Path
) -> None:
    flags = [*cached, "--lr_scheduler=reduce_lr_on_plateau", "--lr_scheduler_args", "patience=0", "threshold=0.99"]
    flags += ["--save_state", "--max_train_epochs=3"]
    whole = run(job.train_flags(tmp_path / "whole", *flags))
    assert len({whole.logged[step][0]["lr/unet"] for step in whole.logged}) > 1
    stopped = run(job.train_flags(tmp_path / "parts", *flags), 10, at_epoch_end=True)
    assert isinstance(stopped.error, KeyboardInterrupt)
    assert_continues(whole, run(job.train_flags(tmp_path / "parts", *flags, "--resume=latest")), 10)
    assert_same_files(tmp_path / "whole" / "my.safetensors", tmp_path / "parts" / "my.safetensors")


@pytest.mark.parametrize("at_epoch_end", [False, True])
def test_ctrl_c_around_the_end_of_an_epoch(
    job: Job, cached: list[str], run: Train, tmp_path: Path, at_epoch_end: bool
) -> None:
    # defect 71: the file of the epoch that was ending must come, with the right counters.
    flags = [*cached, "--save_state", "--save_every_n_epochs=1", "--max_train_epochs=2"]
    whole = run(job.train_flags(tmp_path / "whole", *flags))
    stopped = run(job.train_flags(tmp_path / "parts", *flags), 5, at_epoch_end)
    assert isinstance(stopped.error, KeyboardInterrupt)
    assert not (tmp_path / "parts" / "my-000001.safetensors").exists()
    assert metadata(tmp_path / "parts" / "my-step00000005.safetensors")["ss_epoch"] == "1"
    assert_continues(whole, run(job.train_flags(tmp_path / "parts", *flags, "--resume=latest")), 5)
    for name in ("my-000001.safetensors", "my.safetensors"):
        assert_same_files(tmp_path / "whole" / name, tmp_path / "parts" / name)
    entries = metadata(tmp_path / "parts" / "my-000001.safetensors")
    assert (entries["ss_steps"], entries["ss_epoch"]) == ("5", "1")


def test_ctrl_c_before_a_validation_that_the_schedule_goes_by(
    job: Job, cached: list[str], run: Train, tmp_path: Path
) -> None:
    flags = [*cached, "--validation_split=0.4", "--validate_every_n_steps=1", "--lr_scheduler=reduce_lr_on_plateau"]
    # Every loss counts as a bad one, so that each telling shows as a lower rate.
    flags += ["--lr_scheduler_args", "patience=0", "threshold=0.99", "--save_state", "--max_train_epochs=3"]
    whole = run(job.train_flags(tmp_path / "whole", *flags))
    assert whole.error is None, whole.error
    rates = [whole.logged[step][0]["lr/unet"] for step in sorted(whole.logged)]
    assert len(set(rates)) > 3
    stopped = run(job.train_flags(tmp_path / "parts", *flags), stop_after=2)
    assert isinstance(stopped.error, KeyboardInterrupt)
    assert len(stopped.logged[2]) == 1  # it was not measured any more
    resumed = run(job.train_flags(tmp_path / "parts", *flags, "--resume=latest"))
    assert resumed.logged[2] == whole.logged[2][1:]
    assert_continues(whole, resumed, 2)
    assert_same_files(tmp_path / "whole" / "my.safetensors", tmp_path / "parts" / "my.safetensors")


def test_the_last_step_before_a_stop_is_reported(
    job: Job, cached: list[str], run: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def is_stopped() -> bool:
        asked.append(True)
        return len(asked) == 2

    monkeypatch.setattr("library.training.loop.is_stopped", is_stopped)
    stopped = run(job.train_flags(tmp_path, *cached, "--max_train_epochs=1"))
    assert isinstance(stopped.error, KeyboardInterrupt)
    assert sorted(stopped.logged) == [1, 2]
    assert (tmp_path / "my-step00000002.safetensors").exists()


def test_two_processes(job: Job, cached: list[str], tmp_path: Path) -> None:
    # defect 50: only the first process had a state.
    flags = [*cached, *EVERYTHING_DRAWN, "--max_train_epochs=2", "--save_state", "--save_every_n_steps=2"]

    def go(folder: str, *more: str) -> Path:
        output = job.train_flags(tmp_path / folder, *flags, *more)
        done = launch(*TWO, "lumina_train_network.py", *output, environment=ON_CPU)
        assert done.returncode == 0, done.stderr
        return tmp_path / folder

    whole = go("whole")
    assert (whole / "my-step00000002-state").is_dir()
    (tmp_path / "parts").mkdir()
    shutil.copytree(whole / "my-step00000002-state", tmp_path / "parts" / "my-step00000002-state")
    parts = go("parts", "--resume=latest")
    assert_same_files(whole / "my.safetensors", parts / "my.safetensors")
    assert_same_files(whole / "my-step00000004.safetensors", parts / "my-step00000004.safetensors")


class TestWhatHasChanged:
    """Runs that are not to be continued as they were."""

    @pytest.fixture
    def flags(self, job: Job, cached: list[str], run: Train, folder: Path) -> list[str]:
        """Flags of a run of 4 steps in an epoch of 5, whose states are there."""
        flags = job.train_flags(folder / "short", *cached, *STATES)
        flags = [flag for flag in flags if not flag.startswith("--max_train_epochs")]
        if not (folder / "short" / "my-state").exists():
            assert run([*flags, "--max_train_steps=4"]).error is None
        return flags

    def test_a_longer_run(self, flags: list[str], run: Train, folder: Path, capfd: pytest.CaptureFixture) -> None:
        whole = run([*flags, "--max_train_steps=8", f"--output_dir={folder / 'long'}"])
        resumed = run(
            [*flags, "--max_train_steps=8", f"--output_dir={folder / 'more'}", f"--resume={folder / 'short/my-state'}"]
        )
        # The first run ended inside of the epoch, so only its average over the rest is another.
        assert [resumed.logged[step][0] for step in range(5, 9)] == [whole.logged[step][0] for step in range(5, 9)]
        assert_same_files(folder / "long/my.safetensors", folder / "more/my.safetensors")
        assert_same_files(folder / "long/my-000001.safetensors", folder / "more/my-000001.safetensors")
        log = capfd.readouterr().err
        assert "8 steps long instead of 4; the learning rate's schedule follows" in log
        assert "not continue exactly" not in log

    def test_a_schedule_follows_the_new_length_from_the_first_step(
        self, flags: list[str], run: Train, folder: Path
    ) -> None:
        linear = [*flags, "--lr_scheduler=linear", "--max_train_steps=8", f"--output_dir={folder / 'linear'}"]
        resumed = run([*linear, f"--resume={folder / 'short/my-state'}"])
        rates = [resumed.logged[step][0]["lr/unet"] for step in range(5, 9)]
        assert rates == pytest.approx([1e-3 * share / 8 for share in (4, 3, 2, 1)])

    def test_a_run_that_is_at_its_end(
        self, flags: list[str], run: Train, folder: Path, capfd: pytest.CaptureFixture
    ) -> None:
        (folder / "short" / "my.safetensors").replace(folder / "final.safetensors")
        again = run([*flags, "--max_train_steps=4", "--resume=latest"])
        assert (again.error, again.logged) == (None, {})
        assert_same_files(folder / "short" / "my.safetensors", folder / "final.safetensors")
        assert "at its end already (step 4 of 4)" in capfd.readouterr().err

    def test_other_settings_are_named_once(
        self, flags: list[str], run: Train, folder: Path, capfd: pytest.CaptureFixture
    ) -> None:
        output = f"--output_dir={folder / 'other'}"
        more = ["--learning_rate=5e-4", "--train_batch_size=2", "--seed=8", "--max_train_steps=7", output]
        resumed = run([*flags, *more, f"--resume={folder / 'short/my-state'}"])
        assert resumed.error is None
        # 5 pictures in buckets of 1, 1, 2, 1: 4 batches. Step 4 is the end of an epoch now.
        assert sorted(resumed.logged) == [5, 6, 7]
        assert resumed.logged[5][0]["lr/unet"] == 5e-4
        (said,) = [line for line in capfd.readouterr().err.splitlines() if "not continue exactly" in line]
        for part in (
            "--seed 7 -> 8",
            "--train_batch_size 1 -> 2",
            "--learning_rate 0.001 -> 0.0005",
            "hold from step 5 on",
            "an epoch has 4 steps instead of 5, so this is epoch 2",
        ):
            assert part in said
        assert metadata(folder / "other/my.safetensors")["ss_steps"] == "7"

    def test_a_flag_that_a_dataset_file_overrides_is_no_change(self, flags: list[str], folder: Path) -> None:
        header = read_header(folder / "short" / "my-state")
        facts, settings = dict(header.facts), dict(header.settings)
        assert changes(header, facts, settings | {"train_batch_size": 2, "shuffle_caption": True}) == []
        assert [one.name for one in changes(header, facts, settings | {"network_dropout": 0.5})] == [
            "--network_dropout"
        ]

    def test_another_attention_kernel_is_a_change_and_another_flag_for_it_is_none(
        self, flags: list[str], folder: Path
    ) -> None:
        header = read_header(folder / "short" / "my-state")
        facts, settings = dict(header.facts), dict(header.settings)
        assert "scaled_dot_product_attention" in facts["attention"]
        assert changes(header, facts, settings | {"attn_mode": "sdpa"}) == []
        assert [one.name for one in changes(header, facts | {"attention": "another"}, settings)] == ["attention kernel"]
        # States of before the kernel was written down tell nothing about it.
        del header.facts["attention"]
        assert changes(header, facts, settings) == []

    def test_other_optimizer_arguments_hold(
        self, flags: list[str], run: Train, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        used = []
        step = torch.optim.AdamW.step

        def noted(optimizer: torch.optim.AdamW, *arguments: object) -> object:
            used.append([group["weight_decay"] for group in optimizer.param_groups])
            return step(optimizer, *arguments)

        monkeypatch.setattr(torch.optim.AdamW, "step", noted)
        more = ["--optimizer_args", "weight_decay=0.25", "--max_train_steps=5", f"--output_dir={folder / 'decay'}"]
        assert run([*flags, *more, f"--resume={folder / 'short/my-state'}"]).error is None
        assert used == [[0.25]]

    @pytest.mark.parametrize(
        ("more", "says"),
        [
            (["--network_dim=8"], "tensors of another shape"),
            (["--network_alpha=3"], "alphas of another value"),
            (["--mixed_precision=bf16", "--full_bf16"], "written in another precision"),
            (["--network_args", "train_blocks=noise_refiner"], "this run's network does not have"),
            (["--optimizer_type=SGD"], "memory of the optimizer torch.optim.adamw.AdamW"),
            (["--initial_step=9"], "--initial_step 9 reaches --max_train_steps 8"),
            (["--initial_epoch=3"], "--initial_epoch: 3 lies behind the end"),
        ],
    )
    def test_what_does_not_fit_is_an_error(
        self, flags: list[str], run: Train, folder: Path, more: list[str], says: str
    ) -> None:
        state = f"--resume={folder / 'short/my-state'}"
        resumed = run([*flags, "--max_train_steps=8", f"--output_dir={folder / 'x'}", state, *more])
        assert says in str(resumed.error)
        assert resumed.logged == {}

    def test_initial_step_overrides_the_state(
        self, flags: list[str], run: Train, folder: Path, capfd: pytest.CaptureFixture
    ) -> None:
        # defect 15: file names go on from the step that was asked for.
        state, output = f"--resume={folder / 'short/my-state'}", folder / "initial"
        more = ["--max_train_steps=8", f"--output_dir={output}", "--initial_step=6", "--skip_until_initial_step"]
        resumed = run([*flags, *more, "--initial_epoch=1", state])
        assert sorted(resumed.logged) == [7, 8]
        assert (output / "my-step00000007.safetensors").exists()
        log = capfd.readouterr().err
        assert "step 6 instead of 4" in log
        assert "--initial_epoch (--initial_step goes before it)" in log

    def test_initial_epoch_without_a_state(
        self, flags: list[str], run: Train, folder: Path, capfd: pytest.CaptureFixture
    ) -> None:
        whole = run([*flags, "--max_train_steps=8", "--lr_scheduler=linear", f"--output_dir={folder / 'w'}"])
        more = ["--max_train_steps=8", "--lr_scheduler=linear", f"--output_dir={folder / 'i'}", "--initial_epoch=2"]
        later = run([*flags, *more])
        assert sorted(later.logged) == [6, 7, 8]
        assert later.logged[6][0]["lr/unet"] == whole.logged[6][0]["lr/unet"]
        assert later.logged[6][0]["loss/current"] != whole.logged[6][0]["loss/current"]
        assert "starts after step 5 of 8 without the memory of a training state" in capfd.readouterr().err

    def test_latest_without_a_state(
        self, flags: list[str], run: Train, folder: Path, capfd: pytest.CaptureFixture
    ) -> None:
        started = run([*flags, "--max_train_steps=1", "--resume=latest", f"--output_dir={folder / 'new'}"])
        assert sorted(started.logged) == [1]
        assert "there is no training state of this --output_name" in capfd.readouterr().err

    def test_a_state_of_sd_scripts(
        self, flags: list[str], run: Train, folder: Path, capfd: pytest.CaptureFixture
    ) -> None:
        theirs = folder / "theirs-state"
        theirs.mkdir()
        network = load_file(folder / "short" / "my-step00000004.safetensors")
        save_file(network, theirs / "model.safetensors")
        (theirs / "optimizer.bin").write_bytes(b"pickle")
        (theirs / "train_state.json").write_text('{"current_epoch": 0, "current_step": 4}')
        output = folder / "from-theirs"
        more = ["--max_train_steps=2", f"--output_dir={output}", f"--resume={theirs}", "--learning_rate=1e-30"]
        started = run([*flags, *more])
        assert sorted(started.logged) == [1, 2]
        trained = load_file(output / "my.safetensors")
        # A learning rate next to nothing: what is saved is what was taken.
        assert all(torch.allclose(trained[name], network[name], rtol=1e-4, atol=1e-20) for name in network)
        log = capfd.readouterr().err
        assert "is a training state of sd-scripts" in log
        assert "--initial_step=4 counts on from there" in log
        started = run([*flags, *more, "--max_train_steps=6", "--initial_step=4"])
        assert sorted(started.logged) == [5, 6]


@pytest.mark.parametrize(
    ("name", "make", "says"),
    [
        ("nowhere", lambda path: None, "there is no folder"),
        ("my.safetensors", lambda path: path.write_bytes(b""), "--network_weights"),
        ("empty", lambda path: path.mkdir(), "is no training state"),
        ("pickled", lambda path: [path.mkdir(), (path / "pytorch_model.bin").write_bytes(b"")], "can run any code"),
        ("broken", lambda path: [path.mkdir(), (path / "state.json").write_text("{}")], "not written by this program"),
    ],
)
def test_what_is_no_state_ends_before_anything_is_loaded(
    job: Job, run: Train, tmp_path: Path, name: str, make: Callable[[Path], object], says: str
) -> None:
    make(tmp_path / name)
    ended = run(job.train_flags(tmp_path / "out", f"--resume={tmp_path / name}"))
    assert says in str(ended.error)
    assert not (tmp_path / "out").exists()
