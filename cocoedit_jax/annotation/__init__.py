"""From (image, instruction) to (image, mask, refined instruction, scores)."""
