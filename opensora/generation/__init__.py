"""The command that makes samples: from prompts and a config to files."""

LATENTS_ENDING = ".latents.safetensors"  # of latents kept beside a sample
