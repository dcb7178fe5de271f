"""Tokens as files: one picture's tokens, and pictures to token files and back."""
