"""Sound: the right samples at the right time, or one typed error."""

from __future__ import annotations

import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from mmzoo.errors import AudioReadError, InputError
from mmzoo.media import Audio, VideoWriter, has_audio, read_audio, read_video, write_video


def tone(seconds: float, rate: int = 16000, hertz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def click(at: float, seconds: float, rate: int = 16000) -> np.ndarray:
    sound = np.zeros(round(seconds * rate), np.float32)
    sound[round(at * rate) : round((at + 0.05) * rate)] = 0.8
    return sound


def onset(audio: Audio) -> float:
    return float(np.flatnonzero(np.abs(audio.waveform) > 0.2)[0] / audio.sample_rate)


def pitch(audio: Audio) -> float:
    spectrum = np.abs(np.fft.rfft(audio.waveform * np.hanning(len(audio.waveform))))
    return float(spectrum.argmax() * audio.sample_rate / len(audio.waveform))


def write_wav(path: Path, planes: np.ndarray, rate: int) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(planes))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((planes.T * 32767).astype("<i2").tobytes())
    return path


def film(path: Path, seconds: float = 1.0, audio: np.ndarray | None = None) -> Path:
    frames = np.random.default_rng(0).integers(0, 256, (round(8 * seconds), 32, 32, 3), dtype=np.uint8)
    write_video(frames, path, fps=8, audio=audio)
    return path


@pytest.mark.parametrize("channels", [1, 2, 6, 8])
@pytest.mark.parametrize("rate", [8000, 11025, 44100, 192000])
def test_every_rate_and_number_of_channels_gives_the_same_sound(tmp_path: Path, rate: int, channels: int) -> None:
    audio = read_audio(write_wav(tmp_path / "a.wav", np.stack([tone(1, rate)] * channels), rate))
    assert (audio.sample_rate, audio.source_rate, audio.channels) == (16000, rate, channels)
    assert audio.waveform.dtype == np.float32
    assert len(audio.waveform) == pytest.approx(16000, abs=8)
    assert pitch(audio) == pytest.approx(440, abs=2)
    assert np.abs(audio.waveform).max() == pytest.approx(0.5, abs=0.05)


def test_a_sound_of_eight_bits_is_centred(tmp_path: Path) -> None:
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(1)
        file.setframerate(16000)
        file.writeframes((128 + 127 * tone(1)).round().astype(np.uint8).tobytes())
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav").waveform, tone(1), atol=0.01)


def adts(path: Path, rate: int) -> bytes:
    with av.open(str(path), "w", format="adts") as container:
        stream = container.add_stream("aac", rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(tone(1, rate)[None], format="fltp", layout="mono")
        frame.sample_rate = rate
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path.read_bytes()


def test_a_rate_that_changes_inside_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "b.aac").write_bytes(adts(tmp_path / "a.aac", 16000) + adts(tmp_path / "a.aac", 48000))
    with pytest.raises(AudioReadError, match="the sample rate changes from 16000 to 48000"):
        read_audio(tmp_path / "b.aac")


def test_nothing_is_read_after_the_moment_that_is_wanted(tmp_path: Path) -> None:
    """Not even decoded: what is damaged there is no matter."""
    path = noise_in(tmp_path / "a.m4a", "aac")
    damage(path, 0.7, 4000)
    assert read_audio(path, stop=1).duration == 1


def test_the_picture_on_a_records_sleeve_is_no_video(tmp_path: Path) -> None:
    from PIL import Image

    from mmzoo.media.audio import streams

    Image.new("RGB", (16, 16)).save(tmp_path / "sleeve.png")
    with av.open(str(tmp_path / "a.m4a"), "w", format="mp4") as container:
        sound = container.add_stream("aac", rate=16000, layout="mono")
        with av.open(str(tmp_path / "sleeve.png")) as picture:
            sleeve = container.add_stream_from_template(picture.streams.video[0])
            sleeve.disposition = av.stream.Disposition.attached_pic
            frame = av.AudioFrame.from_ndarray(tone(1)[None], format="fltp", layout="mono")
            frame.sample_rate = 16000
            container.mux(sound.encode(frame))
            container.mux(sound.encode())
            for packet in picture.demux(video=0):
                if packet.dts is not None:
                    packet.stream = sleeve
                    container.mux(packet)
    assert streams(tmp_path / "a.m4a") == {"audio"}


def test_channels_are_averaged_or_the_first_is_taken(tmp_path: Path) -> None:
    path = write_wav(tmp_path / "a.wav", np.stack([tone(1), 0 * tone(1)]), 16000)
    assert np.abs(read_audio(path).waveform).max() == pytest.approx(0.25, abs=0.01)
    assert np.abs(read_audio(path, channels="first").waveform).max() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_a_film_with_sound_is_written_and_read_back_in_time(tmp_path: Path, suffix: str) -> None:
    path = film(tmp_path / f"a{suffix}", 2, click(1.25, 2))
    assert has_audio(path)
    assert onset(read_audio(path)) == pytest.approx(1.25, abs=0.03)
    assert len(read_video(path, sampling="all").frames) == 16


@pytest.mark.parametrize("seconds", [0.5, 3.0])
def test_sound_may_be_shorter_or_longer_than_the_film(tmp_path: Path, seconds: float) -> None:
    audio = read_audio(film(tmp_path / "a.mp4", 1, tone(seconds)))
    assert audio.duration == pytest.approx(seconds, abs=0.1)


@pytest.mark.parametrize("delay", [-0.5, 0.04, 0.75])
def test_the_clock_is_that_of_the_frames(tmp_path: Path, delay: float) -> None:
    """A track that begins later begins with silence; what lies before the first frame is cut."""
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        picture = container.add_stream("libx264", rate=8)
        picture.width = picture.height = 32
        sound = container.add_stream("pcm_s16le", rate=16000, layout="mono")
        for i in range(16):
            frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8))
            frame.pts, frame.time_base = i + 8, Fraction(1, 8)
            container.mux(picture.encode(frame))
        container.mux(picture.encode())
        frame = av.AudioFrame.from_ndarray((click(0.75, 1.5) * 32767).astype(np.int16)[None], layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 16000, round((1 + delay) * 16000), Fraction(1, 16000)
        container.mux(sound.encode(frame))
        container.mux(sound.encode())
    assert onset(read_audio(path)) == pytest.approx(0.75 + delay, abs=0.02)


def test_more_than_thirty_seconds_are_read_whole_or_up_to_a_moment(tmp_path: Path) -> None:
    path = write_wav(tmp_path / "a.wav", tone(40, 8000)[None], 8000)
    assert read_audio(path).duration == pytest.approx(40, abs=0.01)
    assert read_audio(path, stop=30).duration == pytest.approx(30, abs=0.01)


def test_a_film_without_sound_says_so(tmp_path: Path) -> None:
    path = film(tmp_path / "a.mp4")
    assert not has_audio(path)
    with pytest.raises(AudioReadError, match="no sound track"):
        read_audio(path)


@pytest.mark.parametrize("content", [b"", b"no sound at all", bytes(range(256)) * 9])
def test_what_is_no_sound_is_a_typed_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.wav").write_bytes(content)
    for call in (read_audio, has_audio):
        with pytest.raises(AudioReadError, match=r"a\.wav"):
            call(tmp_path / "a.wav")
    with pytest.raises(AudioReadError, match="no such file"):
        read_audio(tmp_path / "b.wav")


def test_a_cut_file_is_an_error_or_what_is_there(tmp_path: Path) -> None:
    whole = write_wav(tmp_path / "a.wav", tone(2)[None], 16000).read_bytes()
    (tmp_path / "b.wav").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(AudioReadError, match="allow_short"):
        read_audio(tmp_path / "b.wav")
    short = read_audio(tmp_path / "b.wav", allow_short=True)
    assert short.duration == pytest.approx(1, abs=0.1)
    assert short.notes


def remuxed(path: Path, to: Path, **options: str) -> Path:
    with av.open(str(path)) as source, av.open(str(to), "w", options=options) as container:
        stream = container.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(audio=0):
            if packet.dts is not None:
                packet.stream = stream
                container.mux(packet)
    return to


def test_a_file_that_is_cut_between_packets_holds_less_than_it_promises(tmp_path: Path) -> None:
    path = remuxed(noise_in(tmp_path / "a.m4a", "aac"), tmp_path / "b.m4a", movflags="faststart")
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(audio=0) if packet.size]
    path.write_bytes(path.read_bytes()[: packets[len(packets) // 3].pos])
    with pytest.raises(AudioReadError, match="the header promises 4.* s, the sound ends at 1"):
        read_audio(path)
    assert "promises" in read_audio(path, allow_short=True).notes[-1]


def test_a_byte_that_only_the_checksum_tells_is_an_error(tmp_path: Path) -> None:
    path = remuxed(noise_in(tmp_path / "a.flac", "flac"), tmp_path / "b.mkv")
    damage(path, 0.5, 1)
    with av.open(str(path)) as container:
        assert sum(frame.samples for frame in container.decode(audio=0)) == 64000
    with pytest.raises(AudioReadError, match="damaged at"):
        read_audio(path)


def damage(path: Path, start: float, length: int) -> None:
    data = bytearray(path.read_bytes())
    for i in range(int(len(data) * start), int(len(data) * start) + length):
        data[i] ^= 0x5A
    path.write_bytes(data)


def noise_in(path: Path, codec: str) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=16000, layout="mono")
        noise = np.random.default_rng(0).normal(size=(1, 64000)).astype(np.float32) / 4
        frame = av.AudioFrame.from_ndarray(noise, format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_damaged_packets_are_an_error_or_silence(tmp_path: Path) -> None:
    path = noise_in(tmp_path / "a.m4a", "aac")
    damage(path, 0.5, 4000)
    with pytest.raises(AudioReadError, match="damaged at .* allow_short"):
        read_audio(path)
    audio = read_audio(path, allow_short=True)
    assert audio.duration == pytest.approx(4, abs=0.2)
    assert "damaged packets" in audio.notes[0] or "damaged packets" in audio.notes[1]


def test_packets_that_the_container_drops_leave_a_hole_that_is_said(tmp_path: Path) -> None:
    path = noise_in(tmp_path / "a.flac", "flac")
    damage(path, 0.5, 4000)
    audio = read_audio(path)
    assert audio.duration == pytest.approx(4, abs=0.1)
    assert "missing, and silent" in audio.notes[0]


def test_arrays_are_sounds_too() -> None:
    assert read_audio(tone(1)).duration == 1
    assert read_audio(np.stack([tone(1), -tone(1)]), stop=0.5).waveform.tolist() == [0.0] * 8000
    for wrong in (
        np.zeros(0, np.float32),
        np.zeros(3),
        np.full(3, np.nan, np.float32),
        np.zeros((1, 1, 1), np.float32),
    ):
        with pytest.raises(InputError, match="A sound is finite float32"):
            read_audio(wrong)


@pytest.mark.parametrize("options", [{"sample_rate": 10}, {"channels": "left"}, {"stop": 0.0}])
def test_options_out_of_range_are_refused(options: dict) -> None:
    with pytest.raises(InputError, match="Sound is read with"):
        read_audio(tone(1), **options)


def test_what_is_no_sound_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Sound is written from float32"):
        VideoWriter(tmp_path / "a.mp4", audio=np.zeros(3))
