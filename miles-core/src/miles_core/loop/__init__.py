"""The trainer: prompts in, a better policy out. Start reading at ``driver.py``."""
