"""What is better here than in sd-scripts, by flag and by key of the dataset file: the texts of sd_scripts_compatibility.md.

A flag or key without a text simply works as it does there. Why a flag has no effect or is refused stands beside the flag,
in library/training/legacy_flags.py.
"""

from __future__ import annotations

_CAPTIONS = (
    "is the same with cached captions, where sd-scripts silently leaves it out: all captions of the run are cached"
)
_METADATA_TOO = "recorded in the LoRA file, so that pictures can be drawn with the same"
_EARLY = "is checked before a model is loaded"
_FOUND = "cached entries are found by content: a changed picture, caption, setting or model is encoded anew by itself"
_STATE = "a resumed run draws the same pictures, captions, noise and dropout, on a CPU it is equal bit for bit"
_HUBER = "huber and smooth_l1 work with every schedule; sd-scripts ends with an error at its default one, snr"
_COUNTED = "counts optimizer steps whatever the number of processes; there a warm-up of N ends after N / processes"
_VALIDATION = "each time on the same pictures with the same noise and the same noise levels; there all of them differ"
_SPLIT = "training and validation never share a picture, also where --validation_seed is left out; there they overlap"
_UPLOAD = "without --huggingface_path_in_repo files go to the repository's top; there every upload then fails"
_MASK = "masks are resized and cut exactly as their pictures; there they are stretched and end up beside the subject"
_TIMESTEP = "limits training; sd-scripts only writes it into the metadata"
_WORKERS = "readers are threads that know the epoch, so that nothing is shown twice or left out at its start"

BETTER_FLAGS: dict[str, str] = {
    # models
    "pretrained_model_name_or_path": f"takes diffusers folders, shards and all-in-one files too, and {_EARLY}",
    "gemma2": "takes folders, shards and all-in-one files too; may be left out where the first file holds it",
    "ae": "takes folders and all-in-one files too; its name and hash go into the metadata",
    "gemma2_max_token_length": "up to 8192 works; sd-scripts fails beyond 299 tokens. Captions that are cut off are named",
    "system_prompt": _METADATA_TOO
    + "; empty captions and empty negative prompts are treated alike; a <Prompt Start> at its end is not doubled",
    "tokenizer_cache_dir": "takes a plain folder too, and is needed only where the Gemma2 file has no tokenizer inside",
    "disable_mmap_load_safetensors": "acts on all three models, there on the first one only",
    # pictures
    "dataset_config": "every message names the file, table, key and value, and the nearest key; flags that it overrides"
    " are named",
    "resolution": "sizes that the model cannot train are refused; the metadata take it from the dataset file too",
    "enable_bucket": "buckets are shuffled anew each epoch, without repeating or losing pictures at its start",
    "bucket_reso_steps": "multiples of 16 work, as the model allows; there only multiples of 64 do",
    "bucket_no_upscale": "a picture smaller than a step is named; there it divides by zero",
    "min_bucket_reso": "not held against the resolution where --bucket_no_upscale makes it meaningless",
    "max_bucket_reso": "not held against the resolution where --bucket_no_upscale makes it meaningless; said where it makes"
    " pictures smaller",
    "resize_interpolation": "an unknown name is refused also inside a subset",
    "color_aug": "refused beside cached latents on every level; there mask datasets are not looked at",
    "flip_aug": "drawn for each picture by itself; there all workers draw the same",
    "face_crop_aug_range": "refused beside buckets, where sd-scripts silently leaves it out",
    "random_crop": "works beside mask pictures, and without buckets also for pictures smaller than the resolution",
    "alpha_mask": "transparent parts are painted white too, so that no hidden colours are trained at their edges; said where"
    " no picture can be transparent",
    "masked_loss": _MASK + ". Where there are no masks at all, that is said",
    "conditioning_data_dir": "works; sd-scripts reads only the dataset file's key. " + _MASK[0].upper() + _MASK[1:],
    "cache_info": "keeps sizes and content hashes, and captions are read anew; there captions are paired with wrong pictures"
    " beside --validation_split",
    "in_json": "sizes are read from the pictures; there a set without sizes in the file fails in its second run",
    "train_data_dir": "takes a folder of pictures without N_name sub-folders too, and says where that is itself named"
    " N_name; photographs are turned upright (EXIF)",
    "debug_dataset": "writes one page that shows what the model sees; there it never ends on Linux",
    # captions
    "caption_extension": "a missing or empty caption is named once, and does not end the run; said where files have another"
    " extension or lines that are not read",
    "shuffle_caption": _CAPTIONS,
    "keep_tokens_separator": "never stays in the caption; there it does where nothing is shuffled",
    "secondary_separator": _CAPTIONS,
    "enable_wildcard": _CAPTIONS,
    "caption_prefix": _CAPTIONS,
    "caption_suffix": _CAPTIONS,
    "caption_dropout_rate": _CAPTIONS + ", the empty one included",
    "caption_dropout_every_n_epochs": _CAPTIONS + "; there each worker's first batch is dropped too",
    "caption_tag_dropout_rate": _CAPTIONS,
    "token_warmup_min": _CAPTIONS,
    "token_warmup_step": "follows the optimizer step exactly; there it lags behind, and mask datasets stay at its beginning",
    "weighted_captions": "works, the same with cached captions; sd-scripts ends with an error. See weighted_captions.md",
    # caches
    "cache_latents": "the most likely latents are kept, not one random draw of them",
    "cache_latents_to_disk": _FOUND,
    "vae_batch_size": "without it as many as have the pixels of one of 1024 x 1024; pictures are read ahead by threads",
    "cache_text_encoder_outputs": "freezes Gemma2 instead of training it on captions that are not used",
    "cache_text_encoder_outputs_to_disk": _FOUND + "; only real tokens are kept, in 16 bits",
    "max_data_loader_n_workers": _WORKERS,
    # saving
    "output_dir": "is asked for, and tried out, at the start; there a missing folder loses the whole run at its end",
    "output_name": "a name that no file can have is refused at the start; an older file of this name is told before it is"
    " overwritten; a file's ending is left out",
    "save_model_as": "files are written whole or not at all",
    "save_state": "written as a whole, for every process: " + _STATE,
    "save_state_on_train_end": "as --save_state",
    "resume": _STATE + "; --resume latest finds the newest one. States of sd-scripts give their weights",
    "initial_epoch": "counts as the files are named, with accumulation too; there a resumed run counts wrongly",
    "initial_step": "counts optimizer steps, with accumulation too; there it becomes the remainder within the epoch",
    "skip_until_initial_step": "accepted and always so: a run goes on with the pictures that come then",
    "metadata_thumbnail": "a file that is missing or too large is refused at the start",
    "save_every_n_epochs": "a run that is stopped or fails saves what it has; files are written whole or not at all",
    "save_every_n_steps": "a run that is stopped or fails saves what it has; files are written whole or not at all",
    "huggingface_repo_id": _UPLOAD,
    "huggingface_path_in_repo": _UPLOAD,
    "huggingface_token": "never written to a file or a log; there --output_config writes it",
    "save_state_to_huggingface": "refused where no state is written or no repository is named",
    "resume_from_huggingface": "refused without --resume",
    # length, seed, precision
    "gradient_accumulation_steps": "the loss is a mean over all pictures of the step, also where batches differ in size",
    "seed": "all draws are keyed: N processes train what one process with N times the batch trains",
    "use_flash_attn": "takes FlashAttention 3 too, in all blocks, there not in the refiners; it is tried at the start",
    "use_sage_attn": "draws pictures; training with it is refused, where sd-scripts silently trains nothing in attention",
    "sdpa": "means it; there it is always used, with a mask that rules its flash kernel out",
    "xformers": "the same as --sdpa, which has xformers' memory-efficient kernel inside",
    "mem_eff_attn": "the same as --sdpa, which has a memory-efficient kernel inside",
    "mixed_precision": "timesteps stay float32, there bf16 rounds them. fp16 is for products alone, which cannot overflow,"
    " and losses are not scaled",
    "full_bf16": "needs --mixed_precision bf16, and says so at the start",
    "fp8_base": "a scale for each output channel, and only the blocks' large matrices; there everything is cast without"
    " scales, embedders, norms and time features too. Quantised while reading, so that the bf16 model never has to fit",
    "fp8_base_unet": "as --fp8_base, without Gemma2",
    "no_half_vae": "the cache knows the precision that it was made with",
    "gradient_checkpointing": "covers every block, and does not make Gemma2's embedding trainable",
    "blocks_to_swap": "all 26 blocks instead of at most 24; weights are never copied back; works with difference output"
    " preservation and with --cpu_offload_checkpointing; Gemma2's layers are streamed too while captions are encoded",
    "cpu_offload_checkpointing": "really offloads, where there the flag is stored and never used; also without"
    " --gradient_checkpointing and together with --blocks_to_swap",
    # optimizer
    "optimizer_type": _EARLY + "; a package that is missing is named with its install line",
    "learning_rate": "the default of 2e-6 is warned of where nobody gave a rate; a run in which every rate is 0 is refused;"
    " a loss that is no number ends the run",
    "text_encoder_lr": "0 freezes Gemma2's LoRA; there its gradients still shrink the others' by clipping",
    "max_grad_norm": "clips what is trained and nothing else; the norm is logged",
    "lr_scheduler": "every name works or is refused at the start; there two of them end in a traceback",
    "lr_scheduler_type": _EARLY,
    "lr_warmup_steps": _COUNTED,
    "lr_decay_steps": _COUNTED,
    # network
    "network_module": _EARLY + "; there after all caching",
    "network_args": "unknown names are refused, and mlp_dim and split_qkv do what they say",
    "network_dropout": "off while previews are drawn and the validation loss is measured",
    "network_weights": "alpha and strength are the file's, key forms of other programs are converted; a file that does not"
    " fit is refused",
    "dim_from_weights": "keeps --network_args and --network_dropout, which sd-scripts drops",
    "base_weights": "merged before captions are cached, in float32; a file of which nothing fits is refused",
    "base_weights_multiplier": "more values than files are refused",
    "network_train_unet_only": "Gemma2 is not even loaded where every caption is cached already",
    "scale_weight_norms": "after each optimizer step, without waiting for the device",
    # noise and loss
    "timestep_sampling": "noise levels stay float32",
    "discrete_flow_shift": "previews use it too; there they are drawn with 6.0 always",
    "model_prediction_type": "additive and sigma_scaled compare with the right target; there the objective is wrong",
    "weighting_scheme": "one that would have no effect is refused",
    "min_timestep": _TIMESTEP,
    "max_timestep": _TIMESTEP,
    "loss_type": _HUBER,
    "huber_schedule": _HUBER,
    "ip_noise_gamma_random_strength": "refused without --ip_noise_gamma",
    # validation and previews
    "validation_split": _SPLIT,
    "validation_seed": "left out it is --seed, as the help of sd-scripts says but its code does not do; " + _SPLIT,
    "validate_every_n_steps": _VALIDATION + ". The average is of this validation alone",
    "validate_every_n_epochs": _VALIDATION,
    "max_validation_steps": "always the same batches",
    "sample_prompts": "any option in any kind of file; the prompt's own text is never read as an option; seed 0 works",
    "sample_every_n_steps": "right colours: sd-scripts unscales previews' latents twice. Each event also gives one sheet",
    "sample_every_n_epochs": "right colours: sd-scripts unscales previews' latents twice. Each event also gives one sheet",
    "sample_at_first": "works while Gemma2 is trained; there the first preview ends the run",
    "sample_batch_size": "prompts of one batch need not share their noise",
    # logging and config file
    "log_with": "each value once a step; there repeated and under two names",
    "log_config": "of paths only the last part is stored; there several are stored whole",
    "log_tracker_config": _EARLY,
    "console_log_file": "errors are shown on the screen too",
    "config_file": "types and choices are checked, unknown keys are refused with the nearest flag, keys of front ends are"
    " named, on/off flags can be turned off on the command line, and a typed flag also goes before the file's line under"
    " another name (max_train_steps and max_train_epochs)",
    "output_config": "writes what was set, never a secret, and reads back equal",
}
"""Flag -> how it is better here."""

BETTER_KEYS: dict[str, str] = {
    "resolution": "sizes that the model cannot train are refused at the start",
    "bucket_reso_steps": BETTER_FLAGS["bucket_reso_steps"],
    "bucket_no_upscale": BETTER_FLAGS["bucket_no_upscale"],
    "resize_interpolation": BETTER_FLAGS["resize_interpolation"],
    "validation_split": "a subset may hold it too, and whole numbers are numbers; 1.0 holds all of it out. "
    "Metadata and mask subsets are split too",
    "validation_seed": "a subset may hold it too; left out it is --seed",
    "image_dir": "relative folders are also looked for beside the file; one without pictures is named",
    "metadata_file": "absolute and relative names, .json and .jsonl; its pictures can be held out for validation",
    "conditioning_data_dir": _MASK + ". A picture without a mask is trained whole",
    "num_repeats": "repeats come after the validation split, so that a picture is on one side only",
    "caption_extension": BETTER_FLAGS["caption_extension"],
    "alpha_mask": BETTER_FLAGS["alpha_mask"],
    "cache_info": BETTER_FLAGS["cache_info"],
    "custom_attributes": "diff_output_preservation compares with the prediction without any LoRA, made without gradients;"
    " misspelt attributes are refused",
    "face_crop_aug_range": BETTER_FLAGS["face_crop_aug_range"] + "; whole numbers are numbers",
}
BETTER_KEYS |= {
    name: BETTER_FLAGS[name]
    for name in (
        "shuffle_caption",
        "keep_tokens_separator",
        "secondary_separator",
        "enable_wildcard",
        "caption_prefix",
        "caption_suffix",
        "caption_dropout_rate",
        "caption_dropout_every_n_epochs",
        "caption_tag_dropout_rate",
        "token_warmup_min",
        "token_warmup_step",
        "color_aug",
        "flip_aug",
        "random_crop",
        "min_bucket_reso",
        "max_bucket_reso",
    )
}
"""Key of the dataset file -> how it is better here."""
