"""Two processes train what one process with twice the batch trains."""

from pathlib import Path

import numpy
import pytest
from e2e_helpers import NUM_PICTURES, Job, difference, launch, log_lines, python
from PIL import Image

TWO = [
    "--multi_gpu",
    "--num_processes",
    "2",
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
]
ON_CPU = {"ACCELERATE_USE_CPU": "true"}
EVERYTHING_DRAWN = [
    "--network_dropout=0.1",
    "--flip_aug",
    "--shuffle_caption",
    "--caption_dropout_rate=0.2",
    "--token_warmup_step=3",
    "--caption_variants=2",
    "--ip_noise_gamma=0.1",
    "--network_args",
    "rank_dropout=0.1",
    "module_dropout=0.1",
]


@pytest.mark.parametrize("caching", [True, False])
def test_two_processes_equal_one_with_twice_the_batch(job: Job, tmp_path: Path, caching: bool) -> None:
    # A rank with which gradients are enough for several buckets.
    more = ["--gradient_accumulation_steps=2", "--network_dim=64"] if caching else []
    more += EVERYTHING_DRAWN
    cached = ["--cache_latents", "--cache_text_encoder_outputs"] if caching else []
    # Of the two processes alone: computing again in backward must not disturb the sums that begin there.
    again = ["--gradient_checkpointing", f"--gradient_checkpointing_level={'full' if caching else 'selective'}"]
    two = launch(
        *TWO,
        "lumina_train_network.py",
        *job.train_flags(tmp_path / "two", "--train_batch_size=1", *cached, *more, *again),
        environment=ON_CPU,
    )
    assert two.returncode == 0, two.stderr
    assert any("Device: cpu, 2 processes" in line for line in log_lines(two))
    if caching:  # one bar for the pictures of both processes, of which each encodes some
        assert f"Caching latents: 100%|██████████| {NUM_PICTURES}/{NUM_PICTURES} " in two.stderr
    one = python("lumina_train_network.py", *job.train_flags(tmp_path / "one", "--train_batch_size=2", *cached, *more))
    assert one.returncode == 0, one.stderr
    # Same draws, other order of float32 sums: Adam divides gradients by their own size, which shows rounding of the
    # smallest ones. Measured 3e-4 and 5e-3 on two machines; a picture drawn or weighted differently gives more than 0.1.
    assert difference(tmp_path / "one" / "my.safetensors", tmp_path / "two" / "my.safetensors") < 2e-2


def test_two_processes_share_the_previews(job: Job, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(
        "a red disc --w 64 --h 64 --s 3\na ring --w 64 --h 64 --s 3 --d 0\n--w 64 --h 64 --s 3\n", "utf-8"
    )
    flags = [f"--sample_prompts={prompts}", "--sample_at_first", "--sample_batch_size=3", "--max_train_epochs=1"]
    flags += ["--cache_latents", "--cache_text_encoder_outputs"]
    two = launch(*TWO, "lumina_train_network.py", *job.train_flags(tmp_path / "two", *flags), environment=ON_CPU)
    assert two.returncode == 0, two.stderr
    one = python("lumina_train_network.py", *job.train_flags(tmp_path / "one", *flags))
    assert one.returncode == 0, one.stderr
    for ending, count in (("png", 3), ("jpg", 1)):
        found = [sorted((tmp_path / name / "sample").glob(f"*.{ending}")) for name in ("one", "two")]
        assert [len(files) for files in found] == [count, count]
        for first, second in zip(*found, strict=True):
            with Image.open(first) as a, Image.open(second) as b:
                difference_of_levels = numpy.asarray(a).astype(int) - numpy.asarray(b)
            # Another batch size: float32 sums in another order turn a level of 255, and JPEG makes a few of that.
            assert numpy.abs(difference_of_levels).max() <= (1 if ending == "png" else 8)


def test_processes_that_do_not_see_each_other_are_refused(job: Job, output: Path, tmp_path: Path) -> None:
    config = tmp_path / "accelerate.yaml"
    # accelerate starts two processes for this, each of which believes to be alone.
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nmixed_precision: 'no'\n"
        "num_machines: 1\nnum_processes: 2\nuse_cpu: true\n",
        encoding="utf-8",
    )
    done = launch("--config_file", str(config), "lumina_train_network.py", *job.train_flags(output))
    assert done.returncode != 0
    # Said by the first process, and by the other one where the launcher does not end it quickly enough.
    assert "ERROR: the launcher started 2 processes, but accelerate sees 1" in done.stderr
    assert not output.exists()


def test_an_error_that_only_the_second_process_finds_is_heard(job: Job, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    flags = ["--train_batch_size=1", "--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk"]
    flags += [f"--cache_dir={cache}", "--max_train_epochs=1"]
    done = launch(*TWO, "lumina_train_network.py", *job.train_flags(tmp_path / "a", *flags), environment=ON_CPU)
    assert done.returncode == 0, done.stderr
    # One step of two pictures: each process reads one of them, so each damaged file is met by one process only.
    damaged = 0
    for path in sorted((cache / "latents").iterdir()):
        path.write_bytes(b"damaged")
        damaged += 1
    assert damaged >= 5
    done = launch(*TWO, "lumina_train_network.py", *job.train_flags(tmp_path / "b", *flags), environment=ON_CPU)
    assert done.returncode != 0
    assert "ERROR: " in done.stderr
    assert str(cache / "latents") in done.stderr


@pytest.mark.slow
def test_twenty_clean_exits_of_twenty(job: Job, tmp_path: Path) -> None:
    """Process groups that are not taken down in order abort now and then, after all work is done."""
    flags = ["--train_batch_size=1", "--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk"]
    codes = []
    for number in range(20):
        output = job.train_flags(tmp_path / str(number), f"--cache_dir={tmp_path / 'cache'}", *flags)
        done = launch(*TWO, "lumina_train_network.py", *output, environment=ON_CPU)
        codes.append(done.returncode)
        assert (tmp_path / str(number) / "my.safetensors").is_file()
    assert codes == [0] * 20
