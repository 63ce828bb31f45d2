"""Pictures, video and sound: read, sample, write. Failures are one typed error each; nothing falls back silently."""

from __future__ import annotations

from mmzoo.media.audio import Audio, has_audio, read_audio, streams
from mmzoo.media.image import read_image
from mmzoo.media.sampling import SAMPLING_RULES, sample_indices
from mmzoo.media.video import Video, VideoWriter, read_video, write_video

__all__ = [
    "SAMPLING_RULES", "Audio", "Video", "VideoWriter", "has_audio", "read_audio", "read_image", "read_video",
    "sample_indices", "streams", "write_video",
]  # fmt: skip
