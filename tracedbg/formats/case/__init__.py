"""Case files: text, in and out."""
