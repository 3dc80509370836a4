"""Mixtures: training sets of several sources, each with its own share of an epoch and frame rate.

A source is an entry of --data_csv or --data_dirs. S is their number, n that of all samples.
"""

import numpy as np

from data.manifest import NO_SPAN, Samples
from data.samplers import SampleGroups
from util.dist import UserError, print0


def join_sources(sources: list[Samples]) -> Samples:
    """Return the samples of all sources in order, with their sources unless there is only one."""
    if len(sources) == 1:
        return sources[0]
    sizes = [len(source.paths) for source in sources]
    spans = None
    if any(source.spans is not None for source in sources):
        whole_files = [np.tile(NO_SPAN, (size, 1)) for size in sizes]
        spans = np.concatenate(
            [
                whole if source.spans is None else source.spans
                for source, whole in zip(sources, whole_files, strict=True)
            ]
        )
    return Samples(
        [path for source in sources for path in source.paths],
        [label for source in sources for label in source.labels],
        spans,
        np.repeat(np.arange(len(sources)), sizes),
    )


def check_mixture(num_sources: int, weights: list[float], rates: list[int], origin: str) -> None:
    """Raise UserError unless there is one weight, if any, and one sampling rate per source.

    weights: --data_weights, may be empty. rates: --sampling_rate; one holds for all sources.
    origin: the flag or the manifest that has the sources, for messages.
    """
    for flag, values in (("--data_weights", weights), ("--sampling_rate", rates)):
        has_one_for_all = flag == "--sampling_rate" and len(values) == 1
        if values and not has_one_for_all and len(values) != num_sources:
            raise UserError(
                f"{flag} {' '.join(f'{value:g}' for value in values)}: {len(values)} values, but "
                f"the number of sources in {origin} is {num_sources}. Give one for each, in order."
            )
    if weights and num_sources == 1:
        raise UserError(
            f"--data_weights {weights[0]:g} has no effect, because {origin} has one source of "
            "videos. Drop it, or give more."
        )


def source_groups(sources: np.ndarray | None, weights: list[float]) -> SampleGroups | None:
    """Return the sources as groups of a sampler, or None if they have no weights.

    sources: (n,) index of each sample's source, None for one source.
    """
    if sources is None or not weights:
        return None
    return SampleGroups(sources, np.array(weights))


def print_mixture(
    sources: np.ndarray | None,
    groups: SampleGroups | None,
    samples_per_epoch: int,
    rates: list[int],
) -> None:
    """Print a line about each source: its samples, its share, how often each sample is used.

    sources: (n,) index of each sample's source; None for one source, then nothing is printed.
    groups: None if the samples have equal weights. Raises UserError for a source with less than one
    sample per epoch.
    """
    if sources is None:
        return
    sizes = np.bincount(sources)
    weights = sizes if groups is None else groups.weights
    shares = weights / weights.sum()
    for source, (size, share) in enumerate(zip(sizes.tolist(), shares.tolist(), strict=True)):
        expected = share * samples_per_epoch
        if groups is not None and expected < 1:
            raise UserError(
                f"--data_weights {weights[source]:g} gives source {source + 1} {expected:.2g} of "
                f"the {samples_per_epoch} samples of an epoch: raise it to get at least one"
            )
        rate = rates[min(source, len(rates) - 1)]
        print0(
            f"source {source + 1}: {size} samples, {100 * share:.3g} % of an epoch ({expected:.1f} "
            f"of {samples_per_epoch}), each used {expected / size:.3g} times, sampling rate {rate}"
        )
