"""Datasets: the clips that samples consist of, read from videos and images.

B videos, R clips of a video, C colors (3), T frames, H and W pixels, S = img_size, L tokens. Every
dataset yields clips (R, C, T, H, W) uint8. A sample is a function of (seed, epoch, index, repeat)
alone, so the numbers of workers and ranks do not change it.
"""

import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from data.clips import (
    ClipSampling,
    Span,
    check_spans,
    clip_indices,
    view_starts,
)
from data.decode import warn_if_decord_missing
from data.images import read_image
from data.input_files import ReadError, error_summary
from data.manifest import part_name
from data.open_videos import OpenVideos
from data.video import VideoInfo, VideoReader
from data.video_index import VideoIndex
from data.watchdog import WorkerWatchdog
from data.worker_limits import check_open_files
from util.dist import UserError
from util.seeds import (
    MASK_NOISE_STREAM,
    SUBSTITUTE_STREAM,
    derive_seed,
    fixed_noise,
    fork_rng,
    mask_noise,
)

SUBSTITUTES = 32  # number of other videos to try in place of an unreadable one
DUMMY_IMAGE_SIZE = (256, 256)  # pixels, to find out how many bytes a transformed image has
MAX_REPLACED_SHARE = 0.1  # a file with a larger share of undecodable frames is listed as damaged


class ReadClips(NamedTuple):
    """The clips that were read from a file for a sample."""

    clips: Tensor | VideoInfo  # (R, C, T, H, W) uint8; or, to inspect a file, its properties
    frames: int = 0  # number of frames to decode
    replaced: int = 0  # number of these that could not be decoded and repeat a neighbor


class PackedPaths:
    """The path of each sample, in flat arrays; the path of several samples is kept once.

    Worker processes share the arrays' memory. They would slowly copy a list of str, because reading
    a str changes its reference count.

    files: (n,) int64 index of each sample's file, in the order of their first samples.
    """

    def __init__(self, paths: list[str]):
        index_of: dict[str, int] = {}
        self.files = np.array([index_of.setdefault(path, len(index_of)) for path in paths], int)
        encoded = [os.fsencode(path) for path in index_of]
        lengths = [len(path) for path in encoded]
        self.ends = np.cumsum([0, *lengths])
        self.bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> str:
        file = self.files[index]
        encoded = self.bytes[self.ends[file] : self.ends[file + 1]]
        return encoded.tobytes().decode("utf-8", "surrogateescape")


class SampleDataset(Dataset):
    """Base of all datasets: `dataset[(epoch, index)]` reads a sample with that epoch's draws.

    A subclass defines `read_clips`. A `FaultTolerantLoader` sets `watchdog`, and `quarantine`: the
    files {path: reason} that must not be opened.

    Args:
        paths: The file of each sample. Samples may share a file.
        labels: Class index of each sample, or None.
        seed: Seed of all draws.
        substitutes: Number of other samples to try in place of an unreadable one.
        known: The video index, of one row per file in the order of their first samples, or None.
        spans: The part (start, end) of its file that each sample consists of, in seconds (n, 2);
            None for whole files. See data/clips.py.

    Attributes:
        epochs_differ: Whether each epoch has draws of its own. Otherwise those of epoch 0 are used,
            and the substitute of an unreadable file is the same in all epochs.

    Raises UserError for spans that `check_spans` refuses.
    """

    def __init__(
        self,
        paths: list[str],
        labels: list[int] | None,
        seed: int,
        substitutes: int,
        known: VideoIndex | None = None,
        spans: list[Span] | np.ndarray | None = None,
    ):
        self.paths = PackedPaths(paths)
        self.spans = None
        if spans is not None:
            self.spans = check_spans(spans, len(paths))
        self.labels = None
        if labels is not None:
            self.labels = np.array(labels)
        self.seed = seed
        self.substitutes = substitutes
        self.known = known
        self.epochs_differ = True
        self.watchdog = WorkerWatchdog(0, 0)
        self.quarantine: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.paths)

    def read_clips(
        self, key: tuple[int, int], path: str, span: Span | None, info: VideoInfo | None
    ) -> ReadClips:
        """Read the clips (R, C, T, H, W) uint8 of a file with the draws of sample `key`.

        span: the part of the file to read, None: all. info: what the video index holds of the file,
        or None. Raises ReadError.
        """
        raise NotImplementedError

    def sample_bytes(self) -> int:
        """Return the size of a sample's tensors, found without reading a file; 0 for none."""
        return 0

    def span_of(self, index: int) -> Span | None:
        """Return the part of its file that a sample consists of, None if all are whole files."""
        if self.spans is None:
            return None
        start, end = self.spans[index].tolist()
        return start, end

    def name_of(self, index: int) -> str:
        """Return the name of a sample, see `part_name`."""
        return part_name(self.paths[index], self.span_of(index))

    def _unreadable_reason(self, index: int, path: str) -> str | None:
        """Return why the file of sample `index` must not be read, or None."""
        reason = self.quarantine.get(path)
        if not reason and self.known is not None:
            reason = self.known.reason(self.paths.files[index], path)
        return reason

    def _read(self, key: tuple[int, int], candidate: int) -> ReadClips:
        """Read the clips of sample `candidate` with the draws of sample `key`.

        Raises ReadError, also for any error that a library raises: one bad file must not end a run.
        Raises UserError if this process can open no more files: then the file is not bad.
        """
        path = self.paths[candidate]
        reason = self._unreadable_reason(candidate, path)
        if reason:
            raise ReadError(reason)
        span = self.span_of(candidate)
        try:
            with self.watchdog.watch(candidate):
                info = None
                if self.known is not None:
                    info = self.known.info(self.paths.files[candidate], path)
                read = self.read_clips(key, path, span, info)
            if read.replaced:  # frames in files of their own may be intact
                check_open_files()
            return read
        except UserError:
            raise
        except Exception as error:
            check_open_files()
            if isinstance(error, (ReadError, ImportError)):  # a missing package is not its fault
                raise
            raise ReadError(f"{type(error).__name__}: {error_summary(error)}") from error

    def _candidates(self, epoch: int, index: int) -> list[int]:
        """Return the index of the sample itself and those of its substitutes, in order."""
        draws = np.random.default_rng(derive_seed(self.seed, epoch, index, 0, SUBSTITUTE_STREAM))
        pool = self.substitutes_of(index)
        chosen = draws.integers(len(pool), size=self.substitutes).tolist()
        return [index, *(int(pool[i]) for i in chosen)]

    def substitutes_of(self, index: int) -> Sequence[int] | np.ndarray:
        """Return the samples from which the substitutes of one are drawn: all."""
        return range(len(self))

    def __getitem__(self, key: tuple[int, int]) -> dict:
        """Read sample (epoch, index).

        An unreadable file is replaced by another one, chosen by (seed, epoch, index). The keys of a
        sample:

        clips: (R, C, T, H, W) uint8, None if all substitutes are unreadable too.
        label: Class index, -1 if there is none.
        index: The index asked for.
        path: The file that was read.
        bad: [(name, reason)] of the unreadable samples, see `part_name`.
        replaced: Number of undecodable frames, each of which repeats a neighbor.
        damaged: [(path, reason)] of the file that was read, if these frames are many.
        """
        epoch, index = key
        if not self.epochs_differ:
            epoch = 0
        sample: dict = {
            "clips": None,
            "label": -1,
            "index": index,
            "path": "",
            "bad": [],
            "replaced": 0,
            "damaged": [],
        }
        for candidate in self._candidates(epoch, index):
            path = self.paths[candidate]
            try:
                read = self._read((epoch, index), candidate)
            except ReadError as error:
                sample["bad"].append((self.name_of(candidate), str(error)))
                continue
            sample["clips"] = read.clips
            sample["path"] = path
            sample["replaced"] = read.replaced
            if read.replaced > MAX_REPLACED_SHARE * read.frames:
                reason = f"{read.replaced} of {read.frames} frames cannot be decoded"
                sample["damaged"].append((path, reason))
            if self.labels is not None:
                sample["label"] = int(self.labels[candidate])
            break
        return sample


class ClipDataset(SampleDataset):
    """Training clips of videos: repeat_aug clips from repeat_windows time windows of a video.

    Each window is decoded once and cropped repeat_aug / repeat_windows times.

    Args:
        paths, labels, seed, known, spans: See `SampleDataset`.
        sampling: T and the spacing of the frames.
        sources: Index of each sample's source (n,), None if they have one. Substitutes come from
            the same source.
        sampling_rates: The sampling rate of each source, in place of that in `sampling`; None if
            they have the same.
        repeat_aug: R, clips of a video.
        repeat_windows: Time windows of a video; divides repeat_aug.
        transform: Crops uint8 (T, C, H, W), drawing from torch's global generator.
        decoder: See `open_video`.
        short_side: Short side of the decoded frames in pixels.
        noise_tokens: L of the mask noise, 0 for none.
        frames_fps: See `open_video`.
    """

    def __init__(
        self,
        *,
        paths: list[str],
        labels: list[int] | None,
        sampling: ClipSampling,
        repeat_aug: int,
        repeat_windows: int,
        transform: Callable[[Tensor], Tensor],
        decoder: str,
        short_side: int,
        seed: int,
        noise_tokens: int,
        known: VideoIndex | None = None,
        spans: list[Span] | np.ndarray | None = None,
        sources: np.ndarray | None = None,
        sampling_rates: list[int] | None = None,
        frames_fps: float | None = None,
    ):
        """Raise UserError if repeat_windows does not divide repeat_aug."""
        super().__init__(paths, labels, seed, SUBSTITUTES, known, spans)
        warn_if_decord_missing(decoder)
        if repeat_aug % repeat_windows != 0:
            raise UserError(
                f"--repeat_aug {repeat_aug} is not divisible by --repeat_windows {repeat_windows}: "
                "change one of them"
            )
        self.sampling = sampling
        self.sources = sources
        self.sampling_rates = sampling_rates
        self.members: list[np.ndarray] = []  # samples of each source
        if sources is not None:
            ends = np.bincount(sources).cumsum()
            self.members = np.split(np.argsort(sources, kind="stable"), ends[:-1])
        self.repeat_aug = repeat_aug
        self.repeat_windows = repeat_windows
        self.transform = transform
        self.noise_tokens = noise_tokens
        self.videos = OpenVideos(decoder, short_side, frames_fps)

    def read_clips(
        self, key: tuple[int, int], path: str, span: Span | None, info: VideoInfo | None
    ) -> ReadClips:
        """Read the clips (R, C, T, S, S) uint8 of a video with the draws of sample `key`.

        Raises ReadError, also if the video ends before the span starts.
        """
        seeds = [derive_seed(self.seed, *key, repeat) for repeat in range(self.repeat_aug)]
        clips_per_window = self.repeat_aug // self.repeat_windows
        with self.videos.open(path, info, keep=span is not None) as video:
            windows = self._read_windows(
                video, self.sampling_of(key[1]), span, seeds[::clips_per_window]
            )
            replaced = video.replaced
        # Whole files are closed before the first crop: decord's threads would decode on beside it.
        for repeat, seed in enumerate(seeds):
            window = windows[repeat // clips_per_window]
            with fork_rng(seed):
                draw_start(self.sampling)  # was drawn for the window
                clip = self.transform(window)  # (T, C, S, S)
            clip = clip.permute(0, 2, 3, 1)  # (T, S, S, C)
            if repeat == 0:
                clips = clip.new_empty(self.repeat_aug, *clip.shape)  # (R, T, S, S, C)
            clips[repeat] = clip  # copied at once, so that the next crop can reuse its memory
        frames = len(windows) * self.sampling.num_frames
        return ReadClips(clips.permute(0, 4, 1, 2, 3), frames, replaced)

    def sample_bytes(self) -> int:
        """Return the size of a sample's clips and noise."""
        with fork_rng(0):
            clip = self.transform(self.videos.dummy_frames(self.sampling.num_frames))
        noise_bytes = 4 * self.noise_tokens
        return self.repeat_aug * (clip.nbytes + noise_bytes)

    def _read_windows(
        self, video: VideoReader, sampling: ClipSampling, span: Span | None, seeds: list[int]
    ) -> list[Tensor]:
        """Read a window (T, C, H, W) uint8, channels last, for each seed. Raises ReadError."""
        windows = []
        for seed in seeds:
            with fork_rng(seed):
                start = draw_start(sampling)
            indices = clip_indices(video, sampling, start, span)
            windows.append(video.read_tensor(indices))
        return windows

    def sampling_of(self, index: int) -> ClipSampling:
        """Return the sampling of a sample's source."""
        if self.sources is None or self.sampling_rates is None:
            return self.sampling
        rate = self.sampling_rates[self.sources[index]]
        return self.sampling._replace(sampling_rate=rate)

    def substitutes_of(self, index: int) -> Sequence[int] | np.ndarray:
        """Return the samples from which the substitutes of one are drawn: those of its source."""
        if self.sources is None:
            return super().substitutes_of(index)
        return self.members[self.sources[index]]

    def noise(self, epoch: int, index: int) -> Tensor:
        """Return the mask noise (R, L) float32 of a sample."""
        seeds = [
            derive_seed(self.seed, epoch, index, repeat, MASK_NOISE_STREAM)
            for repeat in range(self.repeat_aug)
        ]
        return mask_noise(seeds, self.noise_tokens)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        """Read sample (epoch, index), see `SampleDataset`; in pretraining with its noise (R, L)."""
        sample = super().__getitem__(key)
        if self.noise_tokens > 0:
            sample["noise"] = self.noise(*key)
        return sample


def draw_start(sampling: ClipSampling) -> float | np.ndarray:
    """Draw the start of a training clip, see `clip_indices`, from torch's global generator."""
    if sampling.method == "uniform":
        return torch.rand(sampling.num_frames).double().numpy()
    return torch.rand(()).item()


class ViewDataset(SampleDataset):
    """Evaluation views of videos: num_views clips, evenly spread in time, times the crops of each.

    R = num_views * crops. The frames of all clips are decoded in one pass.

    Args:
        paths, labels, substitutes, known, spans: See `SampleDataset`.
        sampling: T and the spacing of the frames.
        num_views: Clips of a video, or of the sample's part of it.
        transform: Crops uint8 (T, C, H, W) to (crops, T, C, S, S).
        decoder: See `open_video`.
        short_side: Short side of the decoded frames in pixels.
        noise_tokens: L of the mask noise, 0 for none. Samples with noise have one view.
        frames_fps: See `open_video`.
    """

    def __init__(
        self,
        *,
        paths: list[str],
        labels: list[int],
        sampling: ClipSampling,
        num_views: int,
        transform: Callable[[Tensor], Tensor],
        decoder: str,
        short_side: int,
        noise_tokens: int = 0,
        substitutes: int = 0,
        known: VideoIndex | None = None,
        spans: list[Span] | np.ndarray | None = None,
        frames_fps: float | None = None,
    ):
        super().__init__(paths, labels, seed=0, substitutes=substitutes, known=known, spans=spans)
        self.epochs_differ = False
        warn_if_decord_missing(decoder)
        self.sampling = sampling
        self.num_views = num_views
        self.transform = transform
        self.noise_tokens = noise_tokens
        self.videos = OpenVideos(decoder, short_side, frames_fps)

    def read_clips(
        self, key: tuple[int, int], path: str, span: Span | None, info: VideoInfo | None
    ) -> ReadClips:
        """Read the views (R, C, T, S, S) uint8 of a video, clips in order of time.

        Raises ReadError, also if the video ends before the span starts.
        """
        with self.videos.open(path, info, keep=span is not None) as video:
            starts = view_starts(video, self.sampling, self.num_views, span)
            clips = [clip_indices(video, self.sampling, start, span) for start in starts]
            indices = np.stack(clips)  # (num_views, T)
            distinct, inverse = np.unique(indices, return_inverse=True)
            frames = video.read_tensor(distinct)
            replaced = video.replaced
        positions = torch.from_numpy(inverse.reshape(indices.shape))  # in `frames`
        views = [self.transform(frames[clip]) for clip in positions]
        return ReadClips(torch.cat(views).transpose(1, 2), len(distinct), replaced)

    def sample_bytes(self) -> int:
        """Return the size of a sample's views."""
        views = self.transform(self.videos.dummy_frames(self.sampling.num_frames))
        return self.num_views * views.nbytes

    def __getitem__(self, key: tuple[int, int]) -> dict:
        """Read sample (0, index), see `SampleDataset`; if asked for with its `fixed_noise` (1, L).

        The noise is made here, on the host: making it from an index on the device would wait.
        """
        sample = super().__getitem__(key)
        if self.noise_tokens > 0:
            _, index = key
            sample["noise"] = fixed_noise([index], self.noise_tokens)
        return sample


class ImageDataset(SampleDataset):
    """Images as clips of one frame (1, C, 1, S, S).

    transform: a PIL image -> uint8 (C, S, S), drawing from torch's global generator. epochs_differ:
    False for crops that are the same in each epoch. The other arguments: see `SampleDataset`.
    """

    def __init__(
        self,
        *,
        paths: list[str],
        labels: list[int],
        transform: Callable,
        seed: int,
        substitutes: int,
        epochs_differ: bool = True,
    ):
        super().__init__(paths, labels, seed, substitutes)
        self.epochs_differ = epochs_differ
        self.transform = transform

    def read_clips(
        self, key: tuple[int, int], path: str, span: Span | None, info: VideoInfo | None
    ) -> ReadClips:
        """Read the image as (1, C, 1, S, S) uint8. Raises ReadError."""
        with fork_rng(derive_seed(self.seed, *key)):
            image = self.transform(read_image(path))
        return ReadClips(image[None, :, None])

    def sample_bytes(self) -> int:
        """Return the size of a sample's image."""
        with fork_rng(0):
            return self.transform(Image.new("RGB", DUMMY_IMAGE_SIZE)).nbytes
