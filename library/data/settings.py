"""The flags that say which pictures are trained on, how captions are treated, and what is cached where."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from library.data import schema
from library.data.augment_rules import UNCACHED, contradiction
from library.errors import SettingsError
from library.settings import flag


@dataclass(frozen=True)
class DataSettings:
    """Everything the data rooms need to know, with sd-scripts' names and defaults.

    Values of the dataset file go before these where both exist.

    Raises:
        SettingsError: a value is out of range, or the resolution cannot be trained on.
    """

    dataset_config: Path | None = flag(None, "dataset file (.toml or .json) with [general], [[datasets]] and subsets")
    train_data_dir: str | None = flag(
        None, "without a dataset file: a folder of pictures, or of sub-folders named {repeats}_{class tokens}"
    )
    reg_data_dir: str | None = flag(
        None, "without a dataset file: regularisation pictures, in sub-folders named {repeats}_{class tokens}"
    )
    in_json: str | None = flag(
        None, "without a dataset file: metadata file (.json or .jsonl) with captions; --train_data_dir has the pictures"
    )
    prior_loss_weight: float = flag(1.0, "weight of regularisation pictures in the loss")
    dataset_repeats: int = flag(1, "how often a picture is shown per epoch, where the dataset file does not say it")
    train_batch_size: int = flag(1, "pictures per step and process")
    resolution: tuple[int, int] | None = flag(
        None, "training size in pixels: N for a square, or W,H", parse=schema.resolution
    )
    enable_bucket: bool = flag(False, "train in several aspect ratios: each picture goes to the bucket nearest to it")
    min_bucket_reso: int = flag(256, "shortest side of a bucket in pixels (no effect with --bucket_no_upscale)")
    max_bucket_reso: int = flag(1024, "longest side of a bucket in pixels (no effect with --bucket_no_upscale)")
    bucket_reso_steps: int = flag(64, "bucket sides are multiples of this many pixels (a multiple of 16)")
    bucket_no_upscale: bool = flag(False, "buckets are made from the pictures' own sizes, and none is enlarged")
    resize_interpolation: Literal["lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area"] | None = flag(
        None, "how pictures are resized (default: area where they shrink, else lanczos)"
    )
    caption_extension: str = flag(
        ".caption", "extension of the caption file beside each picture", aliases=("caption_extention",)
    )
    caption_separator: str = flag(",", "what separates tags in a caption")
    shuffle_caption: bool = flag(False, "shuffle the tags of a caption each time it is used")
    keep_tokens: int = flag(0, "this many tags at the front are neither shuffled nor dropped")
    keep_tokens_separator: str = flag(
        "", "tags before this mark (and after a second one) are neither shuffled nor dropped"
    )
    secondary_separator: str | None = flag(
        None, "joins tags that stay together; becomes --caption_separator at the end"
    )
    enable_wildcard: bool = flag(
        False, "{a|b} in captions is a random choice, and a caption of several lines a random line"
    )
    join_caption_lines: bool = flag(
        False, "all lines of a caption are one text, joined by spaces (else only its first line is read)"
    )
    caption_prefix: str | None = flag(None, "put in front of every caption, with a space")
    caption_suffix: str | None = flag(None, "put behind every caption, with a space")
    caption_dropout_rate: float = flag(0.0, "probability that a caption is left empty")
    caption_dropout_every_n_epochs: int = flag(0, "every N-th epoch is trained with empty captions")
    caption_tag_dropout_rate: float = flag(0.0, "probability that a tag is left out")
    token_warmup_min: int = flag(1, "tags that a caption begins with while --token_warmup_step lasts")
    token_warmup_step: int | float = flag(
        0,
        "optimizer steps until captions have all their tags (below 1: a share of all steps)",
        parse=schema.count_or_share,
    )
    caption_variants: int | None = flag(
        None, "at most this many different captions a picture from shuffling and choosing, drawn once and used in turn"
    )
    color_aug: bool = flag(False, "vary hue or brightness a little in a third of the showings")
    flip_aug: bool = flag(False, "mirror a picture left to right half of the time")
    random_crop: bool = flag(False, "cut the bucket out at a random place instead of the centre")
    face_crop_aug_range: tuple[float, float] | None = flag(
        None,
        "cut around the face whose place is in the file name (_cx_cy_w_h), enlarged by a factor from lo,hi",
        parse=schema.face_crop_range,
    )
    alpha_mask: bool = flag(False, "train only where pictures are not transparent: their alpha is the loss mask")
    masked_loss: bool = flag(False, "weigh the loss with the mask pictures of conditioning_data_dir")
    conditioning_data_dir: str | None = flag(
        None, "without a dataset file: folder of mask pictures (bright is trained), named as the pictures"
    )
    normalize_masked_loss: bool = flag(
        False, "divide a masked loss by the mask's area, so that small masks weigh as much as large ones"
    )
    validation_split: float = flag(0.0, "share of the pictures that is held out to measure the validation loss on")
    validation_seed: int | None = flag(None, "seed of that choice; --seed when left out")
    cache_info: bool = flag(False, "remember picture sizes on disk also where nothing else is cached there")
    debug_dataset: bool = flag(
        False, "write a page that shows what the model would see, debug_dataset.html in --output_dir, and end"
    )
    cache_latents: bool = flag(False, "encode every picture once, before training, and keep the result in memory")
    cache_latents_to_disk: bool = flag(False, "as --cache_latents, kept on disk for the next run")
    vae_batch_size: int | None = flag(
        None, "pictures that are encoded at a time (default: as many as have the pixels of one of 1024 x 1024 together)"
    )
    cache_text_encoder_outputs: bool = flag(False, "encode every caption once, before training, and keep it in memory")
    cache_text_encoder_outputs_to_disk: bool = flag(
        False, "as --cache_text_encoder_outputs, kept on disk for the next run"
    )
    text_encoder_batch_size: int | None = flag(
        None, "captions that are encoded at a time (default: the batch size, 8 at least)"
    )
    cache_dir: Path | None = flag(
        None, "folder for everything cached on disk (default: a folder lumina_cache beside the pictures)"
    )
    max_data_loader_n_workers: int = flag(8, "threads that read pictures and cached files ahead of training")

    def __post_init__(self) -> None:
        for key in (*schema.DATASET_KEYS, *schema.SUBSET_KEYS):
            if key.flag is not None:
                self._check(key.flag, key.read)
        for name, minimum in _MINIMA.items():
            self._check(name, schema.whole(minimum))
        self._check("prior_loss_weight", schema.number(0, 1e6))
        self._check("caption_variants", schema.whole(1))
        if self.cache_latents_to_disk:
            self._set("cache_latents", True)
        if self.cache_text_encoder_outputs_to_disk:
            self._set("cache_text_encoder_outputs", True)
        if self.dataset_config is None:
            self._check_resolution()
            # With a dataset file, its tables may turn these on or off; they are checked there, one by one.
            given = [name for name in UNCACHED if getattr(self, name)]
            problem = contradiction(given, self.cache_latents, self.enable_bucket, mark="--")
            if problem:
                raise SettingsError(problem)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check(self, name: str, read: schema.Reader) -> None:
        value = getattr(self, name)
        if value is None:
            return
        try:
            self._set(name, read(value))
        except ValueError as error:
            raise SettingsError(f"--{name}: {value!r} is not valid: {error}") from error

    def _check_resolution(self) -> None:
        multiple = schema.PIXEL_MULTIPLE
        if self.resolution is None or self.enable_bucket:
            return
        if any(side % multiple for side in self.resolution):
            raise SettingsError(
                f"--resolution: {self.resolution[0]},{self.resolution[1]} cannot be trained on without buckets, because "
                f"the model needs multiples of {multiple}; choose such sides or add --enable_bucket"
            )


_MINIMA = {
    "dataset_repeats": 1,
    "vae_batch_size": 1,
    "text_encoder_batch_size": 1,
    "max_data_loader_n_workers": 0,
}
