"""Tokenizers: trained here, or of somebody else and opened with care."""
