"""Which images made a pipeline stop, and what is wrong with them."""

from collections.abc import Callable, Sequence

from pipelines.bad_samples.decoder_check import why_undecodable


def undecodable(images: Sequence[bytes], alone: Callable[[int], bool]) -> dict[int, str]:
    """Which of the images at which a pipeline stopped cannot be decoded, and why; tried one by one, completely.

    Args:
        images: The encoded images.
        alone: Whether a pipeline with nothing but the image of that number stops, too; asked where nothing else tells.
    """
    found = {i: reason for i, reason in enumerate(why_undecodable(images)) if reason}
    return found or dict.fromkeys(filter(alone, range(len(images))), "the pipeline cannot decode it")
