"""Checkpoints to and from the folders that Hugging Face's transformers reads: config.json, safetensors, a tokenizer."""
