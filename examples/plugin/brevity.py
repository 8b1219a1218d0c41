"""A plugin in one file: a reward against every character that an answer does not need.

Name it in a run with ``plugins = ["./brevity.py"]``. Its name is the file's, so its table is ``[brevity]``.
"""

from miles_core import Plugin, hookimpl
from miles_core.types import Complain, Group
from pydantic import Field


class Brevity(Plugin):
    class Config(Plugin.Config):
        weight: float = Field(0.1, gt=0)  # of each character beyond ``limit``
        limit: int = Field(4, ge=0)  # characters that cost nothing

    config: Config

    @hookimpl
    def miles_check(self, complain: Complain) -> None:
        if self.config.limit >= self.run.rollout.max_tokens:
            complain("brevity.limit", f"no response has more than rollout.max_tokens = {self.run.rollout.max_tokens}")

    @hookimpl
    async def miles_reward(self, group: Group, evaluating: bool) -> dict[str, list[float]]:
        extra = [max(0, len(sample.response) - self.config.limit) for sample in group.samples]
        return {"brevity": [-self.config.weight * n for n in extra]}
