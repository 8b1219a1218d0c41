"""Miles: a small reinforcement-learning loop for language models that plugins fill in."""

from importlib.metadata import version

__version__ = version("miles-core")

from .hookspecs import hookimpl  # noqa: E402
from .plugins import Plugin  # noqa: E402

__all__ = ["Plugin", "__version__", "hookimpl"]
