"""Write what the run files here need into ``data/`` beside this file: a tiny Qwen3, its tokenizer, and the prompts.

``miles_core.testing.reverse`` says what the task is. Nothing is downloaded, and nothing written that is there already.
"""

from pathlib import Path

from miles_core.testing.reverse import write

write(Path(__file__).parent / "data")
