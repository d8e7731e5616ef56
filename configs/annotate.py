"""Settings of python -m launch.annotate. Thresholds, radii and prompts are choices of this project: those of
CoCoEdit-40K are not published. All raw scores are kept; change `filter` and run with --refilter to choose again.

    vllm serve Qwen/Qwen2.5-VL-72B-Instruct --host 127.0.0.1 --limit-mm-per-prompt '{"image": 2}'
    python -m launch.annotate --input=FOLDER_OR_JSONL --output=DIR
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "models": {
                "endpoints": ("http://127.0.0.1:8000/v1",),  # OpenAI chat completions; requests are spread over all
                "name": "Qwen/Qwen2.5-VL-72B-Instruct",
                "key_env": "",  # environment variable that holds the API key, or
                "key_file": "",  # file that does
                "concurrency": 64,  # requests under way at once
                "timeout_s": 120.0,  # of one request
                "deadline_s": 1800.0,  # of all requests of a shard in a stage, retries included
                "probe_s": 120.0,  # to wait for the first answers, while servers start
                # Share of a stage's requests that may stay unanswered: these items become dead letters. Beyond it the
                # run stops; nothing is lost, and the same command continues. With batches: the share of a stage's
                # records whose replies came back failed; beyond it all of them wait, to be emitted again.
                "max_unanswered": 0.02,
                "cell": 28,  # px; sides of pictures are multiples of it: 28 for Qwen2-VL and 2.5-VL, 32 for Qwen3-VL
                "max_pixels": 1003520,  # of a picture as sent; keep it within the server's own limit
                "image_format": "jpeg",  # of pictures as sent: jpeg (quality 95) or png (exact, five times the bytes)
                "prompts": "",  # folder with prompt files that replace those of cocoedit_jax/annotation/prompts
            },
            "classify": {
                # Kinds with a region to edit, and kinds that concern the whole picture, which are rejected as global.
                "local": ("add", "remove", "replace", "color", "material", "motion", "text"),
                "whole": ("background", "style", "tone", "viewpoint"),
                # What data sets call them. An edit type that is neither above nor here is asked for.
                "aliases": {
                    "addition": "add",
                    "object_add": "add",
                    "subject-add": "add",
                    "removal": "remove",
                    "object_removal": "remove",
                    "subject-remove": "remove",
                    "swap": "replace",
                    "object_swap": "replace",
                    "subject-replace": "replace",
                    "attribute_modification": "color",
                    "recolor": "color",
                    "color_alter": "color",
                    "material_alter": "material",
                    "action": "motion",
                    "motion_change": "motion",
                    "text_change": "text",
                    "background_swap": "background",
                    "background_change": "background",
                    "environment": "tone",
                    "env": "tone",
                    "style_change": "style",
                    "style_transfer": "style",
                    "tone_transfer": "tone",
                },
                "max_tokens": 16,
            },
            "box": {
                # How the model writes boxes: "pixels" of the picture as sent (Qwen2.5-VL), "relative-1000" (Qwen2-VL,
                # Qwen3-VL), "relative-1", or "auto": what is known of models.name, else what fits the test picture.
                "convention": "auto",
                "probe": True,  # before anything else, ask for a known square and compare
                "min_side": 8,  # px of the picture as sent; smaller boxes are dead letters
                "max_boxes": 8,  # the largest ones are taken
                "max_tokens": 512,
            },
            "mask": {
                "segmenter": "sam2",  # sam2, sam2-transformers, random-walker, box, or MODULE:CLASS
                # Arguments of the segmenter, such as {"checkpoint": "sam2.1_hiera_large.pt"}; see its docstring.
                "options": {},
                "from_box": ("add",),  # kinds whose region is the box itself: there is nothing to segment yet
                # Growth per kind, as a share of the picture's shorter side. What replaces or moves needs room.
                "dilate": {"replace": 0.03, "motion": 0.06, "add": 0.02, "other": 0.01},
                "fill_holes": True,  # before the growth
                "min_piece": 0.02,  # pieces below this share of the largest piece are dropped, before the growth
            },
            # use: the new text becomes the prompt, and is scored; --refilter keeps to what the run was begun with.
            "rewrite": {"use": True, "max_words": 60, "max_tokens": 384},
            "score": {"min_mass": 0.5},  # probability that must lie on the digits for a score to count
            "filter": {
                # Expected digit / 5 under the judge's own distribution; None: not asked for.
                "min_clarity": 0.7,
                "min_mask_accuracy": 0.7,
                "min_prominence": 0.5,
                "min_area": 0.01,  # share of the picture
                "max_area": 0.6,
                "min_crop_area": 0.005,  # the same in the centred square that data.crop="center" leaves
                "max_crop_area": 0.9,
                "max_components": 8,
                "min_box_iou": 0.4,  # between the mask's bounding box (before growth) and the box
                "max_border": 0.5,  # share of the picture's border inside the mask
                # Of the same picture with the same instruction the best-scored stays: "exact" (equal files), "near"
                # (to the eye, see cocoedit_jax/data/duplicates.py), or "keep" all.
                "duplicates": "near",
                # What "near" means: so many of the 64 bits of the difference hashes may differ (0 to 16), and so much
                # of 255 the colours of the 8 x 8 thumbnails, in the mean.
                "near_bits": 4,
                "near_colour": 12.0,
            },
            "engine": {
                "shard_size": 128,  # items per shard; a killed run repeats at most one stage of the shards under way
                "in_flight": 2,  # shards worked on at once, so that servers stay busy at a shard's end
                "images": "copy",  # of the kept into DIR/images: copy or hardlink
                # Per file of --emit_batch: requests and MiB at most. Hosted services take 50,000 and 200 MB.
                "batch_requests": 2000,
                "batch_mib": 180.0,
                # With --engine=ray: workers of a stage, CPUs of one worker (fewer in a cluster that has not enough for
                # all), and GPUs of one that makes masks.
                "ray": {"workers": 2, "cpus": 1.0, "mask_workers": 1, "mask_gpus": 1.0},
            },
        }
    )
