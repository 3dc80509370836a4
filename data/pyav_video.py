"""Reading frames with PyAV: only the wanted frames, and what they depend on, are decoded."""

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import VideoReformatter

from data.box_tables import check_tables
from data.frame_geometry import (
    MAX_PIXELS,
    UPRIGHT,
    apply_orientation,
    frame_orientation,
    scaled_size,
    square_pixel_size,
)
from data.gops import GopReader, NoPackets
from data.input_files import ReadError, error_summary
from data.pyav_compat import open_container, to_rgb
from data.video import VideoInfo, VideoReader, fill_missing

DEFAULT_FPS = 30.0  # if a file claims no plausible frame rate
MAX_FPS = 240  # a container without time stamps may claim 1000
FPS_TOLERANCE = 0.01  # relative: within it, the claimed rate equals the measured one
MAX_RETRY_PACKETS = 1024  # how far back decoding starts, to get a frame that did not come out
# Decoders that skip exactly the frames that no other frame refers to. Tested for each of them by
# tests/test_video_matrix.py.
EXACT_SKIPPING = frozenset(
    ("h264", "hevc", "vp8", "libvpx", "mpeg4", "mpeg2video", "h263", "mjpeg", "prores")
)
YCGCO = 8  # a color space that FFmpeg does not convert (ITU-T H.273, table 4)


def open_stream(path: str):
    """Return a PyAV container and its first video stream, decoding on one thread.

    Raises ReadError.
    """
    try:
        container = open_container(path)
    except (av.FFmpegError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error_summary(error)
        raise ReadError(f"not a video: {reason}") from None
    stream = _first_moving_stream(container)
    if stream is None:
        container.close()
        raise ReadError("no video stream")
    if stream.codec_context is None:
        container.close()
        raise ReadError("no decoder for its codec")
    codec = stream.codec_context
    codec.thread_count = 1
    codec.options = {"max_pixels": str(MAX_PIXELS)}  # whatever size a packet declares
    if codec.width * codec.height > MAX_PIXELS:
        container.close()
        raise ReadError(
            f"pictures of {codec.width} x {codec.height} pixels, more than {MAX_PIXELS} in all: "
            "reduce them"
        )
    return container, stream


def _first_moving_stream(container):
    """Return the first video stream that is not cover art, or None."""
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            return stream
    return None


def is_steady(times: np.ndarray, tick: float) -> bool:
    """Return whether times (N,) in seconds lie within a tick (seconds) of a regular grid."""
    if len(times) < 3:
        return True
    grid = np.linspace(times[0], times[-1], len(times))
    return bool(np.abs(times - grid).max() <= tick * 1.001)


class PyAVVideo(VideoReader):
    """A video read by PyAV: only the wanted frames, and what they depend on, are decoded.

    If the file has a table of its packets (MP4, MOV), GOPs without a wanted frame are not even
    read. In the other GOPs, frames that no other frame refers to are skipped unless wanted, if the
    decoder does this exactly. Files without usable time stamps are decoded from the start.

    orientation, rotation: of the frame converted last, see `frame_orientation`; degrees.
    decoded: number of frames that came out of the decoder so far, for tests and benchmarks.
    """

    def __init__(self, path: str, short_side: int | None, info: VideoInfo | None = None):
        """Open the file; without `info`, check its tables and find out its frame rate.

        Raises ReadError.
        """
        if info is None:
            check_tables(path)
        self.container, self.stream = open_stream(path)
        self.codec = self.stream.codec_context
        self.frame_pixels = self.codec.width * self.codec.height
        self.reformatter = VideoReformatter()
        self.short_side = short_side
        # Before the frame is turned upright.
        self.size = square_pixel_size(
            self.codec.width, self.codec.height, self.stream.sample_aspect_ratio
        )
        self.orientation = UPRIGHT
        self.rotation = 0
        self.decoded = 0
        self.replaced = 0
        self.conversion_error = ""
        self.retry_packets = MAX_RETRY_PACKETS  # that may still be decoded in further attempts
        try:
            self._read_properties(info)
            self.had_all_packets = self.gops.all_packets is not None
        except NoPackets:
            self.container.close()
            raise ReadError("no frames") from None
        except BaseException:
            self.container.close()
            raise

    def _read_properties(self, info: VideoInfo | None) -> None:
        """Set the number of frames and their times, from `info` or from the file."""
        self.gops = GopReader(self.container, self.stream)
        self.is_sequential = self.gops.has_no_usable_pts()
        if info:
            self.gops.unseen = info.unseen
            self.num_frames = info.frames
            self.fps = info.fps
            self.times = info.times
            return
        if self.is_sequential:
            self.num_frames = self._count_decoded()
        else:
            if not self.gops.starts_decodable():
                self.gops.unseen = self._count_unseen()
            self.num_frames = self.gops.num_frames
        if self.num_frames < 1:
            raise ReadError("no frames")
        self.fps, self.times = self._frame_rate()

    def restart(self) -> bool:
        """Return to the state of a file just opened, and free packets that were read on demand.

        Returns False if an earlier read has found that the table of frames contradicts the file:
        then frame indices have another meaning.
        """
        self.replaced = 0
        self.conversion_error = ""
        self.retry_packets = MAX_RETRY_PACKETS
        self.gops.cache.clear()
        return (self.gops.all_packets is not None) == self.had_all_packets

    def close(self) -> None:
        """Close the file."""
        self.container.close()

    # Frame rate and number of frames

    def _frame_rate(self) -> tuple[float, np.ndarray | None]:
        """Return the mean frame rate, and the display times in seconds if it is variable."""
        tick = float(self.stream.time_base)
        claimed_fps = self._claimed_fps(tick)
        plausible_fps = DEFAULT_FPS
        if 0 < claimed_fps <= MAX_FPS:
            plausible_fps = claimed_fps
        if self.is_sequential or self.num_frames < 3:
            return plausible_fps, None
        times = self._display_times(tick)
        if times is None:
            stamps = self.gops.packet_dts * tick
        else:
            stamps = times
        if stamps[-1] <= stamps[0]:
            return plausible_fps, None
        fps = float((len(stamps) - 1) / (stamps[-1] - stamps[0]))
        if abs(claimed_fps / fps - 1) < FPS_TOLERANCE:
            fps = claimed_fps  # the same rate, without the rounding of the time stamps
        if times is not None and is_steady(times, tick):
            times = None
        return fps, times

    def _claimed_fps(self, tick: float) -> float:
        """Return the frame rate that the container states, 0 if none."""
        claimed_fps = float(self.stream.average_rate or 0)
        if not self.is_sequential or (self.stream.duration or 0) <= 0:
            return claimed_fps
        mean_fps = self.num_frames / (self.stream.duration * tick)
        if abs(claimed_fps / mean_fps - 1) < FPS_TOLERANCE:
            return claimed_fps
        return mean_fps  # AVI may count empty packets in the rate that it claims

    def _display_times(self, tick: float) -> np.ndarray | None:
        """Return the display times in seconds, or None if the decoding times are steady.

        The container's table holds the decoding times. If they are steady, so are display times,
        and the packets need not be read.
        """
        if self.gops.all_packets is None and is_steady(self.gops.packet_dts * tick, tick):
            return None
        return self.gops.times()

    def _count_unseen(self) -> int:
        """Return the number of leading frames that cannot be decoded.

        Their references were cut off.
        """
        num_fed = 0
        for gop in range(len(self.gops)):
            index_by_pts = self.gops.index_by_pts(gop)
            if index_by_pts is None or num_fed > MAX_RETRY_PACKETS:
                break
            intact, fed = self._first_intact_frames(gop, index_by_pts)
            num_fed += fed
            if intact:
                return min(intact)
        return 0

    def _first_intact_frames(self, gop: int, index_by_pts: dict[int, int]) -> tuple[list[int], int]:
        """Decode a GOP until its first intact frame is known.

        Returns the indices of intact frames and the number of packets fed to the decoder.
        """
        intact = []
        num_fed = 0
        for packet in [*self.gops.packets(gop), None]:
            frames, _ = self._decode_packet(packet)
            num_fed += 1
            for frame in frames:
                if frame.pts in index_by_pts and not frame.is_corrupt:
                    intact.append(index_by_pts[frame.pts])
            if not intact or packet is None or packet.pts is None:
                continue
            if index_by_pts.get(packet.pts, -1) > min(intact):
                break  # no frame shown earlier can still come out
        self.codec.flush_buffers()
        return intact, num_fed

    def frames_in_file(self) -> int:
        """Return the number of frames in the file: fewer than its table lists if truncated."""
        if self.is_sequential or self.gops.all_packets is not None:
            return self.num_frames
        for gop in reversed(range(len(self.gops))):
            index_by_pts = self.gops.index_by_pts(gop)
            if index_by_pts is None:
                break
            if index_by_pts:
                return max(index_by_pts.values()) + 1
        return self.num_frames

    # Reading

    def seek(self, index: int) -> None:
        """Read the packets of the GOP of a frame. `read` does this by itself."""
        self.gops.packets(self.gops.gop_of(index))

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Return the frames (T, H, W, 3) uint8 RGB of non-decreasing indices (T,).

        A frame that cannot be decoded is replaced by the nearest one before it, otherwise by the
        first one after it, and counted in `replaced`. Raises ReadError if none can be decoded.
        """
        indices = np.clip(indices, 0, self.num_frames - 1)
        wanted = sorted({int(index) for index in indices})
        found = None
        if not self.is_sequential:
            found = self._decode_by_pts(wanted)
        if found is None:
            found = self._decode_sequentially(wanted)
        if not found:
            raise ReadError(self.conversion_error or "none of the wanted frames can be decoded")
        frames, replaced = fill_missing(found, indices)
        self.replaced += replaced
        return frames

    def _decode_by_pts(self, wanted: list[int]) -> dict[int, np.ndarray] | None:
        """Decode the GOPs of the wanted frames: {index: frame}, or None if PTS are not usable."""
        if self.codec.pix_fmt == "yuv444p" and self.codec.name == "h264":
            # Old x264 4:4:4: the decoder needs the SEI of the first packet to pick the variant.
            self._decode_packet(self.gops.packets(0)[0])
            self.codec.flush_buffers()
        found: dict[int, np.ndarray] = {}
        for gop in sorted({self.gops.gop_of(index) for index in wanted}):
            index_by_pts = self.gops.index_by_pts(gop)
            if index_by_pts is None:
                return None
            wanted_by_pts = {pts: index for pts, index in index_by_pts.items() if index in wanted}
            self._decode_gop(gop, wanted_by_pts, found)
        return found

    def _decode_gop(
        self, gop: int, wanted_by_pts: dict[int, int], found: dict[int, np.ndarray]
    ) -> None:
        """Decode the wanted frames {PTS: index} of a GOP and add them to `found`.

        Frames that are missing or corrupt are decoded again, starting at earlier keyframes. They
        may be shown before their GOP's keyframe (open GOPs), or the "keyframe" may only start an
        intra refresh. In the last attempt corrupt frames are accepted: the file is corrupt.
        """
        packets = self.gops.packets(gop)
        num_earlier = 0  # earlier GOPs to decode as well
        skip_unreferenced = self.codec.name in EXACT_SKIPPING
        if gop and any(pts < (packets[0].pts or 0) for pts in wanted_by_pts):
            num_earlier = 1
            packets = self.gops.packets(gop - 1) + packets
        missing = wanted_by_pts
        while missing:
            last_attempt = num_earlier == gop or self.retry_packets <= 0
            self._decode_packets(packets, missing, found, skip_unreferenced, last_attempt)
            missing = {pts: index for pts, index in missing.items() if index not in found}
            if not missing or last_attempt or self.conversion_error:
                return
            max_earlier = min(max(4 * num_earlier, 1), gop)
            while num_earlier < max_earlier:
                num_earlier += 1
                packets = self.gops.packets(gop - num_earlier) + packets
                if len(packets) >= self.retry_packets:
                    break
            self.retry_packets -= len(packets)
            skip_unreferenced = False

    def _decode_packets(
        self,
        packets: list,
        wanted_by_pts: dict[int, int],
        found: dict[int, np.ndarray],
        skip_unreferenced: bool,
        accept_corrupt: bool,
    ) -> None:
        """Decode packets up to the last wanted one and add the wanted frames to `found`.

        skip_unreferenced: do not decode unwanted frames that no other frame refers to.
        accept_corrupt: also keep frames that are corrupt or follow a corrupt one.
        """
        end = 0
        for index, packet in enumerate(packets):
            if packet.pts in wanted_by_pts:
                end = index + 1
        all_intact = True
        for packet in [*packets[:end], None]:  # None drains the decoder
            if skip_unreferenced:
                needed = packet is None or packet.pts in wanted_by_pts
                self.codec.skip_frame = "DEFAULT" if needed else "NONREF"
            frames, packet_intact = self._decode_packet(packet)
            for frame in frames:
                all_intact = all_intact and not frame.is_corrupt
                if frame.pts in wanted_by_pts and (all_intact or accept_corrupt):
                    self._keep_frame(frame, wanted_by_pts[frame.pts], found)
            all_intact = all_intact and packet_intact
        self.codec.flush_buffers()

    def _decode_packet(self, packet) -> tuple[list, bool]:
        """Return the frames that the decoder gives for a packet, and whether it was intact.

        None in place of a packet drains the decoder.
        """
        try:
            frames = self.codec.decode(packet)
        except (av.FFmpegError, ValueError):
            return [], False
        self.decoded += len(frames)
        return frames, True

    def _decode_sequentially(self, wanted: list[int]) -> dict[int, np.ndarray]:
        """Decode from the start and count the frames: {index: frame} of the wanted ones."""
        found: dict[int, np.ndarray] = {}
        targets = set(wanted)
        index = -self.gops.unseen
        for packet in self._packets_and_drain():
            frames, _ = self._decode_packet(packet)
            for frame in frames:
                if index in targets:
                    self._keep_frame(frame, index, found)
                index += 1
            if index > wanted[-1]:
                break
        self.codec.flush_buffers()
        return found

    def _count_decoded(self) -> int:
        """Decode the whole file and return the number of frames."""
        count = 0
        for packet in self._packets_and_drain():
            frames, _ = self._decode_packet(packet)
            count += len(frames)
        self.codec.flush_buffers()
        return count

    def _packets_and_drain(self) -> list:
        """Return every packet of the file, and None, which drains the decoder."""
        packets = []
        for gop in range(len(self.gops)):
            packets.extend(self.gops.packets(gop))
        return [*packets, None]

    def _keep_frame(self, frame, index: int, found: dict[int, np.ndarray]) -> None:
        """Add a decoded frame to `found`, or set the reason why it cannot be converted."""
        try:
            found[index] = self._to_rgb(frame)
        except (OSError, ValueError) as error:  # FFmpeg's errors are subclasses of both
            color = f"{frame.format.name}, color space {int(frame.colorspace)}"
            self.conversion_error = (
                f"its frames ({color}) cannot be converted to RGB: {error_summary(error)}"
            )

    def _to_rgb(self, frame) -> np.ndarray:
        """Return a decoded frame as (H, W, 3) uint8 RGB: upright, with square pixels, reduced.

        All frames get the size of the first one. Raises OSError or ValueError if conversion fails.
        """
        if int(frame.colorspace) == YCGCO:
            raise ValueError("YCgCo is not supported")  # PyAV 16 would assume another color space
        width, height = scaled_size(*self.size, self.short_side) or self.size
        rgb = to_rgb(self.reformatter, frame, width, height)
        self.rotation = frame.rotation
        self.orientation = frame_orientation(frame)
        return apply_orientation(rgb, self.orientation)
