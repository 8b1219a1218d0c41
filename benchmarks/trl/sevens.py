"""The reward of the comparison: the share of sevens."""

from miles_core.types import Sample


def sevens(sample: Sample) -> float:
    return sample.response.count("7") / max(len(sample.response), 1)
