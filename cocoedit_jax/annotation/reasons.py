"""Why an item is not in the result, as codes to count by."""

# The item could not be annotated. Those marked * may go well another time: --retry_dead.
DEAD = {
    "unreadable_image": "the picture cannot be opened, or is larger than what is safe to decode *",
    "refused_request": "the model's server refused the request as it is (status 4xx) *",
    "no_reply": "the model's server gave no answer in time, or failed (status 5xx, garbled); in a batch too *",
    "unparsed_reply": "the model answered in another form than asked for",
    "bad_box": "the model's box is empty or outside of the picture",
    "segmenter_failed": "the segmenter raised an error *",
    "no_score": "the judge's answer is not a digit, and the filter needs that score",
}
# The item was annotated, and is not wanted. The first two end its way through the stages; the filter gives the others.
REJECTED = {
    "global_edit": "the edit concerns the whole picture, so there is no region to keep",
    "no_target": "the picture does not show what the instruction names",
    "empty_mask": "the segmenter marked nothing",
    "area": "the mask's share of the picture is too small or too large",
    "crop": "the mask's share of the centred square, which training may crop to, is too small or too large",
    "components": "the mask has too many pieces",
    "box_mismatch": "mask and box differ too much",
    "border": "the mask takes up too much of the picture's border",
    "clarity": "the instruction is not clear enough",
    "mask_accuracy": "the mask does not fit the instruction well enough",
    "prominence": "the target is not prominent enough",
    "duplicate": "the same picture with the same instruction has a better annotation",
}
