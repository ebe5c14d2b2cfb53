"""How many tokens an image or a video becomes.

Images: sides rounded to multiples of 32 (patch 16, merged 2 x 2), scaled to between 65,536 and 16,777,216 pixels; a
token is 1,024 pixels. Videos: 2 frames a second, 4 to 768 of them, two frames to a token, at most 25,165,824 pixels in
all frames, except that a frame is never narrower than a token. (preprocessor_config.json and
video_preprocessor_config.json of Qwen3.6-35B-A3B; transformers 5.23, `Qwen2VLImageProcessorFast` and
`Qwen3VLVideoProcessor`, `smart_resize`.)
"""

from math import ceil, floor, sqrt

from .errors import BadInput

SIDE = 32  # pixels of a token's side
MIN_IMAGE_PIXELS, MAX_IMAGE_PIXELS = 65_536, 16_777_216
MIN_VIDEO_PIXELS, MAX_VIDEO_PIXELS = 4_096, 25_165_824
FRAMES_PER_S, MIN_FRAMES, MAX_FRAMES, FRAMES_PER_TOKEN = 2.0, 4, 768, 2
MAX_SIDE_RATIO = 200


def image_tokens(width: int, height: int) -> int:
    """Tokens of one image of that many pixels. Raises BadInput for sides that the processor refuses."""
    return _cells(width, height, 1, MIN_IMAGE_PIXELS, MAX_IMAGE_PIXELS)


def video_tokens(width: int, height: int, duration_s: float) -> int:
    """Tokens of the frames of one video, without the timestamps between them."""
    if not 0 < duration_s < 10**7:
        raise BadInput(f"a video of {duration_s} s: give a duration in seconds")
    frames = min(max(int(duration_s * FRAMES_PER_S), MIN_FRAMES), MAX_FRAMES)
    frames = ceil(frames / FRAMES_PER_TOKEN) * FRAMES_PER_TOKEN
    return frames // FRAMES_PER_TOKEN * _cells(width, height, frames, MIN_VIDEO_PIXELS, MAX_VIDEO_PIXELS)


def _cells(width: int, height: int, frames: int, least_pixels: int, most_pixels: int) -> int:
    """Tokens of one frame, when all frames together have to stay between two numbers of pixels."""
    short, long = sorted((width, height))
    if short < 1 or long > MAX_SIDE_RATIO * short or long > 10**6:
        raise BadInput(f"{width} x {height} pixels: the processor takes sides of 1 and more, at most 200 to 1")
    columns, rows = max(1, round(width / SIDE)), max(1, round(height / SIDE))
    pixels = frames * columns * rows * SIDE**2
    if pixels > most_pixels:
        scale = sqrt(frames * width * height / most_pixels)
        return max(1, floor(width / scale / SIDE)) * max(1, floor(height / scale / SIDE))
    if pixels < least_pixels:
        scale = sqrt(least_pixels / (frames * width * height))
        return ceil(width * scale / SIDE) * ceil(height * scale / SIDE)
    return columns * rows
