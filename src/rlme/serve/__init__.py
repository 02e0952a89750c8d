"""The reward server: prompts and completions in over HTTP, rewards with every judgement out."""
